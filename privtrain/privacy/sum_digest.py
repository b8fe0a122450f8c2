"""A digest of the clipped, reduced sum that does not depend on how the sum is sharded over ranks.

The noise of a step is keyed by the run's secret *and* this digest, so that equal sums get equal noise, on any number of
ranks and in any replay, and different sums never share noise, whoever computes them, in however many copies of a run
directory: whoever holds two noised sums of different data could subtract the noise otherwise.

The flat vector of all trainable tensors (of whole tensors, whatever part of it a rank holds) is cut into blocks of
2**16 coordinates. A block's value is, in each of three *lanes* (independent repetitions), Σ_i a_i·low_i + b_i·high_i
mod 2**64: low_i and high_i are the 32-bit halves of coordinate i, and a_i and b_i come from a table under the secret
(multilinear hashing: Carter and Wegman 1979; with halves and a power of two, Lemire and Kaser 2014, "Strongly universal
string hashing is fast", section 3). Sums over disjoint coordinates add up, so a rank that holds a part of the vector
computes its share, and an integer reduction of a few numbers a block gives every rank the whole. HMAC-SHA-256 binds the
values of all blocks, the tensors' names and shapes, and all public constants.

Two sums that differ, differ in a half of some coordinate by d with 0 < |d| < 2**32. A block's value is then equal in
one lane with probability at most 2**-33, since a·d = c mod 2**64 has at most 2**31 solutions a; in three lanes at most
2**-99. The table is independent of the sums, which depend on it through outputs of HMAC alone. Only sums under one
secret and of one step are compared, so a union bound over 10**6 steps and 100 copies of each leaves less than 2**-66.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import StepNoise
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.threads import CHUNK_ON_CPU, in_threads

#: Coordinates of a block, and rows of the table that one lane uses.
BLOCK = 1 << 16
_NUM_LANES = 3
#: Blocks that a device other than a CPU takes at a time.
_MOST_BLOCKS = 64
_HALF = 32


@dataclasses.dataclass(frozen=True)
class BoundSum:
    """The noise key and the ledger commitment derived from a sum.

    Attributes:
        noise: the key of the noise; different for every sum.
        commitment: 64 hex digits that the ledger keeps; under the secret, so they tell nothing of the sum, and
            independent of the noise's key.
    """

    noise: StepNoise
    commitment: str


def bind(
    key: SecretKey,
    step: int,
    total: torch.Tensor,
    layout: Layout,
    *,
    public: Sequence[object],
    metrics: Sequence[int],
    sum_parts: Callable[[torch.Tensor], None],
    previous: str | None = None,
) -> BoundSum:
    """Derive the noise's key and the ledger's commitment from a step's sum, the same on every rank.

    Args:
        key: secret of the run's current generation.
        step: the logical step.
        total: the reduced int64 sum, or this rank's parts of it.
        layout: where they lie.
        public: constants that say what the integers mean and how they are noised: exponents, standard deviations.
        metrics: exact sums that are released beside the gradient, the same on every rank.
        sum_parts: replaces a vector by its sum over the ranks that together hold one copy of the sum.
        previous: where noise is correlated, the commitment to the sum of the step before, empty for the first step of a
            generation (a stretch of the run under one secret): noise and commitment then depend on all sums so far.
            ``None`` where noise is independent.
    """
    values = block_values(total, layout, _table(key, total.device))
    sum_parts(values)
    sha = hashlib.sha256()
    for slot in layout.slots:
        sha.update(f"{slot.name!r} {slot.whole_shape}\n".encode())
    sha.update(repr((tuple(public), tuple(metrics))).encode())
    if previous is not None:
        sha.update(f"after {previous}\n".encode())
    sha.update(values.cpu().numpy().astype("<i8").tobytes())
    digest = sha.hexdigest()
    commitment = key.derive("commitment to a sum", step, digest).hex()
    if previous is not None:
        return BoundSum(chained_noise(key, step, commitment), commitment)
    return BoundSum(StepNoise(SecretKey(key.derive("noise of a sum", step, digest))), commitment)


def chained_noise(key: SecretKey, step: int, commitment: str) -> StepNoise:
    """Return the key of a step's fresh noise where noise is correlated.

    It is derived from the ledger's commitment, which depends on all sums so far. So noise of earlier steps can be drawn
    again without their sums. Without ``key`` a commitment tells nothing.
    """
    return StepNoise(SecretKey(key.derive("noise of a chain of sums", step, commitment)))


def block_values(total: torch.Tensor, layout: Layout, table: torch.Tensor) -> torch.Tensor:
    """Return this rank's share of every block's value: [blocks of the whole vector, lanes] int64.

    Args:
        total: this rank's coordinates of the sum, int64.
        layout: which coordinates these are.
        table: of :func:`_table`.
    """
    runs, num_coordinates = _runs(layout)
    values = torch.zeros(-(-num_coordinates // BLOCK), _NUM_LANES, dtype=torch.int64, device=total.device)
    most = CHUNK_ON_CPU if total.device.type == "cpu" else _MOST_BLOCKS * BLOCK
    pieces = list(_pieces(runs, most))

    def lanes(piece: _Piece) -> torch.Tensor:
        """Return what a piece adds to the values of its blocks."""
        part = total[piece.start : piece.start + piece.num_blocks * piece.size].view(piece.num_blocks, piece.size)
        return _lanes(part, table[:, piece.offset : piece.offset + piece.size])

    for piece, share in zip(pieces, in_threads(lanes, pieces, total.device), strict=True):
        values[piece.block : piece.block + piece.num_blocks] += share
    return values


class _Run(NamedTuple):
    """Coordinates that this rank holds and that follow one another, in its vector and in the whole vector."""

    start: int  # first coordinate in this rank's vector
    place: int  # first coordinate in the whole vector
    count: int  # number of coordinates


class _Piece(NamedTuple):
    """Coordinates that are hashed at a time: a part of one block, or several whole blocks."""

    start: int  # first coordinate in this rank's vector
    block: int  # number of the first block
    num_blocks: int
    offset: int  # first coordinate within each block; 0 for whole blocks
    size: int  # coordinates of each block


def _pieces(runs: list[_Run], most: int) -> Iterator[_Piece]:
    """Cut runs into pieces of at most ``most`` coordinates."""
    for run in runs:
        done = 0
        while done < run.count:
            left = run.count - done
            block, offset = divmod(run.place + done, BLOCK)
            num_whole = min(left, most) // BLOCK if offset == 0 else 0
            if num_whole:
                piece = _Piece(run.start + done, block, num_blocks=num_whole, offset=0, size=BLOCK)
            else:
                size = min(left, BLOCK - offset, most)
                piece = _Piece(run.start + done, block, num_blocks=1, offset=offset, size=size)
            yield piece
            done += piece.num_blocks * piece.size


def _lanes(part: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Return [blocks, lanes] int64: each block's Σ_i a_i·low_i + b_i·high_i mod 2**64.

    Args:
        part: [blocks, coordinates] int64.
        table: [2 · lanes, coordinates]: a and b of the first lane, then of the next.
    """
    low, high = part & ((1 << _HALF) - 1), part >> _HALF
    coefficients = list(zip(table[0::2], table[1::2], strict=True))  # a and b of each lane
    if part.device.type == "cpu" and len(part) == 1:  # quicker; integers on other devices have no dot
        lanes = [torch.dot(low[0], a) + torch.dot(high[0], b) for a, b in coefficients]
        return torch.stack(lanes)[None]
    lanes = [(low * a + high * b).sum(1) for a, b in coefficients]
    return torch.stack(lanes, dim=1)


def _runs(layout: Layout) -> tuple[list[_Run], int]:
    """Return the runs of coordinates that this rank holds, as long as can be, and the length of the whole vector."""
    runs: list[_Run] = []
    whole = 0  # length of the whole vector so far
    for slot in layout.slots:
        place, count = whole + slot.first, slot.num_coordinates
        last = runs[-1] if runs else None
        if last is not None and (last.start + last.count, last.place + last.count) == (slot.start, place):
            runs[-1] = last._replace(count=last.count + count)
        elif count:
            runs.append(_Run(slot.start, place, count))
        whole += slot.num_whole_coordinates
    return runs, whole


@functools.lru_cache(maxsize=4)
def _table(key: SecretKey, device: torch.device) -> torch.Tensor:
    """Return [2 · lanes, BLOCK] uniform 64-bit coefficients for the low and the high half, lane by lane."""
    words = key.stream("sum digest").uint64(2 * _NUM_LANES * BLOCK)
    return torch.from_numpy(words.view("<i8").copy()).view(2 * _NUM_LANES, BLOCK).to(device)
