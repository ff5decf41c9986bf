"""Evaluation: over every point, in blocks whose draws depend on neither batch nor machine load."""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from surflow.files import write_bytes
from surflow.flow import Flow, Ledger, bytes_of, flow_sha256, in_double
from surflow.objectives import check_iwbo, iwbo

BLOCK_NUMBERS = 2**20
"""Numbers of the data in a block of rows and samples: 341 draws of 32x32 images."""

LEAST_BLOCK, MOST_BLOCK = 256, 2**16
"""Fewest and most draws of a block, whatever the dimension."""

SAVE_EVERY_S = 30.0
"""Seconds between writes of what a resumable evaluation has."""

LAYOUT = 1
"""Raised where blocks, seeds or file change, so that no older file is taken up."""


@dataclass(frozen=True)
class Estimate:
    """A mean over data points.

    Attributes:
        value: the mean, negated log-likelihood or bound: lower is better.
        unit: nats or bpd.
        kind: "likelihood" or "bound"; "score" for one of samples.
        estimator: how it was obtained.
        standard_error: of the mean over data points.
        count: the number of points.
        protocol: what else it depends on; None where the estimator says all.
    """

    value: float
    unit: str
    kind: str
    estimator: str
    standard_error: float
    count: int
    protocol: dict[str, Any] | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it: without a protocol or a standard error that it does not have."""
        fields = asdict(self)
        if self.protocol is None:
            del fields["protocol"]
        if self.standard_error is None or math.isnan(self.standard_error):
            del fields["standard_error"]
        return fields


@torch.no_grad()
def evaluate(
    flow: Flow,
    data: Tensor,
    batch_size: int,
    seed: int = 0,
    eval_samples: int = 1,
    iwbo_samples: int = 0,
    unit: str = "nats",
    split: str = "test",
    progress: Callable[[int, int], None] = lambda done, total: None,
    resume: Path | None = None,
    tf32: bool = False,
) -> tuple[dict[str, Estimate], Ledger]:
    r"""Score every row of ``data``.

    .. math:: \hat{\mathcal L} = \frac1N \sum_n \mathcal L(x_n), \qquad
              \mathrm{se} = \sqrt{\tfrac{1}{N (N - 1)} \sum_n
              (\mathcal L(x_n) - \hat{\mathcal L})^2}

    A flow that draws is scored in blocks of rows and samples whose size follows from the dimension
    of the data alone (:func:`block_size`), each with random numbers of its own, from a hash of the
    seed, the estimator and the block's first row and sample. So the result depends on the seed,
    and neither on ``batch_size`` nor on an interruption. In a block, what does not depend on a draw
    is computed once a row. The sums over samples are float64. The random numbers of the caller are
    left as they were; autocast is switched off, and TF32 too unless it is allowed.

    Args:
        flow: the model, on its device; evaluated in evaluation mode.
        data: (N, *event), on any device: blocks of rows are moved to the flow's.
        batch_size: rows at a time where nothing is drawn.
        seed: of the draws.
        eval_samples: S, draws averaged in the ELBO.
        iwbo_samples: K of an IWBO beside it, with draws of its own; 0 for none.
        unit: nats or bpd.
        split: which split these rows are, for the names.
        progress: told after each block how many draws are done, and of how many.
        resume: a file that keeps what is done. Where there is one of the same flow, data, seed and
            estimators, the evaluation goes on behind it; any other is replaced. It stays when the
            evaluation is complete, so that nothing is lost before the caller has kept the numbers:
            the caller then deletes it.
        tf32: whether a GPU may round the factors of convolutions and matrix products to TF32, a few
            times as fast; the estimator's text then says so.

    Returns:
        metrics by name (``test/nll_nats`` or ``test/elbo_nats``, ``test/iwbo_nats``), and the
        ledger over all rows, from one draw of each.

    Raises:
        ValueError: for an IWBO of a flow with estimated log-determinants
            (:func:`surflow.objectives.iwbo`), no rows, or numbers of samples or a batch size out of
            range.

    Cost: S + K draws a row. Memory: a block's.
    """
    _check(flow, data, batch_size, eval_samples, iwbo_samples, unit)
    flow.eval()
    passes = _passes(flow, data, batch_size, eval_samples, iwbo_samples)
    work = _Work(passes, len(data))
    reference = next(flow.parameters(), None)
    dtype = None if reference is None else reference.dtype
    device = _device(flow, data)
    mark = "" if resume is None else _fingerprint(flow, data, device, seed, passes, tf32)
    if resume is not None:
        work.load(resume, mark)
    draws = sum(p.num_samples for p in passes) * len(data)
    saved = time.monotonic()
    done = 0
    exact = contextlib.nullcontext() if tf32 else full_float32()
    with _restored_random_state(device), torch.autocast(device.type, enabled=False), exact:
        try:
            for number, block in enumerate(_blocks(passes, len(data))):
                done += block.rows * block.samples
                if number < work.done:
                    if number + 1 == work.done:
                        progress(done, draws)
                    continue
                x = data[block.row : block.row + block.rows].to(device, non_blocking=True)
                x = x.to(dtype) if dtype is not None and x.is_floating_point() else x
                _seed(device, seed, block)
                work.keep(block, *_scored(flow, x, block))
                if resume is not None and time.monotonic() - saved > SAVE_EVERY_S:
                    work.save(resume, mark)
                    saved = time.monotonic()
                progress(done, draws)
        except BaseException:
            if resume is not None:
                with contextlib.suppress(RuntimeError, OSError):  # the first error is the news
                    work.save(resume, mark)
            raise
    if resume is not None:
        work.save(resume, mark)
    values = work.values()
    note = _dtypes(flow) + (", TF32 allowed" if tf32 else "")
    words = {
        "nll": (
            "likelihood",
            "unbiased estimate of the log-likelihood" if flow.estimated else "exact log-likelihood",
        ),
        "elbo": ("bound", f"ELBO, {eval_samples} sample(s) a point"),
        "iwbo": ("bound", f"IWBO, K = {iwbo_samples}"),
    }
    scale = 1.0 if unit == "nats" else 1.0 / (math.prod(data.shape[1:]) * math.log(2.0))
    estimates = {}
    for name, rows in values.items():
        rows = -rows * scale
        kind, how = words[name]
        estimates[f"{split}/{name}_{unit}"] = Estimate(
            value=rows.mean().item(),
            unit=unit,
            kind=kind,
            estimator=f"{how}{note}, mean over {len(rows)} {split} points",
            standard_error=(rows.std() / len(rows) ** 0.5).item() if len(rows) > 1 else math.nan,
            count=len(rows),
        )
    return estimates, work.ledger(flow)


POINT_NAMES = {"nll": "log_likelihood", "elbo": "elbo", "iwbo": "iwbo"}


def per_point(estimates: Mapping[str, Estimate], num_points: int) -> dict[str, Estimate]:
    r"""The scores of sets, a point, as they are published: not negated, higher is better.

    .. math:: \frac1N \log p(x_1, \dots, x_N)

    Args:
        estimates: of sets, in nats, by names such as ``test/nll_nats``.
        num_points: N, points of a set.

    Returns:
        by name: ``test/point_log_likelihood_nats`` of an exact likelihood, ``test/point_elbo_nats``
        and ``test/point_iwbo_nats`` of bounds.
    """
    found = {}
    for name, e in estimates.items():
        split, _, rest = name.partition("/")
        estimator, _, unit = rest.rpartition("_")
        if estimator in POINT_NAMES and unit == "nats":
            how = e.estimator.replace("point", "set")  # where a data point is a set
            found[f"{split}/point_{POINT_NAMES[estimator]}_nats"] = replace(
                e,
                value=-e.value / num_points,
                unit="nats/point",
                estimator=f"{how}, divided by the {num_points} points of a set",
                standard_error=e.standard_error / num_points,
            )
    return found


def block_size(num_dims: int) -> int:
    """Draws in a block, rows times samples: about a million numbers of the data.

    >>> block_size(2), block_size(3 * 32 * 32), block_size(3 * 64 * 64)
    (65536, 341, 256)
    """
    return min(max(BLOCK_NUMBERS // num_dims, LEAST_BLOCK), MOST_BLOCK)


# How the work is parted


@dataclass(frozen=True)
class _Pass:
    """One estimator over all rows: ``rows`` at a time, their samples in ``chunks``.

    Attributes:
        name: nll, elbo, iwbo, or ledger for a draw that only the ledger needs.
        rows: rows of a block.
        chunks: samples of the blocks that share these rows, in order.
        traced: whether its draw is the ledger's too.
    """

    name: str
    rows: int
    chunks: tuple[int, ...]
    traced: bool

    @property
    def num_samples(self) -> int:
        return sum(self.chunks)


@dataclass(frozen=True)
class _Block:
    """Rows ``row`` to ``row + rows`` and samples ``sample`` to ``sample + samples`` of a pass."""

    of: _Pass
    index: int
    row: int
    rows: int
    chunk: int
    sample: int
    samples: int


def _pass(name: str, num_samples: int, size: int, traced: bool) -> _Pass:
    count = -(-num_samples // size)
    edges = [num_samples * i // count for i in range(count + 1)]
    chunks = tuple(b - a for a, b in pairwise(edges))
    return _Pass(name, max(1, size // num_samples), chunks, traced)


def _passes(
    flow: Flow, data: Tensor, batch_size: int, eval_samples: int, iwbo_samples: int
) -> list[_Pass]:
    size = block_size(math.prod(data.shape[1:]))
    if not flow.lower_bound:
        return [_pass("nll", 1, size if flow.estimated else batch_size, traced=True)]
    if eval_samples == 1:
        found = [_pass("elbo", 1, size, traced=True)]
    else:
        found = [
            _pass("ledger", 1, size, traced=True),
            _pass("elbo", eval_samples, size, traced=False),
        ]
    if iwbo_samples:
        found.append(_pass("iwbo", iwbo_samples, size, traced=False))
    return found


def _blocks(passes: Sequence[_Pass], count: int) -> Iterator[_Block]:
    """Every block, in the order of the work; those of the same rows follow each other."""
    for index, of in enumerate(passes):
        for row in range(0, count, of.rows):
            sample = 0
            for chunk, samples in enumerate(of.chunks):
                rows = min(of.rows, count - row)
                yield _Block(of, index, row, rows, chunk, sample, samples)
                sample += samples


def _scored(
    flow: Flow, x: Tensor, block: _Block
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
    """The block's share of every row, (rows,), float64, and the ledger's moments where traced."""
    if block.of.traced:
        moments = flow.moments(x)
        return moments.parts.sum(0), (moments.mean, moments.squares, moments.finite)
    values = in_double(flow.log_prob_samples(x, num_samples=block.samples))
    return (torch.logsumexp(values, 0) if block.of.name == "iwbo" else values.sum(0)), None


# What is done


class _Work:
    """The shares of finished blocks; those not yet fetched stay on their device."""

    def __init__(self, passes: Sequence[_Pass], count: int) -> None:
        self.passes = passes
        self.count = count
        self.done = 0
        self.tables = [torch.zeros(len(p.chunks), count, dtype=torch.float64) for p in passes]
        self.rows: list[int] = []  # of each traced block
        self.moments: list[Tensor] = []  # (3, layers): mean, squares, finite
        self._waiting: list[tuple[_Block, Tensor, tuple[Tensor, Tensor, Tensor] | None]] = []

    def keep(
        self, block: _Block, values: Tensor, moments: tuple[Tensor, Tensor, Tensor] | None
    ) -> None:
        self._waiting.append((block, values, moments))

    def fetch(self) -> None:
        """Take what waits from the device."""
        for block, values, moments in self._waiting:
            table = self.tables[block.index]
            table[block.chunk, block.row : block.row + block.rows] = values.cpu()
            if moments is not None:
                self.rows.append(block.rows)
                self.moments.append(torch.stack([m.double() for m in moments]).cpu())
            self.done += 1
        self._waiting = []

    def save(self, path: Path, mark: str) -> None:
        self.fetch()
        arrays = {f"table{i}": t.numpy() for i, t in enumerate(self.tables)}
        if self.moments:
            arrays["moments"] = torch.stack(self.moments).numpy()
        buffer = io.BytesIO()
        np.savez(buffer, mark=np.array(mark), done=np.array(self.done), rows=self.rows, **arrays)
        write_bytes(path, buffer.getvalue())

    def load(self, path: Path, mark: str) -> None:
        """Take up a file of this very work; leave any other to be replaced."""
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["mark"]) != mark:
                    return
                done = int(file["done"])
                rows = [int(n) for n in file["rows"]]
                tables = [torch.from_numpy(file[f"table{i}"]) for i in range(len(self.tables))]
                moments = torch.from_numpy(file["moments"]).unbind(0) if rows else ()
        except (OSError, ValueError, KeyError, EOFError, RuntimeError, zlib.error, BadZipFile):
            return  # none, or damaged
        self.done, self.rows, self.tables, self.moments = done, rows, tables, list(moments)

    def values(self) -> dict[str, Tensor]:
        """Each row's nll, elbo, iwbo, (N,), nats, not negated."""
        self.fetch()
        found = {}
        for of, table in zip(self.passes, self.tables, strict=True):
            if of.name == "iwbo":
                found[of.name] = torch.logsumexp(table, 0) - math.log(of.num_samples)
            elif of.name != "ledger":
                found[of.name] = table.sum(0) / of.num_samples
        return found

    def ledger(self, flow: Flow) -> Ledger:
        self.fetch()
        parts = [
            flow.ledger_of(rows, mean, squares, finite.bool())
            for rows, (mean, squares, finite) in zip(self.rows, self.moments, strict=True)
        ]
        return Ledger.merge(parts)


