"""Likelihoods and bounds of every row, in blocks whose draws no batch size changes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from surflow.draws import device_of, evaluating, full_float32
from surflow.errors import check_choice
from surflow.evaluation.blocks import Work, fingerprint, passes_of
from surflow.evaluation.trained import Trained
from surflow.flow import Flow, Ledger
from surflow.metric import Metric
from surflow.objectives import check_iwbo
from surflow.progress import Progress, shown_progress, silent

SAVE_EVERY_S = 30.0
"""Seconds between writes of what a resumable evaluation has."""

POINT_NAMES = {"nll": "log_likelihood", "elbo": "elbo", "iwbo": "iwbo"}


def likelihood(trained: Trained, tf32: bool = False) -> list[Metric]:
    """Every score of the split: the likelihood, or ELBO and IWBO; of sets also a point; where the
    density of the data is known, also the :func:`excess` over it.

    What is done is kept in :func:`unfinished` of the run's folder, and a second call resumes from
    it; delete it with :func:`forget` once the numbers are written. Sets ``trained.ledger`` and
    ``trained.scores``.
    """
    data = trained.data
    with shown_progress("draws") as progress:
        found, trained.ledger = evaluate(
            trained.flow,
            trained.rows,
            data.eval_batch_size,
            seed=trained.seed,
            eval_samples=trained.eval_samples,
            iwbo_samples=trained.iwbo_samples,
            unit=trained.unit,
            split=trained.split,
            progress=progress,
            resume=unfinished(trained.folder, trained.split),
            tf32=tf32,
            scores=trained.scores,
        )
    if data.kind == "set":
        found |= per_point(found, data.num_points)
    if data.log_prob is not None and trained.unit == "nats":
        best = min(trained.scores, key=lambda name: found[name].value)
        true = data.log_prob(trained.rows).cpu()
        found["excess"] = excess(found[best], trained.scores[best], true)
    return list(found.values())


def on_split(trained: Trained, split: str, iwbo_samples: int = 0) -> list[Metric]:
    """The scores of another split, such as train: :func:`likelihood` of it."""
    other = replace(trained, split=split, iwbo_samples=iwbo_samples, scores={})
    found = likelihood(other)
    forget(trained.folder, split)
    return found


def excess(metric: Metric, scores: Tensor, log_prob: Tensor) -> Metric:
    r"""How far a score lies above what the density of the data has on the same rows, in nats.

    .. math:: \frac1N \sum_n \left[\log p(x_n) - \mathcal L(x_n)\right]

    Its expectation is KL(data || model), or an upper bound of it. Both terms are of the same rows,
    so that the noise of the test draw, most of which they share, leaves it.

    Args:
        metric: the mean of ``scores``.
        scores: negated log-likelihoods, or bounds, of the rows, (N,), nats.
        log_prob: of the rows under the density of the data, (N,), nats.
    """
    values = scores + log_prob
    return replace(
        metric,
        name=f"{metric.name.partition('/')[0]}/excess_nats",
        value=values.mean().item(),
        kind="score",
        estimator=f"{metric.estimator}, less that of the data's own density",
        standard_error=standard_error(values),
    )


def unfinished(folder: Path, split: str) -> Path:
    """The file that keeps a split's scores until they are written."""
    return folder / f"evaluation_{split}.partial.npz"


def forget(folder: Path, split: str) -> None:
    """Delete what :func:`likelihood` kept."""
    unfinished(folder, split).unlink(missing_ok=True)


