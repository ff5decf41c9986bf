"""The rounding surjection: dequantization of integers, and rounding of reals."""

import math
from typing import Any

import torch
from torch import Tensor

from surflow.checks import require
from surflow.distributions import Categorical, LogitLogistic, Uniform
from surflow.distributions.base import Distribution
from surflow.latents import Tape
from surflow.nets import MLP
from surflow.numeric import at_least_float32, repeat_rows, working_dtype
from surflow.transforms.base import Example, Sampler, Surjection, Tail, require_context, zero_ldj
from surflow.transforms.conditioning import check_distribution, draw, score
from surflow.transforms.inverse import _InverseOf

MAX_LEVELS = 2**16
EDGE = 0.1  # of a cell: how far noise whose latents are kept stays off its edges


class Rounding(Surjection):
    r"""The inference surjection that rounds down, with a density within a cell to undo it.

    .. math:: z_d = \lfloor K x_d \rfloor, \quad x_d = (z_d + u_d)/K,\ u \sim p(u \mid z), \qquad
              V = D \log K + \log p(u \mid z)

    Exact: forward is deterministic, and :math:`u = K x - z` is known. The latent is an int64
    tensor of levels 0 ... K - 1, for a discrete base such as a categorical: together a density
    on the unit box, by default piecewise constant.

    The noise u is kept off the edges of its cell by the few last bits that x = (z + u)/K has no
    room for, so that rounding gives z back exactly: at most 4 units of the last place of K, that
    is 6e-5 in float32 with 256 levels and 1.6e-2 with 65 535.

    Args:
        num_levels: K, at most 65 536.
        noise: p(u|z), any density on [0, 1] with the event shape of x; its context, if it is
            conditional, is :math:`2z/(K - 1) - 1`, levels scaled to [-1, 1]. None: uniform, for
            events of any shape.
        scale: True: x in [0, 1). False: x in [0, K), z is the floor of x, and V has no
            :math:`D \log K`.
        context_features: F, of the flow's context, which the noise then sees after the levels;
            see :class:`Slice`.

    Raises:
        ValueError: for a number of levels out of range or a noise that is no density; from
            ``forward`` for x outside its interval, from ``inverse`` for a z outside
            0 ... K - 1 or not of integers, and for noise outside [0, 1].

    Cost: forward one log-density of the noise, inverse one sample; O(D) where uniform.
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Tables 6, 7.

    >>> rounding = Rounding(num_levels=4)
    >>> z, ldj = rounding(torch.tensor([[0.1, 0.3, 0.99]]))
    >>> z.tolist(), round(ldj.item(), 4)  # 3 log 4
    ([[0, 1, 3]], 4.1589)
    """

    integer_latent = True

    def __init__(
        self,
        num_levels: int = 256,
        noise: Distribution | None = None,
        scale: bool = True,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        _check_options(type(self).__name__, num_levels, noise, context_features)
        self.num_levels = num_levels
        self.noise = noise
        self.scale = scale
        self.context_features = context_features
        if noise is not None:
            self.event_shape = noise.event_shape
        # its dtype follows .to(), and says in which dtype to draw for an integer tensor
        self.register_buffer("unit", torch.ones(()), persistent=False)

    def _code(self, level: Tensor) -> Tensor:
        """What the noise is conditioned on: levels scaled to [-1, 1]."""
        level = level.to(working_dtype(self.unit))
        return (2 * level / max(self.num_levels - 1, 1) - 1).to(self.unit.dtype)

    def _margins(self, dtype: torch.dtype) -> tuple[float, float]:
        """The least and the greatest u with which ``dtype`` keeps x in its cell."""
        place = self._last_place(dtype)
        if not self.scale or self.num_levels & (self.num_levels - 1) == 0:
            return 0.0, 1.0 - place  # x + u, and its quotient by a power of two, are then exact
        return 4 * place, 1.0 - 4 * place

    def _last_place(self, dtype: torch.dtype) -> float:
        """The spacing of the numbers just below K, rounded up to a power of two."""
        return 2.0 ** (self.num_levels - 1).bit_length() * torch.finfo(dtype).eps / 2

    def nearest_level(self, x: Tensor) -> Tensor:
        """The level of the cell in which x lies; beyond the edges, the last level: int64."""
        x = at_least_float32(x)
        level = torch.floor(x * self.num_levels if self.scale else x)
        return level.clamp(0, self.num_levels - 1).long()

    def check_interval(self, x: Tensor) -> None:
        """Raise ValueError for x outside the interval of the levels."""
        top = 1 if self.scale else self.num_levels
        require((x >= 0) & (x < top), f"values in [0, {top})", x)

    def _volume(self, x: Tensor) -> float:
        """log of the ratio of volumes, of u to x, nats."""
        return math.prod(x.shape[1:]) * math.log(self.num_levels) if self.scale else 0.0

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        self.check_interval(x)
        z = self.nearest_level(x)
        volume = self._volume(x)
        if self.noise is None:
            return z, zero_ldj(x) + volume
        lifted = at_least_float32(x)
        u = (lifted * self.num_levels if self.scale else lifted) - z
        # off the edges, where a density such as a logit-normal's has no finite logarithm, by half
        # the spacing of the u that there are
        least = max(self._last_place(u.dtype), torch.finfo(x.dtype).eps) / 2
        u = u.to(x.dtype).clamp(least, 1 - least)
        log_p = score(self.noise, u, self._code(z), context, self.context_features)
        return z, log_p + volume

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._inverse_and_ldj_samples(z, context, 1)

    def _inverse_and_ldj_samples(
        self, z: Tensor, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        dtype = working_dtype(self.unit)
        level = z.to(dtype)
        inside = (level >= 0) & (level < self.num_levels)
        require(inside, f"levels 0 to {self.num_levels - 1}", z)
        if self.noise is None:
            shape = (num_samples * z.shape[0], *z.shape[1:])
            u = torch.rand(shape, dtype=dtype, device=z.device)
            log_p = zero_ldj(u)
        else:
            seen, features = self._code(level), self.context_features
            u, log_p = draw(self.noise, seen, context, features, num_samples)
            require((u >= 0) & (u <= 1), "noise in [0, 1]", u)
        u = u.to(dtype).clamp(*self._margins(dtype))
        x = repeat_rows(level, num_samples) + u
        x = x / self.num_levels if self.scale else x
        return x, log_p + self._volume(x)

    def summed_inverse(self, x: Tensor, tail: Tail, rule: Any) -> Tensor:
        scale = self.num_levels if self.scale else 1
        dims = x[0].numel()
        offsets, log_weight = rule.cell(dims, x.device)
        z = (x.flatten(1).unsqueeze(1) + offsets) / scale
        values = tail(z.reshape(-1, *x.shape[1:])).view(len(x), -1) + log_weight
        return torch.logsumexp(values, 1) - dims * math.log(scale)

    @classmethod
    def example(cls) -> Example:
        base = Categorical((2,), 3, [[0.2, -0.3, 0.5], [0.0, 0.4, -0.4]])
        return Example(cls(3, _noise((2,))), Uniform((2,)), base)


class Dequantization(_InverseOf):
    r"""The generative surjection x = ⌊K z⌋: inference adds noise to integers.

    .. math:: x_d = \lfloor K z_d \rfloor, \quad z_d = (x_d + u_d)/K,\ u \sim q(u \mid x), \qquad
              V = -D \log K - \log q(u \mid x)

    A lower bound on the log-mass of x, :math:`\log \int_{\mathrm{cell}(x)} p(z)\,dz`, with
    z in [0, 1). Uniform noise is the default; a flow as the noise makes it variational
    dequantization; :func:`surflow.objectives.iwbo` of a flow that begins with this layer is
    importance-weighted dequantization, whose bound tightens with the number of samples.

    Args:
        num_levels: K; data are integers 0 ... K - 1. At most 65 536.
        noise: q(u|x), any density on [0, 1]; see :class:`Rounding`. Its draw is scored as drawn,
            never inverted.
        scale: False: z = x + u, in [0, K), and V has no :math:`D \log K`.
        clamp: whether ``inverse`` takes z beyond the edges to the nearest level, as needed after
            a flow on the whole line; such mass is lost to the bound. False: it raises.
        context_features: see :class:`Rounding`.

    Raises:
        ValueError: as :class:`Rounding`: from ``forward`` for x < 0, x >= K or x not of integers;
            from ``inverse``, without ``clamp``, for z outside its interval, and in any case for
            z that is not a number.

    Cost: forward one sample of the noise with its log-density, inverse O(D).
    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 3.2 and Table 6; uniform: Theis et al.
    2016, arXiv 1511.01844, Sec. 3.1; variational: Ho et al. 2019, arXiv 1902.00275, Sec. 3.1;
    importance-weighted: Hoogeboom et al. 2020, arXiv 2001.11235, Sec. 3.

    >>> from surflow.distributions import StandardNormal, Uniform
    >>> from surflow.flow import Flow, FlowDistribution
    >>> from surflow.objectives import iwbo
    >>> from surflow.transforms import AffineCoupling, Logit
    >>> uniform = Dequantization(num_levels=256)  # for events of any shape
    >>> x = torch.tensor([[0, 7, 128, 255]])
    >>> z, ldj = uniform(x)
    >>> torch.equal(uniform.inverse(z), x), round(ldj.item(), 4)  # -4 log 256
    (True, -22.1807)

    Variational: noise from a flow whose layers see an embedding of x.

    >>> coupling = AffineCoupling(MLP(2, 4, [16], context_features=8))
    >>> q = FlowDistribution(Flow(StandardNormal(4), [Logit(), coupling]), embed=MLP(4, 8, [16]))
    >>> flow = Flow(Uniform(4), Dequantization(256, noise=q))
    >>> flow.lower_bound, tuple(iwbo(flow, x, num_samples=10).shape)
    (True, (1,))
    >>> bool((flow.log_prob(x) > -60).all()), flow.sample(3).dtype
    (True, torch.int64)
    """

    of = Rounding

    def __init__(
        self,
        num_levels: int = 256,
        noise: Distribution | None = None,
        scale: bool = True,
        clamp: bool = True,
        context_features: int = 0,
    ) -> None:
        _check_options("Dequantization", num_levels, noise, context_features)
        super().__init__(num_levels, noise, scale, context_features)
        self.clamp = clamp

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        # the levels alone: generation does not score the noise
        require_context(context, self.transform.context_features)
        if self.clamp:
            require(~z.isnan(), "numbers", z)
        else:
            self.transform.check_interval(z)
        return self.transform.nearest_level(z)

    def infer(self, x: Tensor, context: Tensor | None, tape: Tape) -> Tensor:
        # off the edges of the cell, so that rounding errors of a deep flow do not leave it
        z, _ = self(x, context)
        width = 1 / self.transform.num_levels if self.transform.scale else 1.0
        low = x.to(z.dtype) * width
        return low + (z - low).clamp(EDGE * width, (1 - EDGE) * width)

    @classmethod
    def example(cls) -> Example:
        base = LogitLogistic((2,), loc=[0.4, -0.3], scale=0.9)
        return Example(cls(3, _noise((2,))), uniform_integers((2,), 3), base)


def _check_options(
    owner: str, num_levels: int, noise: Distribution | None, context_features: int
) -> None:
    if not isinstance(num_levels, int) or not 1 <= num_levels <= MAX_LEVELS:
        raise ValueError(f"{owner}: expected num_levels in 1 to {MAX_LEVELS}, got {num_levels}")
    if noise is not None:
        check_distribution(noise, owner, "noise", context_features)
    elif context_features:
        raise ValueError(
            f"{owner}: expected a conditional noise to read {context_features} features of the "
            "context, got uniform noise"
        )


def _noise(shape: tuple[int, ...]) -> Distribution:
    """Noise for a proof, from a net of the levels and not uniform."""
    return LogitLogistic(shape, net=MLP(shape[0], 2 * shape[0], [8], "tanh"))


def uniform_integers(shape: tuple[int, ...], num_levels: int) -> Sampler:
    """A sampler of uniform integers 0 ... num_levels - 1, with the logarithm of their mass."""

    def sample(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(num_levels, (n, *shape))
        return x, torch.full((n,), -math.prod(shape) * math.log(num_levels))

    return sample
