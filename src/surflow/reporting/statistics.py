"""Intervals over seeds, and what a difference paired by seed or by test point says.

Holm 1979 (a simple sequentially rejective multiple test procedure); Fisher 1935 (sign flips).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

LEVEL = 0.95  # the coverage of every interval
POWER = 0.8  # of the test that finds the smallest difference
FEW = 12  # pairs up to which all flips of signs are counted


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


def differences(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """``one - other`` at every seed that both have.

    Args:
        one, other: values by seed.
    """
    return [one[seed] - other[seed] for seed in one if seed in other]


def paired_difference(one: Mapping[int, float], other: Mapping[int, float]) -> Interval | None:
    """The interval of the mean of :func:`differences`; None without a common seed."""
    found = differences(one, other)
    return of_mean(found) if found else None


def paired_t_p(values: Sequence[float]) -> float | None:
    r"""Two-sided p of the paired t test that differences have mean 0; None of fewer than two.

    .. math:: p = P(|T_{n-1}| \ge |\bar x| \sqrt n / s)
    """
    if len(values) < 2:
        return None
    mean, s = float(np.mean(values)), float(np.std(values, ddof=1))
    if s == 0:
        return float(mean == 0)
    from scipy.special import stdtr

    return float(2 * stdtr(len(values) - 1, -abs(mean) * math.sqrt(len(values)) / s))


def sign_flip_p(values: Sequence[float]) -> float | None:
    r"""Two-sided p of differences with symmetric distribution about 0, exact: the share of the
    :math:`2^n` flips of signs whose mean is as far from 0. None of fewer than two, and of more than
    `FEW`. It cannot be below :math:`2^{1-n}`.
    """
    if not 2 <= len(values) <= FEW:
        return None
    signs = np.array(list(product((1.0, -1.0), repeat=len(values))))
    sums = np.abs(signs @ np.asarray(values, float))
    return float(np.mean(sums >= sums[0] - 1e-12 * np.abs(values).sum()))


def smallest_found(values: Sequence[float]) -> float:
    r"""The smallest mean that n differences of this spread show with power 0.8 at level 0.05.

    The paired t test, two-sided: :math:`\delta s / \sqrt n` with
    :math:`P(T_{n-1}(\delta) > t_{n-1, 0.975}) = 0.8`, T noncentral. Infinite for one difference.
    """
    n = len(values)
    if n < 2:
        return math.inf
    from scipy.special import nctdtrinc, stdtrit

    edge = stdtrit(n - 1, 0.5 + LEVEL / 2)
    return float(nctdtrinc(n - 1, 1 - POWER, edge)) * float(np.std(values, ddof=1)) / math.sqrt(n)


def holm(ps: Sequence[float]) -> list[float]:
    """The p values of several tests, adjusted so that any false finding among them is as likely as
    the level says (Holm 1979)."""
    adjusted = [0.0] * len(ps)
    least = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        least = max(least, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = least
    return adjusted


def _interval(values: Sequence[float], error: Callable[[float, int], float]) -> Interval:
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Interval(mean, -math.inf, math.inf, n)
    from scipy.special import stdtrit  # here: a report without intervals starts faster

    wide = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * error(float(np.std(values, ddof=1)), n)
    return Interval(mean, mean - wide, mean + wide, n)
