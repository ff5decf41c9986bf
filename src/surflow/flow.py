"""A flow: a base distribution and transforms, with a likelihood that knows what it is."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surflow.distributions.base import Distribution
from surflow.latents import Tape
from surflow.numeric import repeat_rows
from surflow.transforms.base import Transform, has_estimates, number_of
from surflow.transforms.sequential import Sequential


@dataclass(frozen=True)
class LedgerRow:
    """One layer's share of a likelihood.

    Attributes:
        layer: its place and class, such as ``0.AbsInference``; ``base`` comes last.
        kind: bijective, surjective (inference or generative), stochastic, or base.
        bound: whether this layer makes the number a lower bound.
        mean: mean contribution over the rows, nats.
        standard_error: of that mean, nats; NaN for a single row.
        finite: whether output and contribution were finite everywhere.
        estimate: whether this layer's contribution is a random, unbiased estimate.
    """

    layer: str
    kind: str
    bound: bool
    mean: float
    standard_error: float
    finite: bool
    estimate: bool = False

    @property
    def number(self) -> str:
        """'bound', 'estimate' or 'exact'."""
        return number_of(self.bound, self.estimate)


@dataclass(frozen=True)
class Ledger(Sequence[LedgerRow]):
    """The likelihood, layer by layer; the means add up to the mean of ``log_prob``.

    Attributes:
        rows: the layers in order, data side first, the base last.
        count: the number of data points averaged over.
    """

    rows: tuple[LedgerRow, ...]
    count: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> LedgerRow:  # type: ignore[override]
        return self.rows[index]

    @property
    def total(self) -> float:
        """The mean log-likelihood (or bound) per data point, nats."""
        return sum(row.mean for row in self.rows)

    @property
    def lower_bound(self) -> bool:
        """Whether the total is a lower bound."""
        return any(row.bound for row in self.rows)

    @classmethod
    def merge(cls, parts: Sequence[Ledger]) -> Ledger:
        """The ledger over all the rows of several, of one flow."""
        count = sum(p.count for p in parts)
        rows = []
        for same in zip(*(p.rows for p in parts), strict=True):
            mean = sum(r.mean * p.count for r, p in zip(same, parts, strict=True)) / count
            # sums of squares about the common mean, from each part's mean and standard error
            squares = sum(
                p.count * (p.count - 1) * (r.standard_error**2 if p.count > 1 else 0.0)
                + p.count * (r.mean - mean) ** 2
                for r, p in zip(same, parts, strict=True)
            )
            error = (squares / (count - 1) / count) ** 0.5 if count > 1 else float("nan")
            finite = all(r.finite for r in same)
            rows.append(replace(same[0], mean=mean, standard_error=error, finite=finite))
        return cls(tuple(rows), count)

    def to_json(self) -> dict[str, Any]:
        """The ledger of a record; a single point has no standard error."""
        rows = [asdict(row) for row in self.rows]
        for row in rows:
            if math.isnan(row["standard_error"]):
                row["standard_error"] = None
        return {
            "unit": "nats per data point, mean",
            "rows": rows,
            "total": self.total,
            "lower_bound": self.lower_bound,
        }

    def __str__(self) -> str:
        width = max(len("layer"), *(len(r.layer) for r in self.rows))
        kind = max(len("kind"), *(len(r.kind) for r in self.rows))
        lines = [f"{'layer':<{width}}  {'kind':<{kind}}  exact or bound  mean contribution, nats"]
        for r in self.rows:
            lines.append(
                f"{r.layer:<{width}}  {r.kind:<{kind}}  {r.number:<14}  "
                f"{r.mean:+.4f} ± {r.standard_error:.4f}"
            )
        word = number_of(self.lower_bound, any(r.estimate for r in self.rows))
        name = "lower bound on log p(x)" if self.lower_bound else "log p(x)"
        lines.append(
            f"{'sum':<{width}}  {name:<{kind}}  {word:<14}  {self.total:+.4f}  "
            f"(mean of {self.count} points)"
        )
        return "\n".join(lines)


@dataclass(frozen=True)
class Moments:
    """Contributions of the layers of a flow, base last, and their moments over the rows.

    Attributes:
        parts: (layers, B), nats, float64.
        mean: (layers,).
        squares: (layers,), sums of squared deviations from the mean.
        finite: (layers,), whether output and contribution were finite everywhere.
    """

    parts: Tensor
    mean: Tensor
    squares: Tensor
    finite: Tensor


def in_double(value: Tensor) -> Tensor:
    """In float64, on the host where the device has no such numbers."""
    return value.cpu().double() if value.device.type == "mps" else value.double()


def bytes_of(value: Tensor) -> np.ndarray:
    """The bytes of a tensor's numbers in order, uint8, for a hash."""
    flat = value.detach().cpu().contiguous().reshape(-1)
    if flat.stride() != (1,):  # a single number may come with none
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8).numpy()


