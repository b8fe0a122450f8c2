"""Pack a rank's units into lines: microbatches of one row that holds whole units, one after another.

A unit is what is sampled and clipped: a user with the records drawn in this step, or a single record.

Rows of one record each (:mod:`.microbatch`) are mostly padding where records are short. A line is one row: units one
after another, their records one after another, padding only behind the last. Positions begin anew with each record,
and attention stays within it (:mod:`privtrain.clipping.attention`), so that a token's numbers are those of its record
alone. The shape that a unit is computed in depends on nobody else:

* A unit of more than half of ``shared_tokens`` has a line of its own, as long as its own tokens need. One longer than
  ``num_tokens`` has several: its records fill a line in their order until the next does not fit.
* Shorter units share lines with units of their own size alone: within a factor of two, except the shortest. Each
  size has lines of one length, at most ``shared_tokens``. A *slot* is the place of one unit in such a line, for the
  computation of its gradient; a line of one kind has a constant number of slots of a constant size in tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from privtrain.data.microbatch import Records, weights_of
from privtrain.data.records import Record

#: Lines are a multiple of this many tokens: fewer are wasted on a CPU, kernels of other devices work in larger tiles.
_CPU_MULTIPLE, _MULTIPLE = 8, 64
#: Tokens of the longest line, unless records are longer or a microbatch is smaller.
_FEWEST, _MOST = 512, 2048
#: Tokens of a line that units share on a CPU, which is as fast on short ones: the last one of a step is mostly padding.
#: Other devices need longer ones to be busy.
_CPU_SHARED = 128
#: Tokens of the smallest slot in a shared line (or half of the line, if that is less).
_SMALLEST_SLOT = 64
#: A shared line is at most this many times as long as its slots.
_SLOTS_PER_LINE = 8
#: A line holds at most this many units for each row of a microbatch: every slot needs memory for a gradient of its own.
_UNITS_PER_ROW = 2

#: First token and one past the last one.
Span = tuple[int, int]


def default_num_tokens(max_length: int, microbatch_size: int) -> int:
    """Return the tokens of the longest line: two of the longest records, within limits, and no more than rows have.

    A function of the configuration alone.
    """
    two_records = min(2 * max_length, _MOST)
    wanted = max(two_records, max_length, _FEWEST)  # one record must fit, also if it is longer than _MOST
    tokens_of_rows = microbatch_size * max_length
    return _rounded(min(wanted, tokens_of_rows), _MULTIPLE)


def record_lengths(num_tokens: int, max_length: int) -> list[int]:
    """Return the lengths of the fewest records that hold so many tokens together: all the longest, but for the last."""
    return [min(max_length, num_tokens - first) for first in range(0, num_tokens, max_length)]


def _rounded(num_tokens: int, multiple: int) -> int:
    """Round up to a multiple."""
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
        records: (first token, one past the last) of each record, in order; a token of no record is padding.
        units: (first token, one past the last) of each unit of ``owners``: all of its records in this line.
        owners: positions of the units that have a record here, in the list of the rank's units; in order.
        last_continues: whether the last owner has more records in the next line.
        num_slots: how many units a line of this kind may hold: a constant.
        slot_tokens: how many tokens a unit may have in such a line: a constant, or the line's length if it is for one
            unit.
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
        """Return the same line with the tokens of ``owners[index]`` in their places, and padding everywhere else."""
        return self.only((index,))

    def only(self, members: Sequence[int]) -> Line:
        """Return the same line with the tokens of some units in their places, and padding everywhere else.

        ``members`` are indices into ``owners``. Records of the others become records of padding: attention draws as
        many random numbers for them as before, so that the members keep their dropout.
        """
        spans = [self.units[index] for index in members]
        is_member = torch.zeros_like(self.target_mask)
        for first, stop in spans:
            is_member[:, first:stop] = True
        return dataclasses.replace(
            self,
            input_ids=torch.where(is_member, self.input_ids, self.pad_id),
            positions=torch.where(is_member, self.positions, 0),
            target_mask=self.target_mask & is_member,
            token_weight=torch.where(is_member, self.token_weight, 0.0),
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


class _Run(NamedTuple):
    """Consecutive records of one unit that share a line.

    Attributes:
        unit: position in the list of units.
        first: index of the first record among the unit's.
        stop: index of the last record, plus one.
        num_tokens: tokens of these records together.
    """

    unit: int
    first: int
    stop: int
    num_tokens: int


class _Shape(NamedTuple):
    """Tokens of a line, the number of its slots, and tokens of a slot."""

    num_tokens: int
    num_slots: int
    slot_tokens: int


@dataclasses.dataclass(frozen=True)
class LinePacker:
    """Turns units, each given as its records of this step, into lines.

    Attributes:
        num_tokens: length of the longest line, at least ``max_length``.
        shared_tokens: length of the longest line that several units may share.
        max_units: most units in a line.
        max_length: tokens of the longest record.
        pad_id: token id for padding; never predicted.
        multiple: the length of a unit's own line is a multiple of this, up to ``num_tokens``.
        avoided: lengths that lines must not have, since they are sizes of the model's tensors: code that looks for the
            dimension of tokens by its size would take the wrong one.
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
            microbatch_size: rows of a microbatch, by which the configuration bounds memory.
            pad_id: token id for padding.
            num_tokens: length of the longest line, rounded up; by default :func:`default_num_tokens`.
            device_type: ``cpu``, or a device that needs longer lines to be busy.
            avoided: lengths that lines must not have (see the class).
        """
        is_cpu, avoided = device_type == "cpu", frozenset(avoided)
        longest = default_num_tokens(max_length, microbatch_size) if num_tokens is None else num_tokens
        longest = _free(_rounded(longest, _MULTIPLE), _MULTIPLE, avoided)
        shared = _free(min(longest, _CPU_SHARED), _MULTIPLE, avoided) if is_cpu else longest
        multiple = _CPU_MULTIPLE if is_cpu else _MULTIPLE
        return cls(
            num_tokens=longest,
            shared_tokens=shared,
            max_units=_UNITS_PER_ROW * microbatch_size,
            max_length=max_length,
            pad_id=pad_id,
            multiple=multiple,
            avoided=avoided,
        )

    def cost(self, records: Records) -> int:
        """Return what a unit costs in comparison with others, to share units out to ranks: its tokens."""
        return sum(len(record) for record in records)

    def num_batches(self, units: Sequence[Records]) -> int:
        """Return the number of lines that these units need."""
        return len(self._lines(units))

    def pack(self, units: Sequence[Records], num_batches: int) -> Iterator[Line]:
        """Yield exactly ``num_batches`` lines holding the records of ``units``.

        The loss of a unit is the mean over *its own* predicted tokens in the step, so no weight depends on another.

        Args:
            units: per unit its records.
            num_batches: the largest number that any rank needs; all ranks must run equally many.
        """
        weights = weights_of(units)
        lines = self._lines(units)
        assert len(lines) <= num_batches
        for runs in lines:
            yield self._assemble(runs, units, weights)
        for _ in range(num_batches - len(lines)):
            yield self._assemble([], units, weights)  # of padding alone

    def pack_share(
        self, shares: Sequence[Sequence[Records]], share: int, joint: Sequence[Records] = ()
    ) -> Iterator[Line]:
        """Yield one rank's lines of a step: as many as the busiest rank has.

        Args:
            shares: every rank's units.
            share: this rank's number.
            joint: units that ranks work on together; must be empty, since those are packed into rows
                (:class:`~privtrain.data.microbatch.Packer`, which has the same method).
        """
        assert not joint
        yield from self.pack(shares[share], max(self.num_batches(units) for units in shares))

    def arranged(self, units: Sequence[Records]) -> Line:
        """Return one line of these units in this order; several must have the same :meth:`slot` and fit into a line."""
        runs = [_Run(unit, 0, len(records), self.cost(records)) for unit, records in enumerate(units)]
        return self._assemble(runs, units, weights_of(units))

    def slots(self) -> list[tuple[int, int]]:
        """Return all kinds of shared lines as (tokens of a slot, number of slots), the largest slots first."""
        return [(size, self._num_slots(size)) for size in self._sizes()]

    def slot(self, num_tokens: int) -> int:
        """Return the size of the slot for a unit of so many tokens; 0 if the unit has a line of its own."""
        return min((size for size in self._sizes() if size >= num_tokens), default=0)

    def _sizes(self) -> list[int]:
        """Return the sizes of slots in shared lines, in tokens: half of the line, a quarter, ...; the largest first."""
        sizes = [self.shared_tokens // 2]
        while sizes[-1] // 2 >= _SMALLEST_SLOT:
            sizes.append(sizes[-1] // 2)
        return sizes

    def _num_slots(self, size: int) -> int:
        """Return how many units may share a line of slots of this size."""
        is_smallest = size == self._sizes()[-1]
        tokens = self.shared_length(size)
        if is_smallest:
            # Units may be as short as one likes; count on units of a third of this size.
            return min(self.max_units, 3 * tokens // size)
        # A unit has more than size / 2 tokens, or it would have a smaller slot: so fewer than tokens / (size / 2) fit.
        return min(self.max_units, math.ceil(2 * tokens / size) - 1)

    def shared_length(self, slot: int) -> int:
        """Return the length of lines that are shared in slots of this size."""
        length = _free(min(self.shared_tokens, _SLOTS_PER_LINE * slot), self.multiple, self.avoided)
        return min(length, self.shared_tokens)

    def own_length(self, num_tokens: int) -> int:
        """Return the length of a line for one unit of so many tokens, at most those of the longest line."""
        assert num_tokens <= self.num_tokens
        return min(_free(_rounded(num_tokens, self.multiple), self.multiple, self.avoided), self.num_tokens)

    def _lines(self, units: Sequence[Records]) -> list[list[_Run]]:
        """Return the lines that hold these units, each as its runs.

        Units that share lines are placed by best fit, to waste little: the longest first, each into the line of its
        slot size with the least room that is enough.
        """
        lines: list[list[_Run]] = []
        sharing: list[_Run] = []  # units that are whole in one run and short enough for a slot
        for unit, records in enumerate(units):
            runs = self._cut(unit, records)
            if len(runs) == 1 and self.slot(runs[0].num_tokens):
                sharing.append(runs[0])
            else:
                lines += [[run] for run in runs]
        # Size of a line's slots → tokens of room left → lines that take another unit.
        with_room: dict[int, dict[int, list[list[_Run]]]] = {}
        for run in sorted(sharing, key=lambda run: (-run.num_tokens, run.unit)):
            slot = self.slot(run.num_tokens)
            lines_by_room = with_room.setdefault(slot, {})
            fitting = [room for room, some in lines_by_room.items() if some and room >= run.num_tokens]
            if fitting:
                room = min(fitting)
                line = lines_by_room[room].pop()
            else:
                room = self.shared_length(slot)
                line = []
                lines.append(line)
            line.append(run)
            if len(line) < self._num_slots(slot):
                lines_by_room.setdefault(room - run.num_tokens, []).append(line)
        return lines

    def _cut(self, unit: int, records: Records) -> list[_Run]:
        """Return the runs of one unit: each holds as many records as fit into a line. Its records alone decide that."""
        runs: list[_Run] = []
        first = used = 0
        for index, record in enumerate(records):
            assert len(record) <= self.max_length
            if used + len(record) > self.num_tokens:  # the line is full: this record begins the next run
                runs.append(_Run(unit, first, stop=index, num_tokens=used))
                first, used = index, 0
            used += len(record)
        return [*runs, _Run(unit, first, stop=len(records), num_tokens=used)]

    def _assemble(self, runs: Sequence[_Run], units: Sequence[Records], weights: Sequence[float]) -> Line:
        """Return the line that holds these runs one after another; ``weights`` are the units' token weights."""
        shape = self._shape(runs, units)
        length = shape.num_tokens
        input_ids = np.full((1, length), self.pad_id, dtype=np.int64)
        positions = np.zeros((1, length), dtype=np.int64)
        mask = np.zeros((1, length), dtype=bool)
        token_weight = np.zeros((1, length), dtype=np.float32)
        record_spans: list[Span] = []
        unit_spans: list[Span] = []
        place = 0
        for run in runs:
            begin = place
            for record in map(Record.of, units[run.unit][run.first : run.stop]):
                span = slice(place, place + len(record))
                input_ids[0, span], mask[0, span] = record.tokens, record.is_target
                positions[0, span] = np.arange(len(record))
                record_spans.append((place, span.stop))
                place = span.stop
            token_weight[0, begin:place] = weights[run.unit]
            unit_spans.append((begin, place))
        last_continues = bool(runs) and runs[-1].stop < len(units[runs[-1].unit])
        return Line(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(positions),
            target_mask=torch.from_numpy(mask),
            token_weight=torch.from_numpy(token_weight),
            records=tuple(record_spans),
            units=tuple(unit_spans),
            owners=tuple(run.unit for run in runs),
            last_continues=last_continues,
            num_slots=shape.num_slots,
            slot_tokens=shape.slot_tokens,
            pad_id=self.pad_id,
        )

    def _shape(self, runs: Sequence[_Run], units: Sequence[Records]) -> _Shape:
        """Return the shape of a line that holds these runs."""
        longest = max((run.num_tokens for run in runs), default=0)
        slot = self.slot(longest)
        holds_whole_units = all(run.first == 0 and run.stop == len(units[run.unit]) for run in runs)
        if slot and holds_whole_units:
            assert len(runs) <= self._num_slots(slot), "too many units for a line"
            return _Shape(self.shared_length(slot), num_slots=self._num_slots(slot), slot_tokens=slot)
        assert len(runs) == 1, "a unit that needs a line of its own"
        length = self.own_length(longest)
        return _Shape(length, num_slots=1, slot_tokens=length)


def _free(num_tokens: int, multiple: int, avoided: Collection[int]) -> int:
    """Return ``num_tokens``, or if that length is to be avoided, the next one in steps of ``multiple`` that is not."""
    while num_tokens in avoided:
        num_tokens += multiple
    return num_tokens
