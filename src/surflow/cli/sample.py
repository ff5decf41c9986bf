"""Draw samples from a trained run: an .npz file or a folder of PNG files, and a picture."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from surflow.cli.command import command
from surflow.errors import UserError, check_whole
from surflow.evaluation.sampling import SampleWriter
from surflow.files import relative
from surflow.training.run import Run


def sample_run(cfg: DictConfig) -> Path:
    """Draw ``n`` samples with the weights of a checkpoint; returns the file or the folder.

    The draws follow from checkpoint, ``n``, ``seed`` and ``temperature``; no batch size changes
    them. A folder that was begun is completed.
    """
    check_whole("n", cfg.n)
    if not isinstance(cfg.temperature, int | float) or not cfg.temperature > 0:
        raise UserError(f"temperature: expected a positive number, got {cfg.temperature}")
    run = Run(cfg)
    shape = run.data.image_shape
    out = Path(cfg.out) if cfg.out else run.folder / "samples.npz"
    if out.suffix == ".png":
        wanted = "an .npz file or a folder for PNG files" if shape else "an .npz file"
        raise UserError(f"out: expected {wanted}, got {cfg.out}")
    to_folder = shape is not None and out.suffix != ".npz"
    if to_folder and shape[0] not in (1, 3):
        raise UserError(f"out: PNG files have 1 or 3 channels, not {shape[0]}; give an .npz file")
    flow, path = run.load_flow(cfg.checkpoint)
    writer = SampleWriter(flow, run.data, cfg.n, run.seed, cfg.temperature)
    picture = writer.write_files(out, path) if to_folder else writer.write_array(out)
    print(f"{relative(out)}: {cfg.n} samples from {relative(path)}")
    if picture is not None:
        print(relative(picture))
    return out


main = command("sample")(sample_run)

if __name__ == "__main__":
    main()
