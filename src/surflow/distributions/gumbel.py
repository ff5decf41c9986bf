"""The Gumbel distribution."""

import torch
from torch import Tensor

from surflow.distributions.location_scale import LocationScale


class Gumbel(LocationScale):
    r"""Independent Gumbels: the law of a maximum.

    .. math:: \log p(x) = \sum_d -e_d - \exp(-e_d) - \log s_d, \quad e_d = (x_d - \mu_d)/s_d

    Of scores with scale 1, the d-th is the greatest with probability
    :math:`\mathrm{softmax}(\mu)_d`, and their maximum is a Gumbel at
    :math:`\log\sum_d \exp\mu_d`, independently of where it stands.

    Arguments, shapes and errors: see :class:`LocationScale`.

    >>> Gumbel((1,)).log_prob(torch.zeros(1, 1))
    tensor([-1.])
    """

    def _standard_log_prob(self, eps: Tensor) -> Tensor:
        return -eps - torch.exp(-eps)

    def _standard_sample(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        race = torch.empty(shape, device=like.device, dtype=like.dtype).exponential_()
        return -race.clamp_min(torch.finfo(like.dtype).tiny).log()
