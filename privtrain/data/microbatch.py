"""Pack a rank's units into padded microbatches, whole users in a row.

A user's records lie next to each other. A user may span microbatches; it never spans ranks. Every rank runs the same
number of microbatches: missing ones are made of zero-weight rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

#: Owner of a padding row: nobody.
NOBODY = -1


@dataclasses.dataclass(frozen=True)
class Row:
    """One record in a step: its tokens and the position of its owner among the rank's units."""

    tokens: np.ndarray
    owner: int


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Rows for one forward pass.

    Attributes:
        input_ids: [rows, tokens] int64, padded on the right.
        target_mask: [rows, tokens] bool: whether the token at this position is predicted (and not padding).
        row_weight: [rows] float32: 1 / (number of predicted tokens of the row's owner in this step); 0 for padding.
        owner: [rows] position of the owner in ``owners``; ``NOBODY`` for padding rows.
        owners: positions of the units that have a row here, among the rank's units, in row order.
        last_continues: whether the last owner has more rows in the next microbatch.
    """

    input_ids: torch.Tensor
    target_mask: torch.Tensor
    row_weight: torch.Tensor
    owner: torch.Tensor
    owners: tuple[int, ...]
    last_continues: bool

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch on another device."""
        moved = {
            field: getattr(self, field).to(device, non_blocking=True)
            for field in ("input_ids", "target_mask", "row_weight", "owner")
        }
        return dataclasses.replace(self, **moved)


def num_microbatches(num_rows: int, microbatch_size: int) -> int:
    """Microbatches that ``num_rows`` rows need."""
    return -(-num_rows // microbatch_size)


def pack(
    units: Sequence[Sequence[np.ndarray]], *, microbatch_size: int, num_batches: int, pad_id: int
) -> Iterator[Microbatch]:
    """Yield exactly ``num_batches`` microbatches holding the records of ``units`` in order.

    The loss of a unit is the mean over *its own* predicted tokens in the step, so no weight depends on another unit.

    Args:
        units: per unit its token arrays, each of at least two tokens.
        microbatch_size: rows per microbatch.
        num_batches: the largest number that any rank needs.
        pad_id: token id for padding; never predicted.
    """
    rows = [Row(tokens, owner) for owner, records in enumerate(units) for tokens in records]
    weights = [1.0 / max(1, sum(len(tokens) - 1 for tokens in records)) for records in units]
    assert num_microbatches(len(rows), microbatch_size) <= num_batches
    for index in range(num_batches):
        chunk = rows[index * microbatch_size : (index + 1) * microbatch_size]
        following = rows[(index + 1) * microbatch_size : (index + 1) * microbatch_size + 1]
        continues = bool(chunk and following and following[0].owner == chunk[-1].owner)
        yield _assemble(chunk, weights, continues, pad_id)


def _assemble(chunk: Sequence[Row], weights: Sequence[float], continues: bool, pad_id: int) -> Microbatch:
    if not chunk:
        chunk = [Row(np.full(2, pad_id, dtype=np.int64), NOBODY)]
    length = max(len(row.tokens) for row in chunk)
    input_ids = np.full((len(chunk), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(chunk), length), dtype=bool)
    owners = tuple(dict.fromkeys(row.owner for row in chunk if row.owner != NOBODY))
    position = {owner: i for i, owner in enumerate(owners)} | {NOBODY: NOBODY}
    for i, row in enumerate(chunk):
        input_ids[i, : len(row.tokens)] = row.tokens
        mask[i, 1 : len(row.tokens)] = row.owner != NOBODY
    return Microbatch(
        input_ids=torch.from_numpy(input_ids),
        target_mask=torch.from_numpy(mask),
        row_weight=torch.tensor([0.0 if r.owner == NOBODY else weights[r.owner] for r in chunk], dtype=torch.float32),
        owner=torch.tensor([position[row.owner] for row in chunk], dtype=torch.int64),
        owners=owners,
        last_continues=continues,
    )
