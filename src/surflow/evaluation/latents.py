"""Measures of latents: active units of a VAE, bits of each resolution of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from surflow import variational
from surflow.draws import evaluating, seed_draws
from surflow.errors import UserError
from surflow.evaluation.likelihood import standard_error
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


def as_printed(
    trained: Trained,
    formula: str,
    factor: float = 1.0,
    splits: Sequence[str] = ("train", "test"),
    num_samples: int = 10,
    rows: int = 1024,
) -> list[Metric]:
    """What another program prints for a VAE where that is no bound: of kind score.

    Args:
        formula: of :data:`surflow.variational.ANNEALED`, at β = 1, negated.
        factor: of the mean, where a program divides by another number than it sums.
        splits: to be scored.
        num_samples: draws an image.
        rows: images at a time, which set the draws.
    """
    found = []
    for split in splits:
        data, values = trained.data.splits[split], []
        for block, x in enumerate(data.split(rows)):
            x = trained.on_device(x)
            seed_draws(x.device, trained.seed, block)
            how = {"num_samples": num_samples, "annealed": formula}
            values.append(-variational.annealed_elbo(trained.flow, x, **how).double().cpu())
        scores = factor * torch.cat(values)
        of_what = f"{formula} of {num_samples} draws an image, times {factor:g}"
        found.append(
            Metric(
                name=f"{split}/as_printed_nats",
                value=scores.mean().item(),
                unit="nats",
                kind="score",
                estimator=f"no bound: {of_what}, mean over {len(scores)} {split} points",
                standard_error=standard_error(scores),
                count=len(scores),
            )
        )
    return found


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
