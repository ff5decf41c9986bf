"""Doubles that stand for a random part: what they draw is given."""

from surflow.distributions import DiagonalNormal
from surflow.distributions.base import Distribution
from surflow.transforms import MaxPool2d


class GivenNoise(Distribution):
    """Uniform noise that is known."""

    def __init__(self, u):
        super().__init__(tuple(u.shape[1:]))
        self.u = u

    def _log_prob(self, x, context):
        return x.new_zeros(x.shape[0])

    def _sample(self, n, context, temperature):
        return self.u


class GivenDraw(DiagonalNormal):
    """A normal whose draw is known."""

    def _sample(self, n, context, temperature):
        return self.given


def with_noise(flow, values):
    """The flow with the fixture's noise in place of its own draw."""
    rounding = flow.transforms[0].transform
    dtype = flow.base.loc.dtype
    if rounding.noise is None:
        rounding.noise = GivenNoise(values["u"].to(dtype))
    else:
        rounding.noise.flow.base.__class__ = GivenDraw
        rounding.noise.flow.base.given = values["dequant_noise_sample"].to(dtype)
    return flow


def own_downsampling(shape):
    """A downsampling surjection of one's own, for images of the shape (C, H, W)."""
    return MaxPool2d(shape)