def flow_sha256(module: nn.Module) -> str:
    """SHA-256 of all that a module's numbers follow from, 64 hex digits.

    These are its parts, their settings (plain numbers and words, those of helpers such as a
    coupling's map too), and every parameter and buffer. What a training step keeps in memory, and
    whether nets are compiled, does not count.

    >>> from surflow.distributions import StandardNormal
    >>> from surflow.transforms import Dequantization
    >>> few, many = (Flow(StandardNormal(2), Dequantization(k)) for k in (16, 256))
    >>> flow_sha256(few) == flow_sha256(many)
    False
    """
    digest = hashlib.sha256()
    for name, part in module.named_modules(remove_duplicate=False):
        kind = getattr(part, "label", type(part).__qualname__)
        digest.update(f"{name} {kind} {_settings(part)}\n".encode())
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


_OF_EVERY_MODULE = {*vars(nn.Module()), "memory", "_compiled_call_impl", "_turned_into"}


def _settings(owner: Any, depth: int = 3) -> list[tuple[str, Any]]:
    own = sorted(vars(owner).items())
    return [(name, _plain(value, depth)) for name, value in own if name not in _OF_EVERY_MODULE]


def _plain(value: Any, depth: int) -> Any:
    """A setting in plain words; of what may change from call to call, the type alone."""
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return repr(value)
    if isinstance(value, tuple):
        return [_plain(v, depth) for v in value]
    if isinstance(value, functools.partial):
        return ["partial", _plain(value.func, depth), _plain(value.args, depth)]
    kind = type(value).__qualname__
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__
    if type(value).__module__.startswith("surflow.") and not isinstance(value, nn.Module):
        return [kind, _settings(value, depth - 1) if depth and hasattr(value, "__dict__") else ""]
    return kind


