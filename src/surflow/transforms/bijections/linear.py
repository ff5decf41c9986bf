"""Learned linear bijections along dimension 1: dense, PLU, QR, orthogonal.

A vector (B, D) is multiplied as a whole, an image (B, D, H, W) at every pixel.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_at_least, require_one_of
from surflow.distributions import DiagonalNormal, Uniform
from surflow.numeric import at_least_float32, working_dtype
from surflow.transforms.base import Bijection, Example, Transform, require_size, zero_ldj

INITS = ("orthogonal", "identity")


def initial_matrix(size: int, init: str, where: str) -> Tensor:
    """A matrix (size, size) to start from: a random orthogonal one, or the identity."""
    if size < 1:
        raise ValueError(f"{where}: expected a positive size, got {size}")
    require_one_of(where, INITS, init=init)
    matrix = torch.eye(size)
    return nn.init.orthogonal_(matrix) if init == "orthogonal" else matrix


def along_channels(x: Tensor, like: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``function``, which multiplies columns by a matrix, along dimension 1 of x.

    In float32 or better even under autocast: half precision has no accurate inverse. Where x has
    positions, the matrix is multiplied out first: one product a position costs less than a product
    or a solve by each factor.

    Args:
        x: (B, D, ...).
        like: the parameter whose dtype counts.
        function: (D, N) -> (D, N).
    """
    dtype = torch.promote_types(x.dtype, like.dtype)
    with torch.autocast(x.device.type, enabled=False):
        columns = x.to(working_dtype(x, like))
        if x.dim() == 2:
            out = function(columns.T).T
        else:
            matrix = function(torch.eye(x.shape[1], dtype=columns.dtype, device=x.device))
            out = (matrix @ columns.flatten(2)).reshape(x.shape)
    return out.to(dtype)


def per_position(log_abs_det: Tensor, x: Tensor) -> Tensor:
    """The contribution of one matrix at every position of x (B, D, ...): (B,)."""
    zero = zero_ldj(x)
    return zero + (math.prod(x.shape[2:]) * log_abs_det).to(zero.dtype)


def identity_like(parameter: Tensor, size: int) -> Tensor:
    """The identity on a parameter's device, float32 or better."""
    return torch.eye(size, dtype=working_dtype(parameter), device=parameter.device)


def dense_inverse(weight: Tensor) -> Tensor:
    """W^-1, in float64, at little extra cost."""
    inverse = torch.linalg.inv_ex(weight.double())[0]  # unlike inv, it makes no GPU wait
    return inverse.to(working_dtype(weight))


def dense_log_abs_det(weight: Tensor) -> Tensor:
    """log |det W|, in float64: an image multiplies its error by the number of pixels."""
    return torch.linalg.slogdet(weight.double())[1]


class _LinearBijection(Bijection):
    """z = W x along dimension 1: a subclass multiplies, solves, and knows log |det W|."""

    reversible = True

    def __init__(self, features: int) -> None:
        super().__init__()
        require_at_least(type(self).__name__, 1, features=features)
        self.features = features

    @property
    def _like(self) -> Tensor:
        """A parameter, for its dtype."""
        return next(self.parameters())

    def _multiply(self, columns: Tensor) -> Tensor:
        """(D, N) -> W times it."""
        raise NotImplementedError

    def _solve(self, columns: Tensor) -> Tensor:
        """(D, N) -> W^-1 times it."""
        raise NotImplementedError

    def _log_abs_det(self) -> Tensor:
        """A scalar, in float32 or better."""
        raise NotImplementedError

    def weight_matrix(self) -> Tensor:
        """W, (D, D)."""
        return self._multiply(identity_like(self._like, self.features))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        require_size(x, self.features)
        z = along_channels(x, self._like, self._multiply)
        return z, per_position(self._log_abs_det(), x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        require_size(z, self.features)
        return along_channels(z, self._like, self._solve)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, context), per_position(self._log_abs_det(), z)


