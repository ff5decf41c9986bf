"""Blocks of rows and samples that an evaluation is parted into, and what is done of them."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from surflow.draws import device_of
from surflow.files import write_npz
from surflow.flow import Flow, Ledger, bytes_of, flow_sha256, in_double

BLOCK_NUMBERS = 2**20
"""Numbers of the data in a block of rows and samples: 341 draws of 32x32 images."""

LEAST_BLOCK, MOST_BLOCK = 256, 2**16
"""Fewest and most draws of a block, whatever the dimension."""

LAYOUT = 2
"""Raised where blocks, seeds or file change, so that no older file is resumed from."""

Moments = tuple[Tensor, Tensor, Tensor]
"""Mean, squares and finite of a block, (layers,) each: see :class:`surflow.flow.Moments`."""


def block_size(num_dims: int) -> int:
    """Draws in a block, rows times samples: about a million numbers of the data.

    >>> block_size(2), block_size(3 * 32 * 32), block_size(3 * 64 * 64)
    (65536, 341, 256)
    """
    return min(max(BLOCK_NUMBERS // num_dims, LEAST_BLOCK), MOST_BLOCK)


@dataclass(frozen=True)
class Pass:
    """One estimator over all rows: ``rows`` at a time, their samples in ``chunks``, in order.

    ``name`` is nll, elbo, iwbo, or ledger for a draw that only the ledger needs; ``traced`` says
    whether its draw is the ledger's too.
    """

    name: str
    rows: int
    chunks: tuple[int, ...]
    traced: bool

    @property
    def num_samples(self) -> int:
        return sum(self.chunks)


@dataclass(frozen=True)
class Block:
    """Rows ``row`` to ``row + rows`` and samples ``sample`` to ``sample + samples`` of a pass."""

    of: Pass
    index: int
    row: int
    rows: int
    chunk: int
    sample: int
    samples: int

    def seed(self, seed: int) -> int:
        """The seed of its draws: a hash of the seed, the estimator, the first row and sample."""
        text = f"{seed}/{self.of.name}/{self.row}/{self.sample}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 1

    def scored(self, flow: Flow, x: Tensor) -> tuple[Tensor, Moments | None]:
        """Its share of every row, (rows,), float64, and the ledger's moments where traced."""
        if self.of.traced:
            moments = flow.moments(x)
            return moments.parts.sum(0), (moments.mean, moments.squares, moments.finite)
        values = in_double(flow.log_prob_samples(x, num_samples=self.samples))
        return (torch.logsumexp(values, 0) if self.of.name == "iwbo" else values.sum(0)), None


def passes_of(
    flow: Flow, data: Tensor, batch_size: int, eval_samples: int, iwbo_samples: int
) -> list[Pass]:
    """The passes that give the likelihood or the bounds, and the ledger, of a flow."""
    size = block_size(math.prod(data.shape[1:]))
    if not flow.lower_bound:
        return [_pass("nll", 1, size if flow.estimated else batch_size, traced=True)]
    found = [_pass("elbo" if eval_samples == 1 else "ledger", 1, size, traced=True)]
    if eval_samples > 1:
        found.append(_pass("elbo", eval_samples, size, traced=False))
    if iwbo_samples:
        found.append(_pass("iwbo", iwbo_samples, size, traced=False))
    return found


def _pass(name: str, num_samples: int, size: int, traced: bool) -> Pass:
    count = -(-num_samples // size)
    edges = [num_samples * i // count for i in range(count + 1)]
    chunks = tuple(b - a for a, b in pairwise(edges))
    return Pass(name, max(1, size // num_samples), chunks, traced)


def fingerprint(flow: Flow, data: Tensor, seed: int, passes: Sequence[Pass], tf32: bool) -> str:
    """A hash of all that the numbers depend on."""
    device = device_of(flow).type
    digest = hashlib.sha256(f"{LAYOUT} {seed} {device} {tf32} {passes}".encode())
    digest.update(f"{flow_sha256(flow)} {data.dtype} {tuple(data.shape)}".encode())
    digest.update(bytes_of(data))
    return digest.hexdigest()


class Work:
    """The shares of finished blocks of `count` rows; those not yet fetched stay on their device."""

    def __init__(self, passes: Sequence[Pass], count: int) -> None:
        self.passes = passes
        self.count = count
        self.done = 0
        self.tables = [torch.zeros(len(p.chunks), count, dtype=torch.float64) for p in passes]
        self.rows: list[int] = []  # of each traced block
        self.moments: list[Tensor] = []  # (3, layers): mean, squares, finite
        self._waiting: list[tuple[Block, Tensor, Moments | None]] = []

    @property
    def draws(self) -> int:
        """Draws of all blocks."""
        return sum(p.num_samples for p in self.passes) * self.count

    def blocks(self) -> Iterator[Block]:
        """Every block, in the order of the work; those of the same rows follow each other."""
        for index, of in enumerate(self.passes):
            for row in range(0, self.count, of.rows):
                sample = 0
                for chunk, samples in enumerate(of.chunks):
                    rows = min(of.rows, self.count - row)
                    yield Block(of, index, row, rows, chunk, sample, samples)
                    sample += samples

    def keep(self, block: Block, values: Tensor, moments: Moments | None) -> None:
        """Add a finished block, the next in order."""
        self._waiting.append((block, values, moments))

    def fetch(self) -> None:
        """Copy what is not yet fetched from the device."""
        for block, values, moments in self._waiting:
            table = self.tables[block.index]
            table[block.chunk, block.row : block.row + block.rows] = values.cpu()
            if moments is not None:
                self.rows.append(block.rows)
                self.moments.append(torch.stack([m.double() for m in moments]).cpu())
            self.done += 1
        self._waiting = []

    def save(self, path: Path, mark: str) -> None:
        """Write all that is finished."""
        self.fetch()
        arrays = {f"table{i}": t.numpy() for i, t in enumerate(self.tables)}
        if self.moments:
            arrays["moments"] = torch.stack(self.moments).numpy()
        write_npz(path, compressed=False, mark=mark, done=self.done, rows=self.rows, **arrays)

    def load(self, path: Path, mark: str) -> None:
        """Resume from a file with this mark; ignore any other."""
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
        """The ledger over all rows."""
        self.fetch()
        parts = [
            flow.ledger_of(rows, mean, squares, finite.bool())
            for rows, (mean, squares, finite) in zip(self.rows, self.moments, strict=True)
        ]
        return Ledger.merge(parts)
