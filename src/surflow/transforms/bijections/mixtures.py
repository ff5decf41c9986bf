"""Monotone maps made of mixture distribution functions."""

import torch
import torch.nn.functional as F
from torch import Tensor

from surflow.checks import require_at_least
from surflow.numeric import at_least_float32
from surflow.transforms.maps import ElementwiseMap


class LogisticMixtureMap(ElementwiseMap):
    r"""The distribution function of a logistic mixture, back to the line, then affine.

    .. math:: z = e^{a}\,\mathrm{logit}(F(x)) + b, \quad
              F(x) = \sum_k \pi_k\, \sigma((x - \mu_k) e^{-\lambda_k}), \qquad
              \log\frac{dz}{dx} = a + \log\frac{F'(x)}{F(x)(1 - F(x))}

    Parameters of an element: K weight logits, K locations, K log-scales, a, b. The logit is
    taken as log F - log(1 - F), both by log-sum-exp, so neither tail saturates. The inverse is
    bisection inside an exact bracket and one Newton step, which also carries the gradient.

    Args:
        num_components: K.
        max_log_scale: a and the log-scales λ are bounded to ±this by tanh.

    Raises:
        ValueError: for K < 1.

    Cost: O(K) an element forward; the inverse is a bisection, some tens of times that.
    Source: Ho et al. 2019 (Flow++), arXiv 1902.00275, Sec. 3.2.

    >>> map = LogisticMixtureMap(num_components=1)
    >>> z, log_derivative = map.forward(torch.tensor([2.0]), torch.zeros(1, 5))
    >>> z.round(decimals=4)  # one logistic with nothing changed is the identity
    tensor([2.])
    """

    def __init__(self, num_components: int = 8, max_log_scale: float = 7.0) -> None:
        require_at_least("LogisticMixtureMap", 1, num_components=num_components)
        self.num_components, self.max_log_scale = num_components, max_log_scale
        self.num_params = 3 * num_components + 2

    def _unpack(self, params: Tensor) -> tuple[Tensor, ...]:
        params = at_least_float32(params)
        k, limit = self.num_components, self.max_log_scale
        logits, loc, log_scale, affine = params.split([k, k, k, 2], dim=-1)
        log_scale = limit * torch.tanh(log_scale / limit)
        a = limit * torch.tanh(affine[..., 0] / limit)
        return F.log_softmax(logits, dim=-1), loc, log_scale, a, affine[..., 1]

    @staticmethod
    def _logit_cdf(
        x: Tensor, log_weight: Tensor, loc: Tensor, log_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """logit F(x), and the log of its derivative."""
        e = (x.unsqueeze(-1) - loc) * torch.exp(-log_scale)
        below, above = F.logsigmoid(e), F.logsigmoid(-e)
        log_cdf = torch.logsumexp(log_weight + below, dim=-1)
        log_rest = torch.logsumexp(log_weight + above, dim=-1)
        log_density = torch.logsumexp(log_weight + below + above - log_scale, dim=-1)
        return log_cdf - log_rest, log_density - log_cdf - log_rest

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_weight, loc, log_scale, a, b = self._unpack(params)
        y, log_slope = self._logit_cdf(x, log_weight, loc, log_scale)
        z = torch.exp(a) * y + b
        return z.to(torch.promote_types(x.dtype, params.dtype)), a + log_slope

    def inverse(self, z: Tensor, params: Tensor) -> Tensor:
        log_weight, loc, log_scale, a, b = self._unpack(params)
        y = (z - b) * torch.exp(-a)
        with torch.no_grad():
            # a single logistic k takes the value y at mu_k + s_k y, so the mixture takes it
            # between the least and the greatest of these
            at = loc + torch.exp(log_scale) * y.unsqueeze(-1)
            low, high = at.amin(-1), at.amax(-1)
            for _ in range(64 if z.dtype == torch.float64 else 32):
                middle = 0.5 * (low + high)
                too_high = self._logit_cdf(middle, log_weight, loc, log_scale)[0] > y
                low, high = torch.where(too_high, low, middle), torch.where(too_high, middle, high)
            x = 0.5 * (low + high)
        value, log_slope = self._logit_cdf(x, log_weight, loc, log_scale)
        x = x - (value - y) * torch.exp(-log_slope).detach()
        return x.to(torch.promote_types(z.dtype, params.dtype))
