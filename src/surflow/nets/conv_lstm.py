"""A convolutional LSTM over a sequence of images."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

State = Sequence[tuple[Tensor, Tensor]]
"""Of each layer: its output and its cell, (B, hidden, H, W) each."""


class ConvLSTM(nn.Module):
    r"""A stack of convolutional LSTM layers: (T, B, in, H, W) -> (T, B, hidden, H, W).

    .. math:: (i, f, g, o)_t = U * x_t + V * h_{t-1} + b, \quad
              c_t = \sigma(f_t)\, c_{t-1} + \sigma(i_t) \tanh g_t, \quad
              h_t = \sigma(o_t) \tanh c_t

    U and V have a kernel of odd size with zero padding; h and c start at zero, the bias of the
    forget gate at one. Layer l + 1 takes the h of layer l. A whole sequence is walked layer by
    layer: U runs on all T images at once, only V waits for the step before.

    Args:
        in_channels: of x.
        hidden_channels: of h, in every layer.
        num_layers: how many.
        kernel_size: odd, of U and V.
        dilation: of U and V.

    Raises:
        ValueError: for sizes that are not positive, or an even kernel.

    Cost: 2 T convolutions a layer, of which T one after the other.
    Source: Shi et al. 2015, arXiv 1506.04214, Sec. 3.1 (without peepholes).

    >>> net = ConvLSTM(2, 4, num_layers=2)
    >>> x = torch.randn(5, 3, 2, 8, 8)
    >>> whole = net(x)
    >>> first, state = net.step(x[0])
    >>> second, state = net.step(x[1], state)
    >>> whole.shape, bool(torch.allclose(whole[1], second, atol=1e-6))
    (torch.Size([5, 3, 4, 8, 8]), True)
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        num_layers: int = 1,
        kernel_size: int = 3,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        sizes = (in_channels, hidden_channels, num_layers, kernel_size, dilation)
        if min(sizes) < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"ConvLSTM: expected positive sizes and an odd kernel, got {in_channels=}, "
                f"{hidden_channels=}, {num_layers=}, {kernel_size=}, {dilation=}"
            )
        self.hidden_channels = hidden_channels
        padding = dilation * (kernel_size // 2)
        keys = {"kernel_size": kernel_size, "dilation": dilation, "padding": padding}
        seen = [in_channels, *[hidden_channels] * (num_layers - 1)]
        self.inputs = nn.ModuleList(nn.Conv2d(c, 4 * hidden_channels, **keys) for c in seen)
        self.recurrent = nn.ModuleList(
            nn.Conv2d(hidden_channels, 4 * hidden_channels, bias=False, **keys) for _ in seen
        )
        for conv in self.inputs:
            nn.init.zeros_(conv.bias)
            nn.init.ones_(conv.bias[hidden_channels : 2 * hidden_channels])

    @staticmethod
    def _next(gates: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        enter, keep, new, out = gates.chunk(4, dim=1)
        added = torch.sigmoid(enter) * torch.tanh(new)
        cell = added if cell is None else torch.sigmoid(keep) * cell + added
        return torch.sigmoid(out) * torch.tanh(cell), cell

    def forward(self, x: Tensor) -> Tensor:
        for inlet, back in zip(self.inputs, self.recurrent, strict=True):
            gates = inlet(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            outputs: list[Tensor] = []
            cell = None
            for now in gates.unbind(0):
                now = now + back(outputs[-1]) if outputs else now
                h, cell = self._next(now, cell)
                outputs.append(h)
            x = torch.stack(outputs)
        return x

    def step(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """One image further: (B, in, H, W) -> h of the last layer, (B, hidden, H, W), and the
        state to give with the next one; None: before the first."""
        after = []
        for place, (inlet, back) in enumerate(zip(self.inputs, self.recurrent, strict=True)):
            gates, cell = inlet(x), None
            if state is not None:
                h, cell = state[place]
                gates = gates + back(h)
            x, cell = self._next(gates, cell)
            after.append((x, cell))
        return x, after
