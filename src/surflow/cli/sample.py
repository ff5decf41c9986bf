"""Draw samples from a trained run: an .npz file or a folder of PNG files, and a picture."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from surflow.cli.common import (
    check_everything,
    guarded,
    load_flow,
    one_line_errors,
    relative,
    use_threads,
)
from surflow.config import conf_dir, register_resolvers, run_dir
from surflow.errors import UserError


def sample_run(cfg: DictConfig) -> Path:
    """Draw ``n`` samples with the weights of a checkpoint; returns the file or the folder.

    The draws follow from checkpoint, ``n``, ``seed`` and ``temperature``; no batch size changes
    them. A folder that was begun is completed.
    """
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    register_resolvers()
    check_everything(cfg)
    if not isinstance(cfg.n, int) or isinstance(cfg.n, bool) or cfg.n < 1:
        raise UserError(f"n: expected a positive whole number, got {cfg.n}")
    if not isinstance(cfg.temperature, int | float) or not cfg.temperature > 0:
        raise UserError(f"temperature: expected a positive number, got {cfg.temperature}")
    from surflow.cli.pixels import shape_of_config
    from surflow.evaluation.sampling import SampleWriter

    shape = shape_of_config(cfg)
    images = len(shape) == 3
    out = Path(cfg.out) if cfg.out else run_dir(cfg) / "samples.npz"
    if out.suffix == ".png":
        wanted = "an .npz file or a folder for PNG files" if images else "an .npz file"
        raise UserError(f"out: expected {wanted}, got {cfg.out}")
    to_folder = images and out.suffix != ".npz"
    if to_folder and shape[0] not in (1, 3):
        raise UserError(f"out: PNG files have 1 or 3 channels, not {shape[0]}; give an .npz file")
    use_threads(cfg)
    flow, data, path = load_flow(cfg)
    writer = SampleWriter(flow, data, cfg.n, cfg.seed, cfg.temperature)
    picture = writer.write_files(out, path) if to_folder else writer.write_array(out)
    print(f"{relative(out)}: {cfg.n} samples from {relative(path)}")
    if picture is not None:
        print(relative(picture))
    return out


@hydra.main(config_path=conf_dir(), config_name="sample", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        sample_run(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
