"""Pack a rank's units into lines: microbatches of one row of constant length that holds whole units, one after another.

Rows of one record each (:mod:`.microbatch`) are mostly padding where records are short. A line is one row of a constant
number of tokens: units one after another, their records one after another, padding only behind the last. Positions
begin anew with each record, and attention stays within it (:mod:`privtrain.clipping.attention`), so that a token's
numbers are those of its record alone. The one shape of all lines is decided by the configuration, so by nobody's data.

Where a unit is cut depends on it alone: its records fill a line in their order until the next does not fit, and a unit
of several lines begins a line of its own with each. So a unit that fits into a line is never split, whoever shares it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from privtrain.data.microbatch import Records, weights_of
from privtrain.data.records import Record

#: Lines are a multiple of this many tokens, so that no kernel meets the end of a vector in the middle of a line.
_MULTIPLE = 64
#: Tokens of a line unless records, or the microbatch, are larger or smaller: longer lines waste more at a step's end.
_FEWEST, _MOST = 512, 2048
#: Units in a line, as a multiple of the rows of a microbatch: each may need memory for a gradient of its own.
_UNITS_PER_ROW = 4

#: First token and one past the last one.
Span = tuple[int, int]


def default_num_tokens(max_length: int, microbatch_size: int) -> int:
    """Return the tokens of a line: two of the longest records, within limits, and no more than rows would have.

    A function of the configuration alone.
    """
    wanted = max(max_length, min(2 * max_length, _MOST), _FEWEST)
    return _rounded(min(wanted, microbatch_size * max_length))


def _rounded(num_tokens: int) -> int:
    return -(-num_tokens // _MULTIPLE) * _MULTIPLE


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
    pad_id: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the line, padding included."""
        return self.input_ids.shape[1]

    def alone(self, index: int) -> Line:
        """Return a line in which ``owners[index]`` has its tokens, in their places, and all else is padding."""
        return self.only((index,))

    def only(self, members: Sequence[int]) -> Line:
        """Return the same for several of ``owners``, given by their places in it, ascending."""
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
            records=tuple(r for r in self.records if any(first <= r[0] < stop for first, stop in spans)),
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
        num_tokens: of every line, at least ``max_length``.
        max_units: most units in a line.
        max_length: tokens of the longest record.
        pad_id: token id for padding; never predicted.
    """

    num_tokens: int
    max_units: int
    max_length: int
    pad_id: int

    def __post_init__(self) -> None:
        assert self.num_tokens >= self.max_length
        assert self.max_units >= 1

    @classmethod
    def of(cls, max_length: int, microbatch_size: int, pad_id: int, num_tokens: int | None = None) -> LinePacker:
        """Return the packer that a configuration asks for.

        Args:
            max_length: tokens of the longest record.
            microbatch_size: rows of a microbatch: what memory is measured by.
            pad_id: token id for padding.
            num_tokens: of a line, rounded up; by default :func:`default_num_tokens`.
        """
        tokens = default_num_tokens(max_length, microbatch_size) if num_tokens is None else _rounded(num_tokens)
        return cls(tokens, most_units(microbatch_size), max_length, pad_id)

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
        """Return one line of these units, which must fit, in this order."""
        weights = weights_of(units)
        return self._assemble([(i, 0, len(r), self.cost(r)) for i, r in enumerate(units)], units, weights)

    def _lines(self, units: Sequence[Records]) -> list[list[_Run]]:
        """Return lines as runs: units go where the least room is left, the longest first, so that little is wasted."""
        lines: list[list[_Run]] = []
        # Lines that take another unit, by the room that is left in each.
        with_room: dict[int, list[list[_Run]]] = {}

        def put(run: _Run, line: list[_Run], room: int) -> None:
            line.append(run)
            if len(line) < self.max_units and room > run[3]:
                with_room.setdefault(room - run[3], []).append(line)

        def begin(run: _Run) -> None:
            lines.append([])
            put(run, lines[-1], self.num_tokens)

        cut = [self._cut(unit, records) for unit, records in enumerate(units)]
        for runs in (runs for runs in cut if len(runs) > 1):
            lines.extend([run] for run in runs[:-1])
            begin(runs[-1])
        whole = [runs[0] for runs in cut if len(runs) == 1]
        for run in sorted(whole, key=lambda run: (-run[3], run[0])):
            room = min((room for room, some in with_room.items() if some and room >= run[3]), default=None)
            if room is None:
                begin(run)
            else:
                put(run, with_room[room].pop(), room)
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
        input_ids = np.full((1, self.num_tokens), self.pad_id, dtype=np.int64)
        positions = np.zeros((1, self.num_tokens), dtype=np.int64)
        mask = np.zeros((1, self.num_tokens), dtype=bool)
        token_weight = np.zeros((1, self.num_tokens), dtype=np.float32)
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
            pad_id=self.pad_id,
        )


def most_units(microbatch_size: int) -> int:
    """Return the most units in a line."""
    return _UNITS_PER_ROW * microbatch_size
