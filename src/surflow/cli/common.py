"""What every command shares: one clear line for a mistake, and building from a config."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import re
import sys
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from surflow.config import check_config, conf_dir, register_resolvers
from surflow.errors import UserError, close_match


def one_line(text: str, limit: int = 400) -> str:
    """The text on one line, cut at ``limit`` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _config_message(error: BaseException) -> str:
    """A config error of Hydra's or OmegaConf's as one line that says what would be right."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        return (
            f"config: cannot read {error.override!r}; quote a value that holds = or spaces twice, "
            """such as 'overrides=["logger=csv"]'"""
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.partition("/")
        known = _group_options(group)
        if known:
            return f"{group}: unknown option {name!r}{_expected(name, known)}"
    key_error: BaseException | None = error
    while key_error is not None and not isinstance(
        key_error, ConfigAttributeError | ConfigKeyError
    ):
        key_error = key_error.__cause__
    if key_error is not None and isinstance(key_error.parent_node, DictConfig):
        known = [str(key) for key in key_error.parent_node if str(key) != "hydra"]
        return f"{key_error.full_key}: unknown key{_expected(str(key_error.key), known)}"
    missing = re.search(r"Missing mandatory value: (\S+)", str(error))
    if missing:
        return f"{missing[1]}: expected a value, got none; add {missing[1]}=..."
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and getattr(cause, "full_key", None):
        return f"config: {one_line(cause.msg or cause)} (at {cause.full_key})"
    return f"config: {one_line(error)}"


def _expected(word: str, known: list[str]) -> str:
    match = close_match(word, known)
    return f"{match} Known: {', '.join(known)}" if match else f"; known: {', '.join(known)}"


def _group_options(group: str) -> list[str]:
    """What can be chosen in a group of conf/: data, model, experiment, and so on."""
    folder = Path(conf_dir()) / group
    files = [p.relative_to(folder).with_suffix("") for p in sorted(folder.rglob("*.yaml"))]
    return [p.as_posix() for p in files if not p.name.startswith("_")]


def guarded(main: Callable[[], Any]) -> Callable[[], None]:
    """Wrap a command: a user's mistake prints one line and exits with 2.

    Set SURFLOW_DEBUG=1 to see the traceback instead.
    """

    def run() -> None:
        register_resolvers()
        # Hydra otherwise prints several lines and exits with 1
        os.environ.setdefault("HYDRA_FULL_ERROR", "1")
        with one_line_errors():
            main()

    return run


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 2; let bugs keep their traceback."""
    from hydra.errors import HydraException

    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; give the same command again to resume", 130)
    except (UserError, ValueError, HydraException, OmegaConfBaseException, OSError) as error:
        if os.environ.get("SURFLOW_DEBUG"):
            raise
        root = user_error_behind(error)
        if root is not None:
            _fail(one_line(root))
        if isinstance(error, HydraException | OmegaConfBaseException):
            _fail(_config_message(error))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail(f"{one_line(error)}: free some space, then give the same command again to resume")
        _fail(one_line(error))
    except TypeError as error:  # what Python says of a key that nothing takes
        if os.environ.get("SURFLOW_DEBUG") or "unexpected keyword argument" not in str(error):
            raise
        _fail(f"config: {one_line(error)}; leave that key out")


def user_error_behind(error: BaseException | None) -> BaseException | None:
    """The UserError or ValueError that another library wrapped, None if there is none."""
    seen = 0
    while error is not None and seen < 10:
        if isinstance(error, UserError):
            return error
        if isinstance(error, ValueError) and not isinstance(error, OmegaConfBaseException):
            return error
        error, seen = error.__cause__ or error.__context__, seen + 1
    return None


