"""Train one run, or a sweep of them with -m; measure it on test; write its record."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import DictConfig

from surflow.cli.command import command
from surflow.files import relative
from surflow.metric import Metric
from surflow.training.run import Run, first_process


def train(cfg: DictConfig) -> dict[str, float]:
    """Run one config to its record; resume it if it was interrupted; reuse it if it is complete.

    Returns:
        the test metrics by name.
    """
    run = Run(cfg)
    record = None if cfg.run.force else run.complete_record()
    if record is not None and not run.missing_measures(record):
        done = f"already complete ({summary(record.metrics)}); run.force=true repeats"
        print(f"{relative(run.folder)}: {done}")
        return {name: metric.value for name, metric in record.metrics.items()}
    run.check_files()
    with run.held():
        if record is not None:
            record = run.add_measures(record) if first_process() else None
        else:
            flow = run.train()
            record = None if flow is None else run.finish(flow)
    if record is None:
        return {}
    print(f"{relative(run.folder)}: {summary(record.metrics)}")
    for name, reason in record.missing.items():
        print(f"{name}: missing: {reason}")
    return {name: metric.value for name, metric in record.metrics.items()}


def summary(metrics: Mapping[str, Metric]) -> str:
    """Such as "test/elbo_bpd 3.0812, sample/fid 49.1000"."""
    return ", ".join(f"{name} {metric.value:.4f}" for name, metric in metrics.items())


main = command("train")(train)

if __name__ == "__main__":
    main()
