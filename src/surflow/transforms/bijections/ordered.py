"""Sorted vectors and the whole space."""

from __future__ import annotations

import torch
from torch import Tensor

from surflow.checks import require
from surflow.distributions.base import sum_event
from surflow.transforms.base import Example, Transform


class OrderedToReal(Transform):
    r"""Map ascending values onto the whole space: the first one, then logarithms of the steps.

    .. math:: z_1 = x_1, \quad z_i = \log(x_i - x_{i-1}), \qquad
              \mathrm{ldj} = -\sum_{i > 1} z_i

    Exact. Behind :class:`SortInference` it makes room for any flow and any base: without it the
    model would put mass on latents that are not sorted, and so lose it. Values are ordered along
    dimension 1; equal ones have no finite image.

    Raises:
        ValueError: from ``forward`` for values that do not ascend strictly.

    Cost: O(D) a row; forward and inverse alike.

    Source: the ordered vectors of Carpenter et al. 2017, Stan, doi 10.18637/jss.v076.i01.

    >>> import torch
    >>> OrderedToReal()(torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist()
    [[1.0, 0.0, 0.0]]
    """

    bijective = True
    stochastic_forward = False
    stochastic_inverse = False

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        steps = x.diff(dim=1)
        require(steps > 0, self.where("forward"), "values that ascend along dimension 1", steps)
        logs = steps.log()
        return torch.cat([x[:, :1], logs], dim=1), -sum_event(logs)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return torch.cat([z[:, :1], z[:, 1:].exp()], dim=1).cumsum(1)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse(z, context), -sum_event(z[:, 1:])

    @classmethod
    def example(cls) -> Example:
        from surflow.distributions import DiagonalNormal, StandardNormal

        wide = DiagonalNormal((3,), loc=[0.0, -0.3, 0.2], scale=[1.3, 1.2, 1.2])

        def sample(n: int) -> tuple[Tensor, Tensor]:
            z, log_q = wide.sample_and_log_prob(n)
            z[:, 1:] = z[:, 1:].exp()  # log-normal steps
            return z.cumsum(1), log_q - z[:, 1:].log().sum(1)

        return Example(cls(), sample, StandardNormal((3,)))
