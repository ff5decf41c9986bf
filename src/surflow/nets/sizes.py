"""Images brought to the size of others."""

import torch.nn.functional as F
from torch import Tensor


def averaged_to(image: Tensor, height: int, width: int) -> Tensor | None:
    """Means over blocks of pixels: (B, C, k H, k W) -> (B, C, H, W); None where there is no k."""
    factor = image.shape[2] // height
    if image.dim() != 4 or factor < 1 or image.shape[2:] != (factor * height, factor * width):
        return None
    return image if factor == 1 else F.avg_pool2d(image, factor)
