"""Pack a rank's units into microbatches whose tensor shapes give nothing away.

A user's records lie next to each other. A user may span microbatches; it never spans ranks. Every rank runs the same
number of microbatches: missing ones are made of zero-weight rows.

The shape of the tensors that a unit is computed in depends on that unit's own records alone: the width is the smallest
of a few fixed widths that holds its longest record, units of different widths never share a microbatch, and every
microbatch has the same number of rows. Padding to the longest batch mate instead would let one user's presence change
how everybody else's bf16 gradients are rounded (measured: 0.17 clipping norms over 14 users), which is sensitivity
that nobody accounted for. Where a unit is cut depends on it alone too: after every ``microbatch_size`` of its own rows,
and nowhere else. So a unit that fits into a microbatch is never split, whoever it shares it with.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from privtrain.data.records import Record

#: Owner of a padding row: nobody.
NOBODY = -1

#: Fixed widths that records are padded to, as a number of equal parts of the longest allowed.
_NUM_WIDTHS = 4

#: A unit's records; an array of tokens stands for a text, all of which is predicted.
Records = Sequence[Record | np.ndarray]


@dataclasses.dataclass(frozen=True)
class Microbatch:
    """Rows for one forward pass.

    Attributes:
        input_ids: [rows, tokens] int64, padded on the right.
        target_mask: [rows, tokens] bool: whether the token at this position is predicted (and not padding).
        row_weight: [rows] float32: 1 / (number of predicted tokens of the row's owner in this step); 0 for padding.
        owner: [rows] position of the owner in ``owners``; ``NOBODY`` for padding rows. Stays on the CPU.
        owners: positions of the units that have a row here, among the rank's units, in row order.
        last_continues: whether the last owner has more rows in the next microbatch.
        pad_id: token id of padding.
        is_joint: whether the ranks of a shard group have this same microbatch and work on its units together.
    """

    input_ids: torch.Tensor
    target_mask: torch.Tensor
    row_weight: torch.Tensor
    owner: torch.Tensor
    owners: tuple[int, ...]
    last_continues: bool
    pad_id: int = 0
    is_joint: bool = False

    def alone(self, index: int) -> Microbatch:
        """Return a microbatch of the same shape in which ``owners[index]`` has its rows and all others are padding.

        The rows stay in their places, so that they draw the same dropout. Without anybody if there is no such owner.
        """
        owner = torch.where(self.owner == index, 0, NOBODY)
        mine = (owner == 0).to(self.input_ids.device)
        return dataclasses.replace(
            self,
            input_ids=torch.where(mine[:, None], self.input_ids, self.pad_id),
            target_mask=self.target_mask & mine[:, None],
            row_weight=torch.where(mine, self.row_weight, 0.0),
            owner=owner,
            owners=self.owners[index : index + 1],
            last_continues=self.last_continues and index == len(self.owners) - 1,
        )

    def to(self, device: torch.device) -> Microbatch:
        """Return the same microbatch on another device."""
        moved = {
            field: getattr(self, field).to(device, non_blocking=True)
            for field in ("input_ids", "target_mask", "row_weight")
        }
        return dataclasses.replace(self, **moved)


#: A run of one unit's rows that share a microbatch: (unit, first row, one past the last row).
_Run = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Packer:
    """Turns units into microbatches.

    Attributes:
        microbatch_size: rows in every microbatch.
        max_length: tokens of the longest record.
        pad_id: token id for padding; never predicted.
    """

    microbatch_size: int
    max_length: int
    pad_id: int

    def width(self, records: Records) -> int:
        """Return the fixed width that a unit's records are padded to: a function of these records alone."""
        part = -(-self.max_length // _NUM_WIDTHS)
        longest = max(len(tokens) for tokens in records)
        assert longest <= self.max_length
        return min(-(-longest // part) * part, self.max_length)

    def fits(self, records: Records) -> bool:
        """Return whether all rows of a unit are in one microbatch."""
        return len(records) <= self.microbatch_size

    def cost(self, records: Records) -> int:
        """Return what a unit costs in comparison with others, to share units out."""
        return self.width(records)

    def num_batches(self, units: Sequence[Records]) -> int:
        """Return the number of microbatches that these units need."""
        rows: dict[int, list[int]] = {}
        for records in units:
            rows.setdefault(self.width(records), []).append(len(records))
        return sum(len(self._runs(range(len(counts)), counts)) for counts in rows.values())

    def pack(self, units: Sequence[Records], num_batches: int) -> Iterator[Microbatch]:
        """Yield exactly ``num_batches`` microbatches holding the records of ``units``.

        The loss of a unit is the mean over *its own* predicted tokens in the step, so no weight depends on another.

        Args:
            units: per unit its records.
            num_batches: the largest number that any rank needs.
        """
        weights = weights_of(units)
        by_width = sorted(range(len(units)), key=lambda u: (-self.width(units[u]), u))
        num_made = 0
        for width, group in itertools.groupby(by_width, key=lambda u: self.width(units[u])):
            for runs in self._runs(list(group), [len(records) for records in units]):
                yield self._assemble(runs, units, weights, width)
                num_made += 1
        assert num_made <= num_batches
        for _ in range(num_batches - num_made):  # empty and narrow: they keep ranks in step
            yield self._assemble([], units, weights, min(-(-self.max_length // _NUM_WIDTHS), self.max_length))

    def pack_share(
        self, shares: Sequence[Sequence[Records]], share: int, joint: Sequence[Records] = ()
    ) -> Iterator[Microbatch]:
        """Yield one rank's microbatches of a step: as many as the busiest rank has, then the joint ones.

        Args:
            shares: every rank's units.
            share: this rank's number.
            joint: units that the ranks of this rank's shard group work on together; their positions follow its share's.
        """
        yield from self.pack(shares[share], max(self.num_batches(units) for units in shares))
        for batch in self.pack(joint, self.num_batches(joint)):
            owners = tuple(len(shares[share]) + owner for owner in batch.owners)
            yield dataclasses.replace(batch, owners=owners, is_joint=True)

    def _runs(self, members: Sequence[int], num_rows: Sequence[int]) -> list[list[_Run]]:
        """Yield microbatches of one width: a long unit fills whole ones and begins the next with what is left.

        Units that fit go where the least room is left, the longest first, so that little of it is wasted.
        """
        size = self.microbatch_size
        batches: list[list[_Run]] = []
        with_room: dict[int, list[list[_Run]]] = {room: [] for room in range(size + 1)}

        def begin(run: _Run) -> None:
            batches.append([run])
            with_room[size - (run[2] - run[1])].append(batches[-1])

        for unit in (unit for unit in members if num_rows[unit] > size):
            for first in range(0, num_rows[unit], size):
                begin((unit, first, min(first + size, num_rows[unit])))
        for unit in sorted((u for u in members if num_rows[u] <= size), key=lambda u: (-num_rows[u], u)):
            run = unit, 0, num_rows[unit]
            room = next((room for room in range(run[2], size + 1) if with_room[room]), None)
            if room is None:
                begin(run)
            else:
                batch = with_room[room].pop()
                batch.append(run)
                with_room[room - run[2]].append(batch)
        return batches

    def _assemble(
        self, runs: Sequence[_Run], units: Sequence[Records], weights: Sequence[float], width: int
    ) -> Microbatch:
        """Return the tensors of a microbatch that holds these runs, a record a row, padded to ``width``."""
        input_ids = np.full((self.microbatch_size, width), self.pad_id, dtype=np.int64)
        mask = np.zeros((self.microbatch_size, width), dtype=bool)
        row_weight = np.zeros(self.microbatch_size, dtype=np.float32)
        owner = np.full(self.microbatch_size, NOBODY, dtype=np.int64)
        rows = [(place, unit, i) for place, (unit, first, stop) in enumerate(runs) for i in range(first, stop)]
        for row, (place, unit, i) in enumerate(rows):
            record = Record.of(units[unit][i])
            input_ids[row, : len(record)] = record.tokens
            mask[row, : len(record)] = record.is_target
            row_weight[row] = weights[unit]
            owner[row] = place
        continues = bool(runs) and runs[-1][2] < len(units[runs[-1][0]])
        tensors = (torch.from_numpy(array) for array in (input_ids, mask, row_weight, owner))
        owners = tuple(unit for unit, _, _ in runs)
        return Microbatch(*tensors, owners=owners, last_continues=continues, pad_id=self.pad_id)


def weights_of(units: Sequence[Records]) -> list[float]:
    """Return each unit's weight of a predicted token: the loss of a unit is the mean over its own ones in the step."""
    return [1.0 / max(1, sum(Record.of(record).num_targets for record in records)) for records in units]
