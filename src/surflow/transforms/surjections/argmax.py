"""The argmax surjection, between real scores and categories, in both directions.

Of an array of categories (C, ...) every element has K scores (or, as bits, :math:`\\log_2 K` of
them); scores stand in channels that alternate over the categories: channel c K + k is the score of
category k for channel c. So scores of a vector (D,) are a vector (D K,), those of a sequence
(1, L) are (K, L), those of an image (C, H, W) are (C K, H, W), and couplings along dimension 1
work on any of them.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.checks import require
from surflow.distributions import Categorical, Gumbel
from surflow.distributions.base import Distribution, as_shape, expand_to, register_value, sum_event
from surflow.distributions.location_scale import Logistic
from surflow.nets import MLP
from surflow.numeric import at_least_float32
from surflow.transforms.base import (
    Example,
    Sampler,
    Surjection,
    require_context,
    require_output,
    run_net,
)
from surflow.transforms.conditioning import check_distribution, draw, score
from surflow.transforms.inverse import _InverseOf
from surflow.transforms.surjections.rounding import uniform_integers


def _log_one_minus_exp(d: Tensor) -> Tensor:
    """log(1 - exp(-d)) for d > 0."""
    return torch.log(-torch.expm1(-d))


def _tiny(dtype: torch.dtype) -> float:
    """The least distance from a threshold that is not zero."""
    return torch.finfo(dtype).eps ** 2


def _below(threshold: Tensor, distance: Tensor) -> Tensor:
    """threshold - distance, but strictly below the threshold also where the distance vanishes."""
    eps = torch.finfo(threshold.dtype).eps
    least = eps * threshold.detach().abs() + _tiny(threshold.dtype)
    return threshold - torch.maximum(distance, least)


class _Categories(Surjection):
    """Scores x (C * width, ...) to categories z (C, ...): a subclass gives p(x|z)."""

    integer_latent = True

    def __init__(self, latent_shape: int | Sequence[int], num_classes: int, width: int) -> None:
        super().__init__()
        if not isinstance(num_classes, int) or num_classes < 2:
            raise ValueError(f"{type(self).__name__}: expected num_classes >= 2, got {num_classes}")
        self.latent_shape = as_shape(latent_shape)
        self.num_classes, self.width = num_classes, width
        self.event_shape = (self.latent_shape[0] * width, *self.latent_shape[1:])
        # its dtype follows .to(), and says in which dtype to draw for an integer tensor
        self.register_buffer("unit", torch.ones(()), persistent=False)

    def _per_category(self, values: Tensor) -> Tensor:
        """A vector over the second dimension of (C, width, ...), to broadcast there."""
        return values.view(-1, *[1] * (len(self.latent_shape) - 1))

    def _chosen(self, z: Tensor) -> Tensor:
        """Where the score of the category stands, (B, C, K, ...), boolean."""
        classes = torch.arange(self.num_classes, device=z.device)
        return z.unsqueeze(2) == self._per_category(classes)

    def _split(self, x: Tensor) -> Tensor:
        """(B, C * width, ...) -> (B, C, width, ...)."""
        return x.unflatten(1, (self.latent_shape[0], self.width))

    def _one_hot(self, z: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C * K, ...), in the dtype of the parameters."""
        return self._chosen(z).flatten(1, 2).to(self.unit.dtype)

    def _category(self, x: Tensor) -> Tensor:
        """Scores (B, C, width, ...) to categories (B, C, ...), int64: the greatest."""
        return x.argmax(2)

    @abstractmethod
    def _score(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """log p(x|z) of scores (B, C, width, ...), (B,), nats."""

    @abstractmethod
    def _draw(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scores (B, C, width, ...) of the category z, and their log p(x|z), (B,), nats."""

    @property
    @abstractmethod
    def _context_features(self) -> int:
        """Features of the context that the layer reads."""

    def category(self, x: Tensor) -> Tensor:
        """The categories of scores, (B, C * width, ...) -> (B, C, ...), int64."""
        require(~x.isnan(), "numbers", x)
        return self._category(self._split(x))

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        z = self.category(x)
        return z, self._score(self._split(x), z, context)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._inverse_and_ldj(z, context)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        level = z.long()
        inside = (level >= 0) & (level < self.num_classes)
        require(inside, f"classes 0 to {self.num_classes - 1}", z)
        x, log_p = self._draw(level, context)
        return x.flatten(1, 2), log_p


class _Generative(_InverseOf):
    """The other direction: generation reads the categories alone, and scores nothing."""

    def __init__(self, event_shape: int | Sequence[int], *arguments: Any, **options: Any) -> None:
        super().__init__(event_shape, *arguments, **options)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        require_context(context, self.transform._context_features)
        return self.transform.category(z)


class _FromNoise(_Categories):
    """Scores made from noise on the whole line, by thresholds."""

    def __init__(
        self,
        latent_shape: int | Sequence[int],
        num_classes: int,
        width: int,
        noise: Distribution | None,
        context_features: int,
    ) -> None:
        super().__init__(latent_shape, num_classes, width)
        noise = Logistic(self.event_shape) if noise is None else noise
        check_distribution(noise, type(self).__name__, "noise", context_features)
        if noise.event_shape != self.event_shape:
            raise ValueError(
                f"{type(self).__name__}: expected a noise of event shape {self.event_shape}, "
                f"one value a score, got {noise.event_shape}"
            )
        self.noise, self.context_features = noise, context_features

    _context_features = property(lambda self: self.context_features)

    def _thresholded(self, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Scores from noise, both (B, C, width, ...), and log |dx/dv| of each."""
        raise NotImplementedError

    def _unthresholded(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of scores, and log |dx/dv| of each."""
        raise NotImplementedError

    def _score(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        v, log_slope = self._unthresholded(at_least_float32(x), z)
        v = v.flatten(1, 2).to(x.dtype)
        seen = self._one_hot(z)
        log_p = score(self.noise, v, seen, context, self.context_features)
        return log_p - sum_event(log_slope)

    def _draw(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = self._one_hot(z)
        v, log_p = draw(self.noise, seen, context, self.context_features)
        x, log_slope = self._thresholded(self._split(at_least_float32(v)), z)
        return x, log_p - sum_event(log_slope)


class ArgmaxInference(_FromNoise):
    r"""The inference surjection from scores to the greatest one; noise below a threshold undoes it.

    .. math:: z = \arg\max_k x_k, \quad x_z = T = v_z,\ x_k = T - \log(1 + e^{T - v_k}),\
              v \sim p(v \mid z), \qquad V = \log p(v \mid z) - \sum_{k \ne z} \log\sigma(T - v_k)

    Exact: forward is deterministic, and v is known from x. Each element of z has K scores, which
    stand in alternating channels. Among equal scores the first counts as the greatest (a tie has
    probability zero); in ``inverse`` rounding makes none.

    Args:
        latent_shape: the shape of z, (C, ...); that of x is (C K, ...), channel c K + k the score
            of category k.
        num_classes: K.
        noise: p(v|z), any density on the whole space of event shape (C K, ...); its context, if
            it is conditional, is z one-hot, (B, C K, ...). None: standard logistics, whose
            thresholded density stays positive and bounded at the threshold.
        context_features: F, of the flow's context, which the noise then sees after the one-hot;
            see :class:`Slice`.

    Raises:
        ValueError: for K < 2 or a noise of another shape; from ``forward`` for x that is not a
            number, from ``inverse`` for a z outside 0 ... K - 1 or not of integers.

    Cost: forward one log-density of the noise, inverse one sample, and O(D K).
    Source: Hoogeboom et al. 2021, arXiv 2102.05379, Sec. 3 (as inference surjection: Nielsen et
    al. 2020, arXiv 2007.02731, Sec. 3.1).

    >>> argmax = ArgmaxInference(2, num_classes=3)  # two elements, three scores each
    >>> z, ldj = argmax(torch.tensor([[0.1, 0.9, -1.0, 2.0, 0.0, 0.0]]))
    >>> z.tolist(), torch.equal(argmax(argmax.inverse(z))[0], z)
    ([[1, 0]], True)
    """

    def __init__(
        self,
        latent_shape: int | Sequence[int],
        num_classes: int,
        noise: Distribution | None = None,
        context_features: int = 0,
    ) -> None:
        super().__init__(latent_shape, num_classes, num_classes, noise, context_features)

    def _thresholded(self, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        chosen, threshold = self._chosen(z), v.gather(2, z.unsqueeze(2))
        gap = torch.where(chosen, 0.0, threshold - v)
        x = torch.where(chosen, v, _below(threshold, -F.logsigmoid(-gap)))
        return x, torch.where(chosen, 0.0, F.logsigmoid(gap))

    def _unthresholded(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        chosen, threshold = self._chosen(z), x.gather(2, z.unsqueeze(2))
        distance = torch.where(chosen, 1.0, threshold - x).clamp_min(_tiny(x.dtype))
        log_slope = _log_one_minus_exp(distance)
        v = torch.where(chosen, x, threshold - distance - log_slope)
        return v, torch.where(chosen, 0.0, log_slope)

    @classmethod
    def example(cls) -> Example:
        base = Categorical((2,), 3, [[0.2, -0.3, 0.5], [0.0, 0.4, -0.4]])
        return Example(cls((2,), 3, _noise(6, 0.0)), scores_below_a_greatest(2, 3), base)


class ArgmaxGenerative(_Generative):
    r"""The generative surjection x = argmax z: inference draws scores whose greatest is x's.

    .. math:: x = \arg\max_k z_k, \quad z_x = T = v_x,\ z_k = T - \log(1 + e^{T - v_k}),\
              v \sim q(v \mid x), \qquad V = \sum_{k \ne x} \log\sigma(T - v_k) - \log q(v \mid x)

    A lower bound on the log-mass of categorical data.

    Args:
        event_shape: the shape of x, (C, ...); that of z is (C K, ...), channel c K + k the score
            of category k.
        num_classes, noise, context_features, and errors (its directions exchanged): see
            :class:`ArgmaxInference`.

    Cost: forward one sample of the noise with its log-density, inverse O(D K).
    Source: Hoogeboom et al. 2021, arXiv 2102.05379, Sec. 3.

    >>> from surflow.distributions import StandardNormal
    >>> from surflow.flow import Flow
    >>> argmax = ArgmaxGenerative(2, num_classes=27)
    >>> flow = Flow(StandardNormal(54), argmax)
    >>> x = torch.tensor([[0, 26]])
    >>> torch.equal(flow.decode(flow.encode(x)), x), flow.lower_bound
    (True, True)
    """

    of = ArgmaxInference

    @classmethod
    def example(cls) -> Example:
        base = Logistic((6,), loc=[0.4, -0.2, 0.0, 0.3, 0.0, -0.5])
        return Example(cls((2,), 3, _noise(6, 0.3)), uniform_integers((2,), 3), base)


class GumbelArgmaxInference(_Categories):
    r"""The inference surjection to the greatest score, undone by Gumbels with a given argmax.

    .. math:: z = \arg\max_k x_k, \quad
              x_z = T \sim \mathrm{Gumbel}(\log\textstyle\sum_k e^{\phi_k}),\
              x_k \sim \mathrm{Gumbel}(\phi_k)\ \text{given}\ x_k < T, \qquad V = \log p(x \mid z)

    Exact, and in closed form. It is the law of independent Gumbels at :math:`\phi`, given where
    their maximum stands; so with a categorical base of logits :math:`\phi` the scores are just
    independent Gumbels. Channels and ties are as in :class:`ArgmaxInference`.

    Args:
        latent_shape: the shape of z, (C, ...); that of x is (C K, ...).
        num_classes: K.
        logits: phi, (K,) or (*latent, K); zeros if left out.
        learn: whether they are a parameter.
        net: maps z one-hot, (B, C K, ...) (and the context, if it has ``context_features``), to
            phi, (B, C K, ...), channels alternating over categories; replaces ``logits``.

    Raises:
        ValueError: as :class:`ArgmaxInference`, and for logits or a net's output of a wrong shape.

    Cost: O(D K) and one pass of the net, either way.
    Source: Hoogeboom et al. 2021, arXiv 2102.05379, Sec. 3 (Gumbel thresholding); Maddison et
    al. 2014, arXiv 1411.0030 (truncated Gumbels).

    >>> argmax = GumbelArgmaxInference(1, num_classes=3, logits=[0.0, 1.0, 2.0])
    >>> z, ldj = argmax(torch.tensor([[0.5, -1.0, 2.0]]))
    >>> z.tolist(), round(ldj.item(), 4)
    ([[2]], -7.088)
    """

    def __init__(
        self,
        latent_shape: int | Sequence[int],
        num_classes: int,
        logits: Sequence[float] | Tensor | None = None,
        learn: bool = False,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__(latent_shape, num_classes, num_classes)
        self.net = net
        if net is not None:
            return
        shape = (*self.latent_shape, num_classes)
        value = 0.0 if logits is None else logits
        value = expand_to(value, shape, f"{type(self).__name__}: logits").movedim(-1, 1).clone()
        register_value(self, "logits", value, learn)

    _context_features = property(lambda self: getattr(self.net, "context_features", 0))

    def _phi(self, z: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, K, ...), or without the batch."""
        if self.net is None:
            phi = self.logits
        else:
            shape = (z.shape[0], *self.event_shape)
            phi = self._split(require_output(run_net(self.net, self._one_hot(z), context), shape))
        phi = at_least_float32(phi)
        return phi.expand(z.shape[0], *phi.shape[-len(self.latent_shape) - 1 :])

    def _score(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        phi = self._phi(z, context)
        x = at_least_float32(x)
        chosen, top = self._chosen(z), x.gather(2, z.unsqueeze(2))
        e = top - phi.logsumexp(2, keepdim=True)
        log_top = -e - torch.exp(-e)
        # a score below T: exp(phi - x) exceeds exp(phi - T) by an exponential variate
        distance = torch.where(chosen, 1.0, top - x).clamp_min(_tiny(x.dtype))
        race = torch.exp(phi - x) * -torch.expm1(-distance)
        return sum_event(torch.where(chosen, log_top, phi - x - race))

    def _draw(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        phi = self._phi(z, context)
        tiny = torch.finfo(phi.dtype).tiny
        race = torch.empty_like(phi).exponential_().clamp_min(tiny)
        chosen = self._chosen(z)
        own = race.gather(2, z.unsqueeze(2))
        top = phi.logsumexp(2, keepdim=True) - own.log()
        # -log(exp(phi - T) + E), from whose two terms the density follows without the score
        rate = torch.logaddexp(phi - top, race.log())
        x = torch.where(chosen, top, torch.minimum(phi - rate, _below(top, torch.zeros_like(top))))
        return x, sum_event(torch.where(chosen, own.log(), rate) - race)

    @classmethod
    def example(cls) -> Example:
        net = MLP(6, 6, [8], "tanh", context_features=1)
        base = Categorical((2,), 3, [[0.2, -0.3, 0.5], [0.0, 0.4, -0.4]])
        return Example(cls((2,), 3, net=net), Gumbel((6,), scale=1.4), base, context=1)


class GumbelArgmaxGenerative(_Generative):
    r"""The generative surjection x = argmax z, with Gumbels of argmax x for the scores.

    .. math:: x = \arg\max_k z_k, \quad
              z_x = T \sim \mathrm{Gumbel}(\log\textstyle\sum_k e^{\phi_k}),\
              z_k \sim \mathrm{Gumbel}(\phi_k)\ \text{given}\ z_k < T, \qquad V = -\log q(z \mid x)

    A lower bound; tight, and every draw equal to the log-mass, where the scores' base is
    Gumbels at the same :math:`\phi`. It is the other direction of :class:`GumbelArgmaxInference`.

    Args:
        event_shape: the shape of x, (C, ...); that of z is (C K, ...).
        num_classes, logits, learn, net, and errors (its directions exchanged): see
            :class:`GumbelArgmaxInference`; the net sees x one-hot.

    Cost: O(D K) either way, and forward one pass of the net.
    Source: Hoogeboom et al. 2021, arXiv 2102.05379, Sec. 3 (Gumbel thresholding).

    >>> from surflow.flow import Flow
    >>> argmax = GumbelArgmaxGenerative(1, num_classes=2, logits=[0.0, 1.0])
    >>> flow = Flow(Gumbel(2, loc=[0.0, 1.0]), argmax)
    >>> flow.log_prob(torch.tensor([[0], [1]])).exp().round(decimals=4)  # softmax(0, 1)
    tensor([0.2689, 0.7311])
    """

    of = GumbelArgmaxInference

    @classmethod
    def example(cls) -> Example:
        base = Gumbel((6,), loc=[0.4, -0.2, 0.0, 0.3, 0.0, -0.3])
        net = MLP(6, 6, [8], "tanh")
        with torch.no_grad():  # a posterior above the base's left tail, for bounded weights
            net.layers[-1].bias.fill_(-0.6)
        return Example(cls((2,), 3, net=net), uniform_integers((2,), 3), base)


class BinaryArgmaxInference(_FromNoise):
    r"""The inference surjection from the signs of few scores to a category: its binary digits.

    .. math:: z = \sum_{m < M} 2^m [x_m > 0], \quad x_m = \pm\log(1 + e^{v_m}),\ v \sim p(v \mid z),
              \qquad V = \log p(v \mid z) - \sum_m \log\sigma(v_m)

    Exact. A product of binary argmaxes: :math:`M = \lceil\log_2 K\rceil` scores an element instead
    of K, in alternating channels, the lowest digit first.

    Args:
        latent_shape: the shape of z, (C, ...); that of x is (C M, ...).
        num_classes: K. Where it is no power of two, ``forward`` refuses x that spells a category
            >= K.
        noise: p(v|z), any density on the whole space of event shape (C M, ...); its context, if
            it is conditional, is the digits of z as -1 and 1, (B, C M, ...). None: standard
            logistics.
        context_features: see :class:`ArgmaxInference`.

    Raises:
        ValueError: as :class:`ArgmaxInference`; from ``forward`` for x that spells no category.

    Cost: forward one log-density of the noise, inverse one sample, and O(D log K).
    Source: Hoogeboom et al. 2021, arXiv 2102.05379, Sec. 3 (Cartesian products of argmaxes).

    >>> digits = BinaryArgmaxInference(1, num_classes=8)
    >>> digits(torch.tensor([[-0.5, 2.0, 0.1]]))[0]
    tensor([[6]])
    """

    def __init__(
        self,
        latent_shape: int | Sequence[int],
        num_classes: int,
        noise: Distribution | None = None,
        context_features: int = 0,
    ) -> None:
        width = max(num_classes - 1, 1).bit_length()
        super().__init__(latent_shape, num_classes, width, noise, context_features)
        self.register_buffer("places", 2 ** torch.arange(width), persistent=False)

    def spelled(self, x: Tensor) -> Tensor:
        """The number whose digits are the signs: (B, C, M, ...) -> (B, C, ...), int64."""
        return ((x > 0) * self._per_category(self.places)).sum(2)

    def _category(self, x: Tensor) -> Tensor:
        z = self.spelled(x)
        what = f"signs that spell a class 0 to {self.num_classes - 1}"
        require(z < self.num_classes, what, z)
        return z

    def _sign(self, z: Tensor) -> Tensor:
        """The digits of z as -1 and 1, (B, C, M, ...)."""
        ones = z.unsqueeze(2).bitwise_and(self._per_category(self.places)) > 0
        return torch.where(ones, 1.0, -1.0).to(self.unit.dtype)

    def _one_hot(self, z: Tensor) -> Tensor:
        return self._sign(z).flatten(1, 2)

    def _thresholded(self, v: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        size = (-F.logsigmoid(-v)).clamp_min(_tiny(v.dtype))
        return self._sign(z) * size, F.logsigmoid(v)

    def _unthresholded(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        size = x.abs().clamp_min(_tiny(x.dtype))
        log_slope = _log_one_minus_exp(size)
        return size + log_slope, log_slope

    @classmethod
    def example(cls) -> Example:
        base = Categorical((2,), 4, [[0.2, -0.3, 0.5, 0.0], [0.0, 0.4, -0.4, 0.1]])
        return Example(cls((2,), 4, _noise(4, -0.3)), Logistic((4,), scale=1.7), base)


class BinaryArgmaxGenerative(_Generative):
    r"""The generative surjection that reads a category from the signs of few scores.

    .. math:: x = \sum_{m < M} 2^m [z_m > 0], \quad z_m = \pm\log(1 + e^{v_m}),\ v \sim q(v \mid x),
              \qquad V = \sum_m \log\sigma(v_m) - \log q(v \mid x)

    A lower bound.

    Args:
        event_shape: the shape of x, (C, ...); that of z is (C M, ...), with
            :math:`M = \lceil\log_2 K\rceil`.
        num_classes: K. Where it is no power of two, ``inverse`` takes a z that spells more to
            K - 1, and the bound loses its mass.
        noise, context_features, and errors (its directions exchanged): see
            :class:`BinaryArgmaxInference`.

    Cost: forward one sample of the noise with its log-density, inverse O(D log K).
    Source: Hoogeboom et al. 2021, arXiv 2102.05379, Sec. 3 (Cartesian products of argmaxes).

    >>> digits = BinaryArgmaxGenerative((1, 5), num_classes=27)  # a text of five letters
    >>> x = torch.tensor([[[0, 26, 3, 17, 9]]])
    >>> z, ldj = digits(x)
    >>> tuple(z.shape), torch.equal(digits.inverse(z), x)
    ((1, 5, 5), True)
    """

    of = BinaryArgmaxInference

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        inner = self.transform
        require_context(context, inner._context_features)
        require(~z.isnan(), "numbers", z)
        return inner.spelled(inner._split(z)).clamp_max(inner.num_classes - 1)

    @classmethod
    def example(cls) -> Example:
        base = Logistic((4,), loc=[0.4, -0.2, 0.0, 0.3])
        return Example(cls((2,), 4, _noise(4, 0.2)), uniform_integers((2,), 4), base)


def _noise(features: int, log_scale: float) -> Distribution:
    """Logistic noise for a proof, from a net, of scales about exp(log_scale).

    Thresholded, a scale above 1 makes a density that grows without limit towards the threshold, one
    below 1 a density that vanishes there, which in a generative example gives large weights.
    """
    net = MLP(features, 2 * features, [8], "tanh")
    with torch.no_grad():
        net.layers[-1].weight.mul_(0.7)
        net.layers[-1].bias[1::2] = log_scale
    return Logistic((features,), net=net)


def scores_below_a_greatest(features: int, num_classes: int) -> Sampler:
    """A sampler of scores, with their log-density: a greatest one T, the others T - d.

    T is logistic and log d logistic about min(T, 0), so that its tails are heavier than those of
    logistic noise under a softplus threshold, which for a low T crowds below it.
    """
    top, gap = Logistic((features,), scale=1.5), Logistic((features, num_classes - 1), scale=1.3)

    def sample(n: int) -> tuple[Tensor, Tensor]:
        threshold, log_top = top.sample_and_log_prob(n)
        offset, log_gap = gap.sample_and_log_prob(n)
        log_d = offset + threshold.unsqueeze(2).clamp_max(0.0)
        others = threshold.unsqueeze(2) - log_d.exp()
        scores = torch.cat([threshold.unsqueeze(2), others], dim=2)
        order = torch.rand_like(scores).argsort(2)  # the order of the others changes no density
        log_r = log_top + log_gap - log_d.flatten(1).sum(1)
        return scores.gather(2, order).flatten(1), log_r - features * math.log(num_classes)

    return sample
