"""Configuration: where it lies, how it is composed, and what makes two runs the same run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from surflow.errors import UserError, close_match

PROFILES = ("paper", "short", "smoke")
EXTRACTORS = ("inception", "random_features")
MEMORY_MODES = ("stored", "reversible", "checkpoint")
WEIGHT_SOURCES = ("official",)
SPLITS = ("train", "valid", "test")
ANNEALED = ("divergence", "joint")

# keys that change where and how a run is carried out, not what it computes
RUNTIME_KEYS = (
    "logger",
    "run",
    "metrics",  # of the trained model's samples: the record keeps them with their protocol
    "weights.path",
    "checkpoint",
    "split",
    "iwbo_samples",  # of evaluate; the run's own is objective.iwbo_samples
    "eval_samples",
    "n",
    "temperature",
    "out",
    "data.root",
    "data.eval_batch_size",
    "data.on_device",
    "data.download",
    "data.cache",
    "data.module.root",
    "data.module.eval_batch_size",
    "data.module.on_device",
    "data.module.download",
    "data.module.cache",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.compile",
    "trainer.threads",
    "trainer.deterministic",
    "trainer.finite_check_every",
    "trainer.log_every",
    "trainer.memory",
    "trainer.channels_last",
    "trainer.checkpoint_minutes",
)

# keys that runs of an earlier version had not: at these values the hash does not see them
ADDED_LATER: dict[str, Any] = {
    "weights.source": None,
    "trainer.scored": "last",
    "objective.annealed": "divergence",
    "objective.beta_start": 1.0,
    "objective.beta_steps": 0,
    "objective.free_bits": 0.0,
    "model.prior": "conditional",  # of model=glow
    "model.builder.prior": "conditional",
    "model.posterior_rate": 1.0,  # of model=vae_posterior
    "model.builder.posterior_rate": 1.0,
    "model.posterior_start": 0,
    "model.builder.posterior_start": 0,
}


def _per_profile(values: DictConfig, *, _root_: DictConfig) -> Any:
    """The entry for the profile, or for the nearest larger one that is given."""
    profile = _root_.profile.name
    order = PROFILES[: PROFILES.index(profile) + 1] if profile in PROFILES else ()
    for name in reversed(order):
        if name in values:
            return values[name]
    raise UserError(f"per_profile: no value for profile {profile!r} among {list(values)}")


def _by(key: str, values: DictConfig, default: Any) -> Any:
    """values[key] where it is there, else the default."""
    return values[key] if key in values else default


def register_resolvers() -> None:
    """Make ``${per_profile:{paper: 10, smoke: 1}}`` and ``${by:key,{a: 1},default}`` known."""
    OmegaConf.register_new_resolver("per_profile", _per_profile, replace=True)
    OmegaConf.register_new_resolver("by", _by, replace=True)


def project_root() -> Path:
    """The folder that holds conf/ and experiments/: the checkout, or the installed package."""
    here = Path(__file__).resolve().parent
    for root in (here.parent.parent, here):
        if (root / "conf").is_dir():
            return root
    raise UserError(f"no conf/ folder beside {here}: install surflow from its repository")


def conf_dir() -> str:
    """The folder of the YAML files."""
    return str(project_root() / "conf")


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> DictConfig:
    """Compose a config as a command would from these overrides."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return hydra_compose(config_name, overrides=list(overrides))


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved."""
    return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[return-value]


def config_hash(cfg: DictConfig) -> str:
    """16 hex digits of what the run computes: the resolved config without its runtime keys."""
    plain = resolved(cfg)
    for key in RUNTIME_KEYS:
        node: Any = plain
        *parents, last = key.split(".")
        for name in parents:
            node = node.get(name, {})
        node.pop(last, None)
    for key, default in ADDED_LATER.items():
        *parents, name = key.split(".")
        node = plain
        for parent in parents:
            node = node.get(parent, {})
        if node.get(name) == default:
            node.pop(name, None)
            if not node and len(parents) == 1:
                plain.pop(parents[0], None)
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def run_dir(cfg: DictConfig) -> Path:
    """runs/<profile>/<artefact>/<row>/<data>/seed<seed>-<hash>: it follows from the config."""
    name = f"seed{cfg.seed}-{config_hash(cfg)[:8]}"
    return Path(cfg.run.root) / cfg.profile.name / cfg.artefact / cfg.row / cfg.data.name / name


def check_config(cfg: DictConfig) -> None:
    """Everything that can be known to be wrong before anything is built.

    Raises:
        UserError: one line: the key, what is wrong, what would be right.
    """
    if cfg.profile.name not in PROFILES:
        raise UserError(
            f"profile: expected one of {', '.join(PROFILES)}, got {cfg.profile.name!r}"
            + close_match(cfg.profile.name, PROFILES)
        )
    positive = (
        "trainer.max_epochs",
        "trainer.accumulate_grad_batches",
        "trainer.ema_every",
        "trainer.num_nodes",
        "trainer.log_every",
        "trainer.finite_check_every",
        "data.batch_size",
        "data.eval_batch_size",
        "metrics.batch_size",
        "objective.num_samples",
        "objective.eval_samples",
        "iwbo_samples",
        "eval_samples",
    )
    for key in positive:
        value = OmegaConf.select(cfg, key, default=1)  # what has not the key has no such mistake
        if value is None and key in ("iwbo_samples", "eval_samples"):
            continue
        if not _whole(value) or value < 1:
            raise UserError(f"{key}: expected a positive whole number, got {value}")
    if not _whole(cfg.objective.iwbo_samples) or cfg.objective.iwbo_samples < 0:
        raise UserError(
            "objective.iwbo_samples: expected 0 (no IWBO) or a positive whole number, got "
            f"{cfg.objective.iwbo_samples}"
        )
    _check_annealing(cfg)
    _check_metrics(cfg)
    _check_weights(cfg)
    _check_kind_of_data(cfg)
    lr = OmegaConf.select(cfg, "optimizer.lr")
    if lr is not None and not (isinstance(lr, int | float) and lr > 0):
        raise UserError(f"optimizer.lr: expected a positive number, got {lr}")
    if not isinstance(cfg.seed, int) or not 0 <= cfg.seed < 2**31:
        raise UserError(f"seed: expected a whole number from 0 to 2^31 - 1, got {cfg.seed}")
    _one_of("trainer.scored", cfg.trainer.scored, ("last", "best"))
    _one_of("trainer.memory", cfg.trainer.memory, MEMORY_MODES)
    if cfg.trainer.channels_last not in ("auto", True, False):
        raise UserError(
            f"trainer.channels_last: expected auto, true or false, got {cfg.trainer.channels_last}"
        )
    minutes = cfg.trainer.checkpoint_minutes
    if minutes is not None and not (isinstance(minutes, int | float) and minutes > 0):
        raise UserError(
            f"trainer.checkpoint_minutes: expected a positive number or null, got {minutes}"
        )
    ema = cfg.trainer.ema_decay
    if ema is not None and not 0 < ema < 1:
        raise UserError(f"trainer.ema_decay: expected a number in (0, 1) or null, got {ema}")
    clip = cfg.trainer.gradient_clip_val
    if clip is not None and not clip > 0:
        raise UserError(
            f"trainer.gradient_clip_val: expected a positive number or null, got {clip}"
        )


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(key: str, value: Any, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f"{key}: expected one of {', '.join(known)}, got {value!r}"
            + close_match(str(value), known)
        )


def _check_annealing(cfg: DictConfig) -> None:
    o = cfg.objective
    _one_of("objective.annealed", o.annealed, ANNEALED)
    if not _real(o.beta_start) or not 0 <= o.beta_start <= 1:
        raise UserError(f"objective.beta_start: expected a number from 0 to 1, got {o.beta_start}")
    if not _whole(o.beta_steps) or o.beta_steps < 0:
        raise UserError(
            "objective.beta_steps: expected 0 (none) or a whole number of steps, got "
            f"{o.beta_steps}"
        )
    if not _real(o.free_bits) or not 0 <= o.free_bits < math.inf:
        raise UserError(f"objective.free_bits: expected nats of at least 0, got {o.free_bits}")
    if o.beta_start < 1 and not o.beta_steps:
        raise UserError(
            f"objective.beta_start: {o.beta_start} is of no effect without objective.beta_steps"
        )
    if (o.beta_steps or o.free_bits) and o.num_samples != 1:
        raise UserError(
            "objective.num_samples: expected 1 with annealing or free bits, which change the ELBO, "
            f"got {o.num_samples}"
        )


def _check_metrics(cfg: DictConfig) -> None:
    m = cfg.metrics
    if not _whole(m.n) or m.n < 0 or m.n == 1:
        raise UserError(f"metrics.n: expected 0 (none) or at least 2 images, got {m.n}")
    _one_of("metrics.extractor", m.extractor, EXTRACTORS)
    reference = list(m.reference) if OmegaConf.is_list(m.reference) else [m.reference]
    if not reference:
        raise UserError("metrics.reference: expected some of train, valid, test, got []")
    for split in reference:
        _one_of("metrics.reference", split, SPLITS)
    if not isinstance(m.temperature, int | float) or not m.temperature > 0:
        raise UserError(f"metrics.temperature: expected a positive number, got {m.temperature}")
    if m.n and len(cfg.data.event_shape) != 3:
        raise UserError(f"metrics.n: scores of samples are for images, not data={cfg.data.name}")


def _check_weights(cfg: DictConfig) -> None:
    if cfg.weights.source is not None:
        _one_of("weights.source", cfg.weights.source, WEIGHT_SOURCES)
    elif cfg.weights.path is not None:
        raise UserError("weights.path: of no effect without weights.source=official")


def _check_kind_of_data(cfg: DictConfig) -> None:
    """Models of vectors take features, of images a shape, of sets a number of points."""
    event = list(cfg.data.event_shape)
    images, sets = ("shape" in cfg.model.builder, "num_points" in cfg.model.builder)
    if sets != (len(event) == 2):
        advice = "point sets such as data=spatial_digits" if sets else "model=set_flow"
        raise UserError(
            f"model={cfg.model.name} is {'' if sets else 'not '}for sets of points, and "
            f"data={cfg.data.name} has events of shape {event}; choose {advice}"
        )
    if images and len(event) != 3:
        raise UserError(
            f"model={cfg.model.name} is for images, and data={cfg.data.name} has events of shape "
            f"{event}; choose image data such as data=photo_patches, or model=coupling_flow"
        )
    if "num_levels" in cfg.model.builder and "num_levels" not in cfg.data:
        raise UserError(
            f"model={cfg.model.name} is for data of levels, and data={cfg.data.name} has none; "
            "choose data=digits_binary or mnist, or model=coupling_flow"
        )
    if not images and not sets and len(event) != 1:
        raise UserError(
            f"model={cfg.model.name} is for vectors, and data={cfg.data.name} has events of shape "
            f"{event}; choose model=pool_flow, realnvp or glow"
        )
