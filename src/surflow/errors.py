"""Errors that a user caused or can mend; a command prints one line for them and exits with 2."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """What is wrong, where, and what would be right, in one line."""


class Stop(SystemExit):
    """The end of a command that has printed why: exit code and message."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message


@contextlib.contextmanager
def named_errors(where: str) -> Iterator[None]:
    """Name the node of the config whose options a block builds something of.

    Raises:
        UserError: for a TypeError or an AttributeError in the block.
    """
    try:
        yield
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: an option does not fit ({error})") from error


def close_match(word: str, known: Iterable[str]) -> str:
    """', did you mean ...?' where a known word is close, else an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {match[0]!r}?" if match else ""


def check_choice(
    name: str, value: object, known: Iterable[str], error: type[Exception] = ValueError
) -> None:
    """Raise ``error`` unless ``value`` is one of ``known``.

    >>> check_choice("unit", "bits", ("nats", "bpd"))
    Traceback (most recent call last):
    ValueError: unit: expected one of nats, bpd, got 'bits'
    """
    known = list(known)
    if value not in known:
        words = ["null" if word is None else str(word) for word in known]
        hint = close_match(str(value), words)
        raise error(f"{name}: expected one of {', '.join(words)}, got {value!r}{hint}")


def is_whole(value: object, least: int = 1) -> bool:
    """Whether a value is a whole number of at least ``least``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_whole(name: str, value: object, least: int = 1, null: bool = False) -> None:
    """Raise ValueError unless ``value`` is a whole number >= ``least``, or None where allowed.

    >>> check_whole("data.train_size", 0, null=True)
    Traceback (most recent call last):
    ValueError: data.train_size: expected a positive whole number or null, got 0
    """
    if not (is_whole(value, least) or (null and value is None)):
        what = "a positive whole number" if least == 1 else f"a whole number >= {least}"
        raise ValueError(f"{name}: expected {what}{' or null' if null else ''}, got {value!r}")
