"""Configuration: composing it, its options, and the hash of what a run computes."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from surflow.errors import UserError, close_match

PROFILES = ("paper", "short", "smoke")
"""From the largest budget to the smallest."""

FREE = "free"
"""The profile of a run that is no row of a table, in the place of paper."""

HASHED_GROUPS = (
    "data",
    "model",
    "surjection",
    "optimizer",
    "schedule",
    "objective",
    "trainer",
    "callbacks",
)
"""Groups that decide what a run computes."""

OPEN_GROUPS = (*HASHED_GROUPS, "measures", "logger", "profiler")
"""Groups of `_target_` nodes: an option of the target is set without it standing in the YAML."""

NODE_GROUPS = ("callbacks", "measures", "logger")
"""Groups that hold several nodes by name."""

OPTIONAL_GROUPS: dict[str, set[str]] = {"surjection": {"name"}, "profiler": set()}
"""Groups whose node may be left out, with the keys that it then has."""

TRAINER_RUNTIME = frozenset(
    "accelerator strategy devices num_nodes logger callbacks profiler plugins default_root_dir "
    "log_every_n_steps deterministic benchmark detect_anomaly barebones inference_mode "
    "use_distributed_sampler num_sanity_val_steps enable_progress_bar enable_model_summary "
    "enable_checkpointing enable_autolog_hparams model_registry sync_batchnorm".split()
)
"""Lightning's options of where and how a run is carried out; the others change what it computes."""


def _per_profile(values: DictConfig, *, _root_: DictConfig) -> Any:
    """The entry for the profile, or for the nearest larger one that is given."""
    profile = _root_.profile.name
    known = "paper" if profile == FREE else profile
    order = PROFILES[: PROFILES.index(known) + 1] if known in PROFILES else ()
    for name in reversed(order):
        if name in values:
            return values[name]
    raise UserError(f"per_profile: no value for profile {profile!r} among {list(values)}")


def _by(key: str, values: DictConfig, default: Any) -> Any:
    """values[key] where it is there, else the default."""
    return values[key] if key in values else default


def _joined(*names: str) -> str:
    """The names that are not none, such as spline_flow-abs."""
    return "-".join(name for name in names if name != "none")


def register_resolvers() -> None:
    """Make ``${per_profile:{paper: 10, smoke: 1}}``, ``${by:key,{a: 1},default}``,
    ``${joined:a,b}`` and the open groups known."""
    from hydra.core.config_store import ConfigStore

    OmegaConf.register_new_resolver("per_profile", _per_profile, replace=True)
    OmegaConf.register_new_resolver("by", _by, replace=True)
    OmegaConf.register_new_resolver("joined", _joined, replace=True)
    node = OmegaConf.create({group: {} for group in OPEN_GROUPS})
    for group in OPEN_GROUPS:
        OmegaConf.set_struct(node[group], False)
    ConfigStore.instance().store(name="open", node=node)


def project_root() -> Path:
    """The folder that holds conf/ and experiments/: the checkout, or the installed package."""
    here = Path(__file__).resolve().parent
    for root in (here.parent.parent, here):
        if (root / "conf").is_dir():
            return root
    raise UserError(f"no conf/ folder next to {here}: install surflow from its repository")


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


# `_target_` nodes


def target_of(node: Mapping[str, Any], where: str = "") -> Callable[..., Any]:
    """The class or function that a node names by `_target_`.

    Raises:
        UserError: for a name that cannot be imported.
    """
    first, *names = node["_target_"].split(".")
    try:
        found: Any = import_module(first)
        for i, name in enumerate(names, 1):
            if isinstance(found, ModuleType) and name not in vars(found):
                import_module(".".join([first, *names[:i]]))
            found = getattr(found, name)
    except Exception as error:  # of the imported module, too
        raise UserError(f"{where}: cannot import {node['_target_']!r} ({error})") from error
    return found


def options_of(target: Callable[..., Any]) -> tuple[dict[str, Any], bool]:
    """The named options of a class or function with their defaults, and whether any other is
    taken. An option without a default has ``inspect.Parameter.empty``.

    A class whose ``**options`` go to its parent has the parent's options too.
    """
    kinds = inspect.Parameter
    calls = (
        [c.__init__ for c in target.__mro__ if "__init__" in vars(c) and c is not object]
        if inspect.isclass(target)
        else [target]
    )
    found: dict[str, Any] = {}
    for call in calls:
        parameters = inspect.signature(call).parameters
        for name, p in parameters.items():
            if name != "self" and p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY):
                found.setdefault(name, p.default)
        if not any(p.kind is kinds.VAR_KEYWORD for p in parameters.values()):
            return found, False
    return found, True


