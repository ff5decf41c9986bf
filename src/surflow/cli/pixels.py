"""Values of data and models as 8-bit images, flat or not."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from torch import Tensor


def image_shape(data: Any) -> tuple[int, ...]:
    """The shape that data are drawn in: (C, H, W) of images, also where a model has them flat."""
    return tuple(getattr(data, "image_shape", None) or data.event_shape)


def shape_of_config(cfg: DictConfig) -> tuple[int, ...]:
    """:func:`image_shape` of a config's data, before they are there."""
    from hydra.utils import get_class

    kind = get_class(cfg.data.module._target_)
    return tuple(getattr(kind, "image_shape", None) or cfg.data.event_shape)


def pixels_of(values: Tensor, data: Any) -> tuple[Tensor, int]:
    """Rows of data, or draws of a model of them, as 8-bit images, and how many levels these have.

    Integers stay as they are. Reals are rounded to the nearest level there is; of grey values in
    [0, 1] these are 256.

    Args:
        values: (N, *event), flat or as images.
        data: a DataModule: ``image_shape`` or ``event_shape``, ``num_levels``, ``binarization``.

    Returns:
        uint8 (N, C, H, W), and K: levels are 0 ... K - 1.

    Raises:
        BrokenSamples: for values that are not finite, or integers that are no levels.
    """
    from surflow.metrics import as_images
    from surflow.metrics.samples import BrokenSamples

    levels = data.num_levels
    values = values.reshape(len(values), *image_shape(data))
    if values.is_floating_point():
        broken = (~values.isfinite()).flatten(1).any(1).sum().item()
        if broken:
            raise BrokenSamples(
                f"samples: expected finite values, got others in {broken} of {len(values)} images"
            )
        if getattr(data, "binarization", None) == "grey":
            values, levels = values * 255, 256
        values = values.round().clamp(0, levels - 1)
    return as_images(values.long(), levels), levels  # as a byte, 256 levels would be none
