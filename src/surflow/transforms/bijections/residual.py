"""The residual flow: x + g(x) with a contraction g."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from surflow.checks import (
    require,
    require_at_least,
    require_fraction,
    require_positive,
    values_are_checked,
)
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import as_shape, sum_event
from surflow.nets.lipschitz import LipschitzMLP
from surflow.numeric import at_least_float32, working_dtype
from surflow.transforms.base import Bijection, Example, require_output, run_net

TRACES = ("exact", "power_series", "russian_roulette")
GRADIENTS = ("neumann", "series")
CHECK_EVERY = 8  # iterations of the inverse between two checks of its convergence

Function = Callable[[Tensor], Tensor]


def value_and_jacobian(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """A function of rows and its Jacobian, by as many backward passes at once as x has elements.

    Args:
        function: (B, D) -> (B, D), a row of the result depending on that row alone.
        x: (B, D).

    Returns:
        value (B, D) and Jacobian (B, D, D), entry i, j being the derivative of output i in input
        j; both differentiable.
    """
    value, pull_back = torch.func.vjp(function, x)
    ones = torch.eye(x.shape[1], device=value.device, dtype=value.dtype)
    rows = torch.func.vmap(pull_back)(ones.unsqueeze(1).expand(-1, x.shape[0], -1))[0]
    return value, rows.movedim(0, 1)


def rademacher(like: Tensor) -> Tensor:
    """Signs with equal chances: a probe of a trace, of the least variance there is."""
    return torch.where(torch.rand_like(like) < 0.5, -1.0, 1.0).to(like.dtype)


class Residual(Bijection):
    r"""The residual flow: an identity and a contraction.

    .. math:: z = x + g(x), \quad \mathrm{Lip}(g) < 1, \qquad
              \mathrm{ldj} = \log\det(I + J_g(x))
              = \sum_{k=1}^{\infty} \frac{(-1)^{k+1}}{k} \operatorname{tr} J_g(x)^k

    How the log-determinant is found is ``trace``:

    * "exact": the Jacobian and its determinant. For low dimension.
    * "power_series": ``num_terms`` of the series, the trace by one random probe a row: biased by
      the terms left out, at most :math:`D\,c^{n+1} / ((n+1)(1-c))` for a contraction by c.
    * "russian_roulette": the series cut after a random number of terms, each divided by the
      chance to be reached: an unbiased estimate. Its variance is finite where
      :math:`c^2 < 1 -` ``stop``.

    The last two give a random number (``estimated`` is True). An unbiased estimate of log p(x) is
    neither its value nor a bound: averages converge to the value, but the mean of its exponential
    does not converge to p(x), so that importance-weighted bounds need ``trace="exact"``.

    The inverse iterates x <- z - g(x), each row until it converges, at most ``max_iterations``
    times. Its gradient is that of the implicit function: with "exact" by a Newton step, which
    also squares the error that is left; otherwise by ``gradient_iterations`` more iterations that
    autograd follows, an error of :math:`c^n`.

    Args:
        net: the contraction g, a module that keeps the shape of x and treats rows apart, such as
            :class:`~surflow.nets.LipschitzMLP`; it gets the context if it has
            ``context_features``. Nothing but the convergence of the inverse is checked.
        trace: see above.
        event_shape: the shape of x; None: the net's ``in_features`` if it has them, else any.
        num_terms: terms of the power series; with roulette, terms that are always there.
        stop: with roulette, the chance to stop after each further term, in (0, 1).
        gradient: of an estimated log-determinant: "neumann", by a series for (I + J)^-1 that
            needs the memory of one term; "series", by autograd through every term. They agree in
            expectation.
        max_iterations: of the inverse.
        tolerance: at which a row of the inverse has converged, relative to 1 + |x|; None: 16 units
            of rounding.
        gradient_iterations: see above.

    Raises:
        ValueError: for an unknown option or one out of range, a wrong shape of x, a net that
            changes the shape, a missing context, or an inverse that does not converge.

    Cost: forward D + 1 passes of g and O(D^3), estimated n + 2 passes; inverse tens of passes.
    Source: Behrmann et al. 2019, arXiv 1811.00995, Sec. 2 and 3; Chen et al. 2019, arXiv
    1906.02735, Sec. 3.

    >>> layer = Residual(LipschitzMLP(2, 2, [16]))
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-5)
    True
    """

    def __init__(
        self,
        net: nn.Module,
        trace: str = "exact",
        event_shape: int | Sequence[int] | None = None,
        num_terms: int = 8,
        stop: float = 0.2,
        gradient: str = "neumann",
        max_iterations: int = 200,
        tolerance: float | None = None,
        gradient_iterations: int = 32,
    ) -> None:
        super().__init__()
        if trace not in TRACES:
            raise ValueError(f"Residual: expected trace in {', '.join(TRACES)}, got {trace!r}")
        if gradient not in GRADIENTS:
            raise ValueError(
                f"Residual: expected gradient in {', '.join(GRADIENTS)}, got {gradient!r}"
            )
        require_fraction("Residual", stop=stop)
        counts = {"num_terms": num_terms, "max_iterations": max_iterations}
        require_at_least("Residual", 1, **counts, gradient_iterations=gradient_iterations)
        if tolerance is not None:
            require_positive("Residual", tolerance=tolerance)
        if event_shape is None:
            event_shape = getattr(net, "in_features", None)
        if event_shape is not None:
            self.event_shape = as_shape(event_shape)
        self.net, self.trace, self.gradient = net, trace, gradient
        self.num_terms, self.stop = num_terms, stop
        self.max_iterations, self.tolerance = max_iterations, tolerance
        self.gradient_iterations = gradient_iterations
        if trace == "russian_roulette":
            self.compiles = False
            self.why_not_compiled = "the number of terms of the series is drawn in each call"

    estimated = property(lambda self: self.trace != "exact")

    def _function(self, like: Tensor, context: Tensor | None) -> Function:
        """g on flat rows in the solver's dtype; its weights are bounded here, once."""
        net = self.net.prepared() if hasattr(self.net, "prepared") else self.net

        def function(rows: Tensor) -> Tensor:
            x = rows.to(like.dtype).unflatten(1, like.shape[1:])
            out = require_output(run_net(net, x, context), tuple(x.shape))
            return out.flatten(1).to(working_dtype(like))

        return function

    # The log-determinant ------------------------------------------------------------------------

    def _value_and_ldj(self, function: Function, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.trace != "exact":
            return self._series(function, rows)
        value, jacobian = value_and_jacobian(function, rows)
        with torch.autocast(rows.device.type, enabled=False):
            eye = torch.eye(rows.shape[1], device=rows.device, dtype=rows.dtype)
            return value, torch.linalg.slogdet(eye + jacobian)[1]

    def _weights(self) -> list[float]:
        """The factor of each term, 1 / P(the series gets there). Roulette draws its length here.

        The length comes from the CPU's generator, so that no device has to be waited for; it is
        one for the whole batch.
        """
        weights = [1.0] * self.num_terms
        if self.trace == "russian_roulette":
            more = int(torch.empty((), dtype=torch.float64, device="cpu").geometric_(self.stop)) - 1
            weights += [(1 - self.stop) ** -j for j in range(1, more + 1)]
        return weights

    def _series(self, function: Function, rows: Tensor) -> tuple[Tensor, Tensor]:
        """sum_k w_k (-1)^(k+1) / k v^T J^k v with one probe v a row, and the value of g."""
        weights = self._weights()
        value, pull_back = torch.func.vjp(function, rows)
        probe = rademacher(rows)
        if self.gradient == "series":
            vector, total = probe, 0.0
            for k, weight in enumerate(weights, 1):
                (vector,) = pull_back(vector)
                total = total + (-1) ** (k + 1) * weight / k * sum_event(vector * probe)
            return value, total
        # d log det(I + J) = tr((I + J)^-1 dJ): the inverse as its own series, of detached terms
        with torch.no_grad():
            vector, total, left = probe, 0.0, 0.0
            for k, weight in enumerate(weights, 1):
                left = left + (-1) ** (k + 1) * weight * vector
                vector = pull_back(vector)[0].detach()
                total = total + (-1) ** (k + 1) * weight / k * sum_event(vector * probe)
        if not torch.is_grad_enabled():
            return value, total
        surrogate = sum_event(pull_back(left)[0] * probe)
        return value, total + (surrogate - surrogate.detach())

    # Both directions ----------------------------------------------------------------------------

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = at_least_float32(x.flatten(1))
        value, ldj = self._value_and_ldj(self._function(x, context), rows)
        return (rows + value).to(x.dtype).view(x.shape), ldj

    @torch.no_grad()
    def _solve(self, function: Function, z: Tensor) -> Tensor:
        """The x with x + g(x) = z. A row that has converged is not changed further.

        Eagerly the loop ends once all rows have converged, checked every few iterations; a
        compiled loop runs ``max_iterations``.
        """
        tolerance = 16 * torch.finfo(z.dtype).eps if self.tolerance is None else self.tolerance
        x = z
        done = torch.zeros_like(z[:, :1], dtype=torch.bool)
        for i in range(1, self.max_iterations + 1):
            step = z - function(x) - x
            size = step.abs() / (1 + x.abs())
            x = torch.where(done, x, x + step)
            done = done | (size.amax(1, keepdim=True) <= tolerance)
            if i % CHECK_EVERY == 0 and not torch.compiler.is_compiling() and bool(done.all()):
                break
        return x

    def _preimage(self, function: Function, z: Tensor) -> Tensor:
        x = self._solve(function, z)
        if self.trace == "exact":
            with torch.no_grad():
                jacobian = value_and_jacobian(function, x)[1]
                with torch.autocast(x.device.type, enabled=False):
                    eye = torch.eye(x.shape[1], device=x.device, dtype=x.dtype)
                    inverse = torch.linalg.inv(eye + jacobian)
            rest = z - function(x) - x
            with torch.autocast(x.device.type, enabled=False):
                x = x + (inverse @ rest.unsqueeze(2)).squeeze(2)
        else:
            for _ in range(self.gradient_iterations if torch.is_grad_enabled() else 1):
                x = z - function(x)
        return x

    def _find(self, z: Tensor, context: Tensor | None) -> tuple[Function, Tensor]:
        rows = at_least_float32(z.flatten(1))
        function = self._function(z, context)
        x = self._preimage(function, rows)
        if values_are_checked():
            with torch.no_grad():
                rest = (x + function(x) - rows).abs()
            half = z.dtype.itemsize == 2 or torch.is_autocast_enabled(z.device.type)
            require(
                rest <= (0.1 if half else 1e-3) * (1 + rows.abs()),
                f"a contraction whose iterations converge within {self.max_iterations} steps "
                "(what is left of the equation)",
                rest,
            )
        return function, x

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._find(z, context)[1].to(z.dtype).view(z.shape)

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        function, x = self._find(z, context)
        return x.to(z.dtype).view(z.shape), self._value_and_ldj(function, x)[1]

    @classmethod
    def example(cls) -> Example:
        net = LipschitzMLP(3, 3, [8], "tanh", coefficient=0.9, context_features=2)
        with torch.no_grad():  # up to the bound, so that the example is far from the identity
            for layer in net.linears:
                layer.weight.mul_(3.0)
        sample, base = DiagonalNormal((3,), scale=1.8), StandardNormal((3,))
        return Example(cls(net, max_iterations=64), sample, base, context=2)
