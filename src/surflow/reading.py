"""Typed access to the fields of a mapping that a file held (JSON, YAML). Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

REQUIRED: Any = object()


def shown(value: Any) -> str:
    """A value in a message: its type and the first characters of it."""
    return "nothing" if value is None else f"{type(value).__name__} {value!r}"[:80]


class Fields:
    """One mapping of a file. A method a type: it returns the value at a key, or raises.

    Without ``default`` a key must be there. With one, an absent key and a null give the default.

    Args:
        content: the mapping, as parsed.
        error: makes the exception from a reason; it adds the file.
        where: the place of the mapping in the file, such as ``rows[0]``; empty for the file itself.
        known: the keys there may be; None: any.
    """

    def __init__(
        self,
        content: Any,
        error: Callable[[str], Exception],
        where: str = "",
        known: Collection[str] | None = None,
    ) -> None:
        self._error, self.where = error, where
        if not isinstance(content, dict):
            raise error(f"{where or 'the file'} must be a mapping, got {shown(content)}")
        self.content = content
        for key in content:
            if known is not None and key not in known:
                raise self.error(f"unknown key {key!r}; known keys: {', '.join(known)}")

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def error(self, reason: str) -> Exception:
        """The exception for a fault of this mapping."""
        return self._error(f"{self.where} {reason}".strip())

    def name(self, key: str) -> str:
        """A key with the place of its mapping."""
        return f"{self.where}.{key}" if self.where else key

    def _read(self, key: str, default: Any, want: str, good: Callable[[Any], Any]) -> Any:
        if key not in self.content and default is REQUIRED:
            raise self._error(f"field {self.name(key)!r} is missing; it must be {want}")
        value = self.content.get(key)
        if value is None and default is not REQUIRED:
            return default
        if not good(value):
            raise self._error(f"field {self.name(key)!r} must be {want}, got {shown(value)}")
        return value

    def text(self, key: str, default: Any = REQUIRED, pattern: str | None = None) -> Any:
        """A string that is not empty, without the space around it."""
        want = f"a string matching {pattern}" if pattern else "a non-empty string"
        expression = pattern or r"(?s).*\S.*"
        value = self._read(
            key, default, want, lambda v: isinstance(v, str) and re.fullmatch(expression, v)
        )
        return value.strip() if isinstance(value, str) else value

    def word(self, key: str, known: Collection[str], default: Any = REQUIRED) -> Any:
        """One of the known strings."""
        return self._read(key, default, f"one of {', '.join(known)}", lambda v: v in known)

    def number(self, key: str, default: Any = REQUIRED, least: float = -math.inf) -> Any:
        """A finite number as a float."""
        want = "a finite number" + ("" if least == -math.inf else f", {least:g} or more")
        value = self._read(
            key, default, want, lambda v: _is(v, (int, float)) and math.isfinite(v) and v >= least
        )
        return float(value) if isinstance(value, int) else value

    def whole(self, key: str, default: Any = REQUIRED, most: float = math.inf) -> Any:
        """An integer from 0 to ``most``."""
        want = "0 or more" if most == math.inf else f"from 0 to {most}"
        return self._read(
            key, default, f"an integer, {want}", lambda v: _is(v, int) and 0 <= v <= most
        )

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """True or false."""
        return self._read(key, default, "true or false", lambda v: isinstance(v, bool))

    def mapping(self, key: str, default: Any = REQUIRED) -> Any:
        """A mapping, as parsed."""
        return self._read(key, default, "a mapping", lambda v: isinstance(v, dict))

    def each(self, key: str, default: Any = REQUIRED) -> Iterator[tuple[str, Fields]]:
        """The mappings in the mapping at a key, by name."""
        for name, item in self.mapping(key, default).items():
            yield name, Fields(item, self._error, self.name(f"{key}.{name}"))

    def items(self, key: str, known: Collection[str], required: bool = False) -> list[Fields]:
        """The mappings in the list at a key; absent and null are the empty list."""
        want = "a non-empty list" if required else "a list"
        content = self._list(key, want, required, lambda item: True)
        return [
            Fields(item, self._error, self.name(f"{key}[{i}]"), known)
            for i, item in enumerate(content)
        ]

    def texts(self, key: str, known: Collection[str] | None = None) -> tuple[str, ...]:
        """The strings in the list at a key: of any kind, or one or more of the known ones."""
        want = "a list of strings" if known is None else f"a list of some of {', '.join(known)}"

        def good(item: Any) -> bool:
            return isinstance(item, str) and (known is None or item in known)

        return tuple(self._list(key, want, known is not None, good))

    def _list(self, key: str, want: str, required: bool, good: Callable[[Any], bool]) -> list:
        default = REQUIRED if required else []
        content = self._read(
            key, default, want, lambda v: isinstance(v, list) and (v or not required)
        )
        for item in content:
            if not good(item):
                raise self._error(f"field {self.name(key)!r} must be {want}, got {shown(item)}")
        return content


def _is(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)
