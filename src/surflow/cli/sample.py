"""Draw samples from a trained run, to an .npz file and, in two dimensions, a picture."""

from __future__ import annotations

import io
from pathlib import Path

import hydra
from omegaconf import DictConfig

from surflow.cli.common import check_everything, guarded, load_flow, one_line_errors, relative
from surflow.config import conf_dir, register_resolvers, run_dir
from surflow.errors import UserError


def sample_run(cfg: DictConfig) -> Path:
    """Draw ``n`` samples with the weights of a checkpoint; returns the .npz file."""
    from surflow.compat import make_torchvision_importable

    make_torchvision_importable()
    import numpy as np
    import torch

    from surflow.reporting import figures
    from surflow.reporting.records import write_bytes_atomic

    register_resolvers()
    check_everything(cfg)
    if not isinstance(cfg.n, int) or cfg.n < 1:
        raise UserError(f"n: expected a positive whole number, got {cfg.n}")
    if not cfg.temperature > 0:
        raise UserError(f"temperature: expected a positive number, got {cfg.temperature}")
    flow, data, path = load_flow(cfg)
    out = Path(cfg.out) if cfg.out else run_dir(cfg) / "samples.npz"
    torch.manual_seed(cfg.seed)
    parts, left = [], cfg.n
    with torch.no_grad():
        while left:
            size = min(left, data.eval_batch_size)
            parts.append(flow.sample(size, temperature=cfg.temperature))
            left -= size
    samples = torch.cat(parts).numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=samples, seed=cfg.seed, temperature=cfg.temperature)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(out, buffer.getvalue())
    print(f"{relative(out)}: {len(samples)} samples from {relative(path)}")
    if samples.shape[1:] == (2,):
        picture = out.with_suffix(".png")
        window = data.dataset.window
        figures.scatter_figure(samples, picture, -window, window)
        print(relative(picture))
    return out


@hydra.main(config_path=conf_dir(), config_name="sample", version_base="1.3")
def _main(cfg: DictConfig) -> None:
    with one_line_errors():
        sample_run(cfg)


main = guarded(_main)

if __name__ == "__main__":
    main()
