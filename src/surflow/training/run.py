"""A run: one config come to life, from its folder to its record."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from surflow.config import (
    FREE,
    PROFILES,
    build,
    check_options,
    computed,
    config_hash,
    options_of,
    resolved,
    run_dir,
    target_of,
    with_defaults,
)
from surflow.data.module import TensorDataModule
from surflow.draws import apart
from surflow.errors import UserError, check_choice, is_whole, named_errors
from surflow.evaluation.likelihood import forget
from surflow.evaluation.pictures import draw_pictures
from surflow.evaluation.trained import Trained, run_measures
from surflow.files import locked, relative, sha256_of, write_json, write_npz
from surflow.flow import Flow, Ledger
from surflow.metric import Metric
from surflow.models.contract import SurjectionError, Takes
from surflow.models.official import find_checkpoint, load_official, read_tensors
from surflow.portable import portable
from surflow.record import RECORD_NAME, SCORES_NAME, Record, RecordError, lacking, load_record
from surflow.training.callbacks import Elapsed
from surflow.training.checkpoint import check_same_run, flow_state, load_checkpoint
from surflow.training.fit import FILES, TRAINER_GIVEN, fit
from surflow.training.hardware import (
    check_compute,
    check_machine,
    check_trainer,
    device_of_accelerator,
)
from surflow.training.loggers import log_result
from surflow.training.objective import Objective
from surflow.training.origin import commit, origin, peak_memory_mib

WEIGHT_SOURCES = ("official",)

GIVEN = {
    "data": ("seed",),
    "surjection": ("shape",),
    "optimizer": ("params",),
    "schedule": ("optimizer", "total_steps", "steps_per_epoch"),
    "trainer": TRAINER_GIVEN,
}
"""Options that a run sets itself, by the group whose target takes them."""


class Run:
    """One config: its folder, hash, device, data, flow and record.

    Args:
        cfg: of ``surflow-train``, or of a command that adds keys to it.
        here: whether it is to be carried out on this machine, which then must be able to.

    Attributes:
        config: resolved, as plain containers.
        hash: of what the run computes.
        folder: runs/<profile>/<artefact>/<row>/<data>/seed<seed>-<hash>.
        objective: what is maximised and reported.
        data: the DataModule, not set up before it is needed.
        measures: functions of a trained model, by name.
        callbacks: Lightning's, those that the config names.
        device: the first one of the trainer's accelerator.

    Raises:
        UserError: for a config that cannot be meant, before a file is read.
    """

    def __init__(self, cfg: DictConfig, here: bool = True) -> None:
        self.times = Elapsed()
        self.config = resolved(cfg)
        check_options(self.config, self._given)
        self._check_plain_keys()
        self.seed: int = self.config["seed"]
        self.objective: Objective = build(self.config["objective"])
        self.data: TensorDataModule = build(self.config["data"], seed=self.seed)
        check_trainer(self.config["trainer"])
        check_compute(self.config["compute"])
        self.measures = {
            name: measure
            for name, node in self.config["measures"].items()
            if (measure := build(node)) is not None
        }
        self.callbacks = [build(node) for node in self.config["callbacks"].values() if node]
        self.builder_takes.check(self.config["model"]["name"], self.data)
        for measure in self.measures.values():
            getattr(measure, "check", lambda data: None)(self.data)
        self._check_surjection()
        self.hash = config_hash(self.config)
        self.folder = run_dir(cfg, self.hash)
        self.device = device_of_accelerator(self.config["trainer"].get("accelerator", "auto"))
        if here:
            check_machine(self.config["trainer"], self.data.batch_size)
            threads = 1 if portable() else self.config["compute"]["threads"]
            if threads is not None:
                torch.set_num_threads(threads)

    # Checks -----------------------------------------------------------------------------------

    @property
    def _given(self) -> dict[str, tuple[str, ...]]:
        return GIVEN | {"model": self.builder_takes.given}

    @property
    def options(self) -> dict[str, Any]:
        """The config with the options that it leaves at the defaults of their targets."""
        return with_defaults(self.config, self._given)

    def check_files(self) -> None:
        """Look at the files that measures need, before anything is trained.

        Raises:
            UserError: for one that is missing or damaged.
        """
        for measure in self.measures.values():
            getattr(measure, "check_files", lambda: None)()

    def _check_plain_keys(self) -> None:
        seed, weights = self.config["seed"], self.config["weights"]
        check_choice("profile", self.config["profile"]["name"], (*PROFILES, FREE), UserError)
        for group in ("experiment", "recipe"):
            if self.config.get(group):
                raise UserError(f"{group}: of no effect; begin its file with # @package _global_")
        lr = self.config["optimizer"].get("lr")
        if lr is not None and not (isinstance(lr, int | float) and lr > 0):
            raise UserError(f"optimizer.lr: expected a positive number, got {lr}")
        if not is_whole(seed, 0) or seed >= 2**31:
            raise UserError(f"seed: expected a whole number from 0 to 2^31 - 1, got {seed}")
        if weights["source"] is not None:
            check_choice("weights.source", weights["source"], WEIGHT_SOURCES, UserError)
            if self.config["model"]["name"] != "pool_flow":
                raise UserError(
                    "weights.source=official: there are none of model="
                    f"{self.config['model']['name']}, only of pool_flow"
                )
        elif weights["path"] is not None:
            raise UserError("weights.path: of no effect without weights.source=official")

    def _check_surjection(self) -> None:
        takes, node = self.builder_takes, self.config["surjection"]
        name, model = node["name"], self.config["model"]["name"]
        chosen = "_target_" in node
        between = chosen and getattr(target_of(node), "between", False)
        if takes.between and not node.get("_partial_"):
            raise UserError(
                f"surjection={name}: model={model} needs a downsampling surjection, such as "
                "max_pool or slice"
            )
        if between and not takes.between:
            raise UserError(
                f"surjection={name} downsamples images, which model={model} does not do by a "
                "surjection of your choice; use model=pool_flow, or surjection=none"
            )
        if chosen and takes.surjection is None:
            raise UserError(f"surjection={name}: model={model} takes none; use surjection=none")

    @property
    def builder_takes(self) -> Takes:
        """What the builder of the model takes.

        Raises:
            UserError: for a builder that does not declare it.
        """
        target = target_of(self.config["model"], "model")
        takes = getattr(target, "takes", None)
        if takes is None:
            raise UserError(
                f"model._target_: {self.config['model']['_target_']} does not say what it takes; "
                "declare it with surflow.models.takes"
            )
        return takes

    # Data, flow, weights ----------------------------------------------------------------------

    @property
    def unit(self) -> str:
        """Of the scores: nats or bpd."""
        return self.objective.unit or self.data.unit

    def build_flow(self) -> Flow:
        """The untrained flow; the same seed gives the same initial weights."""
        self.data.setup()
        torch.manual_seed(self.seed)
        takes = self.builder_takes
        builder = build(self.config["model"], _partial_=True)
        facts = takes.of(self.data)
        if takes.surjection is not None:
            with apart():
                surjection = build(self.config["surjection"])
                made = surjection is None or isinstance(surjection, torch.nn.Module)
                if not made and not takes.between:
                    with named_errors("surjection"):
                        surjection = surjection(self.data.event_shape)
            facts[takes.surjection] = surjection
        try:
            with named_errors("model"):
                flow = builder(**facts)
        except SurjectionError as error:
            chosen = f"surjection={self.config['surjection']['name']}"
            raise UserError(f"{chosen}: model={self.config['model']['name']} {error}") from error
        return flow.double() if str(self.config["trainer"].get("precision")) == "64-true" else flow

    def load_flow(self, checkpoint: str | Path | None = None) -> tuple[Flow, Path]:
        """The trained or released flow on the run's device, and the file of its weights.

        Args:
            checkpoint: a .ckpt file of this config; None: the run's own.

        Raises:
            UserError: where there is none, or it is damaged or of another config.
        """
        if self.config["weights"]["source"] is not None:
            if checkpoint is not None:
                raise UserError("checkpoint: not with weights.source; leave one of them out")
            path, flow = self.weights_file, self.build_flow()
            try:
                load_official(flow, read_tensors(path))
            except ValueError as error:
                raise UserError(f"weights.path: {relative(path)}: {error}") from error
        else:
            path = Path(checkpoint) if checkpoint else self.folder / f"{self.objective.scored}.ckpt"
            state = load_checkpoint(path)
            check_same_run(state, self.hash, self.data_digest(), relative(path))
            flow = self.build_flow()
            flow.load_state_dict(flow_state(state))
        return flow.to(self.device).eval(), path

    @property
    def weights_file(self) -> Path:
        """The file of the released weights."""
        names = self.data.name, self.config["surjection"]["name"]
        return find_checkpoint(self.config["weights"]["path"], *names)

    def data_digest(self) -> dict[str, str]:
        """SHA-256 of each split of data that come from files; empty for data drawn from the
        config, which the hash covers."""
        if not self.data.from_files:
            return {}
        self.data.setup()
        return {s: told["sha256"] for s, told in self.data.provenance()["splits"].items()}

    # The record -------------------------------------------------------------------------------

    def own_record(self) -> Record | None:
        """The complete record of exactly this config; None if there is none."""
        try:
            record = load_record(self.folder)
        except RecordError:
            return None
        return record if record.status == "complete" and record.config_hash == self.hash else None

    def complete_record(self) -> Record | None:
        """The record of this run, finished by an earlier process; None if there is none.

        Raises:
            UserError: where the data or the released weights are no longer those of the record.
        """
        record = self.own_record()
        if record is None:
            return None
        if self.config["weights"]["path"] is not None:
            if sha256_of(self.weights_file) != record.weights.get("sha256"):
                raise UserError(
                    f"weights.path: {relative(self.weights_file)} is not the file that "
                    f"{relative(record.path)} is of; run.force=true scores it in its place"
                )
        self._check_data(record)
        return record

    def _check_data(self, record: Record) -> None:
        told, where = record.provenance.get("splits", {}), relative(self.folder)
        if not told or not self.data.from_files:
            return
        try:
            digests = self.data_digest()
        except (UserError, OSError):  # the files are elsewhere: nothing to compare with
            print(f"{where}: its data are not here to compare with", file=sys.stderr)
            return
        changed = [s for s, digest in digests.items() if told.get(s, {}).get("sha256") != digest]
        if changed:
            raise UserError(
                f"{where}: the data have changed since ({', '.join(changed)}: another SHA-256); "
                "run.force=true trains on what is there now, another run.root keeps both"
            )

    @property
    def wanted(self) -> dict[str, Mapping[str, Any]]:
        """The protocol of every metric whose measure tells one, by name."""
        told = [getattr(measure, "wanted", {}) for measure in self.measures.values()]
        return {name: protocol for of_measure in told for name, protocol in of_measure.items()}

    def missing_measures(self, record: Record) -> dict[str, Any]:
        """The measures with a metric that a record lacks, or has by other options or under another
        protocol.

        A measure tells by ``wanted``: the protocol of each metric that it gives, by name. Records
        of the earlier layout have no options to compare.
        """
        known, now = record.measures, self.config["measures"]
        return {
            key: measure
            for key, measure in self.measures.items()
            if lacking(record, getattr(measure, "wanted", {}))
            or (known and not _same_node(known.get(key), now[key]))
        }

    # Doing it ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the run's folder; a second process is told so instead of writing into it."""
        if not first_process():
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / ".lock", wait=False))
            except BlockingIOError:
                raise UserError(
                    f"{relative(self.folder)}: another process is training this run; wait for it, "
                    "or change seed or run.root"
                ) from None
            except OSError as error:
                raise UserError(
                    f"run.root: cannot write to {relative(self.folder)} ({error.strerror}); choose "
                    "a folder that can be written to: run.root=<folder>"
                ) from None
            yield

    @cached_property
    def loggers(self) -> list[Any]:
        """The loggers that the config names; metrics.csv is written without them."""
        made = []
        for node in (self.config["logger"] or {}).values():
            if node and "run" in options_of(target_of(node))[0]:
                # not through Hydra, which would build the nodes of the config in it
                made.append(build({**node, "_partial_": True})(run=self))
            elif node:
                made.append(build(node))
        return made

    def train(self) -> Flow | None:
        """Train to the last epoch, from the last checkpoint where there is one.

        Returns:
            the flow with the weights to be scored; None in a process other than the first.
        """
        commit()  # of the code that runs, whatever is there when it ends
        if self.config["run"]["force"] and first_process():
            for name in FILES:
                (self.folder / name).unlink(missing_ok=True)
        if self.config["weights"]["source"] is not None:
            return self.load_flow()[0] if first_process() else None
        return fit(self, self.times)

    def trained(self, flow: Flow, split: str = "test", **draws: int | None) -> Trained:
        """The flow with what measures need of the run.

        Args:
            flow: on the device to compute on.
            split: to be scored.
            draws: eval_samples, iwbo_samples in the place of the objective's own.
        """
        own = {key: getattr(self.objective, key) for key in ("eval_samples", "iwbo_samples")}
        given = {key: value for key, value in draws.items() if value is not None}
        self.data.setup()
        return Trained(
            flow=flow,
            data=self.data,
            split=split,
            seed=self.seed,
            unit=self.unit,
            folder=self.folder,
            cache=Path(self.config["run"]["root"]) / ".reference",
            **own | given,
        )

    def finish(self, flow: Flow) -> Record:
        """Measure the flow on test, draw its pictures, write the record last.

        The scores of the rows are in ``scores.npz``, float32, by the names of their metrics.
        """
        trained = self.trained(flow)
        metrics = run_measures(trained, self.measures)
        scores = {name: values.float().numpy() for name, values in trained.scores.items()}
        write_npz(self.folder / SCORES_NAME, **scores)
        pictures = {}
        if self.config["run"]["pictures"]:
            pictures = draw_pictures(trained, self.config["row"])
        record = self._record(trained, metrics)
        write_json(record.path, record.to_json())
        self.log(record, {"test/ledger": trained.ledger} if trained.ledger else {}, pictures)
        forget(self.folder, "test")
        return record

    def add_measures(self, record: Record) -> Record:
        """Add the metrics that a complete record lacks; nothing is trained or scored twice."""
        trained = self.trained(self.load_flow()[0])
        lacked = self.missing_measures(record)
        metrics = {**record.metrics, **run_measures(trained, lacked)}
        missing = {name: why for name, why in record.missing.items() if name not in metrics}
        record = replace(
            record,
            metrics=metrics,
            missing={**missing, **trained.missing},
            measures={**record.measures, **{key: self.config["measures"][key] for key in lacked}},
        )
        write_json(record.path, record.to_json())
        self.log(record)
        return record

    def log(
        self,
        record: Record,
        tables: Mapping[str, Ledger] | None = None,
        pictures: Mapping[str, Path] | None = None,
    ) -> None:
        """Add a record's numbers to the loggers of the run."""
        values = {name: metric.value for name, metric in record.metrics.items()}
        floors = {f"floor/{name}": floor.value for name, floor in record.floor.items()}
        log_result(self.loggers, values | floors, tables or {}, pictures or {})

    def _record(self, trained: Trained, metrics: Mapping[str, Metric]) -> Record:
        config, floor = self.config, self.data.floor
        bounded = [m.name for m in metrics.values() if m.kind != "score" and floor is not None]
        weights = {}
        if config["weights"]["source"] is not None:
            weights = {
                "source": config["weights"]["source"],
                "path": relative(self.weights_file),
                "sha256": sha256_of(self.weights_file),
                "parameters": sum(p.numel() for p in trained.flow.parameters()),
            }
        return Record(
            path=self.folder / RECORD_NAME,
            experiment=f"{config['artefact']}/{config['row']}",
            artefact=config["artefact"],
            row=config["row"],
            data=self.data.name,
            model=config["model"]["name"],
            surjection=config["surjection"]["name"],
            profile=config["profile"]["name"],
            seed=self.seed,
            config_hash=self.hash,
            config=config,
            measures=config["measures"],
            status="complete",
            metrics=metrics,
            missing=trained.missing,
            floor={name: floor for name in bounded},
            provenance=self.data.provenance(),
            weights=weights,
            ledger={} if trained.ledger is None else trained.ledger.to_json(),
            parameters=sum(p.numel() for p in trained.flow.parameters()),
            **trained.details,
            **origin(),
            train_time_s=round(self.times.train, 2),
            wall_time_s=round(self.times.wall, 2),
            peak_memory_mib=peak_memory_mib(),
        )


def first_process() -> bool:
    """Whether this is the only process of the run, or the first of several: it keeps the folder."""
    from pytorch_lightning.utilities.rank_zero import rank_zero_only

    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return rank_zero_only.rank == 0 and node == "0"


def _same_node(one: Mapping[str, Any] | None, other: Mapping[str, Any]) -> bool:
    """Whether two `_target_` nodes compute the same."""
    same_target = one is not None and one["_target_"] == other["_target_"]
    return same_target and computed(one) == computed(other)
