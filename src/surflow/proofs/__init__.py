"""What a transform must prove: checks of the contract as plain functions of one example.

Each check runs a :class:`~surflow.transforms.Example` and returns a :class:`Proof`: what was
measured, whether it holds, and a sentence. A transform that raises fails the check with what it
raised. The checks expect an example built in float64; :func:`example_of` builds it so.

>>> from surflow.transforms import Tanh
>>> with double_precision():
...     all(proof.ok for proof in prove(Tanh.example(), n=20_000))
True
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from surflow.proofs.contract import batch_of_one, contexts, dtypes, flags, row_independence
from surflow.proofs.graph import compiles, gradients
from surflow.proofs.likelihood import agreement, generation, jacobian, round_trip, unit_mass
from surflow.proofs.proof import Proof, double_precision, example_of, turned
from surflow.transforms.base import Example

_OF_NUMBERS = (round_trip, jacobian, unit_mass, generation, gradients)
_OF_RULES = (batch_of_one, row_independence, dtypes, contexts, agreement, flags)
CHECKS: dict[str, Callable[..., Proof]] = {c.__name__: c for c in _OF_NUMBERS + _OF_RULES}

__all__ = ["CHECKS", "Proof", "compiles", "double_precision", "example_of", "prove", "turned"]
__all__ += CHECKS


def prove(
    example: Example, n: int = 200_000, seed: int = 0, backend: str | None = None
) -> list[Proof]:
    """Every check on one example, in float64.

    Args:
        example: an instance with its inputs and base, built in float64; see :func:`example_of`.
        n: draws of :func:`unit_mass`.
        seed: of every check.
        backend: of ``torch.compile``, such as "aot_eager" or "inductor": :func:`compiles` comes
            last; None leaves it out.
    """
    with double_precision():
        for part in (example.transform, example.base):
            if isinstance(part, nn.Module):
                part.to(torch.float64)
        proofs = [
            check(example, n, seed=seed) if name == "unit_mass" else check(example, seed=seed)
            for name, check in CHECKS.items()
        ]
        if backend is not None:
            proofs.append(compiles(example, backend=backend, seed=seed))
        return proofs
