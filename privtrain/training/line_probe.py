"""Prove on the real model that units may share a line, or say why records need rows of their own.

A *line* is one long row that several units share, each with one or more records; attention and positions are confined
to a record. A line is for a constant number of units (*slots*), each of at most a constant number of tokens. The
alternative is a padded *row* for each record. Clipping in rows has passed its own check before
(:mod:`.clipping_check`). A line is compared with rows of one unit, and with itself:

* every token's loss is what it is in a row of its own, also in the longest record: attention and positions are right;
* what the clipper adds for planted units is what it adds by rows; a huge unit adds at most the clipping norm, one that
  is not a number nothing, and units together add what each adds alone, as integers;
* in shared lines of the job's own size, a unit adds the same bits alone and at many places between units of huge
  activations that add gradients of their own, and these add the same with it and without;
* it also adds the same after the longest line of the job as before (what such a line leaves in the model is looked at
  after this probe, by :meth:`.probes.Probe.check_unchanged`);
* no random number is shared by the tokens of a line.

*Loud* units enter the model with huge activations (:func:`.hooks.loud_tokens`), so that whatever of them reaches
another unit is seen. A *coin* is a random number that the model draws in a pass, as dropout does.

Every rank looks for itself and reduces nothing, so that what one rank finds keeps nobody waiting; then all agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from privtrain.clipping import attention, exact_sum, fallback, variable_length
from privtrain.clipping.lines import LineClipper
from privtrain.data.lines import Line, LinePacker, record_lengths
from privtrain.data.microbatch import Packer
from privtrain.data.records import Record
from privtrain.errors import GuaranteeLost, PrivtrainError, UnsupportedLayer
from privtrain.models.losses import token_log_probs
from privtrain.privacy.fixed_point import SLACK
from privtrain.training import hooks
from privtrain.training.trainer import Trainer

#: Change of losses, relative to the largest, that the rounding of other shapes explains, by precision.
_OTHER_SHAPE = {"fp32": 1e-4, "bf16": 5e-2}
#: The same of a unit's clipped gradient, by tensor.
_OTHER_GRADIENT = {"fp32": 1e-3, "bf16": 5e-2}
#: Tokens of each planted unit's records, and of the line that the units share: odd, unlike the widths of models.
_PLANTED_LENGTHS, _PLANTED_TOKENS = (7, 12), 61
#: Gradient norms of the first two planted units, in clipping norms; the third unit's loss is NaN.
_SIZES = (1e4, 0.5)
#: Tokens of two units and of their line, by which a dimension of tokens is told from the model's own. Two choices,
#: since a dimension of the model may have such a size too.
_COIN_SHAPES = (((5, 11), 23), ((7, 13), 29))
#: Full lines in which units are moved about, for each size of slots.
_NUM_CROWDS = 4


@dataclasses.dataclass(frozen=True)
class LineProbe:
    """Tries lines on the model and the clipper of one trainer.

    Attributes:
        trainer: about to train; its adapter has been moved off its starting point.
        vocabulary_size: planted tokens are below this.
        precision: of forward and backward, ``"fp32"`` or ``"bf16"``.
        route: the clipping route that rows take.
    """

    trainer: Trainer
    vocabulary_size: int
    precision: str
    route: str

    def why_rows(self) -> str:
        """Return in words why records need rows; empty, on every rank, if lines are exact. Dropout must be off.

        First one kernel attends within all records of a line, where the device has it. If that is not exact, attention
        goes record by record, and lines are tried once more.
        """
        trainer = self.trainer
        why_by_record = variable_length.refusal(trainer.backend.device)
        if trainer.backend.any_rank(bool(why_by_record)):
            why_by_record = why_by_record or "another rank's device needs that"
        else:
            trainer.choose_attention("")
            why_by_record = self._agreed(self._fault)
            if not why_by_record:
                return ""
        trainer.choose_attention(why_by_record)
        return self._agreed(self._fault)

    def shared_coins(self) -> str:
        """Return in words who draws a random number for several tokens of a line; empty if nobody does.

        Dropout must be as in training.
        """
        return self._agreed(self._coins)

    def _agreed(self, check: Callable[[], str]) -> str:
        """Return why rows are needed: what ``check`` finds, or that it fails; on every rank if on any, else empty."""
        try:
            fault = check()
        except (UnsupportedLayer, GuaranteeLost) as refusal:
            fault = str(refusal)
        except Exception as failure:  # a model may fail in any way on a line; it can still be trained by rows
            if isinstance(failure, PrivtrainError) or fallback.is_elsewhere(failure):
                raise  # not the model's fault: e.g. no memory is left, or another rank is lost
            fault = f"a line fails: {fallback.in_words(failure)}"
        if self.trainer.backend.any_rank(bool(fault)):
            return fault or "another rank found that its model needs them"
        return ""

    def _fault(self) -> str:
        """Return in words the first reason why records need rows; empty if none is found."""
        trainer = self.trainer
        if not trainer.objective.takes_lines:
            return "a classifier reads a record in a row of its own"
        clipper = trainer.new_clipper(trainer.row_losses, self.route)
        if not isinstance(clipper, LineClipper):
            return "gradients are sharded"
        clipper.refuse_lines()
        return (
            self._other_losses()
            or self._other_sums(clipper)
            or self._other_bits(clipper)
            or self._other_bits_later(clipper)
        )

    # Losses and clipped sums, up to rounding.

    def _other_losses(self) -> str:
        """Return in words how far losses in a line are from those in rows, if by more than rounding; else empty.

        The line holds one unit: the longest record that the job may have, and two short ones where there is room.
        """
        packer = self._packer
        lengths = [packer.max_length]
        for length in (5, 9):
            if sum(lengths) + length <= packer.num_tokens:
                lengths.insert(len(lengths) // 2, length)  # in the order 5, 9, longest
        records = [self._record(length, seed) for seed, length in enumerate(lengths)]
        line = packer.arranged([records]).to(self._device)
        with torch.no_grad(), self._within_records(line):
            together = self.trainer.token_losses(line)[0]
        worst = 0.0
        for record, (first, stop) in zip(records, line.records, strict=True):
            with torch.no_grad(), self.trainer.autocast:
                ids = torch.from_numpy(record.tokens)[None].to(self._device)
                alone = -token_log_probs(self.trainer.model, ids)[0]
            if len(alone):  # nothing predicts a record's first token
                change = (together[first + 1 : stop] - alone).abs().max() / alone.abs().max().clamp(min=1e-30)
                worst = max(worst, float("inf") if change.isnan() else float(change))
        if worst > _OTHER_SHAPE[self.precision]:
            return f"losses of records in a line are off by {worst:.2g} from those in rows of their own"
        return ""

    def _other_sums(self, clipper: LineClipper) -> str:
        """Return in words what is wrong with the clipped sum of planted units in a line; empty if nothing.

        Three units of two records: one to be clipped, one within the norm, one whose loss is NaN. The first two are
        compared with rows, whole in a line and cut over two lines. Then all three share a line.
        """
        units = [[self._record(n, 10 * u + n) for n in _PLANTED_LENGTHS] for u in range(3)]
        huge_and_small = units[:2]
        factors = [self._factor(unit, size) for unit, size in zip(huge_and_small, _SIZES, strict=True)]
        if not all(0 < factor < float("inf") for factor in factors):
            return "a planted unit has no gradient"
        longest = max(_PLANTED_LENGTHS)
        packer = LinePacker(
            num_tokens=_PLANTED_TOKENS,
            shared_tokens=_PLANTED_TOKENS,
            max_units=len(units),
            max_length=longest,
            pad_id=self._packer.pad_id,
        )
        cutting_packer = dataclasses.replace(packer, num_tokens=longest + 1)  # its lines hold one record
        sum_of_both: torch.Tensor | None = None  # of what each of the two adds alone, whole in a line
        for unit, factor in zip(huge_and_small, factors, strict=True):
            by_rows = self._by_rows(clipper, unit, factor)
            whole = self._sum(clipper, self._weighted(packer, [unit], [factor]))
            cut = self._sum(clipper, self._weighted(cutting_packer, [unit], [factor]))
            for name, total in (("line", whole), ("line of a part of it", cut)):
                fault = self._difference(clipper, total, by_rows)
                if fault:
                    return f"a unit in a {name} {fault}"
            sum_of_both = whole if sum_of_both is None else sum_of_both + whole
        assert sum_of_both is not None
        together = self._sum(clipper, self._weighted(packer, units, [*factors, float("nan")]))
        if not torch.equal(together, sum_of_both):
            return "units of a line, beside one that is not a number, do not add what each adds alone"
        return ""

    def _difference(self, clipper: LineClipper, total: torch.Tensor, by_rows: torch.Tensor) -> str:
        """Return in words where a unit's clipped sum in a line differs from that in rows by more than rounding.

        Both are in steps of the clipper's grid. The words follow "a unit in a line"; empty if nothing differs.
        """
        plan, layout = self.trainer.plan, clipper.layout
        in_line, in_rows = (exact_sum.as_float32(value, clipper.grid_exponent).double() for value in (total, by_rows))
        # "not <=" rather than ">", so that NaN is a fault.
        if plan.clipping_style != "batch" and not float(in_line.norm()) <= clipper.clipping_norm * (1 + SLACK):
            return f"moved the sum by {float(in_line.norm()):.6g}, above clipping_norm={clipper.clipping_norm}"
        share = clipper.clipping_norm / len(layout.slots) ** 0.5  # a tensor's, if all had equal norms
        for slot in layout.slots:
            change, size = (float(layout.view(value, slot).norm()) for value in (in_line - in_rows, in_rows))
            if not change <= _OTHER_GRADIENT[self.precision] * (size + share):
                return f"adds {change:.3g} of {size:.3g} to {slot.name!r} that it does not add in rows"
        return ""

    # The bits of a sum.

    def _other_bits(self, clipper: LineClipper) -> str:
        """Return in words where a unit in a shared line of the job's size adds other bits than alone; else empty."""
        for size, num_slots in self._packer.slots():  # a line of one slot is not shared
            fault = self._other_bits_in(clipper, size, num_slots) if num_slots > 1 else ""
            if fault:
                return fault
        return ""

    def _other_bits_in(self, clipper: LineClipper, size: int, num_slots: int) -> str:
        """Do the work of :meth:`_other_bits` for lines of ``num_slots`` slots of ``size`` tokens."""
        probed = self._probed_units(size)
        alone = [self._packer.arranged([unit]).to(self._device) for unit in probed]
        bits = [self._sum(clipper, [line]) for line in alone]
        for units, kinds in self._crowds(size, num_slots, probed):
            total, expected = self._crowded(clipper, units, kinds, bits)
            if not torch.equal(total, expected):
                share = float((total - expected).double().norm() / expected.double().norm().clamp(min=1))
                return (
                    f"units do not add the same bits to the sum at all places of a line (off by {share:.2g} of the "
                    f"sum, precision {self.precision})"
                )
        if not all(torch.equal(self._sum(clipper, [line]), one) for line, one in zip(alone, bits, strict=True)):
            return "units add other bits after a line of others than before it"
        return ""

    def _crowded(
        self, clipper: LineClipper, units: Sequence[list[Record]], kinds: Sequence[int], bits: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what a crowded line adds to the clipped sum, and what it should add.

        It should add what the loud units add without the others, and for each other unit what that adds alone.

        Args:
            clipper: adds up.
            units: of the line, in order.
            kinds: of each unit which probed unit it is, or -1 for a loud one; of :meth:`_crowds`.
            bits: what each probed unit adds alone.
        """
        line = self._packer.arranged(units).to(self._device)
        loud = [i for i, kind in enumerate(kinds) if kind < 0]
        is_loud = torch.zeros(line.num_tokens, dtype=torch.bool, device=self._device)
        weight = line.token_weight.clone()
        for i in loud:
            first, stop = line.units[i]
            is_loud[first:stop] = True
            weight[:, first:stop] = hooks.LOUD_WEIGHT
        line = dataclasses.replace(line, token_weight=weight)
        num_split = clipper.num_split  # lines that were split so far
        with hooks.loud_tokens(self.trainer.model, is_loud):
            total, expected = self._sum(clipper, [line]), self._sum(clipper, [line.only(loud)])
        if clipper.num_split > num_split:  # then units ran one by one, and nothing of loud ones could reach the others
            raise UnsupportedLayer("units of huge activations are not finite in a line, so that it proves nothing")
        for kind, own in enumerate(bits):
            expected += kinds.count(kind) * own
        return total, expected

    def _other_bits_later(self, clipper: LineClipper) -> str:
        """Return in words that a unit adds other bits after the longest line than before it; empty if it does not.

        That line is filled by one loud unit.
        """
        packer = self._packer
        short, longest = (packer.arranged([self._unit([n], n)]).to(self._device) for n in (5, packer.num_tokens))
        before = self._sum(clipper, [short])
        longest = dataclasses.replace(longest, token_weight=longest.token_weight * hooks.LOUD_WEIGHT)
        is_loud = torch.ones(longest.num_tokens, dtype=torch.bool, device=self._device)
        with hooks.loud_tokens(self.trainer.model, is_loud):
            self._sum(clipper, [longest])
        is_same = torch.equal(self._sum(clipper, [short]), before)
        return "" if is_same else "units add other bits after the longest line than before it"

    def _probed_units(self, size: int) -> list[list[Record]]:
        """Return units that need a slot of ``size`` tokens, to be tried at many places.

        One of a single record, one of two records, and one that fills the slot, so that its copies fill a line.
        """
        packer = self._packer
        fewest = next((tokens for tokens in range(1, size) if packer.slot(tokens) == size), size)  # for such a slot
        one_record = [min(fewest + 4, size)]  # short, so that most of its slot is empty
        two_records = [max(1, size * 3 // 5), max(1, size // 5)]  # four fifths of the slot together
        filling = [size]
        return [self._unit(lengths, 50 + i) for i, lengths in enumerate((one_record, two_records, filling))]

    def _crowds(
        self, size: int, num_slots: int, probed: Sequence[list[Record]]
    ) -> Iterator[tuple[list[list[Record]], list[int]]]:
        """Yield (units, kinds) of full lines of ``num_slots`` slots of ``size`` tokens.

        ``kinds`` says of each unit which of ``probed`` it is, or -1 for a loud one. First copies of each probed unit
        fill a line, from its beginning and up to its end. Then the first two probed units stand at every other slot,
        and loud units of random lengths between them.
        """
        packer = self._packer
        for kind, unit in enumerate(probed):
            num_units = min(num_slots, packer.shared_length(size) // packer.cost(unit))
            copies, kinds = [list(unit) for _ in range(num_units)], [kind] * num_units
            yield copies, kinds
            room = packer.shared_length(size) - num_units * packer.cost(unit)
            if 0 < room <= size and num_units < num_slots:  # a loud unit before them moves them up to the end
                yield [self._unit([room], 69), *copies], [-1, *kinds]
        rng = np.random.default_rng(size)
        for turn in range(_NUM_CROWDS):
            units: list[list[Record]] = []
            kinds: list[int] = []
            room = packer.shared_length(size)
            for i in range(num_slots):
                # Even turns have probed units at even slots, odd turns at odd ones; the two kinds alternate.
                is_probed = i % 2 == turn % 2
                kind = (i // 2) % 2 if is_probed else -1
                tokens = int(rng.integers(1, size + 1))
                unit = self._unit([tokens], 70 + i) if kind < 0 else list(probed[kind])
                if packer.cost(unit) <= room:
                    units.append(unit)
                    kinds.append(kind)
                    room -= packer.cost(unit)
            if turn >= 2:  # the same two arrangements from the other end
                units.reverse()
                kinds.reverse()
            if max(kinds, default=-1) >= 0:  # some probed unit found room
                yield units, kinds

    def _unit(self, lengths: Sequence[int], seed: int) -> list[Record]:
        """Return a unit whose records have these lengths, cut in two where one is too long."""
        cut: list[int] = []
        for length in lengths:
            cut += record_lengths(length, self._packer.max_length)
        return [self._record(length, 10 * seed + i) for i, length in enumerate(cut)]

    # Random numbers.

    def _coins(self) -> str:
        """Return in words who draws a random number for several tokens of a line; empty if nobody does.

        All such numbers are set to 0, then to 1: losses that differ depend on one.
        """
        for lengths, line_tokens in _COIN_SHAPES:
            fault = self._coins_in(lengths, line_tokens)
            if fault:
                return fault
        return ""

    def _coins_in(self, lengths: tuple[int, ...], line_tokens: int) -> str:
        """Do the work of :meth:`_coins` for a line of ``line_tokens`` tokens with a unit for each of ``lengths``."""
        packer = LinePacker(
            num_tokens=line_tokens,
            shared_tokens=line_tokens,
            max_units=len(lengths),
            max_length=max(lengths),
            pad_id=self._packer.pad_id,
        )
        line = packer.arranged([[self._record(n, n)] for n in lengths]).to(self._device)
        trainer, sizes = self.trainer, (line_tokens, *lengths)  # a dimension of tokens is that of the line or a record
        losses, owner = [], ""
        for extreme in (0.0, 1.0):
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                torch.manual_seed(0)
                with (
                    hooks.SharedRandomNumbers(trainer.model, sizes, extreme) as numbers,
                    torch.no_grad(),
                    self._within_records(line),
                ):
                    losses.append(trainer.token_losses(line))
                owner = owner or numbers.owner
        if torch.equal(*losses):
            return ""
        return f"{owner or 'the model'} draws random numbers that the tokens of a line share"

    def _within_records(self, line: Line) -> AbstractContextManager[None]:
        """Keep attention within the records of a line, as the clipper does."""
        return attention.within_records(self.trainer.model, line, in_one_kernel=not self.trainer.why_by_record)

    # Planted units.

    @property
    def _packer(self) -> LinePacker:
        assert self.trainer.line_packer is not None
        return self.trainer.line_packer

    @property
    def _device(self) -> torch.device:
        return self.trainer.backend.device

    def _record(self, length: int, seed: int) -> Record:
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary_size, size=length)
        return self.trainer.objective.plant(tokens)

    def _weighted(self, packer: LinePacker, units: Sequence[list[Record]], factors: Sequence[float]) -> Sequence[Line]:
        """Return the lines into which ``packer`` packs some units, with each unit's losses multiplied by its factor."""
        lines = []
        for line in packer.pack(units, packer.num_batches(units)):
            weight = line.token_weight.clone()
            for owner, (first, stop) in zip(line.owners, line.units, strict=True):
                weight[:, first:stop] *= factors[owner]
            lines.append(dataclasses.replace(line, token_weight=weight).to(self._device))
        return lines

    def _by_rows(self, clipper: LineClipper, unit: list[Record], factor: float) -> torch.Tensor:
        """Return what a unit adds to the clipped sum in rows, in grid steps, its losses multiplied by ``factor``."""
        packer = Packer(len(unit), max(_PLANTED_LENGTHS), self._packer.pad_id)
        (batch,) = packer.pack([unit], 1)
        batch = dataclasses.replace(batch, row_weight=batch.row_weight * factor).to(self._device)
        clipper.reset()
        clipper.accumulate(batch)
        return clipper.finish().clone()

    def _factor(self, unit: list[Record], size: float) -> float:
        """Return the factor that gives a unit's loss a gradient of ``size`` clipping norms; 0 if it has no gradient.

        By plain autograd, in rows.
        """
        (batch,) = Packer(len(unit), max(_PLANTED_LENGTHS), self._packer.pad_id).pack([unit], 1)
        batch = batch.to(self._device)
        (self.trainer.row_losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum().backward()
        square = 0.0
        for parameter in self.trainer.placement.clipped.parameters.values():
            if parameter.grad is not None:
                square += float(parameter.grad.double().square().sum())
                parameter.grad = None
        return size * self.trainer.plan.clipping_norm / square**0.5 if square else 0.0

    def _sum(self, clipper: LineClipper, lines: Sequence[Line]) -> torch.Tensor:
        """Return the clipped sum of this rank over the lines, in grid steps."""
        clipper.reset()
        for line in lines:
            clipper.accumulate(line)
        return clipper.finish().clone()
