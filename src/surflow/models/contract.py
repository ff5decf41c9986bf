"""What a builder of a model takes of the data: their kind, and facts about them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from surflow.errors import UserError

FACTS: dict[str, Callable[[Any], Any]] = {
    "features": lambda data: math.prod(data.event_shape),
    "shape": lambda data: tuple(data.event_shape),
    "num_levels": lambda data: data.num_levels,
    "num_points": lambda data: data.event_shape[0],
    "num_features": lambda data: data.event_shape[1],
    "width": lambda data: data.width,
    "low": lambda data: data.box[0],
    "high": lambda data: data.box[1],
}
"""Facts about data, by the name of the builder's parameter that they fill."""

DIMS = {"features": 1, "shape": 3, "num_points": 2}
"""Dimensions of a row of the data for builders of vectors, images, sets."""

NOUNS = {1: "vectors", 2: "sets of points", 3: "images"}

ADVICE = {
    1: "model=coupling_flow is for vectors",
    2: "model=set_flow is for sets of points",
    3: "model=pool_flow, realnvp or glow are for images",
}


class SurjectionError(ValueError):
    """A surjection that does not fit a model; the message follows the name of the model."""


@dataclass(frozen=True)
class Takes:
    """What a builder takes.

    Attributes:
        kinds: of data: points, table, image, set.
        facts: its parameters that facts about the data fill.
        surjection: its parameter that takes the chosen surjection; None: it takes none.
        between: whether the surjection stands between the scales of an image, as a function of
            their shape; else it is the first layer.
    """

    kinds: tuple[str, ...]
    facts: tuple[str, ...]
    surjection: str | None = None
    between: bool = False

    @property
    def given(self) -> tuple[str, ...]:
        """The parameters of the builder that are no options."""
        return self.facts if self.surjection is None else (*self.facts, self.surjection)

    def check(self, name: str, data: Any) -> None:
        """Refuse data of another kind or shape.

        Args:
            name: of the model, for the message.
            data: a DataModule, not yet set up.

        Raises:
            UserError: one line with what would be right.
        """
        dims = next(DIMS[fact] for fact in self.facts if fact in DIMS)
        event = list(data.event_shape)
        if data.kind not in self.kinds or len(event) != dims:
            what = f"{' and '.join(self.kinds)} data" if len(event) == dims else NOUNS[dims]
            raise UserError(
                f"model={name} is for {what}, and data={data.name} is {data.kind} data of shape "
                f"{event}; {ADVICE.get(len(event), 'choose other data')}"
            )
        if "num_levels" in self.facts and data.num_levels is None:
            raise UserError(
                f"model={name} is for data of levels, and data={data.name} has none; choose "
                "data=digits_binary or mnist, or model=coupling_flow"
            )

    def of(self, data: Any) -> dict[str, Any]:
        """The facts about these data, by parameter."""
        return {fact: FACTS[fact](data) for fact in self.facts}


def takes(
    *kinds: str, facts: tuple[str, ...], surjection: str | None = None, between: bool = False
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare what a builder takes; see :class:`Takes`.

    >>> @takes("image", facts=("shape", "num_levels"))
    ... def model(shape, num_levels): ...
    >>> model.takes.kinds
    ('image',)
    """

    def declare(builder: Callable[..., Any]) -> Callable[..., Any]:
        builder.takes = Takes(kinds, facts, surjection, between)
        return builder

    return declare
