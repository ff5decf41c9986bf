"""Batch normalisation as a bijection."""

import torch
from torch import Tensor, nn

from surflow.checks import InputError, require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.numeric import at_least_float32
from surflow.transforms.base import Bijection, Example, require_size
from surflow.transforms.bijections.linear import per_position


class BatchNorm(Bijection):
    r"""Normalise every channel by the statistics of the batch, or by running ones.

    .. math:: z = e^{\gamma}\,\frac{x - m}{\sqrt{v + \epsilon}} + \beta, \qquad
              \mathrm{ldj} = N \sum_c \gamma_c - \tfrac12 \log(v_c + \epsilon)

    with N the number of positions of a channel. In evaluation mode m and v are the running mean
    and variance, which are buffers, and the layer is exact.

    In training mode ``forward`` takes m and v from its batch (v biased) and moves the running
    ones towards them (v unbiased). The rows then depend on each other, and ldj is that of the map
    with m and v held fixed, as the authors have it: not exact. (Dinh et al. mix the statistics
    of recent batches into those of the batch; Papamakarios et al. do not, nor does this layer.)
    ``inverse`` and ``inverse_and_ldj`` use the running statistics in both modes.

    Under distributed data parallel each process normalises by its own part of the batch, and the
    running statistics are those of the first process, whose buffers are broadcast.

    Args:
        num_channels: C, the size of dimension 1 of x.
        momentum: the weight of a batch in the running statistics, in (0, 1].
        eps: added to the variance.
        affine: whether γ and β, (C,) each, are learned; otherwise both are 0.

    Raises:
        ValueError: for another number of channels; in training, for a batch of a single value a
            channel, which has no variance; for sizes out of range.

    Cost: forward and inverse O(1) an element; in training one more pass for the statistics.
    Source: Dinh et al. 2017, arXiv 1605.08803, App. E; Papamakarios et al. 2017, arXiv 1705.07057.

    >>> layer = BatchNorm(2).eval()  # running mean 0 and variance 1 until it has trained
    >>> layer(torch.ones(1, 2))[0].round(decimals=4).tolist()
    [[1.0, 1.0]]
    """

    reversible = True

    def __init__(
        self, num_channels: int, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True
    ) -> None:
        super().__init__()
        require_at_least("BatchNorm", 1, num_channels=num_channels)
        if not 0 < momentum <= 1 or not eps > 0:
            raise ValueError(
                f"BatchNorm: expected 0 < momentum <= 1 and eps > 0, got {momentum} and {eps}"
            )
        self.num_channels, self.momentum, self.eps = num_channels, momentum, eps
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))
        self.log_gamma = nn.Parameter(torch.zeros(num_channels)) if affine else None
        self.beta = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def _batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of the batch, (C,) each; the running ones take their share."""
        values = at_least_float32(x).movedim(1, 0).flatten(1)
        count = values.shape[1]
        if count < 2:
            raise InputError(
                f"expected at least 2 values a channel in training, got shape {tuple(x.shape)}"
            )
        var, mean = torch.var_mean(values, dim=1, correction=0)
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
                running.lerp_(new.to(running.dtype), self.momentum)
        return mean, var

    repeatable = property(lambda self: not self.training)

    def _scale_and_shift(self, mean: Tensor, var: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """The mean, log-scale and shift of z = (x - mean) exp(log_scale) + shift, shaped as x."""
        log_scale = -0.5 * torch.log(at_least_float32(var) + self.eps)
        shift = torch.zeros_like(log_scale)
        if self.log_gamma is not None:
            log_scale = log_scale + self.log_gamma
            shift = shift + self.beta
        shape = (1, -1, *[1] * (x.dim() - 2))
        return tuple(t.view(shape) for t in (at_least_float32(mean), log_scale, shift))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        require_size(x, self.num_channels)
        running = self.running_mean, self.running_var
        mean, var = self._batch_statistics(x) if self.training else running
        mean, log_scale, shift = self._scale_and_shift(mean, var, x)
        z = (x - mean) * torch.exp(log_scale) + shift
        return z.to(x.dtype), per_position(log_scale.sum(), x)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        require_size(z, self.num_channels)
        mean, log_scale, shift = self._scale_and_shift(self.running_mean, self.running_var, z)
        x = (z - shift) * torch.exp(-log_scale) + mean
        return x.to(z.dtype), per_position(log_scale.sum(), z)

    @classmethod
    def example(cls) -> Example:
        transform = cls(2)
        with torch.no_grad():
            transform.running_mean.copy_(torch.tensor([0.4, -0.3]))
            transform.running_var.copy_(torch.tensor([1.3, 0.7]))
            transform.log_gamma.copy_(torch.tensor([0.2, -0.1]))
            transform.beta.copy_(torch.tensor([-0.2, 0.5]))
        return Example(transform.eval(), DiagonalNormal((2, 2), scale=1.8), StandardNormal((2, 2)))
