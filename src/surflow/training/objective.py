"""What is maximised in training, and which bounds are reported."""

from __future__ import annotations

import math
from dataclasses import dataclass

from surflow.errors import check_choice, check_whole, is_whole
from surflow.flow import Flow
from surflow.variational import ANNEALED, NEVER_A_BOUND, linear_warm_up

UNITS = ("nats", "bpd")
SCORED = ("last", "best")


@dataclass(frozen=True)
class Objective:
    """What is maximised, in which unit it is shown, and what is reported.

    Attributes:
        num_samples: K draws a point in training; 1 is the ELBO, more the IWBO. Of no effect on an
            exact flow.
        eval_samples: draws a point averaged in the reported ELBO.
        iwbo_samples: K of the reported IWBO where the model is a bound; 0 leaves it out.
        unit: nats (per data point) or bpd (bits a dimension); None: the data's own.
        annealed: of models with a VAE layer: beta times the divergence, or the joint log p(x, z);
            latent_mean, which is no bound at any beta: :func:`surflow.variational.latent_mean`.
        beta_start: beta of the first step.
        beta_steps: optimizer steps in which beta grows to 1; 0: no annealing.
        free_bits: nats that each latent dimension, or a divergence without parts, costs nothing.
        scored: whose weights are scored: of the last epoch, or the best on validation.

    Raises:
        ValueError: for a value out of range.
    """

    num_samples: int = 1
    eval_samples: int = 1
    iwbo_samples: int = 0
    unit: str | None = None
    annealed: str = "divergence"
    beta_start: float = 1.0
    beta_steps: int = 0
    free_bits: float = 0.0
    scored: str = "last"

    def __post_init__(self) -> None:
        for key in ("num_samples", "eval_samples"):
            check_whole(f"objective.{key}", getattr(self, key))
        if not is_whole(self.iwbo_samples, 0):
            raise ValueError(
                "objective.iwbo_samples: expected 0 (no IWBO) or a positive whole number, got "
                f"{self.iwbo_samples}"
            )
        check_choice("objective.unit", self.unit, (*UNITS, None))
        check_choice("objective.scored", self.scored, SCORED)
        check_choice("objective.annealed", self.annealed, ANNEALED)
        if not _real(self.beta_start) or not 0 <= self.beta_start <= 1:
            raise ValueError(
                f"objective.beta_start: expected a number from 0 to 1, got {self.beta_start}"
            )
        if not is_whole(self.beta_steps, 0):
            raise ValueError(
                "objective.beta_steps: expected 0 (none) or a whole number of steps, got "
                f"{self.beta_steps}"
            )
        if not _real(self.free_bits) or not 0 <= self.free_bits < math.inf:
            raise ValueError(
                f"objective.free_bits: expected nats of at least 0, got {self.free_bits}"
            )
        if self.beta_start < 1 and not self.beta_steps:
            raise ValueError(
                f"objective.beta_start: {self.beta_start} is of no effect without "
                "objective.beta_steps"
            )
        if self.anneals and self.num_samples != 1:
            raise ValueError(
                "objective.num_samples: expected 1 with annealing or free bits, which change the "
                f"ELBO, got {self.num_samples}"
            )

    @property
    def anneals(self) -> bool:
        """Whether the training loss differs from the bound; validation has the bound itself."""
        return bool(self.beta_steps or self.free_bits or self.annealed in NEVER_A_BOUND)

    def beta(self, step: int) -> float:
        """Beta at an optimizer step; see :func:`surflow.variational.annealed_elbo`."""
        return linear_warm_up(step, self.beta_start, self.beta_steps)

    def estimator(self, flow: Flow) -> str:
        """nll, elbo or iwbo<K>: what the number is. All are shown negated: lower is better."""
        if not flow.lower_bound:
            return "nll"
        return "elbo" if self.num_samples == 1 else f"iwbo{self.num_samples}"


def scale_of(unit: str, num_dims: int) -> float:
    """Nats of one data point times this is the unit."""
    return 1.0 if unit == "nats" else 1.0 / (num_dims * math.log(2.0))


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