class FullLinear(_LinearBijection):
    r"""Multiplication by a dense matrix.

    .. math:: z_n = W x_n, \qquad \mathrm{ldj} = N \log |\det W|

    with n over the N positions after dimension 1 (one for a vector). Exact. The determinant and
    the inverse are taken in float64.

    Args:
        features: D, the size of dimension 1 of x; ``weight`` is (D, D).
        init: start at a random "orthogonal" matrix or at the "identity".

    Raises:
        ValueError: for another size along dimension 1, D < 1, or an unknown init.

    Cost: O(D²) a position and O(D³) once a call, forward and inverse.
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.2.

    >>> FullLinear(3, init="identity")(torch.ones(1, 3))[0].tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self, features: int, init: str = "orthogonal") -> None:
        super().__init__(features)
        self.weight = nn.Parameter(initial_matrix(features, init, "FullLinear"))

    def _multiply(self, columns: Tensor) -> Tensor:
        return self.weight.to(columns.dtype) @ columns

    def _solve(self, columns: Tensor) -> Tensor:
        return dense_inverse(self.weight).to(columns.dtype) @ columns

    def _log_abs_det(self) -> Tensor:
        return dense_log_abs_det(self.weight)

    @classmethod
    def example(cls) -> Example:
        return _example(_perturbed(cls(3)), (3, 2))


class PLULinear(_LinearBijection):
    r"""Multiplication by a matrix that is kept as its PLU factors.

    .. math:: z_n = P L (U + \mathrm{diag}(s))\, x_n, \qquad
              \mathrm{ldj} = N \sum_d \log |s_d|

    P is a fixed permutation, L lower triangular with a unit diagonal, U strictly upper triangular;
    the signs of s are fixed. N, arguments and errors: see :class:`FullLinear`.

    Cost: O(D²) a position, by products or by triangular solves; for images O(D³) once a call.
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.2.

    >>> PLULinear(3, init="identity")(torch.ones(1, 3))[0].tolist()
    [[1.0, 1.0, 1.0]]
    """

    def __init__(self, features: int, init: str = "orthogonal") -> None:
        super().__init__(features)
        matrix = initial_matrix(features, init, "PLULinear")
        permutation, lower, upper = torch.linalg.lu(matrix)
        scale = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(scale.abs().log())
        self.register_buffer("sign", scale.sign())
        self.register_buffer("permutation", permutation.argmax(1))  # row i of P y is y[this]
        self.register_buffer("inverse_permutation", permutation.argmax(0), persistent=False)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.inverse_permutation = torch.argsort(self.permutation)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """L with its unit diagonal, and U with s on its diagonal."""
        scale = self.sign.to(dtype) * torch.exp(self.log_scale.to(dtype))
        one = torch.eye(self.features, dtype=dtype, device=scale.device)
        return self.lower.to(dtype).tril(-1) + one, self.upper.to(dtype).triu(1) + torch.diag(scale)

    def _multiply(self, columns: Tensor) -> Tensor:
        lower, upper = self._factors(columns.dtype)
        return (lower @ (upper @ columns)).index_select(0, self.permutation)

    def _solve(self, columns: Tensor) -> Tensor:
        lower, upper = self._factors(columns.dtype)
        columns = columns.index_select(0, self.inverse_permutation)
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, columns, upper=True)

    def _log_abs_det(self) -> Tensor:
        return at_least_float32(self.log_scale).sum()

    @classmethod
    def example(cls) -> Example:
        return _example(_perturbed(cls(4)), (4,))


class HouseholderLinear(_LinearBijection):
    r"""Multiplication by an orthogonal matrix, a product of Householder reflections.

    .. math:: z_n = Q x_n, \quad
              Q = \prod_{k=1}^{K} \Big(I - 2\,\frac{v_k v_k^\top}{v_k^\top v_k}\Big)
                = I - V T^{-1} V^\top, \qquad \mathrm{ldj} = 0

    with the normalised v_k as the columns of V, and T upper triangular: 1/2 on its diagonal,
    :math:`v_j^\top v_k` above it. The second form needs no loop over the reflections. Exact.

    Args:
        features: D, the size of dimension 1 of x.
        num_reflections: K; None for D, which reaches every orthogonal matrix of determinant
            (-1)^D.

    Raises:
        ValueError: for another size along dimension 1, D < 1 or K < 1.

    Cost: O(D K) a vector or O(D²) a pixel, and O(D K²) once a call, forward and inverse.
    Source: Tomczak & Welling 2016, arXiv 1611.09630, the Householder transformation.

    >>> layer = HouseholderLinear(3)
    >>> z, ldj = layer(torch.ones(2, 3))
    >>> z.square().sum(1).round(decimals=4).tolist(), ldj.tolist()
    ([3.0, 3.0], [0.0, 0.0])
    """

    def __init__(self, features: int, num_reflections: int | None = None) -> None:
        super().__init__(features)
        count = features if num_reflections is None else num_reflections
        require_at_least(type(self).__name__, 1, num_reflections=count)
        self.vectors = nn.Parameter(torch.randn(count, features))

    def _reflect(self, columns: Tensor, transpose: bool) -> Tensor:
        """Q, or its transpose, times the columns."""
        v = F.normalize(self.vectors.to(columns.dtype), dim=1)
        half = torch.full(v.shape[:1], 0.5, dtype=v.dtype, device=v.device)
        t = (v @ v.T).triu(1) + torch.diag(half)
        inner = v @ columns
        inner = torch.linalg.solve_triangular(t.T if transpose else t, inner, upper=not transpose)
        return columns - v.T @ inner

    def _multiply(self, columns: Tensor) -> Tensor:
        return self._reflect(columns, transpose=False)

    def _solve(self, columns: Tensor) -> Tensor:
        return self._reflect(columns, transpose=True)

    def _log_abs_det(self) -> Tensor:
        return at_least_float32(self.vectors).new_zeros(())

    @classmethod
    def example(cls) -> Example:
        base = DiagonalNormal((3,), loc=[0.5, -0.3, 0.2], scale=[0.4, 0.5, 0.6])
        return Example(cls(3), Uniform((3,), -3.0, 3.0), base)


class QRLinear(HouseholderLinear):
    r"""Multiplication by an orthogonal times an upper triangular matrix.

    .. math:: z_n = Q\,(R + \mathrm{diag}(s))\, x_n, \qquad \mathrm{ldj} = N \sum_d \log s_d

    N is as in :class:`FullLinear`; Q, arguments and errors are those of
    :class:`HouseholderLinear`. R is strictly upper triangular, s > 0; it starts at W = Q.

    Cost: O(D² + D K) a vector or O(D²) a pixel, and O(D K² + D³) once a call, both ways.
    Source: Hoogeboom et al. 2019, arXiv 1901.11137, the QR parametrisation.

    >>> QRLinear(3)(torch.ones(2, 3))[1].tolist()
    [0.0, 0.0]
    """

    def __init__(self, features: int, num_reflections: int | None = None) -> None:
        super().__init__(features, num_reflections)
        self.upper = nn.Parameter(torch.zeros(features, features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def _upper(self, dtype: torch.dtype) -> Tensor:
        return self.upper.to(dtype).triu(1) + torch.diag(torch.exp(self.log_scale.to(dtype)))

    def _multiply(self, columns: Tensor) -> Tensor:
        return self._reflect(self._upper(columns.dtype) @ columns, transpose=False)

    def _solve(self, columns: Tensor) -> Tensor:
        columns = self._reflect(columns, transpose=True)
        return torch.linalg.solve_triangular(self._upper(columns.dtype), columns, upper=True)

    def _log_abs_det(self) -> Tensor:
        return at_least_float32(self.log_scale).sum()

    @classmethod
    def example(cls) -> Example:
        return _example(_perturbed(cls(3)), (3, 2), loc=0.4)


def _perturbed(transform: Transform, std: float = 0.15) -> Transform:
    """The same layer, its parameters moved by noise from where they start."""
    with torch.no_grad():
        for parameter in transform.parameters():
            parameter.add_(std * torch.randn_like(parameter))
    return transform


def _example(transform: Transform, shape: tuple[int, ...], loc: float = 0.0) -> Example:
    """Wide normal inputs, a normal base of scale 1; off the origin, it sees a rotation."""
    return Example(transform, DiagonalNormal(shape, scale=1.4), DiagonalNormal(shape, loc=loc))
