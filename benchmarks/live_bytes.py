"""The bytes of the tensors that live."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that live, on any device: new ones, while it is entered.

    Attributes:
        peak: the most bytes alive at once.

    Cost: some microseconds an operation; for measurements.

    >>> with LiveBytes() as live:
    ...     a = torch.zeros(1000)
    ...     b = a + 1
    ...     del a
    ...     c = b + 1
    >>> live.peak, live.now()
    (8000, 8000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._total = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}

    def now(self) -> int:
        """The bytes alive now."""
        for key in [k for k, (ref, _) in self._known.items() if ref.expired()]:
            self._total -= self._known.pop(key)[1]
        return self._total

    def forget(self) -> None:
        """Leave out what there is by now."""
        self._known.clear()
        self._total = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage()._cdata
            for t in tree_leaves((args, kwargs))
            if isinstance(t, Tensor) and not t.is_sparse
        }
        out = func(*args, **(kwargs or {}))
        self.now()
        for t in tree_leaves(out):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key = storage._cdata
            if key not in given and key not in self._known:
                self._known[key] = (StorageWeakRef(storage), storage.nbytes())
                self._total += storage.nbytes()
        self.peak = max(self.peak, self._total)
        return out
