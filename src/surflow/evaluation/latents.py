"""Measures of latents: active units of a VAE, bits of each resolution of a pyramid."""

from __future__ import annotations

import math

from surflow import variational
from surflow.draws import evaluating, seed_draws
from surflow.errors import UserError
from surflow.evaluation.trained import Trained, evenly_spaced
from surflow.metric import Metric
from surflow.models import PyramidFlow


def active_units(trained: Trained, rows: int = 4096) -> list[Metric]:
    """The latent dimensions that a model with a VAE layer uses, from one draw.

    No metric without a VAE layer, for a pyramid, or for a single row. The variance is taken over at
    most so many `rows` of the split, evenly spaced.
    """
    flow, split = trained.flow, trained.split
    one_latent = variational.has_vae_layer(flow) and not isinstance(flow, PyramidFlow)
    if not one_latent or len(trained.rows) < 2:
        return []
    x = trained.on_device(evenly_spaced(trained.rows, rows))
    with evaluating(flow):
        seed_draws(x.device, trained.seed)
        used = variational.active_units(flow, x)
    words = f"latent dimensions of {used.of} whose posterior mean varies over {split} points"
    return [
        Metric(
            name=f"{split}/active_units",
            value=float(used.count),
            unit="units",
            kind="score",
            estimator=f"{words}, variance > {used.threshold:g}",
            count=len(x),
            protocol={"of": used.of, "threshold": used.threshold, "rows": len(x)},
        )
    ]


def levels(trained: Trained) -> list[Metric]:
    """What every resolution of a pyramid takes, in bits per dimension of its own image.

    No metric for another model. Raises UserError for a pyramid without a ledger.
    """
    flow, ledger = trained.flow, trained.ledger
    if not isinstance(flow, PyramidFlow):
        return []
    if ledger is None:
        raise UserError("measures.levels: expected the measure likelihood before it")
    found = []
    for side, (bits, error) in flow.level_bits(ledger).items():
        given = "unconditional" if side == min(flow.sides) else f"given {side // 2} x {side // 2}"
        image = f"ELBO of the {side} x {side} image, {given}"
        found.append(
            Metric(
                name=f"{trained.split}/level_{side}_bpd",
                value=bits,
                unit="bpd",
                kind="bound",
                estimator=f"{image}; bits per dimension of its own",
                standard_error=error,
                count=ledger.count,
                protocol={"dims": math.prod((flow.shape[0], side, side))},
            )
        )
    return found
