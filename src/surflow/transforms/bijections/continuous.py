"""The continuous flow: the solution of a differential equation."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from surflow.checks import require_one_of, require_positive
from surflow.distributions import DiagonalNormal, StandardNormal
from surflow.distributions.base import as_shape, sum_event
from surflow.nets import MLP
from surflow.numeric import at_least_float32
from surflow.transforms.base import Bijection, Example, require_output, run_net
from surflow.transforms.bijections.residual import rademacher, value_and_jacobian

ADAPTIVE = ("dopri5", "dopri8", "bosh3")  # solvers of torchdiffeq
SOLVERS = ("rk4", *ADAPTIVE)
TRACES = ("exact", "hutchinson")

State = tuple[Tensor, ...]


def load_torchdiffeq() -> ModuleType:
    """The module torchdiffeq, loaded when first needed; ImportError says how to do without."""
    try:
        import torchdiffeq
    except ImportError as error:
        raise ImportError(
            "Continuous: the adaptive solvers need torchdiffeq (pip install torchdiffeq); "
            "solver='rk4' works without"
        ) from error
    return torchdiffeq


def runge_kutta(
    derivative: Callable[[Tensor, State], State], state: State, start: float, end: float, steps: int
) -> State:
    """The classical fourth-order method with equal steps, forwards or backwards in time."""
    h = (end - start) / steps
    like = state[0]

    def moved(state: State, slope: State, by: float) -> State:
        return tuple(s + by * k for s, k in zip(state, slope, strict=True))

    for i in range(steps):
        t = [like.new_full((), start + (i + part) * h) for part in (0.0, 0.5, 1.0)]
        k1 = derivative(t[0], state)
        k2 = derivative(t[1], moved(state, k1, h / 2))
        k3 = derivative(t[1], moved(state, k2, h / 2))
        k4 = derivative(t[2], moved(state, k3, h))
        state = tuple(
            s + h / 6 * (a + 2 * b + 2 * c + d)
            for s, a, b, c, d in zip(state, k1, k2, k3, k4, strict=True)
        )
    return state


class Continuous(Bijection):
    r"""The continuous flow: x is carried along a vector field.

    .. math:: \frac{dy}{dt} = f(y, t), \quad y(0) = x, \ y(T) = z, \qquad
              \mathrm{ldj} = \int_0^T \operatorname{tr} \frac{\partial f}{\partial y}\, dt

    Exact up to the solver's error, with ``trace="exact"``; with "hutchinson" an unbiased estimate
    by one probe a row, held fixed while the equation is solved (``estimated`` is then True, and
    the caveat of :class:`Residual` applies). The inverse solves the same equation backwards, and
    undoes forward up to the solver's error.

    The solver "rk4" takes ``num_steps`` equal steps. The adaptive ones are those of torchdiffeq;
    they choose their steps by an error norm over the whole batch, so that a row depends on the
    other rows within the tolerance, and do not compile. They evaluate f outside autocast.

    Args:
        net: the field f. It sees y with the time appended along dimension 1, (B, C + 1, ...), and
            the context if it has ``context_features``; it gives (B, C, ...), smooth in y, a row
            depending on that row alone.
        event_shape: the shape of x; None: (net.in_features - 1,) if the net has them, else any.
        solver: rk4, dopri5, dopri8 or bosh3.
        num_steps: steps of rk4.
        atol, rtol: tolerances of the adaptive solvers, at least 10 units of rounding of x (1e-6
            in float32).
        end_time: T, positive.
        trace: "exact", D backward passes at once, or "hutchinson", one.
        adjoint: gradients from the adjoint equation, in memory that does not grow with the number
            of steps, by an adaptive solver.

    Raises:
        ValueError: for an unknown option or one out of range, a wrong shape of x, a net whose
            output has a wrong shape, or a missing context.
        ImportError: for an adaptive solver without torchdiffeq.

    Cost: forward and inverse as many passes of f as the solver takes, each with D (exact) or 1
    backward passes.
    Source: Chen et al. 2018, arXiv 1806.07366, Sec. 4; Grathwohl et al. 2019, arXiv 1810.01367,
    Sec. 3.

    >>> layer = Continuous(MLP(2 + 1, 2, [16], "tanh"), solver="rk4")
    >>> x = torch.tensor([[0.5, -1.0]])
    >>> torch.allclose(layer.inverse(layer(x)[0]), x, atol=1e-4)
    True
    """

    def __init__(
        self,
        net: nn.Module,
        event_shape: int | Sequence[int] | None = None,
        solver: str = "dopri5",
        num_steps: int = 16,
        atol: float = 1e-5,
        rtol: float = 1e-5,
        end_time: float = 1.0,
        trace: str = "exact",
        adjoint: bool = False,
    ) -> None:
        super().__init__()
        require_one_of("Continuous", SOLVERS, solver=solver)
        require_one_of("Continuous", TRACES, trace=trace)
        require_positive("Continuous", num_steps=num_steps, atol=atol, rtol=rtol, end_time=end_time)
        if adjoint and solver not in ADAPTIVE:
            raise ValueError(
                f"Continuous: adjoint is for the solvers {', '.join(ADAPTIVE)}, got {solver!r}"
            )
        if event_shape is None and hasattr(net, "in_features"):
            event_shape = net.in_features - 1
        if event_shape is not None:
            self.event_shape = as_shape(event_shape)
        if solver in ADAPTIVE:
            load_torchdiffeq()
            self.compiles = False
            self.why_not_compiled = "an adaptive solver takes a number of steps that the data set"
        self.net, self.trace, self.adjoint = net, trace, adjoint
        self.solver, self.num_steps, self.atol, self.rtol = solver, num_steps, atol, rtol
        self.end_time = float(end_time)

    estimated = property(lambda self: self.trace != "exact")

    def _field(self, t: Tensor, rows: Tensor, context: Tensor | None, like: Tensor) -> Tensor:
        """f on flat rows in the solver's dtype; ``like`` has the shape and dtype of x."""
        y = rows.to(like.dtype).unflatten(1, like.shape[1:])
        time = t.to(y.dtype).expand(y.shape[0], 1, *y.shape[2:])
        out = run_net(self.net, torch.cat([y, time], dim=1), context)
        return require_output(out, tuple(y.shape)).flatten(1).to(rows.dtype)

    def _solve(
        self, value: Tensor, context: Tensor | None, method: str, with_ldj: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The other end of the path through ``value``, and the ldj of the pair ``with_ldj``.

        The context goes through the solver as a constant part of the state: the adjoint
        equation then gives its gradient too.
        """
        dtype = value.dtype
        if self.solver in ADAPTIVE and torch.is_autocast_enabled(value.device.type):
            # f is evaluated outside autocast, by weights that are not in half precision
            value = at_least_float32(value)
            if context is not None and context.is_floating_point():
                context = context.to(value.dtype)
        rows = at_least_float32(value.flatten(1))
        probe = rademacher(rows) if with_ldj and self.estimated else None
        carried = self.adjoint and context is not None and context.is_floating_point()

        def derivative(t: Tensor, state: State) -> State:
            y, given = state[0], state[-1].to(context.dtype) if carried else context

            def field(y: Tensor) -> Tensor:
                return self._field(t, y, given, value)

            still = (torch.zeros_like(state[-1]),) if carried else ()
            if not with_ldj:
                return field(y), *still
            if probe is None:
                slope, jacobian = value_and_jacobian(field, y)
                return slope, jacobian.diagonal(dim1=1, dim2=2).sum(1), *still
            slope, pull_back = torch.func.vjp(field, y)
            return slope, sum_event(pull_back(probe)[0] * probe), *still

        state: State = (rows,)
        if with_ldj:
            state = (*state, torch.zeros_like(rows[:, 0]))
        if carried:
            state = (*state, context)
        start, end = (0.0, self.end_time) if method == "forward" else (self.end_time, 0.0)
        if self.solver == "rk4":
            state = runge_kutta(derivative, state, start, end, self.num_steps)
        else:
            with torch.autocast(value.device.type, enabled=False):
                state = self._adaptive(derivative, state, start, end, value.dtype)
        other = state[0].to(dtype).view(value.shape)
        if not with_ldj:
            return other, None
        # backwards the integral runs from T to 0
        return other, state[1] if method == "forward" else -state[1]

    def _adaptive(
        self,
        derivative: Callable[[Tensor, State], State],
        state: State,
        start: float,
        end: float,
        dtype: torch.dtype,
    ) -> State:
        sign = 1.0 if end > start else -1.0

        def ahead(t: Tensor, state: State) -> State:
            """The same path with a time that begins at 0 and grows."""
            return tuple(sign * slope for slope in derivative(start + sign * t, state))

        times = state[0].new_tensor([0.0, abs(end - start)])
        least = 10 * torch.finfo(dtype).eps  # below it a solver would only chase rounding
        options = {
            "method": self.solver,
            "atol": max(self.atol, least),
            "rtol": max(self.rtol, least),
            # a step ends at the end: a value interpolated in a step that passes it is less exact
            "options": {"step_t": times[1:]},
        }
        if self.adjoint:
            parameters = tuple(p for p in self.net.parameters() if p.requires_grad)
            options |= {"adjoint_params": parameters, "adjoint_options": {"step_t": times[:1]}}
            path = load_torchdiffeq().odeint_adjoint(ahead, state, times, **options)
        else:
            path = load_torchdiffeq().odeint(ahead, state, times, **options)
        return tuple(part[-1] for part in path)

    def _forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._solve(x, context, "forward", with_ldj=True)

    def _inverse(self, z: Tensor, context: Tensor | None) -> Tensor:
        return self._solve(z, context, "inverse", with_ldj=False)[0]

    def _inverse_and_ldj(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._solve(z, context, "inverse", with_ldj=True)

    @classmethod
    def example(cls) -> Example:
        net = MLP(3, 2, [8], "tanh", context_features=1)
        sample, base = DiagonalNormal((2,), scale=1.8), StandardNormal((2,))
        return Example(cls(net, solver="rk4", num_steps=6, end_time=0.5), sample, base, context=1)
