"""Masked nets whose outputs obey an order of the features."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surflow.nets.mlp import make_activation

ORDERINGS = ("natural", "reversed", "random")


class MaskedLinear(nn.Linear):
    r"""A linear layer with some connections cut: (B, in) -> (B, out).

    .. math:: y = (M \odot W)\,x + b

    Args:
        mask: M, (out, in); False cuts a connection.

    Raises:
        ValueError: for a mask of another shape.
    """

    def __init__(self, in_features: int, out_features: int, mask: Tensor) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("mask", torch.empty_like(self.weight), persistent=False)
        self.set_mask(mask)

    def set_mask(self, mask: Tensor) -> None:
        """Take another mask, (out, in)."""
        if mask.shape != self.weight.shape:
            shape = tuple(self.weight.shape)
            got = tuple(mask.shape)
            raise ValueError(f"MaskedLinear: expected a mask of shape {shape}, got {got}")
        self.mask.copy_(mask)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.mask, self.bias)


class MADE(nn.Module):
    r"""A masked autoregressive net: (B, D) -> (B, D P).

    .. math:: \theta_d = \theta_d(x_{d'} : d' \text{ before } d \text{ in the order},\ c)

    The P outputs of feature 0 come first, then those of feature 1, and so on, whatever the order.
    Every unit has a degree: an input its place in the order, 1 to D, a context feature 0, and the
    hidden units of a layer are spread evenly over the degrees below D. A hidden unit sees degrees
    up to its own, an output those below the place of its feature.

    The hidden units stand sorted by degree, so :meth:`sequential` can compute each of them once,
    as soon as what it sees is known.

    Args:
        features: D.
        params_per_feature: P.
        hidden_features: sizes of the hidden layers.
        activation: relu, elu, gelu, silu or tanh.
        context_features: size of a context that every output may see; 0 for none.
        ordering: "natural" (feature 0 first), "reversed", "random" (drawn from ``seed``), or the
            features in their order as a sequence of ints.
        seed: of the random order.
        residual: add a hidden layer's input to its output; the hidden layers are then of one size.
        zero_init: start the output layer at zero, so that a flow starts as the identity.

    Raises:
        ValueError: for sizes that are not positive, an unknown activation or ordering, or hidden
            layers of several sizes with ``residual``.

    Cost: forward one pass; sequential the arithmetic of one pass, in D steps.
    Source: Germain et al. 2015, arXiv 1502.03509, Sec. 3 and 4.

    >>> net = MADE(3, 2, [16], ordering="reversed")
    >>> net(torch.zeros(4, 3)).shape
    torch.Size([4, 6])
    >>> x = torch.zeros(1, 3, requires_grad=True)
    >>> net(x)[0, :2].sum().backward()  # feature 0 is the last in this order
    >>> x.grad[0].ne(0).tolist()
    [False, True, True]
    """

    def __init__(
        self,
        features: int,
        params_per_feature: int,
        hidden_features: Sequence[int] = (128, 128),
        activation: str = "relu",
        context_features: int = 0,
        ordering: str | Sequence[int] = "natural",
        seed: int = 0,
        residual: bool = False,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        hidden_features = list(hidden_features)
        if min([features, params_per_feature, *hidden_features]) < 1 or context_features < 0:
            raise ValueError(
                f"MADE: expected positive sizes, got {features=}, {params_per_feature=}, "
                f"{hidden_features=}, {context_features=}"
            )
        if residual and len(set(hidden_features)) > 1:
            raise ValueError(
                f"MADE: expected hidden layers of one size with residual, got {hidden_features}"
            )
        self.features = features
        self.params_per_feature = params_per_feature
        self.context_features = context_features
        self.residual = residual
        self.activation = make_activation(activation)

        lowest = 0 if context_features else min(1, features - 1)
        self._hidden_degrees = [
            lowest + torch.arange(size) * (features - lowest) // size for size in hidden_features
        ]
        # the number of units of each hidden layer up to a degree, by degree
        self._up_to = [
            [int((degree <= m).sum()) for m in range(features)] for degree in self._hidden_degrees
        ]
        self.register_buffer("order", _order(features, ordering, seed))
        self.register_buffer("_columns", None, persistent=False)
        sizes = [features + context_features, *hidden_features, features * params_per_feature]
        self.layers = nn.ModuleList(
            MaskedLinear(a, b, torch.ones(b, a)) for a, b in pairwise(sizes)
        )
        self._derive()
        if zero_init:
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def _derive(self) -> None:
        """What follows from the order: the masks, and the inputs sorted by degree."""
        order = self.order.cpu()
        self._order = order.tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(1, self.features + 1)
        inputs = torch.cat([place, torch.zeros(self.context_features, dtype=torch.long)])
        degrees = [inputs, *self._hidden_degrees]
        for layer, seen, own in zip(self.layers[:-1], degrees, self._hidden_degrees, strict=False):
            layer.set_mask(own.unsqueeze(1) >= seen)
        outputs = place.repeat_interleave(self.params_per_feature)
        self.layers[-1].set_mask(outputs.unsqueeze(1) > degrees[-1])
        context = torch.arange(self.features, self.features + self.context_features)
        self._columns = torch.cat([context, order]).to(self.order.device)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derive()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Every feature's parameters: x (B, D), context (B, C) -> (B, D P)."""
        h = torch.cat([x, context], dim=1) if self.context_features else x
        for i, layer in enumerate(self.layers):
            out = layer(self.activation(h) if i else h)
            h = h + out if self._adds(i) else out
        return h

    def _adds(self, i: int) -> bool:
        return self.residual and 0 < i < len(self.layers) - 1

    def sequential(
        self, solve: Callable[[int, Tensor], Tensor], like: Tensor, context: Tensor | None = None
    ) -> Tensor:
        """Feature by feature, each from the parameters that those before it give.

        Args:
            solve: ``solve(d, params)`` gives feature d, (B,), from its parameters (B, P).
            like: (B, D), whose batch, dtype and device the result takes.
            context: (B, C), if the net takes one.

        Returns:
            x, (B, D): ``solve(d, self(x, context)[:, d * P : (d + 1) * P])`` is x[:, d].
        """
        count = self.params_per_feature
        known = [context] if self.context_features else []
        first = self.layers[0].weight.index_select(1, self._columns)  # by degree, as ``known``
        before: list[list[Tensor]] = [[] for _ in self._up_to]  # blocks before the activation
        after: list[list[Tensor]] = [[] for _ in self._up_to]
        found: dict[int, Tensor] = {}
        for step, d in enumerate(self._order):
            seen = torch.cat(known, dim=1) if known else like[:, :0]
            for i, up_to in enumerate(self._up_to):
                start, stop = up_to[step - 1] if step else 0, up_to[step]
                if stop > start:  # the units of this degree; all that they see is known
                    block = _partial_linear(self.layers[i], seen, start, stop, None if i else first)
                    if self._adds(i):
                        block = block + before[i - 1][-1]
                    before[i].append(block)
                    after[i].append(self.activation(block))
                seen = torch.cat(after[i], dim=1) if after[i] else seen[:, :0]
            weight = None if self._up_to else first
            out = _partial_linear(self.layers[-1], seen, d * count, (d + 1) * count, weight)
            found[d] = solve(d, out).to(like.dtype)
            known.append(found[d].unsqueeze(1))
        return torch.stack([found[d] for d in range(self.features)], dim=1)


def _partial_linear(
    layer: MaskedLinear, seen: Tensor, start: int, stop: int, weight: Tensor | None
) -> Tensor:
    """Outputs start to stop of a layer of which only the first inputs are seen, unmasked."""
    weight = layer.weight if weight is None else weight
    if not seen.shape[1]:
        return layer.bias[start:stop].expand(seen.shape[0], -1)
    return F.linear(seen, weight[start:stop, : seen.shape[1]], layer.bias[start:stop])


def _order(features: int, ordering: str | Sequence[int], seed: int) -> Tensor:
    """The features in their order, (D,)."""
    if isinstance(ordering, str):
        if ordering not in ORDERINGS:
            raise ValueError(
                f"MADE: expected ordering to be one of {', '.join(ORDERINGS)} or a permutation, "
                f"got {ordering!r}"
            )
        if ordering == "random":
            return torch.randperm(features, generator=torch.Generator().manual_seed(seed))
        order = torch.arange(features)
        return order.flip(0) if ordering == "reversed" else order
    order = torch.as_tensor(ordering, dtype=torch.long)
    if order.dim() != 1 or sorted(order.tolist()) != list(range(features)):
        raise ValueError(
            f"MADE: expected an ordering with each of 0 to {features - 1} once, "
            f"got {order.tolist()}"
        )
    return order