def nodes(config: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every `_target_` node of a plain config with its key, outer nodes first."""
    if isinstance(config, dict):
        if config.get("_target_"):
            yield where, config
        items: Any = config.items()
    elif isinstance(config, list):
        items = enumerate(config)
    else:
        return
    for key, value in items:
        yield from nodes(value, f"{where}.{key}" if where else str(key))


def check_options(config: Mapping[str, Any], given: Mapping[str, Collection[str]]) -> None:
    """Refuse a node without a target, and a key that the target of its node does not take.

    Args:
        config: resolved.
        given: options that the run sets itself, by the key of the node.

    Raises:
        UserError: one line: the key, its target, the nearest known options.
    """
    for group in OPEN_GROUPS:
        several = group in NODE_GROUPS
        content = (config[group] or {}) if several else {"": config[group]}
        for key, node in content.items():
            where = f"{group}.{key}" if several else group
            if node is None and (several or group in OPTIONAL_GROUPS):
                continue
            if not isinstance(node, dict) or not (
                node.keys() <= OPTIONAL_GROUPS.get(group, set()) or node.get("_target_")
            ):
                raise UserError(
                    f"{where}: expected a node with _target_, got {node}; {group}=<name> chooses "
                    "one"
                )
    for where, node in nodes({group: config[group] for group in OPEN_GROUPS}):
        options, others = options_of(target_of(node, where))
        known = [key for key in options if key not in given.get(where, ())]
        for key in node:
            if key in known or key == "name" or key.startswith("_"):
                continue
            if others and key not in options:
                continue
            elsewhere = [
                f"{at}.{key}"
                for at, keys in config.items()
                if isinstance(keys, dict) and at not in OPEN_GROUPS and key in keys
            ]
            hint = f"; did you mean {elsewhere[0]!r}?" if elsewhere else close_match(key, known)
            raise UserError(
                f"{where}.{key}: unknown option of {node['_target_']}{hint or ';'} Known: "
                f"{', '.join(known)}"
            )


def with_defaults(
    config: Mapping[str, Any], given: Mapping[str, Collection[str]]
) -> dict[str, Any]:
    """A resolved config with every option that its nodes leave at the default of their target,
    but those that the run sets itself (``given``, by the key of the node)."""
    filled = deepcopy(dict(config))
    for where, node in nodes({group: filled[group] for group in OPEN_GROUPS}):
        for key, default in options_of(target_of(node, where))[0].items():
            if default is not inspect.Parameter.empty and key not in given.get(where, ()):
                node.setdefault(key, default)
    return filled


def build(node: Any, **given: Any) -> Any:
    """The object that a node describes; None for a node without a target.

    ``name`` labels a node; it is handed on only where the target takes it.

    Args:
        node: of a config, or plain.
        given: further arguments, such as ``seed``.

    Raises:
        UserError: for options that the target refuses.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if not plain or not plain.get("_target_"):
        return None
    try:
        return instantiate(_without_labels(plain), _convert_="all", **given)
    except InstantiationException as error:
        cause = error.__cause__ or error
        if isinstance(cause, TypeError):
            raise UserError(f"{plain['_target_']}: {cause}") from error
        raise UserError(str(cause)) from error


def _without_labels(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_labels(value) for value in node]
    if not isinstance(node, dict):
        return node
    node = {key: _without_labels(value) for key, value in node.items()}
    if node.get("_target_") and "name" in node and "name" not in options_of(target_of(node))[0]:
        del node["name"]
    return node


# What makes two runs the same run


def config_hash(cfg: DictConfig | Mapping[str, Any]) -> str:
    """16 hex digits of what a run computes: its seed, the source of released weights, and the
    options that differ from the defaults of their targets, without those that change no result.

    A target names the latter itself, as ``runtime``.
    """
    plain = resolved(cfg) if isinstance(cfg, DictConfig) else cfg
    found: dict[str, Any] = {"seed": plain["seed"]}
    if plain["weights"]["source"] is not None:
        found["weights"] = plain["weights"]["source"]
    for group in HASHED_GROUPS:
        content = computed(plain.get(group))
        if content:
            found[group] = content
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def computed(node: Any) -> Any:
    """A node without what changes no result; None for one that changes none at all."""
    if isinstance(node, list):
        return [computed(value) for value in node]
    if not isinstance(node, dict):
        return node
    if not node.get("_target_"):
        parts = {key: computed(value) for key, value in node.items()}
        return {key: value for key, value in parts.items() if value is not None}
    target = target_of(node)
    defaults, _ = options_of(target)
    runtime = getattr(target, "runtime", ())
    if runtime == "all":
        return None
    if node["_target_"] == "pytorch_lightning.Trainer":
        runtime = TRAINER_RUNTIME
    empty = inspect.Parameter.empty
    return {
        key: computed(value)
        for key, value in node.items()
        if key not in ("_partial_", "_convert_")
        and key not in runtime
        and not (key in defaults and defaults[key] is not empty and _same(value, defaults[key]))
    }


def _same(value: Any, default: Any) -> bool:
    default = list(default) if isinstance(default, tuple) else default
    return value == default and isinstance(value, bool) == isinstance(default, bool)


def option(config: Mapping[str, Any], key: str) -> Any:
    """The value at a key such as ``optimizer.lr`` of a plain config, else the default of the target
    of its node. A group is its ``name``.

    Raises:
        KeyError: for what is neither there nor a default.
    """
    *parents, name = key.split(".")
    node: Any = config
    for parent in parents:
        node = node.get(parent) if isinstance(node, Mapping) else None
    if isinstance(node, Mapping) and name in node:
        value = node[name]
        return value["name"] if isinstance(value, Mapping) and "name" in value else value
    default = inspect.Parameter.empty
    if isinstance(node, Mapping) and node.get("_target_"):
        with contextlib.suppress(UserError):  # a target that is gone, in an old record
            default = options_of(target_of(node))[0].get(name, default)
    if default is inspect.Parameter.empty:
        raise KeyError(key)
    return list(default) if isinstance(default, tuple) else default


def computed_of(config: Mapping[str, Any], group: str) -> Any:
    """What :func:`config_hash` counts in a group of a plain config; None where nothing."""
    content = config.get(group) if group in (*HASHED_GROUPS, "weights") else None
    try:
        return computed(content)
    except UserError:  # a target that is gone, in an old record
        return content


def run_dir(cfg: DictConfig, known: str | None = None) -> Path:
    """runs/<profile>/<artefact>/<row>/<data>/seed<seed>-<hash>: it follows from the config.

    Args:
        known: the hash of the config, where it is known.
    """
    name = f"seed{cfg.seed}-{(known or config_hash(cfg))[:8]}"
    return Path(cfg.run.root) / cfg.profile.name / cfg.artefact / cfg.row / cfg.data.name / name
