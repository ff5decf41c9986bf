"""A learnable distribution on the unit interval."""

import torch
import torch.nn.functional as F
from torch import Tensor

from surflow.distributions.base import sum_event
from surflow.distributions.location_scale import Logistic


class LogitLogistic(Logistic):
    r"""Independent logistics squeezed into (0, 1); the uniform for loc 0 and scale 1.

    .. math:: x_d = \sigma(y_d),\ y_d \sim \mathrm{Logistic}(\mu_d, s_d), \qquad
              \log p(x) = \sum_d \log p_y(y_d) - \log\sigma(y_d) - \log\sigma(-y_d)

    With a net whose last layer starts at zero it is dequantization noise that starts uniform.

    Args:
        event_shape, loc, scale, learn, parameter_shape, net: see :class:`LocationScale`; loc and
            scale are those of y. A draw is scored at its y, so that one which rounds to 0 or 1
            keeps its density.

    Raises:
        ValueError: as :class:`LocationScale`.

    Source: Tadikamalla & Johnson 1982, Biometrika 69(2), the L_B family.

    >>> LogitLogistic((2,)).log_prob(torch.tensor([[0.2, 0.7]])).round(decimals=4)
    tensor([0.])
    """

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        inside = (x > 0) & (x < 1)
        safe = torch.where(inside, x, 0.5)
        y = torch.log(safe) - torch.log1p(-safe)
        density = super()._log_prob(y, context) - sum_event(torch.log(safe) + torch.log1p(-safe))
        return torch.where(inside.flatten(1).all(1), density, -torch.inf)

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        return torch.sigmoid(super()._sample(n, context, temperature))

    def _sample_and_log_prob(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        n, context = self._rows(n, context, num_samples)
        y = super()._sample(n, context, 1.0)
        log_volume = sum_event(F.logsigmoid(y) + F.logsigmoid(-y))
        return torch.sigmoid(y), super()._log_prob(y, context) - log_volume
