"""Activation normalisation."""

import torch
from torch import Tensor, nn

from surflow.checks import InputError, require_at_least
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import sum_event
from surflow.transforms.base import Bijection, Example


class ActNorm(Bijection):
    r"""A shift and scale per channel, set from the first batch so that z is standardised.

    .. math:: z = (x - t)\, e^{-s}, \qquad \mathrm{ldj} = -n \sum_c s_c

    with n the number of positions of a channel. The first forward in training mode sets t to the
    batch mean and s to the log of its standard deviation; before it, and in evaluation mode,
    the layer is what its parameters say (the identity).

    Args:
        num_channels: C, the size of the channels' dimension of x.
        dim: that dimension, 1 or more.

    Raises:
        ValueError: for another number of channels, or dim < 1; for an initialising batch of a
            single value a channel, which has no standard deviation.

    Cost: O(D) a row, and one pass over the first batch; forward and inverse alike.
    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.1.

    >>> layer = ActNorm(num_channels=3)
    >>> z, ldj = layer(5 + 2 * torch.randn(1000, 3))
    >>> bool((z.mean(0).abs() < 1e-4).all()), bool(((z.std(0) - 1).abs() < 1e-4).all())
    (True, True)
    """

    reversible = True

    def __init__(self, num_channels: int, dim: int = 1) -> None:
        super().__init__()
        require_at_least("ActNorm", 1, dim=dim, num_channels=num_channels)
        self.num_channels, self.dim = num_channels, dim
        self.shift = nn.Parameter(torch.zeros(num_channels))
        self.log_scale = nn.Parameter(torch.zeros(num_channels))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self._initialised = False  # a copy on the host: asking the buffer would make a GPU wait

    repeatable = property(lambda self: self._initialised or not self.training)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._initialised = bool(self.initialised)

    @torch.compiler.disable
    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set shift and scale so that this batch has mean 0 and deviation 1 in every channel."""
        values = x.detach().movedim(self.dim, 0).flatten(1).to(self.shift.dtype)
        if values.shape[1] < 2:
            raise ValueError(
                "ActNorm.forward: expected at least 2 values a channel to initialise from, "
                f"got shape {tuple(x.shape)}"
            )
        self.shift.copy_(values.mean(1))
        self.log_scale.copy_(values.std(1).clamp_min(1e-6).log())
        self.initialised.fill_(True)
        self._initialised = True

    def _per_channel(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.dim() <= self.dim or x.shape[self.dim] != self.num_channels:
            along = "" if self.dim == 1 else f" along dimension {self.dim}"
            raise InputError(
                f"expected {self.num_channels} channels{along}, got shape {tuple(x.shape)}"
            )
        shape = (-1, *[1] * (x.dim() - self.dim - 1))
        return self.shift.view(shape), self.log_scale.view(shape)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        shift, log_scale = self._per_channel(x)
        if self.training and not self._initialised:
            self.initialise(x)
        return (x - shift) * torch.exp(-log_scale), -sum_event(log_scale.expand(x.shape))

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        shift, log_scale = self._per_channel(z)
        return z * torch.exp(log_scale) + shift

    @classmethod
    def example(cls) -> Example:
        wide = DiagonalNormal((3, 2), scale=2.0)
        transform = cls(3)
        transform.initialise(0.7 * wide.sample(64) + 0.3)
        return Example(transform, wide, StandardNormal((3, 2)))