class Flow(nn.Module):
    r"""A base distribution and transforms.

    .. math:: \log p(x) = \log p(z) + \sum_i V_i(x_{i-1}, x_i)

    exactly where every layer's forward is deterministic, else as a lower bound in expectation
    (``lower_bound``).

    Args:
        base: the distribution of the last latent.
        transforms: one transform, or several in order, data side first.

    Source: Nielsen et al. 2020, arXiv 2007.02731, Sec. 2 and Algorithm 1.

    >>> import torch
    >>> from surflow.distributions import StandardNormal
    >>> from surflow.transforms import Affine
    >>> flow = Flow(StandardNormal(1), [Affine(1, scale=2.0)])
    >>> round(flow.log_prob(torch.zeros(1, 1)).item(), 4)  # log N(0; 0, 1/4)
    -0.2258
    """

    def __init__(self, base: Distribution, transforms: Transform | Iterable[Transform] = ()):
        super().__init__()
        if not isinstance(base, Distribution):
            raise TypeError(f"Flow: base must be a Distribution, got {type(base).__name__}")
        self.base = base
        if not isinstance(transforms, Sequential):
            one = isinstance(transforms, Transform)
            transforms = Sequential([transforms] if one else transforms)
        self.transforms = transforms

    @property
    def lower_bound(self) -> bool:
        """Whether ``log_prob`` is a lower bound, in expectation, rather than the likelihood."""
        return self.transforms.lower_bound

    @property
    def estimated(self) -> bool:
        """Whether ``log_prob`` is a random estimate of what it otherwise would be, unbiased."""
        return self.transforms.estimated or has_estimates(self.base)

    @property
    def conditional(self) -> bool:
        """Whether any part reads a context."""
        return self.transforms.conditional or self.base.conditional

    def _check_context(self, context: Tensor | None) -> None:
        if context is not None and not self.conditional:
            raise ValueError("Flow: got a context, but no layer of this flow takes one")

    def log_prob(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The log-likelihood of each row, or a sample of a lower bound on it.

        Args:
            x: data, (B, *event).
            context: (B, ...) for a conditional flow.

        Returns:
            (B,), nats; see ``lower_bound``.

        Raises:
            ValueError: from the layer to which a wrong shape, dtype or value came.
        """
        self._check_context(context)
        z, ldj = self.transforms(x, context)
        return self.base.log_prob(z, context) + ldj

    def log_prob_samples(
        self, x: Tensor, context: Tensor | None = None, num_samples: int = 1
    ) -> Tensor:
        """K draws of :meth:`log_prob` of each row, (K, B), nats, as of the rows repeated.

        What does not depend on a draw is computed once a row: see
        :meth:`~surflow.transforms.base.Transform.forward_samples`.

        Raises:
            ValueError: as ``log_prob``, and for num_samples < 1.
        """
        self._check_context(context)
        z, ldj = self.transforms.forward_samples(x, context, num_samples)
        log_p = self.base.log_prob(z, repeat_rows(context, num_samples))
        return (log_p + ldj).unflatten(0, (num_samples, -1))

    def encode(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The latent of each row (a draw of it where forward is stochastic)."""
        self._check_context(context)
        return self.transforms(x, context)[0]

    def decode(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """The data of each latent (a draw where inverse is stochastic)."""
        self._check_context(context)
        return self.transforms.inverse(z, context)

    def sample(
        self, n: int | None = None, context: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Draw data.

        Args:
            n: how many; may be left out with a context, whose rows then give one sample each.
            context: (n, ...) or (1, ...).
            temperature: of the base distribution; layers are unaffected.

        Returns:
            (n, *event).
        """
        self._check_context(context)
        if n is None and context is not None:
            n = context.shape[0]
        if context is not None and context.shape[0] == 1 and n != 1:
            context = context.expand(n, *context.shape[1:])
        z = self.base.sample(n, context, temperature)
        return self.transforms.inverse(z, context)

    def write(self, x: Tensor, context: Tensor | None, tape: Tape) -> None:
        """Write all the latents of x on the tape: what layers cut off, the base's last."""
        outer = tape.layer
        for i, layer in enumerate(self.transforms):
            tape.layer = f"{i}.{layer.label}" if outer == "base" else outer
            x = layer.infer(x, context, tape)
        tape.layer = outer
        self.base.write(x, context, tape)

    def read(self, context: Tensor | None, tape: Tape) -> Tensor:
        """The x of the latents on the tape: the inverse of :meth:`write`."""
        return self.transforms.generate(self.base.read(context, tape), context, tape)

    def trace(
        self, x: Tensor, context: Tensor | None = None
    ) -> Iterator[tuple[str, Transform | Distribution, Tensor, Tensor]]:
        """Layer by layer: name, layer, output, contribution (B,); the base last."""
        self._check_context(context)
        z = x
        for row in self.transforms.trace(x, context):
            z = row[2]
            yield row
        yield f"base.{type(self.base).__name__}", self.base, z, self.base.log_prob(z, context)

    def at_step(self, step: int) -> None:
        """Called in training before a batch, with the number of optimizer steps done: parts that
        join later begin here."""

    def layers(self) -> Iterator[tuple[str, Transform | Distribution]]:
        """Name and layer in the order of :meth:`trace`."""
        yield from self.transforms.layers()
        yield f"base.{type(self.base).__name__}", self.base

    def moments(self, x: Tensor, context: Tensor | None = None) -> Moments:
        """The contributions of every layer and their moments, on the device."""
        parts, finite = [], []
        for _, _, z, part in self.trace(x, context):
            parts.append(in_double(part))
            finite.append(part.isfinite().all() & z.isfinite().all())
        table = torch.stack(parts)
        mean = table.mean(1)
        squares = (table - mean.unsqueeze(1)).square().sum(1)
        return Moments(table, mean, squares, torch.stack(finite).to(table.device))

    @torch.no_grad()
    def ledger(self, x: Tensor, context: Tensor | None = None) -> Ledger:
        """The likelihood of ``x``, layer by layer, as means over its rows, in nats."""
        found = self.moments(x, context)
        return self.ledger_of(x.shape[0], found.mean, found.squares, found.finite)

    def ledger_of(self, count: int, mean: Tensor, squares: Tensor, finite: Tensor) -> Ledger:
        """A ledger from the moments of ``count`` rows, (layers,) each: see :class:`Moments`."""
        error = (squares / (count - 1) / count).sqrt() if count > 1 else mean * float("nan")
        columns = zip(mean.tolist(), error.tolist(), finite.tolist(), strict=True)
        rows = []
        for (name, layer), numbers in zip(self.layers(), columns, strict=True):
            kind, bound = "base", False
            if isinstance(layer, Transform):
                kind, bound = layer.kind, layer.lower_bound
            rows.append(LedgerRow(name, kind, bound, *numbers, has_estimates(layer)))
        return Ledger(tuple(rows), count)

    def first_non_finite(self, x: Tensor, context: Tensor | None = None) -> str | None:
        """The first layer whose output or contribution is not finite; None if all are."""
        with torch.no_grad():
            if not x.isfinite().all():
                return "the data"
            for name, _, z, part in self.trace(x, context):
                for what, value in (("ldj", part), ("output", z)):
                    if not value.isfinite().all():
                        return f"{name} ({what})"
        return None


class FlowDistribution(Distribution):
    r"""A flow as a distribution: the posterior of a VAE layer, a dequantizer, a prior.

    .. math:: \log q(x \mid c) = \log p(z \mid c) + \sum_i V_i

    Sampling scores its own draw, so that the other direction of an autoregressive or planar flow,
    which is slow or has no closed form, is not needed.

    Args:
        flow: an exact flow (not a lower bound), conditional or not.
        event_shape: the shape of x; None: the flow's own, as the first layer that has one or the
            base say.
        embed: a net through which the context goes once, before every layer and the base.

    Raises:
        ValueError: for a flow whose density is only a bound, or of unknown event shape.

    Source: Rezende & Mohamed 2015, arXiv 1505.05770 (as a posterior); Ho et al. 2019, arXiv
    1902.00275 (as a dequantizer).
    """

    def __init__(
        self,
        flow: Flow,
        event_shape: int | Sequence[int] | None = None,
        embed: nn.Module | None = None,
    ) -> None:
        if flow.lower_bound:
            raise ValueError("FlowDistribution: expected an exact flow, got one that gives a bound")
        if event_shape is None:
            # layers that take any shape keep it, up to the first one that says
            layers = (t for _, t in flow.transforms.layers())
            known = (t.event_shape for t in layers if t.event_shape is not None)
            event_shape = next(known, flow.base.event_shape)
            if any(s is None for s in event_shape):
                raise ValueError("FlowDistribution: the flow takes any shape: give event_shape")
        super().__init__(event_shape, net=embed)
        self.flow = flow
        self.resting = False  # whether draws leave the layers out

    @property
    def conditional(self) -> bool:
        return self.flow.conditional

    def _embed(self, context: Tensor | None) -> Tensor | None:
        if context is None:
            return context
        net = self.flow if self.net is None else self.net
        weight = next(net.parameters(), None)
        if weight is not None and context.is_floating_point():
            context = context.to(weight.dtype)  # a latent is float32 even where a net is bfloat16
        return context if self.net is None else self.net(context)

    @property
    def factorised(self) -> bool:  # type: ignore[override]
        base = self.flow.base
        flat = self.net is not None and (len(self.flow.transforms) == 0 or self.resting)
        return flat and base.normal and base.conditional

    def normal_parameters(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log-scale, (B, *event) each, where ``factorised``."""
        return self.flow.base.parameters_of(self._embed(context))

    def write(self, x: Tensor, context: Tensor | None, tape: Tape) -> None:
        self.flow.write(x, self._embed(context), tape)

    def read(self, context: Tensor | None, tape: Tape) -> Tensor:
        return self.flow.read(self._embed(context), tape)

    def _log_prob(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(x, self._embed(context))

    def _sample(self, n: int, context: Tensor | None, temperature: float) -> Tensor:
        return self.flow.sample(n, self._embed(context), temperature)

    def _sample_and_log_prob(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor]:
        x, log_p, ldj = self._draw_in_parts(n, context, num_samples)
        return x, log_p + ldj

    def _draw_in_parts(
        self, n: int | None, context: Tensor | None, num_samples: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, context = self._rows(n, context)
        context = repeat_rows(self._embed(context), num_samples)  # embedded once a row
        z, log_p = self.flow.base.sample_and_log_prob(num_samples * n, context)
        if self.resting:
            return z, log_p, torch.zeros_like(log_p)
        x, ldj = self.flow.transforms.inverse_and_ldj(z, context)
        return x, log_p, ldj
