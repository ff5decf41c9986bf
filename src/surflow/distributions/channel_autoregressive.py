"""Channels of an image, each normal given those before it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from surflow.distributions.base import Distribution, sum_event
from surflow.distributions.location_scale import HALF_LOG_TWO_PI
from surflow.latents import Tape
from surflow.nets.conv_lstm import ConvLSTM, State
from surflow.nets.sizes import averaged_to
from surflow.numeric import at_least_float32, repeat_rows, working_dtype


class ChannelAutoregressive(Distribution):
    r"""Normals whose means and scales a convolutional LSTM finds channel by channel.

    .. math:: \log p(x \mid c) = \sum_t \sum_{hw} \log \mathcal N(x_{thw};\ \mu_{thw},
              e^{2 \lambda_{thw}}), \qquad (\mu_t, \lambda_t) = f_t(x_{<t}, c)

    Step t of the LSTM sees channel t - 1 (zeros for the first) and an embedding of the context,
    through one linear convolution; a 3×3 convolution, zero at the start, gives μ and
    λ. So the density begins as a standard normal. With an image as the context (what a
    :class:`~surflow.transforms.Slice` keeps, say) two k×k convolutions with a rectifier between
    embed it, once a row. Without, the density is unconditional, and can be the base of a flow.

    Args:
        event_shape: (C, H, W).
        context_channels: of the context, (B, context_channels, H, W), or k times as high and wide,
            which is averaged over blocks of k × k pixels; 0: none.
        hidden_channels: of the LSTM, and of the context's embedding inside.
        num_layers: of the LSTM.
        kernel_size: k, odd, of the convolutions into the LSTM and in it.
        dilation: of those in it.
        embed_channels: what the context is embedded to.
        embed_kernel_size: odd, of the two convolutions of the embedding.

    Raises:
        ValueError: for an event that is no image, sizes that are not positive or even kernels; for
            a context of a wrong shape.

    Cost: ``log_prob`` one pass of the LSTM over C images, whose first layer and inputs run on all
    at once; ``sample`` C steps of all layers, one after the other.
    Source: Mahajan, Bhattacharyya et al. 2020 (mAR-SCF), arXiv 2004.03891, Sec. 4.1 and
    Algorithm 1; sizes and embedding of the authors' code.

    >>> prior = ChannelAutoregressive((4, 8, 8), context_channels=2, hidden_channels=8)
    >>> given = torch.randn(3, 2, 8, 8)
    >>> x, log_p = prior.sample_and_log_prob(context=given)
    >>> x.shape, bool(torch.allclose(log_p, prior.log_prob(x, given), atol=1e-4))
    (torch.Size([3, 4, 8, 8]), True)
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        context_channels: int = 0,
        hidden_channels: int = 32,
        num_layers: int = 3,
        kernel_size: int = 3,
        dilation: int = 1,
        embed_channels: int = 4,
        embed_kernel_size: int = 5,
    ) -> None:
        sizes = (context_channels + 1, embed_channels, embed_kernel_size)
        if min(sizes) < 1 or embed_kernel_size % 2 == 0:
            raise ValueError(
                "ChannelAutoregressive: expected context_channels >= 0, embed_channels >= 1 and an "
                f"odd embed_kernel_size, got {context_channels}, {embed_channels}, "
                f"{embed_kernel_size}"
            )
        embed = None
        if context_channels:
            pad = embed_kernel_size // 2
            embed = nn.Sequential(
                nn.Conv2d(context_channels, hidden_channels, embed_kernel_size, padding=pad),
                nn.ReLU(),
                nn.Conv2d(hidden_channels, embed_channels, embed_kernel_size, padding=pad),
            )
        super().__init__(event_shape, net=embed)
        if len(self.event_shape) != 3:
            raise ValueError(
                f"ChannelAutoregressive: expected an event (C, H, W), got {self.event_shape}"
            )
        self.context_channels = context_channels
        self.lstm = ConvLSTM(hidden_channels, hidden_channels, num_layers, kernel_size, dilation)
        pad = kernel_size // 2
        self.inlet = nn.Conv2d(1, hidden_channels, kernel_size, padding=pad)
        sizes = (embed_channels, hidden_channels, kernel_size)
        self.beside = nn.Conv2d(*sizes, padding=pad, bias=False) if context_channels else None
        self.outlet = nn.Conv2d(hidden_channels, 2, 3, padding=1)
        nn.init.zeros_(self.outlet.weight)
        nn.init.zeros_(self.outlet.bias)

    def _embed(self, context: Tensor | None) -> Tensor | None:
        """What every step sees of the context, (B, hidden, H, W)."""
        if self.net is None:
            return None
        seen = averaged_to(context, *self.event_shape[1:]) if context.dim() == 4 else None
        if seen is None or seen.shape[1] != self.context_channels:
            expected = (self.context_channels, *self.event_shape[1:])
            raise ValueError(
                f"ChannelAutoregressive: expected a context of shape (batch, "
                f"{', '.join(map(str, expected))}) or a multiple of that height and width, "
                f"got {tuple(context.shape)}"
            )
        return self.beside(self.net(seen.to(self.inlet.weight.dtype)))

    def _located(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale from the last layer, (..., hidden, H, W) -> (..., H, W) each."""
        out = at_least_float32(self.outlet(h.flatten(0, -4)).unflatten(0, h.shape[:-3]))
        return out[..., 0, :, :], out[..., 1, :, :]

    def parameters_of(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-scale of every channel given those of x before it: (B, C, H, W) each."""
        return self._parallel(x, self._embed(context))

    def _parallel(self, x: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        given = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        given = given.to(self.inlet.weight.dtype).transpose(0, 1).unsqueeze(2)  # T B 1 H W
        seen = self.inlet(given.flatten(0, 1)).unflatten(0, given.shape[:2])
        if embedded is not None:
            seen = seen + embedded
        loc, log_scale = self._located(self.lstm(seen))
        return loc.transpose(0, 1), log_scale.transpose(0, 1)

    @staticmethod
    def _density(eps: Tensor, log_scale: Tensor) -> Tensor:
        return sum_event(-0.5 * eps.square() - HALF_LOG_TWO_PI - log_scale)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        loc, log_scale = self._parallel(x, self._embed(context))
        return self._density((x - loc) * torch.exp(-log_scale), log_scale)

    def standardised(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(x - μ)/σ of every channel given those before it: standard normal noise, (B, C, H, W)."""
        loc, log_scale = self.parameters_of(x, context)
        return (x - loc) * torch.exp(-log_scale)

    def from_standardised(self, eps: Tensor, context: Tensor | None = None) -> Tensor:
        """The x of this noise: the inverse of :meth:`standardised`, channel by channel."""
        return self._walk(eps, self._embed(context))[0]

    def write(self, x: Tensor, context: Tensor | None, tape: Tape) -> None:
        tape.write(self.standardised(x, context), normal=True)

    def read(self, context: Tensor | None, tape: Tape) -> Tensor:
        return self.from_standardised(tape.read(), context)

    def _walk(self, eps: Tensor, embedded: Tensor | None) -> tuple[Tensor, Tensor]:
        """The x of standardised values (n, C, H, W), channel by channel, and its log-scales."""
        x = torch.zeros_like(eps[:, :1])
        state: State | None = None
        found = []
        for now in eps.split(1, dim=1):
            seen = self.inlet(x.to(self.inlet.weight.dtype))
            h, state = self.lstm.step(seen if embedded is None else seen + embedded, state)
            loc, log_scale = (p.unsqueeze(1) for p in self._located(h))
            x = loc + torch.exp(log_scale) * now
            found.append((x, log_scale))
        x, log_scale = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
        return x, log_scale

    def _noise(self, n: int) -> Tensor:
        like = self.inlet.weight
        return torch.randn(n, *self.event_shape, device=like.device, dtype=working_dtype(like))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        return self._walk(temperature * self._noise(n), self._embed(context))[0]

    def _sample_and_log_prob(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        n, context = self._rows(n, context)
        embedded = repeat_rows(self._embed(context), num_samples)  # embedded once a row
        eps = self._noise(num_samples * n)
        x, log_scale = self._walk(eps, embedded)
        return x, self._density(eps, log_scale)
