"""Distributions inside layers: their context, their draws and their densities."""

from __future__ import annotations

import torch
from torch import Tensor

from surflow.checks import InputError
from surflow.distributions.base import Distribution
from surflow.nets.sizes import averaged_to
from surflow.transforms.base import require_context


def check_distribution(
    distribution: Distribution, owner: str, role: str, context_features: int
) -> None:
    """Raise ValueError unless ``distribution`` is a density, with context features a conditional
    one; ``owner`` is the class that takes it and ``role`` the argument's name."""
    if not isinstance(distribution, Distribution) or distribution.discrete:
        raise ValueError(
            f"{owner}: expected a density (a Distribution that is not discrete) as {role}, "
            f"got {type(distribution).__name__}"
        )
    if context_features < 0 or (context_features and not distribution.conditional):
        raise ValueError(
            f"{owner}: expected context_features >= 0, and a conditional {role} where it is "
            f"positive, got {context_features} and {type(distribution).__name__}"
        )


def concatenate_context(seen: Tensor, context: Tensor | None, features: int) -> Tensor:
    """``seen`` and the flow's context, concatenated along dimension 1.

    Args:
        context: (B, F), expanded over the other dimensions of ``seen``, or (B, F, ...); an image
            k times as high and wide is averaged over blocks of k × k pixels.
        features: F; 0: the layer reads no context, and ``seen`` is returned.

    Raises:
        InputError: for a context that is missing or of a wrong shape.
    """
    if not features:
        return seen
    require_context(context, features)
    if context.dim() == 2:
        context = context.reshape(*context.shape, *[1] * (seen.dim() - 2))
        context = context.expand(-1, -1, *seen.shape[2:])
    elif context.dim() == seen.dim() == 4:
        smaller = averaged_to(context, *seen.shape[2:])
        context = context if smaller is None else smaller
    if context.shape[1:] != (features, *seen.shape[2:]):
        raise InputError(
            f"expected a context with {features} features, (batch, {features}) or "
            f"{(seen.shape[0], features, *seen.shape[2:])}, got shape {tuple(context.shape)}"
        )
    return torch.cat([seen, context.to(seen.dtype)], dim=1)


def draw(
    distribution: Distribution,
    seen: Tensor,
    context: Tensor | None,
    features: int,
    num_samples: int = 1,
) -> tuple[Tensor, Tensor]:
    """K events a row of ``seen`` and their log-densities, (K B, *event) and (K B,), nats.

    Sample k of row b is at k B + b.
    """
    if not distribution.conditional:
        return distribution.sample_and_log_prob(num_samples * seen.shape[0])
    given = concatenate_context(seen, context, features)
    return distribution.sample_and_log_prob(context=given, num_samples=num_samples)


def score(
    distribution: Distribution, value: Tensor, seen: Tensor, context: Tensor | None, features: int
) -> Tensor:
    """The log-density of ``value``, given ``seen`` where conditional: (B,), nats."""
    if not distribution.conditional:
        return distribution.log_prob(value)
    return distribution.log_prob(value, concatenate_context(seen, context, features))
