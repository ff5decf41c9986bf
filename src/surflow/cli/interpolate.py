"""Images on the way between test images, through all latents of a trained run: one PNG."""

from __future__ import annotations

from pathlib import Path

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
from surflow.errors import UserError, check_choice

OWN_KEYS = ("pairs", "steps", "path")  # of this command: they are not of the run


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
    from surflow.cli.pixels import shape_of_config
    from surflow.evaluation.pictures import interpolation_figure
    from surflow.models.interpolation import PATHS

    register_resolvers()
    check_everything(cfg)
    for key, least in (("pairs", 1), ("steps", 2)):
        if not isinstance(cfg[key], int) or cfg[key] < least:
            raise UserError(f"{key}: expected a whole number >= {least}, got {cfg[key]}")
    check_choice("path", cfg.path, PATHS, UserError)
    if len(shape_of_config(cfg)) != 3:
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
