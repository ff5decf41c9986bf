"""Permutations, reversal and rotations: volume-preserving linear bijections."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surflow.checks import require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal, Uniform
from surflow.distributions.base import register_value
from surflow.numeric import working_dtype
from surflow.transforms.base import Bijection, Example, require_dim, require_size, zero_ldj


class Permute(Bijection):
    r"""A fixed permutation along one dimension.

    .. math:: z_i = x_{\pi(i)}, \qquad \mathrm{ldj} = 0

    Args:
        permutation: the indices :math:`\pi`, each of 0 ... D - 1 once.
        dim: the dimension it acts on; 1 is the first after the batch.

    Raises:
        ValueError: if the indices are no permutation, or x has another size along ``dim``.

    Cost: O(D) a row; forward and inverse alike.
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.2 (as what it generalises).

    >>> layer = Permute([2, 0, 1])
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    tensor([[3., 1., 2.]])
    """

    reversible = True

    def __init__(self, permutation: Sequence[int] | Tensor, dim: int = 1) -> None:
        super().__init__()
        index = torch.as_tensor(permutation, dtype=torch.long)
        if index.dim() != 1 or sorted(index.tolist()) != list(range(len(index))):
            raise ValueError(
                f"{type(self).__name__}: expected each of 0 to {index.numel() - 1} once, "
                f"got {index.tolist()}"
            )
        require_at_least(type(self).__name__, 1, dim=dim)
        self.dim = dim
        self.register_buffer("permutation", index)
        self.register_buffer("inverse_permutation", torch.argsort(index), persistent=False)

    @classmethod
    def random(cls, size: int, dim: int = 1, seed: int = 0) -> Permute:
        """A permutation drawn from ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        return cls(torch.randperm(size, generator=generator), dim)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.inverse_permutation = torch.argsort(self.permutation)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        require_size(x, len(self.permutation), self.dim)
        return x.index_select(self.dim, self.permutation), zero_ldj(x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        require_size(z, len(self.permutation), self.dim)
        return z.index_select(self.dim, self.inverse_permutation)

    @classmethod
    def example(cls) -> Example:
        normal = StandardNormal((4, 2))
        return Example(cls([2, 0, 3, 1]), normal, normal)


class Reverse(Bijection):
    r"""Reverse the order along one dimension.

    .. math:: z_i = x_{D - 1 - i}, \qquad \mathrm{ldj} = 0

    Args:
        dim: the dimension it acts on; 1 is the first after the batch.

    Raises:
        ValueError: for dim < 1, or an x without that dimension.

    Cost: O(D) a row; forward and inverse alike.
    Source: Papamakarios et al. 2017, arXiv 1705.07057 (between autoregressive layers).

    >>> layer = Reverse()
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    tensor([[3., 2., 1.]])
    """

    reversible = True

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        require_at_least("Reverse", 1, dim=dim)
        self.dim = dim

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(x, context), zero_ldj(x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        require_dim(z, self.dim)
        return z.flip(self.dim)

    @classmethod
    def example(cls) -> Example:
        normal = StandardNormal((3,))
        return Example(cls(), normal, normal)


class Rotation(Bijection):
    r"""A rotation, learned or fixed: the exponential of a skew-symmetric matrix.

    .. math:: z = R x, \quad R = \exp(A - A^\top), \qquad \mathrm{ldj} = \log\det R = 0

    Args:
        features: D, at least 2; x is (B, D).
        angle: for D = 2, the initial angle in radians, counter-clockwise.
        learn: whether A is a parameter.
        seed: for D > 2, draws the initial A; None starts at the identity.

    Raises:
        ValueError: for D < 2, or an angle with D other than 2.

    Cost: O(D²) a row, and O(D³) a call for the matrix (O(1) where D = 2); forward and inverse
    alike.
    Source: the exponential map onto rotations, as in Lezcano-Casado & Martínez-Rubio 2019, arXiv
    1901.08428, Sec. 3.

    >>> import math
    >>> layer = Rotation(2, angle=math.pi / 2)
    >>> layer(torch.tensor([[1.0, 0.0]]))[0].detach().round(decimals=3).abs()
    tensor([[0., 1.]])
    """

    reversible = True

    def __init__(
        self, features: int, angle: float | None = None, learn: bool = True, seed: int | None = None
    ) -> None:
        super().__init__()
        require_at_least("Rotation", 2, features=features)
        if angle is not None and features != 2:
            raise ValueError(f"Rotation: an angle is for features = 2, got features = {features}")
        self.event_shape = (features,)
        count = features * (features - 1) // 2
        if angle is not None:
            values = torch.tensor([-angle])
        elif seed is None:
            values = torch.zeros(count)
        else:
            values = torch.randn(count, generator=torch.Generator().manual_seed(seed))
        register_value(self, "values", values, learn)
        rows, columns = torch.triu_indices(features, features, 1).unbind()
        basis = torch.zeros(count, features, features)
        basis[torch.arange(count), rows, columns] = 1.0
        basis[torch.arange(count), columns, rows] = -1.0
        self.register_buffer("basis", basis, persistent=False)

    def matrix(self) -> Tensor:
        """R, (D, D), float32 or better: in half precision it would be no rotation."""
        dtype = working_dtype(self.values)
        if self.event_shape == (2,):  # the closed form, many times cheaper than the exponential
            cosine, sine = torch.cos(self.values.to(dtype)), torch.sin(self.values.to(dtype))
            return torch.stack([cosine, sine, -sine, cosine], dim=-1).view(2, 2)
        with torch.autocast(self.values.device.type, enabled=False):
            skew = torch.einsum("k,kij->ij", self.values.to(dtype), self.basis.to(dtype))
            return torch.linalg.matrix_exp(skew)

    def _multiply(self, x: Tensor, matrix: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, matrix.dtype)
        with torch.autocast(x.device.type, enabled=False):
            product = x.to(dtype) @ matrix.to(dtype)
        return product.to(torch.promote_types(x.dtype, self.values.dtype))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._multiply(x, self.matrix().T), zero_ldj(x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._multiply(z, self.matrix())

    @classmethod
    def example(cls) -> Example:
        base = DiagonalNormal((3,), loc=[0.5, -0.3, 0.2], scale=[0.4, 0.5, 0.6])
        return Example(cls(3, seed=1), Uniform((3,), -3.0, 3.0), base)
