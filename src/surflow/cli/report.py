"""Write a table and its figures from the records there are."""

from __future__ import annotations

from omegaconf import DictConfig

from surflow.cli.cells import plan_cells, write_report
from surflow.cli.command import command
from surflow.cli.request import complete_request


def report(cfg: DictConfig) -> None:
    """Write results/<profile>/<artefact>/; nothing is run."""
    spec = complete_request(cfg)
    write_report(cfg, spec, plan_cells(cfg, spec))


main = command("report")(report)

if __name__ == "__main__":
    main()
