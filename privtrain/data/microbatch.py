"""Pack a rank's units into microbatches whose tensor shapes give nothing away.

A unit is what is sampled and clipped: a user with the records drawn in this step, or a single record.

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
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
        owner: [rows] whose row it is: an index into ``owners``; ``NOBODY`` for padding rows. Stays on the CPU.
        owners: positions of the units that have a row here, in the list of the rank's units; in row order.
        last_continues: whether the last owner has more rows in the next microbatch.
        pad_id: token id of padding.
        is_joint: whether the ranks of a shard group (which divide one model's weights and gradients among them) have
            this same microbatch and work on its units together.
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
        """Return the same microbatch with the rows of ``owners[index]`` alone; all other rows are padding.

        The rows stay in their places, so that they draw the same dropout. If there is no such owner, all are padding.
        """
        owner = torch.where(self.owner == index, 0, NOBODY)  # the one owner that is left is number 0
        is_kept = (owner == 0).to(self.input_ids.device)
        return dataclasses.replace(
            self,
            input_ids=torch.where(is_kept[:, None], self.input_ids, self.pad_id),
            target_mask=self.target_mask & is_kept[:, None],
            row_weight=torch.where(is_kept, self.row_weight, 0.0),
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


class _Run(NamedTuple):
    """Consecutive records of one unit that share a microbatch, a row each.

    Attributes:
        unit: position in the list of units.
        first: index of the first record among the unit's.
        stop: index of the last record, plus one.
    """

    unit: int
    first: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.first


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
        step = math.ceil(self.max_length / _NUM_WIDTHS)  # widths are its multiples
        longest = max(len(tokens) for tokens in records)
        assert longest <= self.max_length
        return min(math.ceil(longest / step) * step, self.max_length)

    def fits(self, records: Records) -> bool:
        """Return whether all rows of a unit are in one microbatch."""
        return len(records) <= self.microbatch_size

    def cost(self, records: Records) -> int:
        """Return what a unit costs in comparison with others, to share units out."""
        return self.width(records)

    def num_batches(self, units: Sequence[Records]) -> int:
        """Return the number of microbatches that these units need."""
        num_rows = [len(records) for records in units]
        return sum(len(self._runs(members, num_rows)) for members in self._by_width(units).values())

    def pack(self, units: Sequence[Records], num_batches: int) -> Iterator[Microbatch]:
        """Yield exactly ``num_batches`` microbatches holding the records of ``units``.

        The loss of a unit is the mean over *its own* predicted tokens in the step, so no weight depends on another.

        Args:
            units: per unit its records.
            num_batches: the largest number that any rank needs; all ranks must run equally many.
        """
        weights = weights_of(units)
        num_rows = [len(records) for records in units]
        num_made = 0
        for width, members in sorted(self._by_width(units).items(), reverse=True):  # the widest first
            for runs in self._runs(members, num_rows):
                yield self._assemble(runs, units, weights, width)
                num_made += 1
        assert num_made <= num_batches
        narrowest = min(math.ceil(self.max_length / _NUM_WIDTHS), self.max_length)
        for _ in range(num_batches - num_made):
            yield self._assemble([], units, weights, narrowest)  # of padding alone

    def pack_share(
        self, shares: Sequence[Sequence[Records]], share: int, joint: Sequence[Records] = ()
    ) -> Iterator[Microbatch]:
        """Yield one rank's microbatches of a step: as many as the busiest rank has, then the joint ones.

        Args:
            shares: every rank's units.
            share: this rank's number.
            joint: units that the ranks of this rank's shard group work on together; in ``owners`` they are numbered
                after the units of the rank's own share.
        """
        yield from self.pack(shares[share], max(self.num_batches(units) for units in shares))
        for batch in self.pack(joint, self.num_batches(joint)):
            owners = tuple(len(shares[share]) + owner for owner in batch.owners)
            yield dataclasses.replace(batch, owners=owners, is_joint=True)

    def _by_width(self, units: Sequence[Records]) -> dict[int, list[int]]:
        """Return width → the units that are padded to it, as positions in the list of units, in order."""
        members: dict[int, list[int]] = {}
        for unit, records in enumerate(units):
            members.setdefault(self.width(records), []).append(unit)
        return members

    def _runs(self, members: Sequence[int], num_rows: Sequence[int]) -> list[list[_Run]]:
        """Return the microbatches that hold units of one width, each as its runs.

        A unit that is too long for one fills whole microbatches and begins the next with what is left. The other units
        are placed by best fit, to waste little: the longest first, each where the least room is left that is enough.

        Args:
            members: the units of this width, as positions in the list of units.
            num_rows: rows of every unit, by position.
        """
        size = self.microbatch_size
        batches: list[list[_Run]] = []
        with_room: list[list[list[_Run]]] = [[] for _ in range(size + 1)]  # rows of room left → microbatches

        def begin_batch(run: _Run) -> None:
            """Put a run into a microbatch of its own."""
            batches.append([run])
            with_room[size - run.num_rows].append(batches[-1])

        long_units = [unit for unit in members if num_rows[unit] > size]
        for unit in long_units:
            for first in range(0, num_rows[unit], size):
                begin_batch(_Run(unit, first, min(first + size, num_rows[unit])))
        fitting_units = [unit for unit in members if num_rows[unit] <= size]
        for unit in sorted(fitting_units, key=lambda unit: (-num_rows[unit], unit)):
            run = _Run(unit, 0, num_rows[unit])
            enough = [room for room in range(run.num_rows, size + 1) if with_room[room]]
            if not enough:
                begin_batch(run)
                continue
            room = min(enough)
            batch = with_room[room].pop()
            batch.append(run)
            with_room[room - run.num_rows].append(batch)
        return batches

    def _assemble(
        self, runs: Sequence[_Run], units: Sequence[Records], weights: Sequence[float], width: int
    ) -> Microbatch:
        """Return the tensors of a microbatch that holds these runs, a record a row, padded to ``width``."""
        input_ids = np.full((self.microbatch_size, width), self.pad_id, dtype=np.int64)
        mask = np.zeros((self.microbatch_size, width), dtype=bool)
        row_weight = np.zeros(self.microbatch_size, dtype=np.float32)
        owner = np.full(self.microbatch_size, NOBODY, dtype=np.int64)
        row = 0
        for place, run in enumerate(runs):
            for record in map(Record.of, units[run.unit][run.first : run.stop]):
                input_ids[row, : len(record)] = record.tokens
                mask[row, : len(record)] = record.is_target
                row_weight[row] = weights[run.unit]
                owner[row] = place
                row += 1
        last_continues = bool(runs) and runs[-1].stop < len(units[runs[-1].unit])
        tensors = (torch.from_numpy(array) for array in (input_ids, mask, row_weight, owner))
        owners = tuple(run.unit for run in runs)
        return Microbatch(*tensors, owners=owners, last_continues=last_continues, pad_id=self.pad_id)


def weights_of(units: Sequence[Records]) -> list[float]:
    """Return the weight of a predicted token of each unit: 1 / their number, since a unit's loss is their mean."""
    return [1.0 / max(1, sum(Record.of(record).num_targets for record in records)) for records in units]
