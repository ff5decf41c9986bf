"""The maxout activation."""

from torch import Tensor, nn

from surflow.checks import require_at_least


class Maxout(nn.Module):
    r"""The largest of W neighbours: (B, W C) -> (B, C).

    .. math:: y_c = \max_{0 \le w < W} x_{W c + w}

    Args:
        window: W.

    Raises:
        ValueError: for a window that is not positive.

    Source: Goodfellow et al. 2013, arXiv 1302.4389.

    >>> import torch
    >>> Maxout(2)(torch.tensor([[1.0, 3.0, 5.0, -1.0]]))
    tensor([[3., 5.]])
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        require_at_least("Maxout", 1, window=window)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.window)).amax(2)
