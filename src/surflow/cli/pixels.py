"""The shape of a config's images; the data branch replaces it."""

from __future__ import annotations

from omegaconf import DictConfig


def shape_of_config(cfg: DictConfig) -> tuple[int, ...]:
    """The shape that a config's data are drawn in, before they are there."""
    from hydra.utils import get_class

    shape = getattr(get_class(cfg.data.module._target_), "image_shape", None)
    return tuple(shape if isinstance(shape, tuple) else cfg.data.event_shape)
