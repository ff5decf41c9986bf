"""Invertible convolutions of images: 1×1, and periodic."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import InputError, require_at_least, require_one_of, require_positive_sizes
from surflow.numeric import working_dtype
from surflow.transforms.base import Bijection, Example, zero_ldj
from surflow.transforms.bijections.linear import (
    HouseholderLinear,
    PLULinear,
    QRLinear,
    _example,
    _perturbed,
    dense_inverse,
    dense_log_abs_det,
    identity_like,
    initial_matrix,
    per_position,
)

FACTORISED = {"plu": PLULinear, "qr": QRLinear, "orthogonal": HouseholderLinear}


class Conv1x1(Bijection):
    r"""An invertible 1×1 convolution: one matrix multiplies the channels of every pixel.

    .. math:: z_{hw} = W x_{hw}, \qquad \mathrm{ldj} = H\,W\,\log |\det W|

    Exact. It starts at a random orthogonal W.

    Args:
        channels: C; x is (B, C, H, W).
        parametrisation: "full", W itself, the parameter ``weight`` (C, C), whose determinant and
            inverse are taken in float64; or the factors ``linear`` of "plu"
            (:class:`PLULinear`), "qr" (:class:`QRLinear`) or "orthogonal"
            (:class:`HouseholderLinear`, ldj = 0).

    Raises:
        ValueError: for an unknown parametrisation, C < 1, or x of another shape.

    Cost: O(C²) a pixel and O(C³) once a call, forward and inverse.
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.2; "qr" Hoogeboom et al. 2019.

    >>> Conv1x1(3, "plu")(torch.zeros(2, 3, 4, 4))[0].shape
    torch.Size([2, 3, 4, 4])
    """

    reversible = True
    channels_last = False  # the result's memory format, even where x has another

    def __init__(self, channels: int, parametrisation: str = "full") -> None:
        super().__init__()
        require_one_of("Conv1x1", ["full", *FACTORISED], parametrisation=parametrisation)
        require_at_least("Conv1x1", 1, channels=channels)
        self.parametrisation = parametrisation
        self.event_shape = (channels, None, None)
        self.linear = None
        if parametrisation == "full":
            self.weight = nn.Parameter(initial_matrix(channels, "orthogonal", "Conv1x1"))
        else:
            self.linear = FACTORISED[parametrisation](channels)

    def weight_matrix(self) -> Tensor:
        """W, (C, C)."""
        return self.weight if self.linear is None else self.linear.weight_matrix()

    def _inverse_matrix(self) -> Tensor:
        if self.linear is None:
            return dense_inverse(self.weight)
        return self.linear._solve(identity_like(self._like, self.event_shape[0]))

    @property
    def _like(self) -> Tensor:
        """A parameter, for its dtype."""
        return self.weight if self.linear is None else self.linear._like

    def _log_abs_det(self, x: Tensor) -> Tensor:
        dense = self.linear is None
        log_det = dense_log_abs_det(self.weight) if dense else self.linear._log_abs_det()
        return per_position(log_det, x)

    def _at_every_pixel(self, x: Tensor, matrix: Callable[[], Tensor]) -> Tensor:
        """The matrix times the channels, in float32 or better even under autocast, in the memory
        format of x."""
        dtype = torch.promote_types(x.dtype, self._like.dtype)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(working_dtype(x, self._like))
            factor = matrix().to(x.dtype)
            if self.channels_last or x.stride(1) == 1:
                out = (x.permute(0, 2, 3, 1) @ factor.T).permute(0, 3, 1, 2)
            else:
                out = (factor @ x.flatten(2)).reshape(x.shape)
        return out.to(dtype)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._at_every_pixel(x, self.weight_matrix), self._log_abs_det(x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._at_every_pixel(z, self._inverse_matrix)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, context), self._log_abs_det(z)

    @classmethod
    def example(cls) -> Example:
        return _example(_perturbed(cls(2)), (2, 2, 2))


class PeriodicConv2d(Bijection):
    r"""A convolution of an image that wraps round at its edges, inverted by FFT.

    .. math:: \hat z(f) = \hat K(f)\, \hat x(f), \qquad
              \mathrm{ldj} = \sum_f \log |\det \hat K(f)|

    with :math:`\hat x(f) \in \mathbb C^C` the discrete Fourier transform of x at frequency f, one
    of H W, and :math:`\hat K(f)` the C × C response of the kernel. Exact, and parallel both ways.
    In the image, z is the cross-correlation of x, padded circularly, with ``weight``; both
    directions go through the FFT, so that they undo each other.

    Args:
        channels: C; x is (B, C, H, W).
        kernel_size: k; ``weight`` is (C, C, k, k) and its middle lies at (k // 2, k // 2).

    Raises:
        ValueError: for sizes that are not positive; for x of another shape, or an image smaller
            than the kernel.

    Cost: forward and inverse each O(C² + C log HW) a pixel, and O(C³ HW) once a call.
    Source: Hoogeboom et al. 2019, arXiv 1901.11137, periodic convolutions.

    >>> PeriodicConv2d(3, kernel_size=3).inverse(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 3, 8, 8])
    """

    reversible = True

    def __init__(self, channels: int, kernel_size: int = 3) -> None:
        super().__init__()
        require_positive_sizes("PeriodicConv2d", channels=channels, kernel_size=kernel_size)
        self.kernel_size = kernel_size
        self.event_shape = (channels, None, None)
        # an orthogonal matrix in the middle, and around it noise whose response stays well below
        # one at every frequency, so that the whole is well conditioned
        noise = 0.1 / (kernel_size * math.sqrt(channels))
        weight = noise * torch.randn(channels, channels, kernel_size, kernel_size)
        middle = kernel_size // 2
        weight[:, :, middle, middle] = initial_matrix(channels, "orthogonal", "PeriodicConv2d")
        self.weight = nn.Parameter(weight)

    def _response(self, x: Tensor) -> Tensor:
        """The kernel at the frequencies of a real transform of x, (H, W // 2 + 1, C, C)."""
        height, width = x.shape[2:]
        size = self.kernel_size
        if min(height, width) < size:
            raise InputError(
                f"expected an image of at least {size} x {size}, the size "
                f"of the kernel, got shape {tuple(x.shape)}"
            )
        # the tap at (u, v) reads x at an offset of (u, v) - middle, and is the value of the
        # convolution's kernel at minus that offset
        weight = self.weight.to(working_dtype(x, self.weight))
        kernel = F.pad(weight.flip(-2, -1), (0, width - size, 0, height - size))
        shift = -(size - 1 - size // 2)
        kernel = kernel.roll((shift, shift), dims=(-2, -1))
        return torch.fft.rfft2(kernel).permute(2, 3, 0, 1)

    def _log_abs_det(self, response: Tensor, x: Tensor) -> Tensor:
        """The sum over all frequencies: all but the real transform's edges stand for two."""
        log_det = torch.linalg.slogdet(response)[1]
        total = 2 * log_det.sum() - log_det[:, 0].sum()
        if x.shape[3] % 2 == 0:
            total = total - log_det[:, -1].sum()
        zero = zero_ldj(x)
        return zero + total.to(zero.dtype)

    def _filter(self, x: Tensor, response: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x.to(working_dtype(x, self.weight))).permute(2, 3, 1, 0)
        out = torch.fft.irfft2((response @ spectrum).permute(3, 2, 0, 1), s=x.shape[2:])
        return out.to(torch.promote_types(x.dtype, self.weight.dtype))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            response = self._response(x)
            return self._filter(x, response), self._log_abs_det(response, x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return self._filter(z, torch.linalg.inv_ex(self._response(z))[0])

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        with torch.autocast(z.device.type, enabled=False):
            response = self._response(z)
            x = self._filter(z, torch.linalg.inv_ex(response)[0])
            return x, self._log_abs_det(response, z)

    @classmethod
    def example(cls) -> Example:
        return _example(_perturbed(cls(2, kernel_size=2), 0.05), (2, 2, 3))
