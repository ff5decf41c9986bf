"""The convolutions of Glow: standardised by the first batch, and zero at the start."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require_positive_sizes
from surflow.nets.sizes import averaged_to
from surflow.numeric import at_least_float32

LOG_SCALE_FACTOR = 3.0


class StandardisedConv2d(nn.Conv2d):
    r"""A convolution whose outputs the first batch standardises: (B, in, H, W) -> (B, out, H, W).

    .. math:: y_o = (W_o * x - t_o)\, e^{-s_o}

    The first forward in training mode sets t to the batch mean of W * x and s to the log of its
    standard deviation, channel by channel; before it t = s = 0. Shift and scale go into the
    filters, so that they cost nothing an element. Odd kernels, zero padding.

    Args:
        kernel_size: odd.

    Raises:
        ValueError: for an initialising batch of a single value a channel.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039 (activation normalisation after the hidden
    convolutions; filters from N(0, 0.05²)).

    >>> conv = StandardisedConv2d(2, 3, 3)
    >>> y = conv(5 + torch.randn(64, 2, 8, 8))
    >>> std, mean = torch.std_mean(y, (0, 2, 3))
    >>> bool((mean.abs() < 1e-4).all()), bool(((std - 1).abs() < 1e-3).all())
    (True, True)
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False
        )
        nn.init.normal_(self.weight, std=0.05)
        self.shift = nn.Parameter(torch.zeros(out_channels))
        self.log_scale = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("initialised", torch.zeros((), dtype=torch.bool))
        self._initialised = False  # a copy on the host: asking the buffer would make a GPU wait

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._initialised = bool(self.initialised)

    @torch.compiler.disable
    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set shift and scale so that the outputs of this batch are standardised."""
        with torch.autocast(x.device.type, enabled=False):
            out = F.conv2d(x.to(self.weight.dtype), self.weight, padding=self.padding)
        values = out.movedim(1, 0).flatten(1)
        if values.shape[1] < 2:
            raise ValueError(
                "StandardisedConv2d: expected at least 2 values a channel to initialise from, "
                f"got shape {tuple(out.shape)}"
            )
        self.shift.copy_(values.mean(1))
        self.log_scale.copy_(values.std(1).clamp_min(1e-6).log())
        self.initialised.fill_(True)
        self._initialised = True

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._initialised:
            self.initialise(x)
        scale = torch.exp(-self.log_scale)
        return F.conv2d(
            x, self.weight * scale.view(-1, 1, 1, 1), -self.shift * scale, padding=self.padding
        )


class ZeroConv2d(nn.Conv2d):
    r"""A convolution that starts at zero: (B, in, H, W) -> (B, out, H, W).

    .. math:: y_o = (W_o * x + b_o)\, e^{3 l_o}, \qquad W = b = l = 0 \text{ at the start}

    The output is float32 or better whatever the precision of the convolution.

    Args:
        kernel_size: odd; zero padding keeps height and width.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.3; the factor of the authors' code.

    >>> bool((ZeroConv2d(2, 4)(torch.ones(1, 2, 3, 3)) == 0).all())
    True
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.log_gain = nn.Parameter(torch.zeros(out_channels))
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        out = at_least_float32(super().forward(x))
        return out * torch.exp(LOG_SCALE_FACTOR * self.log_gain).view(-1, 1, 1)


class GlowNet(nn.Module):
    """3×3, 1×1 and 3×3 convolutions with rectifiers between: (B, in, H, W) -> (B, out, H, W).

    The first two are :class:`StandardisedConv2d` (or plain, with a bias), the last is a
    :class:`ZeroConv2d`.

    Args:
        hidden_channels: of the two hidden layers.
        standardise: whether the first batch standardises the hidden layers.
        context_features: F of an image that the first convolution sees too, after x: (B, F, H, W),
            or k times as high and wide, which is averaged over blocks of k × k pixels. 0: none.

    Raises:
        ValueError: for sizes that are not positive, or a context of another size.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, Sec. 3.3.

    >>> tuple(GlowNet(6, 12, hidden_channels=16)(torch.randn(2, 6, 4, 4)).shape)
    (2, 12, 4, 4)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        hidden_channels: int = 512,
        standardise: bool = True,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.context_features = context_features
        in_channels += context_features
        require_positive_sizes(
            "GlowNet",
            in_channels=in_channels,
            out_channels=out_channels,
            hidden_channels=hidden_channels,
        )
        if standardise:
            self.first = StandardisedConv2d(in_channels, hidden_channels, 3)
            self.second = StandardisedConv2d(hidden_channels, hidden_channels, 1)
        else:
            self.first = nn.Conv2d(in_channels, hidden_channels, 3, padding=1)
            self.second = nn.Conv2d(hidden_channels, hidden_channels, 1)
        self.last = ZeroConv2d(hidden_channels, out_channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if self.context_features:
            context_here = averaged_to(context, *x.shape[2:])
            if context_here is None:
                raise ValueError(
                    f"GlowNet: expected a context of a multiple of {x.shape[2]} x {x.shape[3]} "
                    f"pixels, got shape {tuple(context.shape)}"
                )
            x = torch.cat([x, context_here.to(x.dtype)], dim=1)
        return self.last(F.relu(self.second(F.relu(self.first(x)))))
