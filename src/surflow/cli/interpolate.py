"""Images on the way between test images, through all latents of a trained run: one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from surflow.cli.common import (
    check_everything,
    guarded,
    load_flow,
    one_line_errors,
    relative,
    use_threads,
)
from surflow.config import conf_dir, register_resolvers, run_dir
from surflow.errors import UserError, close_match

OWN_KEYS = ("pairs", "steps", "path")  # of this command: they are not of the run


def interpolation_figure(
    flow: Any,
    data: Any,
    folder: str | Path,
    pairs: int = 8,
    steps: int = 9,
    path: str = "spherical",
    seed: int = 0,
    name: str = "interpolation.png",
) -> Path:
    """Draw a grid of images: a row for a pair of test images, the way between them in columns.

    Of a VAE over bits or levels, whose draws cannot be kept, the way goes between draws of the two
    posteriors, through the latents of the prior, and the decoder's means are shown.

    Args:
        flow: a flow over images, on any device.
        data: a DataModule, set up, of the same images, flat or not.
        folder: where the picture goes; made if it is not there.
        pairs: rows; as many as there are pairs of test images where there are fewer.
        steps: columns, the two images included.
        path: "spherical" or "linear"; see :func:`surflow.models.latent_interpolation`.
        seed: of the choice of images and of what inference draws.
        name: the file's name.

    Returns:
        The picture.

    Raises:
        ValueError: as :func:`surflow.models.latent_interpolation`; for fewer than two images.
    """
    import torch

    from surflow.cli.decoded import decoded_of, drawing
    from surflow.models import latent_interpolation
    from surflow.reporting.images import image_grid

    test = data.splits["test"]
    pairs = min(pairs, len(test) // 2)
    if pairs < 1:
        raise ValueError(f"interpolation: expected at least two test images, got {len(test)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(test), generator=generator)[: 2 * pairs]
    chosen = test[order.to(test.device)].to(next(flow.parameters()).device)
    parts = decoded_of(flow)
    if parts is not None and parts.has_grey:
        with drawing(flow, seed):
            ends = parts.posterior(chosen)
            parts.eval()
            way = latent_interpolation(parts.prior, *ends.split(pairs), steps, path, seed)
            pixels, levels, _ = parts.pixels(parts.images(way.flatten(0, 1)), data)
    else:
        way = latent_interpolation(flow, chosen[:pairs], chosen[pairs:], steps, path, seed)
        pixels, levels = data.pixels(way.flatten(0, 1).cpu())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return image_grid(pixels.numpy(), folder / name, columns=steps, num_levels=levels)


def run_config(cfg: DictConfig) -> DictConfig:
    """The config of the run alone: without this command's keys, which change nothing in it."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    for key in OWN_KEYS:
        plain.pop(key, None)
    run = OmegaConf.create(plain)
    OmegaConf.set_struct(run, True)
    return run


def interpolate_run(cfg: DictConfig) -> Path:
    """Draw the picture with the weights of a checkpoint; returns the .png file."""
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    from hydra.utils import instantiate

    from surflow.models.interpolation import PATHS

    register_resolvers()
    check_everything(cfg)
    for key, least in (("pairs", 1), ("steps", 2)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise UserError(f"{key}: expected a whole number >= {least}, got {cfg[key]}")
    if cfg.path not in PATHS:
        raise UserError(
            f"path: expected one of {', '.join(PATHS)}, got {cfg.path!r}"
            + close_match(str(cfg.path), PATHS)
        )
    if instantiate(cfg.data.module).image_shape is None:
        raise UserError(f"interpolate: pictures are of images, not of data={cfg.data.name}")
    run = run_config(cfg)
    out = Path(cfg.out) if cfg.out else run_dir(run) / "interpolation.png"
    if out.suffix != ".png":
        raise UserError(f"out: expected a .png file, got {out}")
    use_threads(cfg)
    flow, data, checkpoint = load_flow(run)
    file = interpolation_figure(
        flow, data, out.parent, cfg.pairs, cfg.steps, cfg.path, cfg.seed, out.name
    )
    print(f"{relative(file)}: images on the {cfg.path} way, from {relative(checkpoint)}")
    return file


@hydra.main(config_path=conf_dir(), config_name="interpolate", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        interpolate_run(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
