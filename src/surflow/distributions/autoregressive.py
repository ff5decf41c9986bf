"""Bernoulli pixels, each from those before it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require
from surflow.distributions.base import Distribution, sum_event
from surflow.numeric import at_least_float32, working_dtype


class AutoregressiveBernoulli(Distribution):
    r"""Pixels in raster order, each a Bernoulli given a window before it and a context.

    .. math:: \log p(x \mid c) = \sum_{ij} x_{ij}\,\ell_{ij} - \log(1 + e^{\ell_{ij}}), \qquad
              \ell_{ij} = \ell_{ij}(x_{<ij}, c)

    Args:
        event_shape: (1, H, W); x is 0.0 and 1.0.
        local: gives logits, (B, 1, H, W), from x and features (B, F, H, W); a pixel's must depend
            on pixels before it alone, and on those, and on features, no farther off than its
            attribute ``reach``: a :class:`~surflow.nets.masked_conv.LocalPixelCNN`.
        net: maps the context to the features.

    Raises:
        ValueError: for more than one channel; for features that are not of x's height and width;
            from ``log_prob``, for x outside [0, 1].

    Cost: ``log_prob`` one pass of both nets. ``sample`` one pass of ``net``, and of ``local`` H W
    passes over windows of (r + 1) × (2 r + 1) pixels, r being its reach.
    Source: van den Oord et al. 2016, arXiv 1601.06759; as a decoder, Chen et al. 2017, arXiv
    1611.02731, Sec. 3.1.
    """

    discrete = True

    def __init__(self, event_shape: int | Sequence[int], local: nn.Module, net: nn.Module) -> None:
        super().__init__(event_shape, net)
        if len(self.event_shape) != 3 or self.event_shape[0] != 1:
            raise ValueError(
                f"AutoregressiveBernoulli: expected shape (1, H, W), got {self.event_shape}"
            )
        self.local = local

    def _features(self, context: Tensor) -> Tensor:
        weight = next(self.net.parameters(), None)
        features = self.net(context if weight is None else context.to(weight.dtype))
        if features.dim() != 4 or tuple(features.shape[2:]) != self.event_shape[1:]:
            raise ValueError(
                "AutoregressiveBernoulli: expected the net to give shape (batch, features, "
                f"{self.event_shape[1]}, {self.event_shape[2]}), got {tuple(features.shape)}"
            )
        return features

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        require((x >= 0) & (x <= 1), "values in [0, 1]", x)
        features = self._features(context)
        logits = at_least_float32(self.local(x.to(features.dtype), features))
        return sum_event(x * logits - F.softplus(logits))

    @torch.no_grad()
    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        features = self._features(context)
        _, height, width = self.event_shape
        exact = working_dtype(features)
        x = features.new_zeros(n, *self.event_shape, dtype=exact)
        r = self.local.reach
        for i in range(height):
            top = max(0, i - r)
            for j in range(width):
                left, right = max(0, j - r), j + r + 1
                window = (slice(None), slice(None), slice(top, i + 1), slice(left, right))
                seen = x[window].to(features.dtype)
                logits = self.local(seen, features[window])[:, :, -1, j - left]
                x[:, :, i, j] = torch.bernoulli(torch.sigmoid(logits.to(exact) / temperature))
        return x
