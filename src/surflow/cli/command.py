"""What every command shares: Hydra's entry point, and one clear line for a mistake."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from surflow.cli.sweep import INTERRUPTED, job, outcomes, sweeping
from surflow.config import conf_dir, register_resolvers
from surflow.errors import Stop, UserError, close_match


def command(
    config_name: str, folder: str | None = None
) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Make a command of a function of a config; see :func:`guarded`.

    Args:
        config_name: a file of the folder.
        folder: of the YAML files; None: conf/.
    """

    def wrap(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @hydra.main(config_path=folder or conf_dir(), config_name=config_name, version_base="1.3")
        @functools.wraps(function)
        def run(cfg: DictConfig) -> Any:
            def once() -> Any:
                with one_line_errors():  # inside Hydra, which would print lines of its own
                    return function(cfg)

            return job(once) if sweeping() else once()

        def main() -> None:
            with outcomes(config_name):
                run()

        return guarded(main)

    return wrap


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
    """Turn a user's mistake into one line and exit code 2; a fault of ours keeps its traceback."""
    from hydra.errors import HydraException

    debug = os.environ.get("SURFLOW_DEBUG")
    try:
        yield
    except KeyboardInterrupt:
        _fail("interrupted; give the same command again to resume", INTERRUPTED)
    except (UserError, ValueError, HydraException, OmegaConfBaseException, OSError) as error:
        if debug:
            raise
        cause = user_error_of(error)
        if cause is not None:
            _fail(one_line(cause))
        if isinstance(error, HydraException | OmegaConfBaseException):
            _fail(_config_message(error))
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            _fail(f"{one_line(error)}: free some space, then give the same command again to resume")
        _fail(one_line(error))


def user_error_of(error: BaseException | None) -> BaseException | None:
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
    raise Stop(code, message)


def one_line(text: object, limit: int = 400) -> str:
    """The text on one line, cut at ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


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
    """The options of a group of conf/: data, model, experiment, and so on."""
    folder = Path(conf_dir()) / group
    files = [p.relative_to(folder).with_suffix("") for p in sorted(folder.rglob("*.yaml"))]
    return [p.as_posix() for p in files if not p.name.startswith("_")]