# Seeds, devices, checks


def _seed(device: torch.device, seed: int, block: _Block) -> None:
    text = f"{seed}/{block.of.name}/{block.row}/{block.sample}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(value)
    elif device.type == "mps":
        torch.mps.manual_seed(value)


@contextlib.contextmanager
def _restored_random_state(device: torch.device) -> Iterator[None]:
    state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        if state is not None:
            torch.mps.set_rng_state(state)


def _device(flow: Flow, data: Tensor) -> torch.device:
    device = next(flow.parameters(), next(flow.buffers(), data)).device
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fingerprint(
    flow: Flow,
    data: Tensor,
    device: torch.device,
    seed: int,
    passes: Sequence[_Pass],
    tf32: bool,
) -> str:
    """A hash of all that the numbers depend on."""
    digest = hashlib.sha256(f"{LAYOUT} {seed} {device.type} {tf32} {passes}".encode())
    digest.update(f"{flow_sha256(flow)} {data.dtype} {tuple(data.shape)}".encode())
    digest.update(bytes_of(data))
    return digest.hexdigest()


def _dtypes(flow: Flow) -> str:
    """In what numbers the flow computes, where that is not float32."""
    found = {str(p.dtype).removeprefix("torch.") for p in flow.parameters()} - {"float32"}
    return f", {' and '.join(sorted(found))}" if found else ""


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions and matrix products of float32 without TF32, which keeps 10 bits of 23."""
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cuda, "fp32_precision"):
        name, value = "fp32_precision", "ieee"
        switches = [cuda, cudnn.conv, cudnn.rnn]
    else:  # before torch 2.9
        name, value = "allow_tf32", False
        switches = [cuda, cudnn]
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, value)
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            setattr(switch, name, old)


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
    if unit not in ("nats", "bpd"):
        raise ValueError(f"evaluate: expected unit nats or bpd, got {unit!r}")
    check_iwbo(flow, iwbo_samples)


# Densities on a grid


@torch.no_grad()
def density_grid(
    flow: Flow,
    low: float,
    high: float,
    size: int,
    box: tuple[Sequence[float], Sequence[float]] | None = None,
    lower_bound_samples: int = 64,
) -> Tensor:
    """exp(log p) at the cell centres of a square grid, (size, size), index [i, j] = (x_i, y_j).

    Args:
        flow: a model of 2-D data.
        low, high: the square's edges.
        size: cells a side.
        box: lower and upper edges of the model's support; the density is 0 outside.
        lower_bound_samples: K of the IWBO where the flow is a bound.
    """
    flow.eval()
    step = (high - low) / size
    centres = low + step * (torch.arange(size) + 0.5)
    # a fifth of a cell off, so that no point lies on a diagonal, the edge of a folded model
    x = torch.cartesian_prod(centres + 0.2 * step, centres).to(next(flow.parameters(), centres))
    inside = torch.ones(len(x), dtype=torch.bool, device=x.device)
    if box is not None:
        edges = x.new_tensor(box[0]), x.new_tensor(box[1])
        inside = ((x > edges[0]) & (x < edges[1])).all(1)
    parts = [iwbo(flow, p, num_samples=lower_bound_samples) for p in x[inside].split(4096)]
    density = x.new_zeros(len(x))
    density[inside] = torch.cat(parts).exp()
    return density.reshape(size, size).cpu()


@torch.no_grad()
def mass_table(flow: Flow, num_levels: int, lower_bound_samples: int = 64) -> Tensor:
    """exp(log P) of every pair of integers 0 ... K - 1, (K, K), index [x_0, x_1].

    Args:
        flow: a model of pairs of integers.
        num_levels: K.
        lower_bound_samples: draws of the IWBO where the flow is a bound.
    """
    flow.eval()
    device = next(flow.parameters(), torch.zeros(())).device
    levels = torch.arange(num_levels, device=device)
    pairs = torch.cartesian_prod(levels, levels)
    parts = [iwbo(flow, p, num_samples=lower_bound_samples) for p in pairs.split(4096)]
    return torch.cat(parts).exp().reshape(num_levels, num_levels).cpu()
