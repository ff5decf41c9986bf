"""The random variables that together say all about a batch: a tape of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Latent:
    """One of the variables that together say all about a batch.

    Attributes:
        value: (B, ...), standardised where its density is of a location-scale family.
        normal: whether it is standard normal under the model; all such ones turn together on a
            great circle.
        layer: where it comes from, such as ``base`` or ``7.Slice``.
    """

    value: Tensor
    normal: bool
    layer: str


class Tape:
    """Latents in the order in which inference writes them; generation reads them backwards.

    Attributes:
        layer: the name under which the next latents are written.
    """

    def __init__(self, latents: list[Latent] | None = None) -> None:
        self.latents = list(latents or [])
        self.layer = "base"

    def write(self, value: Tensor, normal: bool = False) -> None:
        """Put a latent on top."""
        self.latents.append(Latent(value, normal, self.layer))

    def read(self) -> Tensor:
        """Take the latent on top."""
        return self.latents.pop().value