def _fail(message: str, code: int = 2) -> None:
    print(f"surflow: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def build_data(cfg: DictConfig) -> Any:
    """The DataModule of a config, set up."""
    from hydra.utils import instantiate

    data = instantiate(cfg.data.module)
    data.setup()
    return data


def build_flow(cfg: DictConfig, data: Any) -> Any:
    """The flow of a config, for this data; the same seed gives the same initial weights.

    A builder with a parameter ``surjection`` takes a layer in front and the box of the data; one
    with ``downsampling`` takes what stands between the scales of an image; others take neither.

    Raises:
        UserError: for a surjection that is not of the model's kind.
    """
    import torch
    from hydra.utils import instantiate

    torch.manual_seed(cfg.seed)
    builder = instantiate(cfg.model.builder)
    takes = inspect.signature(builder).parameters
    return builder(**_surjection_for(cfg, takes, data.box))


def _surjection_for(cfg: DictConfig, takes: Container[str], box: Any) -> dict[str, Any]:
    """What of the surjection a builder with these parameters gets."""
    from hydra.utils import instantiate

    layer, between = cfg.surjection.transform, OmegaConf.select(cfg, "surjection.downsampling")
    if "downsampling" in takes:
        if between is None:
            raise UserError(
                f"surjection={cfg.surjection.name}: model={cfg.model.name} needs a downsampling "
                f"surjection: {', '.join(_downsampling_options())}"
            )
        named = isinstance(between, str)
        return {"downsampling": between if named else instantiate(between)}
    if between is not None:
        raise UserError(
            f"surjection={cfg.surjection.name} downsamples images, which model={cfg.model.name} "
            "does not do by a surjection of your choice; use model=pool_flow, or surjection=none"
        )
    if "surjection" in takes:
        low, high = box
        return {"surjection": instantiate(layer) if layer else None, "low": low, "high": high}
    if layer:
        raise UserError(
            f"surjection={cfg.surjection.name}: model={cfg.model.name} takes none; "
            "use surjection=none"
        )
    return {}


def _downsampling_options() -> list[str]:
    """The options of the group surjection that stand between two scales of an image."""
    import yaml

    found = []
    for name in _group_options("surjection"):
        content = yaml.safe_load((Path(conf_dir()) / "surjection" / f"{name}.yaml").read_text())
        if "downsampling" in content:
            found.append(name)
    return found


def load_flow(cfg: DictConfig, checkpoint: Path | None = None) -> tuple[Any, Any, Path]:
    """The trained flow of a config on its device, its data, and the checkpoint it came from.

    Args:
        cfg: of the run; with the key ``checkpoint`` where a command has it.
        checkpoint: the file; None: as the config says, else the run's own.

    Raises:
        UserError: where there is no checkpoint, or it is damaged or of another config.
    """
    from surflow.config import config_hash, run_dir
    from surflow.training.checkpoint import check_same_config, flow_state, load_checkpoint

    named = checkpoint or OmegaConf.select(cfg, "checkpoint")
    if cfg.weights.source is not None:
        if named is not None:
            raise UserError("checkpoint: not beside weights.source; leave one of them out")
        data = build_data(cfg)
        flow = build_flow(cfg, data)
        path = Path(official_weights(cfg, flow)["path"])
        return flow.to(device_of(cfg)).eval(), data, path
    path = Path(named) if named else run_dir(cfg) / f"{cfg.trainer.scored}.ckpt"
    state = load_checkpoint(path)
    check_same_config(state, config_hash(cfg), relative(path))
    data = build_data(cfg)
    flow = build_flow(cfg, data)
    if str(cfg.trainer.precision) == "64-true":
        flow.double()
    flow.load_state_dict(flow_state(state))
    return flow.to(device_of(cfg)).eval(), data, path


def official_weights(cfg: DictConfig, flow: Any) -> dict[str, Any]:
    """Load released weights into a flow of the same configuration.

    Returns:
        what they are: source, file, its SHA-256, the number of parameters.

    Raises:
        UserError: where they are missing, of another configuration, or the model has none.
    """
    from surflow.models.official import find_checkpoint, load_official, read_tensors, sha256_of

    if cfg.model.name != "pool_flow":
        raise UserError(
            f"weights.source=official: there are none of model={cfg.model.name}, only of pool_flow"
        )
    path = find_checkpoint(cfg.weights.path, cfg.data.name, cfg.surjection.name)
    try:
        load_official(flow, read_tensors(path))
    except ValueError as error:
        raise UserError(f"weights.path: {relative(path)}: {error}") from error
    return {
        "source": cfg.weights.source,
        "path": relative(path),
        "sha256": sha256_of(path),
        "parameters": sum(p.numel() for p in flow.parameters()),
    }


def device_of(cfg: DictConfig) -> Any:
    """The device that a command computes on: the trainer's accelerator, its first device."""
    import torch

    kinds = {"gpu": "cuda", "cuda": "cuda", "mps": "mps", "cpu": "cpu"}
    kind = kinds.get(cfg.trainer.accelerator)
    if kind is None:
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(kind)


def check_hardware(cfg: DictConfig) -> None:
    """Refuse a device, a precision or a number of threads that this machine cannot give."""
    import torch

    t = cfg.trainer
    accelerators = ("auto", "cpu", "gpu", "cuda", "mps")
    if t.accelerator not in accelerators:
        raise UserError(
            f"trainer.accelerator: expected one of {', '.join(accelerators)}, got {t.accelerator!r}"
        )
    if t.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={t.accelerator}: no CUDA device on this machine; "
            "use trainer.accelerator=cpu or auto"
        )
    if t.accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "trainer.accelerator=mps: not available on this machine; use trainer.accelerator=cpu"
        )
    precisions = ("32-true", "bf16-mixed", "16-mixed", "64-true")
    if str(t.precision) not in precisions:
        raise UserError(
            f"trainer.precision: expected one of {', '.join(precisions)}, got {t.precision!r}"
        )
    on_cpu = t.accelerator == "cpu" or (t.accelerator == "auto" and not torch.cuda.is_available())
    if str(t.precision) == "16-mixed" and on_cpu:
        raise UserError(
            "trainer.precision=16-mixed: needs a GPU; on a CPU use bf16-mixed or 32-true"
        )
    devices = t.devices
    if on_cpu and devices == -1:
        raise UserError(
            "trainer.devices=-1: all devices, but there is no accelerator; on a CPU give the "
            "number of processes, such as trainer.devices=2"
        )
    if not (devices in ("auto", -1) or (isinstance(devices, int) and devices > 0)):
        raise UserError(
            f"trainer.devices: expected a positive whole number, -1 or auto, got {devices}"
        )
    if isinstance(devices, int) and devices > 0 and not on_cpu:
        there = torch.cuda.device_count()
        if there and devices > there:
            raise UserError(f"trainer.devices={devices}: this machine has {there} GPU(s)")
    here = torch.cuda.device_count() if not on_cpu and devices == -1 else devices
    processes = t.num_nodes * (here if isinstance(here, int) else 1)
    if processes > 1 and cfg.data.batch_size % processes:
        raise UserError(
            f"data.batch_size: expected a multiple of the {processes} processes, got "
            f"{cfg.data.batch_size}"
        )
    if t.threads is not None and (not isinstance(t.threads, int) or t.threads < 1):
        raise UserError(
            f"trainer.threads: expected a positive whole number or null, got {t.threads}"
        )
    if t.compile not in ("auto", "nets", True, False):
        raise UserError(f"trainer.compile: expected auto, nets, true or false, got {t.compile!r}")


def check_everything(cfg: DictConfig) -> None:
    """All checks that need neither data nor a model."""
    check_config(cfg)
    check_hardware(cfg)


def use_threads(cfg: DictConfig) -> None:
    """Compute with the CPU threads that the config names, if it names a number."""
    import torch

    if cfg.trainer.threads is not None:
        torch.set_num_threads(cfg.trainer.threads)


def truth_of(cfg: DictConfig) -> Any:
    """How the likelihood of this model is computed, where its config says so; else None."""
    from hydra.utils import instantiate

    spec = OmegaConf.select(cfg, "model.truth")
    return None if spec is None else instantiate(spec)


def origin_line(result: dict[str, Any], command: str) -> str:
    """Machine, torch, commit and command of a result that holds ``record.origin()``."""
    return (
        f"Machine: {result['machine']['cpu']}, {result['machine']['cores']} cores; "
        f"torch {result['versions']['torch']}; commit {result['commit'][:12]}"
        + ("+dirty" if result["dirty"] else "")
        + f". Written by `{command}`."
    )


def relative(path: Path) -> str:
    """A path as a person would write it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
