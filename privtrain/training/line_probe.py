"""Prove on the real model that units may share a line, or say why records need rows of their own.

Rows have passed their own checks before. A line is compared with them, and with itself:

* every token's loss is what it is in a row of its own, also in the longest record: attention and positions are right;
* what the clipper adds for planted units is what it adds by rows; a huge unit adds at most the clipping norm, one that
  is not a number nothing, and units together add what each adds alone, as integers;
* in shared lines of the job's own size, a unit adds the same bits alone and at many places between units of huge
  activations that add gradients of their own, and these add the same with it and without;
* no random number is shared by the tokens of a line.

Every rank looks for itself and reduces nothing, so that what one rank finds keeps nobody waiting; then all agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from privtrain.clipping import attention, exact_sum, fallback
from privtrain.clipping.lines import LineClipper
from privtrain.data.lines import Line, LinePacker
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
#: Records of the planted units, and tokens of the line that they share: odd, so that no width of a model has as many.
_PLANTED_LENGTHS, _PLANTED_TOKENS = (7, 12), 61
#: Norms of the planted units in clipping norms; the third is not a number.
_SIZES = (1e4, 0.5)
#: Full lines in which units are moved about, for each size of slots.
_NUM_CROWDS = 4


@dataclasses.dataclass(frozen=True)
class LineProbe:
    """The probe of one trainer.

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
        """Return why records need rows; nothing, on every rank, if a line is exact. Dropout must be off."""
        return self._agreed(self._fault)

    def shared_coins(self) -> str:
        """Return why rows are needed for random numbers that tokens of a line share. Dropout must be as in training."""
        return self._agreed(self._coins)

    def _agreed(self, check: Callable[[], str]) -> str:
        """Return why rows are needed, on every rank; a model that fails on a line needs them too."""
        try:
            fault = check()
        except (UnsupportedLayer, GuaranteeLost) as refusal:
            fault = str(refusal)
        except Exception as failure:  # whatever a model does with positions that it does not know: rows are the way out
            if isinstance(failure, PrivtrainError) or fallback.is_elsewhere(failure):
                raise
            fault = f"a line fails: {fallback.in_words(failure)}"
        if self.trainer.backend.any_rank(bool(fault)):
            return fault or "another rank found that its model needs them"
        return ""

    def _fault(self) -> str:
        """Return the first reason why records need rows, or nothing."""
        trainer = self.trainer
        if not trainer.objective.takes_lines:
            return "a classifier reads a record in a row of its own"
        clipper = trainer.new_clipper(trainer.row_losses, self.route)
        if not isinstance(clipper, LineClipper):
            return "gradients are sharded"
        clipper.refuse_lines()
        return self._other_losses() or self._other_sums(clipper) or self._other_bits(clipper)

    # What is computed.

    def _other_losses(self) -> str:
        """Return how far losses in a line are from those in rows, if it is more than rounding."""
        packer = self._packer
        lengths = [packer.max_length]
        for length in (5, 9):
            if sum(lengths) + length <= packer.num_tokens:
                lengths.insert(len(lengths) // 2, length)
        records = [self._record(length, seed) for seed, length in enumerate(lengths)]
        line = packer.arranged([records]).to(self._device)
        with torch.no_grad(), attention.within_records(self.trainer.model, line):
            together = self.trainer.token_losses(line)[0]
        worst = 0.0
        for record, (first, stop) in zip(records, line.records, strict=True):
            with torch.no_grad(), self.trainer.autocast:
                ids = torch.from_numpy(record.tokens)[None].to(self._device)
                alone = -token_log_probs(self.trainer.model, ids)[0]
            if len(alone):
                change = (together[first + 1 : stop] - alone).abs().max() / alone.abs().max().clamp(min=1e-30)
                worst = max(worst, float("inf") if change.isnan() else float(change))
        if worst > _OTHER_SHAPE[self.precision]:
            return f"losses of records in a line are off by {worst:.2g} from those in rows of their own"
        return ""

    def _other_sums(self, clipper: LineClipper) -> str:
        """Return what is wrong with the sum over planted units in a line, or nothing."""
        units = [[self._record(n, 10 * u + n) for n in _PLANTED_LENGTHS] for u in range(3)]
        factors = [self._factor(unit, size) for unit, size in zip(units, _SIZES, strict=False)]
        if not all(0 < factor < float("inf") for factor in factors):
            return "a planted unit has no gradient"
        factors = [*factors, float("nan")]
        longest = max(_PLANTED_LENGTHS)
        packer = LinePacker(_PLANTED_TOKENS, _PLANTED_TOKENS, len(units), longest, self._packer.pad_id)
        short = dataclasses.replace(packer, num_tokens=max(_PLANTED_LENGTHS) + 1)
        alone = []
        for unit, factor in zip(units[:2], factors, strict=False):
            by_rows = self._by_rows(clipper, unit, factor)
            for name, one in (("line", packer), ("line of a part of it", short)):
                total = self._sum(clipper, self._weighted(one, [unit], [factor]))
                fault = self._difference(clipper, total, by_rows)
                if fault:
                    return f"a unit in a {name} {fault}"
                alone += [total] if one is packer else []
        together = self._sum(clipper, self._weighted(packer, units, factors))
        if not torch.equal(together, alone[0] + alone[1]):
            return "units of a line, beside one that is not a number, do not add what each adds alone"
        return ""

    def _difference(self, clipper: LineClipper, total: torch.Tensor, by_rows: torch.Tensor) -> str:
        """Return in words where a unit's sum in a line differs from that in rows by more than rounding."""
        plan, layout = self.trainer.plan, clipper.layout
        own, rows = (exact_sum.as_float32(value, clipper.grid_exponent).double() for value in (total, by_rows))
        if plan.clipping_style != "batch" and not float(own.norm()) <= clipper.clipping_norm * (1 + SLACK):
            return f"moved the sum by {float(own.norm()):.6g}, above clipping_norm={clipper.clipping_norm}"
        for slot in layout.slots:
            one, other = (layout.view(value, slot).norm() for value in (own - rows, rows))
            share = clipper.clipping_norm / len(layout.slots) ** 0.5
            if not float(one) <= _OTHER_GRADIENT[self.precision] * (float(other) + share):
                return f"adds {float(one):.3g} of {float(other):.3g} to {slot.name!r} that it does not add in rows"
        return ""

    # Its bits.

    def _other_bits(self, clipper: LineClipper) -> str:
        """Return where a unit of a shared line of the job does not add the bits that it adds alone, or nothing."""
        for size, num_slots in self._packer.slots():
            fault = self._other_bits_in(clipper, size, num_slots) if num_slots > 1 else ""
            if fault:
                return fault
        return ""

    def _other_bits_in(self, clipper: LineClipper, size: int, num_slots: int) -> str:
        """Return what :meth:`_other_bits` does for lines of ``num_slots`` slots of ``size`` tokens."""
        moved = self._moved(size)
        alone = [self._packer.arranged([unit]).to(self._device) for unit in moved]
        bits = [self._sum(clipper, [line]) for line in alone]
        for units, kinds in self._crowds(size, num_slots, moved):
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
        """Return what a crowded line adds, and what it should: the loud units without the others, and each of these."""
        line = self._packer.arranged(units).to(self._device)
        loud = [i for i, kind in enumerate(kinds) if kind < 0]
        is_loud = torch.zeros(line.num_tokens, dtype=torch.bool, device=self._device)
        weight = line.token_weight.clone()
        for first, stop in (line.units[i] for i in loud):
            is_loud[first:stop], weight[:, first:stop] = True, hooks.LOUD_WEIGHT
        line = dataclasses.replace(line, token_weight=weight)
        with hooks.loud_tokens(self.trainer.model, is_loud):
            total, expected = self._sum(clipper, [line]), self._sum(clipper, [line.only(loud)])
        for kind, own in enumerate(bits):
            expected += kinds.count(kind) * own
        return total, expected

    def _moved(self, size: int) -> list[list[Record]]:
        """Return the units that are moved about in slots of ``size`` tokens: a short one, and one of two records."""
        packer = self._packer
        smallest = next((tokens for tokens in range(1, size) if packer.slot(tokens) == size), size)
        short, first = smallest + min(4, size - smallest), max(1, size * 3 // 5)
        lengths = [[short], [first, max(1, size // 5)]]
        return [self._unit(unit, 50 + i) for i, unit in enumerate(lengths)]

    def _crowds(
        self, size: int, num_slots: int, moved: Sequence[list[Record]]
    ) -> Iterator[tuple[list[list[Record]], list[int]]]:
        """Yield the units of full lines, and which of ``moved`` each is: -1 for the loud ones between them.

        First equal units fill a line. Then those of ``moved`` take turns at every slot, behind loud units of many
        lengths.
        """
        packer = self._packer
        for kind, unit in enumerate(moved):
            num_units = min(num_slots, packer.shared_length(size) // packer.cost(unit))
            yield [list(unit) for _ in range(num_units)], [kind] * num_units
        rng = np.random.default_rng(size)
        for turn in range(_NUM_CROWDS):
            units: list[list[Record]] = []
            kinds: list[int] = []
            room = packer.shared_length(size)
            for i in range(num_slots):
                kind = (i // 2) % len(moved) if i % 2 == turn % 2 else -1
                tokens = int(rng.integers(1, size + 1))
                unit = self._unit([tokens], 70 + i) if kind < 0 else list(moved[kind])
                if packer.cost(unit) <= room:
                    units.append(unit)
                    kinds.append(kind)
                    room -= packer.cost(unit)
            if max(kinds, default=-1) >= 0:
                yield (units, kinds) if turn < 2 else (units[::-1], kinds[::-1])

    def _unit(self, lengths: Sequence[int], seed: int) -> list[Record]:
        """Return a unit whose records have these lengths, cut in two where one is too long."""
        most = self._packer.max_length
        cut = [min(most, length - first) for length in lengths for first in range(0, length, most)]
        return [self._record(length, 10 * seed + i) for i, length in enumerate(cut)]

    # Random numbers.

    def _coins(self) -> str:
        """Return who draws a random number for several tokens: an extreme value of it changes a loss; or empty."""
        lengths = (5, 11)
        packer = LinePacker(23, 23, 2, max(lengths), self._packer.pad_id)
        line = packer.arranged([[self._record(n, n)] for n in lengths]).to(self._device)
        trainer, sizes = self.trainer, (23, *lengths, 1 + sum(lengths))
        losses, owner = [], ""
        for extreme in (0.0, 1.0):
            with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
                torch.manual_seed(0)
                with (
                    hooks.SharedRandomNumbers(trainer.model, sizes, extreme) as numbers,
                    torch.no_grad(),
                    attention.within_records(trainer.model, line),
                ):
                    losses.append(trainer.token_losses(line))
                owner = owner or numbers.owner
        if torch.equal(*losses):
            return ""
        return f"{owner or 'the model'} draws random numbers that the tokens of a line share"

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
        """Return the lines of some units, whose losses are multiplied by ``factors``."""
        lines = []
        for line in packer.pack(units, packer.num_batches(units)):
            weight = line.token_weight.clone()
            for owner, (first, stop) in zip(line.owners, line.units, strict=True):
                weight[:, first:stop] *= factors[owner]
            lines.append(dataclasses.replace(line, token_weight=weight).to(self._device))
        return lines

    def _by_rows(self, clipper: LineClipper, unit: list[Record], factor: float) -> torch.Tensor:
        """Return what a unit adds to the sum in rows, its losses times ``factor``."""
        packer = Packer(len(unit), max(_PLANTED_LENGTHS), self._packer.pad_id)
        (batch,) = packer.pack([unit], 1)
        batch = dataclasses.replace(batch, row_weight=batch.row_weight * factor).to(self._device)
        clipper.reset()
        clipper.accumulate(batch)
        return clipper.finish().clone()

    def _factor(self, unit: list[Record], size: float) -> float:
        """Return the factor that gives a unit's loss a gradient of ``size`` clipping norms, by plain autograd."""
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
        """Return the clipped sum over the lines."""
        clipper.reset()
        for line in lines:
            clipper.accumulate(line)
        return clipper.finish().clone()
