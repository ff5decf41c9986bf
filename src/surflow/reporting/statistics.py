"""Intervals over seeds: of one more run, and of a difference paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
"""The coverage of every interval."""


@dataclass(frozen=True)
class Interval:
    """A mean over `count` values, and an interval around it.

    The ends are infinite where a single value says nothing of its spread.
    """

    mean: float
    low: float
    high: float
    count: int

    def text(self, digits: int, sign: bool = False) -> str:
        """The ends, as in "3.012 to 3.047"."""
        style = f"{'+' if sign else ''}.{digits}f"
        return f"{self.low:{style}} to {self.high:{style}}"


def of_one_more(values: Sequence[float]) -> Interval:
    r"""The prediction interval for one more run, of normal values.

    .. math:: \bar x \pm t_{n-1} \, s \, \sqrt{1 + 1/n}
    """
    return _interval(values, lambda s, n: s * math.sqrt(1 + 1 / n))


def of_mean(values: Sequence[float]) -> Interval:
    r"""The confidence interval of the mean, :math:`\bar x \pm t_{n-1} \, s / \sqrt n`."""
    return _interval(values, lambda s, n: s / math.sqrt(n))


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """The interval of the mean of ``one - other`` over the seeds that both have; None without any.

    Args:
        one, other: values by seed.
    """
    seeds = [seed for seed in one if seed in other]
    return of_mean([one[seed] - other[seed] for seed in seeds]) if seeds else None


def _interval(values: Sequence[float], error: Callable[[float, int], float]) -> Interval:
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    from scipy.special import stdtrit  # here: a report without intervals starts faster

    wide = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * error(statistics.stdev(values), n)
    return Interval(mean, mean - wide, mean + wide, n)
