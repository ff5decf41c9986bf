"""Masks for couplings of images; True conditions, False is transformed."""

import torch
from torch import Tensor


def checkerboard_mask(height: int, width: int, invert: bool = False) -> Tensor:
    """The squares of a chessboard: True where row + column is even.

    Args:
        height, width: of the image.
        invert: exchange True and False.

    Returns:
        (1, H, W), boolean, broadcastable to (C, H, W).

    Raises:
        ValueError: for sizes that are not positive, or an image of one pixel, of which a coupling
            would leave one part empty.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.4.

    >>> checkerboard_mask(2, 3).int().tolist()
    [[[1, 0, 1], [0, 1, 0]]]
    """
    if min(height, width) < 1 or height * width < 2:
        raise ValueError(
            f"checkerboard_mask: expected at least two pixels, got height={height}, width={width}"
        )
    rows, columns = torch.arange(height).view(1, -1, 1), torch.arange(width).view(1, 1, -1)
    return (rows + columns) % 2 == int(invert)


def channel_mask(channels: int, alternate: bool = False, invert: bool = False) -> Tensor:
    """Whole channels: True for the first floor(C/2), or for the even ones.

    A :class:`Coupling` with ``split`` parts the channels the same way, and its net sees only those
    that condition; the mask is for a net that takes all of them.

    Args:
        channels: C.
        alternate: the even channels instead of the first ones.
        invert: exchange True and False.

    Returns:
        (C, 1, 1), boolean, broadcastable to (C, H, W).

    Raises:
        ValueError: for fewer than two channels, of which a coupling would leave one part empty.

    Source: Dinh et al. 2017, arXiv 1605.08803, Sec. 3.4.

    >>> channel_mask(3).flatten().tolist(), channel_mask(3, alternate=True).flatten().tolist()
    ([True, False, False], [True, False, True])
    """
    if channels < 2:
        raise ValueError(f"channel_mask: expected at least two channels, got {channels}")
    index = torch.arange(channels).view(-1, 1, 1)
    mask = index % 2 == 0 if alternate else index < channels // 2
    return ~mask if invert else mask