def evaluate(
    flow: Flow,
    data: Tensor,
    batch_size: int,
    seed: int = 0,
    eval_samples: int = 1,
    iwbo_samples: int = 0,
    unit: str = "nats",
    split: str = "test",
    progress: Progress = silent,
    resume: Path | None = None,
    tf32: bool = False,
    scores: dict[str, Tensor] | None = None,
) -> tuple[dict[str, Metric], Ledger]:
    r"""Score every row of ``data``.

    .. math:: \hat{\mathcal L} = \frac1N \sum_n \mathcal L(x_n), \qquad
              \mathrm{se} = \sqrt{\tfrac{1}{N (N - 1)} \sum_n
              (\mathcal L(x_n) - \hat{\mathcal L})^2}

    A flow that draws is scored in blocks of rows and samples whose size follows from the dimension
    of the data alone (:func:`~surflow.evaluation.blocks.block_size`), each with its own random
    numbers (:meth:`~surflow.evaluation.blocks.Block.seed`). So the result depends on the seed, and
    neither on ``batch_size`` nor on an interruption. In a block, what does not depend on a draw is
    computed once a row. The sums over samples are float64. Autocast is off. The flow is in
    evaluation mode; mode and random state are restored.

    Args:
        flow: the model, on its device.
        data: (N, *event), on any device: blocks of rows are moved to the flow's.
        batch_size: rows at a time where nothing is drawn.
        eval_samples: S, draws averaged in the ELBO.
        iwbo_samples: K of an IWBO with its own draws; 0 for none.
        unit: nats or bpd.
        split: which split these rows are, for the names.
        progress: called after each block with the draws that are done, and all of them.
        resume: a file that keeps what is done. From one of the same flow, data, seed and
            estimators the evaluation resumes; any other is replaced. The caller deletes it.
        tf32: whether a GPU may round the factors of convolutions and matrix products to TF32, a few
            times as fast; the estimator's text then says so.
        scores: is given the score of every row, (N,), float64, by the name of its metric.

    Returns:
        metrics by name, such as ``test/nll_nats``, and the ledger over all rows, from one draw.

    Raises ValueError for an IWBO of a flow with estimated log-determinants
    (:func:`surflow.objectives.iwbo`), no rows, or numbers of samples or a batch size out of range.

    Cost: S + K draws a row. Memory: a block's.
    """
    _check(flow, data, batch_size, eval_samples, iwbo_samples, unit)
    passes = passes_of(flow, data, batch_size, eval_samples, iwbo_samples)
    work = Work(passes, len(data))
    save: Callable[[], None] = lambda: None  # noqa: E731
    if resume is not None:
        mark = fingerprint(flow, data, seed, passes, tf32)
        work.load(resume, mark)
        save = partial(work.save, resume, mark)
    exact = contextlib.nullcontext() if tf32 else full_float32()
    with evaluating(flow), torch.autocast(device_of(flow).type, enabled=False), exact:
        try:
            _score_blocks(flow, data, work, seed, partial(progress, f"evaluating {split}"), save)
        except BaseException:
            with contextlib.suppress(RuntimeError, OSError):  # the first error is raised
                save()
            raise
    save()
    exactly = "unbiased estimate of the" if flow.estimated else "exact"
    words = {
        "nll": f"{exactly} log-likelihood",
        "elbo": f"ELBO, {eval_samples} sample(s) a point",
        "iwbo": f"IWBO, K = {iwbo_samples}",
    }
    note = _dtypes(flow) + (", TF32 allowed" if tf32 else "")
    scale = 1.0 if unit == "nats" else 1.0 / (math.prod(data.shape[1:]) * math.log(2.0))
    found = {}
    for key, values in work.values().items():
        values, name = -values * scale, f"{split}/{key}_{unit}"
        if scores is not None:
            scores[name] = values
        found[name] = Metric(
            name=name,
            value=values.mean().item(),
            unit=unit,
            kind="likelihood" if key == "nll" else "bound",
            estimator=f"{words[key]}{note}, mean over {len(values)} {split} points",
            standard_error=standard_error(values),
            count=len(values),
        )
    return found, work.ledger(flow)


def _score_blocks(
    flow: Flow,
    data: Tensor,
    work: Work,
    seed: int,
    progress: Callable[[int, int], None],
    save: Callable[[], None],
) -> None:
    """Add to ``work`` what is not done of it."""
    weight = next(flow.parameters(), None)
    device, resumed = device_of(flow), work.done
    saved, done = time.monotonic(), 0
    for number, block in enumerate(work.blocks()):
        done += block.rows * block.samples
        if number + 1 < resumed:
            continue
        if number >= resumed:
            x = data[block.row : block.row + block.rows].to(device, non_blocking=True)
            x = x.to(weight.dtype) if weight is not None and x.is_floating_point() else x
            torch.manual_seed(block.seed(seed))
            work.keep(block, *block.scored(flow, x))
            if time.monotonic() - saved > SAVE_EVERY_S:
                save()
                saved = time.monotonic()
        progress(done, work.draws)


def standard_error(values: Tensor) -> float | None:
    """Of the mean of values, (N,); None for a single one."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def per_point(metrics: Mapping[str, Metric], num_points: int) -> dict[str, Metric]:
    r"""The scores of sets, a point, as they are published: not negated, higher is better.

    .. math:: \frac1N \log p(x_1, \dots, x_N)

    Those in nats by names such as ``test/nll_nats`` become ``test/point_log_likelihood_nats``,
    ``test/point_elbo_nats`` and ``test/point_iwbo_nats``; N is ``num_points``.
    """
    found = {}
    for metric in metrics.values():
        split, _, rest = metric.name.partition("/")
        estimator, _, unit = rest.rpartition("_")
        if estimator in POINT_NAMES and unit == "nats":
            name = f"{split}/point_{POINT_NAMES[estimator]}_nats"
            error = metric.standard_error
            how = metric.estimator.replace("point", "set")  # where a data point is a set
            found[name] = replace(
                metric,
                name=name,
                value=-metric.value / num_points,
                unit="nats/point",
                estimator=f"{how}, divided by the {num_points} points of a set",
                standard_error=None if error is None else error / num_points,
            )
    return found


def _dtypes(flow: Flow) -> str:
    """The types that the flow computes in, where that is not float32."""
    found = {str(p.dtype).removeprefix("torch.") for p in flow.parameters()} - {"float32"}
    return f", {' and '.join(sorted(found))}" if found else ""


def _check(
    flow: Flow, data: Tensor, batch_size: int, eval_samples: int, iwbo_samples: int, unit: str
) -> None:
    if len(data) < 1:
        raise ValueError("evaluate: expected at least one row, got none")
    if batch_size < 1 or eval_samples < 1 or iwbo_samples < 0:
        raise ValueError(
            "evaluate: expected batch_size >= 1, eval_samples >= 1 and iwbo_samples >= 0, got "
            f"{batch_size}, {eval_samples} and {iwbo_samples}"
        )
    check_choice("evaluate: unit", unit, ("nats", "bpd"))
    check_iwbo(flow, iwbo_samples)
