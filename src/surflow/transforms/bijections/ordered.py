"""Sorted vectors and the whole space."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surflow.checks import require
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import sum_event
from surflow.distributions.order import feature_index
from surflow.transforms.base import Bijection, Example, generated_by


class OrderedToReal(Bijection):
    r"""Map ascending values onto the whole space: the first one, then logarithms of the steps.

    .. math:: z_1 = x_1, \quad z_i = \log(x_i - x_{i-1}), \qquad
              \mathrm{ldj} = -\sum_{i > 1} z_i

    Exact. After :class:`SortInference` it lets any flow and any base follow: without it the model
    would lose the mass that it puts on latents that are not sorted. Values are ordered along
    dimension 1; equal ones have no finite image.

    Raises:
        ValueError: from ``forward`` for values that do not ascend strictly.

    Cost: O(D) a row; forward and inverse alike.
    Source: the ordered vectors of Carpenter et al. 2017, Stan, doi 10.18637/jss.v076.i01.

    >>> OrderedToReal()(torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist()
    [[1.0, 0.0, 0.0]]
    """

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        steps = x.diff(dim=1)
        require(steps > 0, "values that ascend along dimension 1", steps)
        logs = steps.log()
        return torch.cat([x[:, :1], logs], dim=1), -sum_event(logs)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return torch.cat([z[:, :1], z[:, 1:].exp()], dim=1).cumsum(1)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, context), -sum_event(z[:, 1:])

    @classmethod
    def example(cls) -> Example:
        wide = DiagonalNormal((3,), loc=[0.0, -0.3, 0.2], scale=[1.3, 1.2, 1.2])

        def sample(n: int) -> tuple[Tensor, Tensor]:
            z, log_q = wide.sample_and_log_prob(n)
            z[:, 1:] = z[:, 1:].exp()  # log-normal steps
            return z.cumsum(1), log_q - z[:, 1:].log().sum(1)

        return Example(cls(), sample, StandardNormal((3,)))


class RunningMaxToReal(Bijection):
    r"""Map ascending values onto the whole space: the inverse of a soft running maximum.

    .. math:: z_1 = x_1, \quad z_i = x_i + s \log(1 - e^{-(x_i - x_{i-1}) / s}), \qquad
              x_i = s \log \sum_{j \le i} e^{z_j / s}, \qquad
              \mathrm{ldj} = \sum_{i > 1} (x_i - z_i) / s

    Exact. As :class:`OrderedToReal` it lets any flow and any base follow :class:`SortInference`,
    but z_i is x_i up to a few s, and x_i itself where the step before it is long. What depends on
    the location of a value then depends on its own latent alone. Steps that are exponential with
    mean s become logistic around the value before. Elements are ordered along dimension 1; where
    they are vectors, by one feature, and the others are unchanged. Equal values have no finite
    image.

    Args:
        softness: s, in units of x; a typical step.
        by: the feature that ascends, an index into the shape of an element; the first if left out.

    Raises:
        ValueError: for a softness that is not positive, an index that does not point at one
            feature, or, from ``forward``, values that do not ascend strictly.

    Cost: O(D) a row; forward and inverse alike, both without a loop over the elements.
    Source: the log-sum-exp as a soft maximum: Boyd & Vandenberghe 2004, Convex Optimization, Sec.
    3.1.5; taken cumulatively it is this library's.

    >>> layer = RunningMaxToReal(softness=0.1)
    >>> z, ldj = layer(torch.tensor([[1.0, 1.1, 3.0]]))
    >>> z, ldj  # log(e - 1) / 10 = 0.0541
    (tensor([[1.0000, 1.0541, 3.0000]]), tensor([0.4587]))
    """

    def __init__(self, softness: float, by: int | Sequence[int] | None = None) -> None:
        super().__init__()
        if not 0 < softness < math.inf:
            raise ValueError(f"RunningMaxToReal: expected a softness > 0, got {softness}")
        self.softness = float(softness)
        self.by = by if by is None or isinstance(by, int) else tuple(by)

    def _key(self, value: Tensor) -> Tensor:
        by = feature_index(self.by, tuple(value.shape[2:]), type(self).__name__)
        return value[(slice(None), slice(None), *by)]

    def _with_key(self, value: Tensor, key: Tensor) -> Tensor:
        """The elements with another value of their feature."""
        if value.dim() == 2:
            return key
        shape = value.shape[2:]
        place = 0
        for index, size in zip(feature_index(self.by, tuple(shape), ""), shape, strict=True):
            place = place * size + index
        flat = torch.select_scatter(value.flatten(2), key, dim=2, index=place)
        return flat.unflatten(2, shape)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        key = self._key(x)
        steps = key.diff(dim=1)
        require(steps > 0, "values that ascend along dimension 1", steps)
        logs = torch.log(-torch.expm1(-steps / self.softness))
        z = torch.cat([key[:, :1], key[:, 1:] + self.softness * logs], dim=1)
        return self._with_key(x, z), -sum_event(logs)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        key = self._key(z)
        x = self.softness * torch.logcumsumexp(key / self.softness, dim=1)
        x = torch.cat([key[:, :1], x[:, 1:]], dim=1)
        ldj = sum_event((x - key)[:, 1:] / self.softness)
        # a parallel sum may round a value below the one before it
        return self._with_key(z, x.cummax(dim=1).values), ldj

    @classmethod
    def example(cls) -> Example:
        transform = cls(softness=0.8, by=1)
        wide = DiagonalNormal((3, 2), loc=[[0, -0.2], [0.1, 0.2], [0, 0.1]], scale=1.4)
        return Example(transform, generated_by(transform, wide), StandardNormal((3, 2)))
