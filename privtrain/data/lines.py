"""Pack a rank's units into lines: microbatches of one row that holds whole units, one after another.

Rows of one record each (:mod:`.microbatch`) are mostly padding where records are short. A line is one row: units one
after another, their records one after another, padding only behind the last. Positions begin anew with each record,
and attention stays within it (:mod:`privtrain.clipping.attention`), so that a token's numbers are those of its record
alone. The shape that a unit is computed in depends on nobody else:

* A unit of more than half of ``shared_tokens`` has a line of its own, as long as its own tokens need. One longer than
  ``num_tokens`` has several: its records fill a line in their order until the next does not fit.
* Shorter units share lines with units of their own size alone: within a factor of two, but for the shortest. Each
  size has lines of one length, at most ``shared_tokens``. So their gradients are taken in slots of one constant size
  and number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np
import torch

from privtrain.data.microbatch import Records, weights_of
from privtrain.data.records import Record

#: Lines are a multiple of this many tokens: fewer are wasted on a CPU, kernels of other devices work in larger tiles.
_CPU_MULTIPLE, _MULTIPLE = 16, 64
#: Tokens of the longest line, unless records are longer or a microbatch is smaller.
_FEWEST, _MOST = 512, 2048
#: Tokens of a line that units share on a CPU, which is as fast on short ones: the last one of a step is mostly padding.
#: Other devices need longer ones to be busy.
_CPU_SHARED = 128
#: The smallest slot of a unit in a shared line has so many tokens, or half of a shorter line.
_SMALLEST_SLOT = 64
#: Tokens of a shared line, at most, as a multiple of those of its slots.
_SLOTS_PER_LINE = 8
#: Units in a line, as a multiple of the rows of a microbatch: every slot needs memory for a gradient of its own.
_UNITS_PER_ROW = 2

#: First token and one past the last one.
Span = tuple[int, int]


def default_num_tokens(max_length: int, microbatch_size: int) -> int:
    """Return the tokens of the longest line: two of the longest records, within limits, and no more than rows have.

    A function of the configuration alone.
    """
    wanted = max(max_length, min(2 * max_length, _MOST), _FEWEST)
    return _rounded(min(wanted, microbatch_size * max_length), _MULTIPLE)


def _rounded(num_tokens: int, multiple: int) -> int:
    return -(-num_tokens // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class Line:
    """One row for one forward pass.

    Attributes:
        input_ids: [1, tokens] int64, padding at the end.
        positions: [1, tokens] int64: of each token within its record; 0 for padding.
        target_mask: [1, tokens] bool: whether the token at this position is predicted, from those of its record before.
        token_weight: [1, tokens] float32: 1 / (number of predicted tokens of the token's unit in this step); 0 for
            padding.
        records: where each record is, in order; a token of none is padding.
        units: where each unit of ``owners`` is: the whole of its records in this line.
        owners: positions of the units that have a record here, among the rank's units, in order.
        last_continues: whether the last owner has more records in the next line.
        num_slots: units that a line of this kind may hold: a constant.
        slot_tokens: tokens that each of them may have here: a constant, or the line's own length if it is for one.
        pad_id: token id of padding.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    target_mask: torch.Tensor
    token_weight: torch.Tensor
    records: tuple[Span, ...]
    units: tuple[Span, ...]
    owners: tuple[int, ...]
    last_continues: bool
    num_slots: int
    slot_tokens: int
    pad_id: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the line, padding included."""
        return self.input_ids.shape[1]

    def alone(self, index: int) -> Line:
        """Return a line in which ``owners[index]`` has its tokens, in their places, and all else is padding."""
        return self.only((index,))

    def only(self, members: Sequence[int]) -> Line:
        """Return a line in which some of ``owners``, given by their places, have their tokens and all else is padding.

        Records of the others become records of padding: attention draws as many random numbers for them, so that each
        unit keeps its own dropout, of which it shares nothing.
        """
        mine = torch.zeros_like(self.target_mask)
        for first, stop in (self.units[index] for index in members):
            mine[:, first:stop] = True
        spans = [self.units[index] for index in members]
        return dataclasses.replace(
            self,
            input_ids=torch.where(mine, self.input_ids, self.pad_id),
            positions=torch.where(mine, self.positions, 0),
            target_mask=self.target_mask & mine,
            token_weight=torch.where(mine, self.token_weight, 0.0),
            units=tuple(spans),
            owners=tuple(self.owners[index] for index in members),
            last_continues=self.last_continues and len(self.owners) - 1 in members,
        )

    def to(self, device: torch.device) -> Line:
        """Return the same line on another device."""
        moved = {
            field: getattr(self, field).to(device, non_blocking=True)
            for field in ("input_ids", "positions", "target_mask", "token_weight")
        }
        return dataclasses.replace(self, **moved)


#: Records of one unit that share a line: (unit, first record, one past the last, tokens).
_Run = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True)
class LinePacker:
    """Turns units into lines.

    Attributes:
        num_tokens: of the longest line, at least ``max_length``.
        shared_tokens: of the longest line that several units may share.
        max_units: most units in a line.
        max_length: tokens of the longest record.
        pad_id: token id for padding; never predicted.
        multiple: of which the length of a unit's own line is one, up to ``num_tokens``.
        avoided: lengths that lines do not have: sizes of the model, which its tokens would be mistaken for.
    """

    num_tokens: int
    shared_tokens: int
    max_units: int
    max_length: int
    pad_id: int
    multiple: int = _MULTIPLE
    avoided: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        assert self.num_tokens >= self.max_length
        assert self.shared_tokens >= 2
        assert self.max_units >= 1

    @classmethod
    def of(
        cls,
        max_length: int,
        microbatch_size: int,
        pad_id: int,
        num_tokens: int | None = None,
        *,
        device_type: str = "cpu",
        avoided: Collection[int] = (),
    ) -> LinePacker:
        """Return the packer that a configuration asks for.

        Args:
            max_length: tokens of the longest record.
            microbatch_size: rows of a microbatch: what memory is measured by.
            pad_id: token id for padding.
            num_tokens: of the longest line, rounded up; by default :func:`default_num_tokens`.
            device_type: where lines are computed.
            avoided: see above.
        """
        is_cpu, taken = device_type == "cpu", frozenset(avoided)
        tokens = default_num_tokens(max_length, microbatch_size) if num_tokens is None else num_tokens
        tokens = _free(_rounded(tokens, _MULTIPLE), _MULTIPLE, taken)
        shared = _free(min(tokens, _CPU_SHARED), _MULTIPLE, taken) if is_cpu else tokens
        multiple = _CPU_MULTIPLE if is_cpu else _MULTIPLE
        return cls(tokens, shared, _UNITS_PER_ROW * microbatch_size, max_length, pad_id, multiple, taken)

    def cost(self, records: Records) -> int:
        """Return the tokens of a unit."""
        return sum(len(record) for record in records)

    def num_batches(self, units: Sequence[Records]) -> int:
        """Return the number of lines that these units need."""
        return len(self._lines(units))

    def pack(self, units: Sequence[Records], num_batches: int) -> Iterator[Line]:
        """Yield exactly ``num_batches`` lines holding the records of ``units``.

        The loss of a unit is the mean over *its own* predicted tokens in the step, so no weight depends on another.

        Args:
            units: per unit its records.
            num_batches: the largest number that any rank needs.
        """
        weights = weights_of(units)
        lines = self._lines(units)
        assert len(lines) <= num_batches
        for runs in lines:
            yield self._assemble(runs, units, weights)
        for _ in range(num_batches - len(lines)):
            yield self._assemble([], units, weights)

    def pack_share(
        self, shares: Sequence[Sequence[Records]], share: int, joint: Sequence[Records] = ()
    ) -> Iterator[Line]:
        """Yield one rank's lines of a step: as many as the busiest rank has.

        Args:
            shares: every rank's units.
            share: this rank's number.
            joint: empty: where ranks work on a unit together, records are in rows.
        """
        assert not joint
        yield from self.pack(shares[share], max(self.num_batches(units) for units in shares))

    def arranged(self, units: Sequence[Records]) -> Line:
        """Return one line of these units in this order; several must be of one size and fit (:meth:`slot`)."""
        weights = weights_of(units)
        return self._assemble([(i, 0, len(r), self.cost(r)) for i, r in enumerate(units)], units, weights)

    def slots(self) -> list[tuple[int, int]]:
        """Return all kinds of shared lines, (tokens of a slot, slots), the largest slots first."""
        return [(size, self._num_slots(size)) for size in self._sizes()]

    def slot(self, num_tokens: int) -> int:
        """Return the tokens of the slot for a unit in a shared line; 0 if it has a line of its own."""
        return min((size for size in self._sizes() if size >= num_tokens), default=0)

    def _sizes(self) -> list[int]:
        """Return the tokens of slots in shared lines: halves of halves, the largest first."""
        sizes = [self.shared_tokens // 2]
        while sizes[-1] // 2 >= _SMALLEST_SLOT:
            sizes.append(sizes[-1] // 2)
        return sizes

    def _num_slots(self, size: int) -> int:
        """Return how many units share a line: all that fit if each takes half of its slot, of the smallest a third."""
        # A unit has more than half of its slot, or it had a smaller slot; of the smallest, a third is a guess.
        is_smallest = size == self._sizes()[-1]
        tokens = self.shared_length(size)
        fitting = 3 * tokens // size if is_smallest else -(-2 * tokens // size) - 1
        return min(self.max_units, fitting)

    def shared_length(self, slot: int) -> int:
        """Return the length of lines that are shared in slots of this size."""
        length = _free(min(self.shared_tokens, _SLOTS_PER_LINE * slot), self.multiple, self.avoided)
        return min(length, self.shared_tokens)

    def own_length(self, num_tokens: int) -> int:
        """Return the length of a line for one unit of so many tokens, at most those of the longest line."""
        assert num_tokens <= self.num_tokens
        return min(_free(_rounded(num_tokens, self.multiple), self.multiple, self.avoided), self.num_tokens)

    def _lines(self, units: Sequence[Records]) -> list[list[_Run]]:
        """Return lines as runs: units go where the least room is left, the longest first, so that little is wasted."""
        cut = [self._cut(unit, records) for unit, records in enumerate(units)]
        lines = [[run] for runs in cut for run in runs if len(runs) > 1 or not self.slot(run[3])]
        # Lines that take another unit, by the size of slots and the room that is left in each.
        with_room: dict[tuple[int, int], list[list[_Run]]] = {}
        sharing = [runs[0] for runs in cut if len(runs) == 1 and self.slot(runs[0][3])]
        for run in sorted(sharing, key=lambda run: (-run[3], run[0])):
            slot = self.slot(run[3])
            fitting = (place for place, some in with_room.items() if some and place[0] == slot and place[1] >= run[3])
            place = min(fitting, default=None)
            if place is None:
                lines.append([])
            line, room = (lines[-1], self.shared_length(slot)) if place is None else (with_room[place].pop(), place[1])
            line.append(run)
            if len(line) < self._num_slots(slot):
                with_room.setdefault((slot, room - run[3]), []).append(line)
        return lines

    def _cut(self, unit: int, records: Records) -> list[_Run]:
        """Return the runs of one unit: a function of its records alone."""
        runs: list[_Run] = []
        first = used = 0
        for i, record in enumerate(records):
            assert len(record) <= self.max_length
            if used + len(record) > self.num_tokens:
                runs.append((unit, first, i, used))
                first, used = i, 0
            used += len(record)
        return [*runs, (unit, first, len(records), used)]

    def _assemble(self, runs: Sequence[_Run], units: Sequence[Records], weights: Sequence[float]) -> Line:
        """Return the line that holds these runs one after another; ``weights`` are the units' token weights."""
        length, num_slots, slot_tokens = self._shape(runs, units)
        input_ids = np.full((1, length), self.pad_id, dtype=np.int64)
        positions = np.zeros((1, length), dtype=np.int64)
        mask = np.zeros((1, length), dtype=bool)
        token_weight = np.zeros((1, length), dtype=np.float32)
        spans: list[Span] = []
        own: list[Span] = []
        place = 0
        for unit, first, stop, _ in runs:
            begin = place
            for record in map(Record.of, units[unit][first:stop]):
                span = slice(place, place + len(record))
                input_ids[0, span], mask[0, span] = record.tokens, record.is_target
                positions[0, span] = np.arange(len(record))
                spans.append((place, span.stop))
                place = span.stop
            token_weight[0, begin:place] = weights[unit]
            own.append((begin, place))
        continues = bool(runs) and runs[-1][2] < len(units[runs[-1][0]])
        return Line(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            target_mask=torch.from_numpy(mask),
            token_weight=torch.from_numpy(token_weight),
            records=tuple(spans),
            units=tuple(own),
            owners=tuple(run[0] for run in runs),
            last_continues=continues,
            num_slots=num_slots,
            slot_tokens=slot_tokens,
            pad_id=self.pad_id,
        )

    def _shape(self, runs: Sequence[_Run], units: Sequence[Records]) -> tuple[int, int, int]:
        """Return the tokens of a line, its slots and the tokens of each."""
        longest = max((run[3] for run in runs), default=0)
        slot = self.slot(longest)
        is_whole = all((first, stop) == (0, len(units[unit])) for unit, first, stop, _ in runs)
        if slot and is_whole:
            assert len(runs) <= self._num_slots(slot), "too many units for a line"
            return self.shared_length(slot), self._num_slots(slot), slot
        assert len(runs) == 1, "a unit that needs a line of its own"
        length = self.own_length(longest)
        return length, 1, length


def _free(num_tokens: int, multiple: int, avoided: Collection[int]) -> int:
    """Return the first multiple from ``num_tokens`` on that is not to be avoided."""
    while num_tokens in avoided:
        num_tokens += multiple
    return num_tokens
