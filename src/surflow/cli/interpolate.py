"""Images on the way between test images, through all latents of a trained run: one PNG."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from surflow.cli.command import command
from surflow.errors import UserError, check_choice, is_whole
from surflow.evaluation.pictures import interpolation_figure
from surflow.files import relative
from surflow.models.interpolation import PATHS
from surflow.training.run import Run


def interpolate_run(cfg: DictConfig) -> Path:
    """Draw the picture with the weights of a checkpoint; returns the .png file."""
    for key, least in (("pairs", 1), ("steps", 2)):
        if not is_whole(cfg[key], least):
            raise UserError(f"{key}: expected a whole number >= {least}, got {cfg[key]}")
    check_choice("path", cfg.path, PATHS, UserError)
    run = Run(cfg)
    if run.data.image_shape is None:
        raise UserError(f"interpolate: pictures are of images, not of data={run.data.name}")
    out = Path(cfg.out) if cfg.out else run.folder / "interpolation.png"
    if out.suffix != ".png":
        raise UserError(f"out: expected a .png file, got {out}")
    flow, checkpoint = run.load_flow(cfg.checkpoint)
    run.data.setup()
    file = interpolation_figure(
        flow, run.data, out.parent, cfg.pairs, cfg.steps, cfg.path, run.seed, out.name
    )
    print(f"{relative(file)}: images on the {cfg.path} way, from {relative(checkpoint)}")
    return file


main = command("interpolate")(interpolate_run)

if __name__ == "__main__":
    main()
