"""Probe the real model at start-up: a forward pass leaves no trace, rows are independent, nobody looks ahead.

Exact clipping bounds what one unit adds to the sum. That bounds what the unit does to the *release* only if it does not
also change what the other units add. So, in training mode, before the first step:

* no pass over rows of any width, loud or long, changes a buffer, an attribute or a weight (:mod:`.traces`);
* what the clipper adds for a short unit has the same bits alone, after a long row, beside rows of huge activations that
  add gradients of their own, in every row, and whatever ids stand in its padding; if the huge ones are not finite, that
  proves nothing, since the clipper then runs each unit by itself;
* a unit adds the same bits on every rank;
* no random number is shared between rows (layer drop, router jitter): such a number is called a *coin*.

*Loud* rows enter the model with huge activations (:func:`.hooks.loud_rows`), so that whatever of them reaches another
row is seen. A *width* is a number of tokens, padding included, that the packer makes rows of. The *route* is how the
clipper computes gradients of units; ``one_unit`` runs one unit at a time, so rows of different units never meet.

One probe is about what is learned, not about privacy: a token's loss does not move when later tokens change or vanish,
or when the row is padded further. A model that sees the token it predicts learns to copy it.

Every rank runs the same passes, as a sharded model needs, and what one rank finds stops all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from privtrain.backends.base import all_equal, digest
from privtrain.clipping import refusals
from privtrain.data.lines import Line, record_lengths
from privtrain.data.microbatch import NOBODY, Microbatch
from privtrain.data.records import Record
from privtrain.errors import UnsupportedLayer
from privtrain.models.losses import CausalLM
from privtrain.privacy.layout import Slot
from privtrain.training import hooks, traces
from privtrain.training.agreement import agree_on_fault
from privtrain.training.trainer import Trainer

#: A row whose outputs change by more than this share beside others is mixed with them; by less, kernels round it
#: differently. By bytes of a number in forward passes: 4 for fp32, 2 for bf16.
_MIXED = {4: 1e-5, 2: 2e-2}
#: Change of logits, relative to the largest, that the rounding of other shapes explains, by bytes of a weight.
_OTHER_SHAPE = {4: 1e-4, 2: 5e-2}
#: The same where every shape is the same: none is expected.
_SAME_SHAPE = 1e-6
#: (rows, tokens) of the passes that look for coins. Rows are told by these sizes, which a dimension of the model may
#: have too, so two pairs are tried.
_COIN_SHAPES = ((5, 7), (3, 11))
#: Parts of a config key's name by which it tosses one coin for a whole batch.
_COIN_KEYS = ("layerdrop", "layer_drop", "drop_path", "stochastic_depth", "jitter", "expert_drop")
#: Tokens of the short unit, at least.
_SHORT = 4
_IN_CONFIG = "in the model's config.json"


@dataclasses.dataclass(frozen=True)
class Probe:
    """The probes of one trainer. Each ``check_...`` raises on every rank if any rank finds a fault.

    Attributes:
        trainer: about to train; its adapter has been moved off its starting point, where half of LoRA has no gradient.
        vocabulary_size: planted token ids are below this.
    """

    trainer: Trainer
    vocabulary_size: int

    # Random numbers.

    def check_config(self) -> None:
        """Refuse what a config says: coins for a whole batch, and positions rescaled by the longest row of a batch.

        Raises:
            SelfTestFailed: naming the key, or the module, and the longest rows that need no rescaling.
        """
        model, max_length = self.trainer.model, self.trainer.packer.max_length
        faults = []
        for name, owner in _owners(model):
            for key, value in vars(owner).items():
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if is_number and value > 0 and any(part in key.lower() for part in _COIN_KEYS):
                    faults.append(
                        f"{key}: {value:g} ({name}) tosses a coin for a whole batch; set {key}: 0 {_IN_CONFIG}"
                    )
        try:
            refusals.refuse_rescaled_positions(model, max_length)
        except UnsupportedLayer as refusal:
            faults.append(str(refusal))
        self._agree(faults[0] if faults else "")

    def check_coins(self) -> None:
        """Refuse random numbers that rows share: another unit in the batch would change how they fall for the others.

        All shared numbers are set to 0, then to 1: losses that differ depend on one. Dropout draws for every row apart,
        and stays on here.

        Raises:
            SelfTestFailed: naming the module.
        """
        trainer = self.trainer
        if trainer.clipper.route == "one_unit":
            return  # a batch is one row, or rows of one unit: its coin is the unit's own
        fault = ""
        for num_rows, num_tokens in _COIN_SHAPES:
            batch = self._batch([self._record(num_tokens, seed) for seed in range(num_rows)], num_tokens)
            losses_at_0, module = self._with_coins(batch, 0.0)
            losses_at_1, _ = self._with_coins(batch, 1.0)
            if not fault and not _equal(losses_at_0, losses_at_1):
                fault = (
                    f"{module or type(refusals.unwrapped(trainer.model)).__name__} draws random numbers that all rows "
                    f"of a batch share, which couples units; switch them off {_IN_CONFIG}, or {refusals.ONE_UNIT}"
                )
        self._agree(fault)

    def _with_coins(self, batch: Microbatch, extreme: float) -> tuple[torch.Tensor, str]:
        """Return losses with all random numbers that rows share at ``extreme``, and the module that drew the first."""
        device = self.trainer.backend.device
        num_rows, num_tokens = batch.input_ids.shape
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with hooks.SharedRandomNumbers(self.trainer.model, (num_rows, num_rows * num_tokens), extreme) as numbers:
                return self._losses(batch), numbers.owner

    # Traces.

    def check_traces(self) -> dict[str, object]:
        """Demand that passes over rows of every width, longest and loudest first, leave no trace in the model.

        One short pass comes before: it may build what was not there yet (e.g. a cached mask), which then depends on the
        model alone. The same pass at the end must have the same bits, since a trace may be kept where it is not seen.

        Returns:
            The model's state, to compare with later by :meth:`check_unchanged`.

        Raises:
            SelfTestFailed: naming the module and what it kept.
        """
        widths, before = self._widths(), self._state()
        short = self._batch([self._record(widths[0], 0)], widths[0])
        outputs_before = self._outputs(short)
        built = self._state()
        # The first pass may fill what was empty, but not change what was there.
        changed = [place for place in traces.changes(before, built) if not traces.was_nothing(before, place)]
        self._refuse_traces(changed)
        with hooks.loud_rows(self.trainer.model, self._loud):
            for width in reversed(widths):
                self._losses(self._batch([self._record(width, 1, is_loud=True)], width))
        for width in widths:
            self._losses(self._batch([self._record(width, 2)], width))
        self.check_unchanged(built)
        name = self._first_differing(outputs_before, self._outputs(short))
        self._refuse_traces([f"what {self._named(name)} returns for the same row"] if name else [])
        return built

    def check_unchanged(self, state: dict[str, object], way_out: str = "") -> None:
        """Demand that the model's state is still the one of :meth:`check_traces`.

        Args:
            state: of :meth:`check_traces`.
            way_out: what else a user may do, for the message.

        Raises:
            SelfTestFailed: naming the module and what it kept.
        """
        self._refuse_traces(traces.changes(state, self._state()), way_out)

    def _state(self) -> dict[str, object]:
        return traces.snapshot(self.trainer.model, self.trainer.backend.local_tensors(self.trainer.model))

    def _refuse_traces(self, kept: Sequence[str], way_out: str = "") -> None:
        """Raise, on every rank, if any rank has places in the model that a pass changed."""
        fault = ""
        if kept:
            fault = (
                f"a pass over the model changes {kept[0]}: what one unit's rows leave there changes the gradients of "
                f"the others, which clipping does not bound. Switch that off {_IN_CONFIG} (for positions that are "
                "rescaled by length: data.max_length within the original context), or replace the module by one that "
                f"keeps nothing{way_out}"
            )
        self._agree(fault)

    # Independent rows.

    def check_rows(self, *, every_width: bool = True) -> None:
        """Demand that a row's loss does not depend on the rows beside it, up to the rounding of kernels.

        Args:
            every_width: the longest rows too; without, only the shortest, of which little depends where lines are
                packed in place of rows.

        Raises:
            SelfTestFailed: naming the first module that mixes rows.
        """
        trainer = self.trainer
        if trainer.clipper.route == "one_unit":
            return  # rows of different units never meet
        fault, widths = "", self._widths()
        tried = {widths[0], widths[-1]} if every_width else {widths[0]}
        for width in sorted(tried):
            with hooks.loud_rows(trainer.model, self._loud):
                alone = self._outputs(self._arranged(0, is_crowded=False, width=width))
                beside = self._outputs(self._arranged(0, is_crowded=True, width=width))
            # An expert's outputs have other shapes beside other rows: it returns the tokens that are routed to it. A
            # mixture there shows in the modules after it.
            beside = {
                name: value for name, value in beside.items() if name in alone and value.shape == alone[name].shape
            }
            name = self._first_differing(alone, beside)
            share = _moved(alone[name], beside[name]) if name else 0.0
            if not fault and share > self._tolerance(_MIXED):
                fault = (
                    f"rows of a batch are mixed by {self._named(name)}: what it returns for a row is off by "
                    f"{share:.2g} beside rows with huge activations. Replace it by one that works on each row alone, "
                    f"or {refusals.ONE_UNIT}"
                )
        self._agree(fault)

    def independent_route(self, route: str) -> str:
        """Demand that a short unit adds the same bits to the sum whatever is computed beside it or before it.

        Also whatever ids stand in its padding, except for a model with experts.

        Args:
            route: clipping route to test, after :meth:`check_rows` has passed.

        Returns:
            ``route``; or ``"one_unit"`` where that passes and ``"auto"`` does not, because kernels round a row
            differently beside others. The same on every rank.

        Raises:
            SelfTestFailed: naming the circumstance, and the first module whose output differs.
        """
        difference = self._first_difference(route)
        if not difference:
            return route
        if route == "auto":
            self.trainer.clipper.fallback_reason = difference
            return self.independent_route("one_unit")
        way_out = (
            f"; {refusals.ONE_UNIT}" if route in ("batched", "two_pass") else "; choose another model or precision"
        )
        self._agree(f"{difference}{way_out}")
        raise AssertionError("unreachable")

    def _first_difference(self, route: str) -> str:
        """Return, in words, in which circumstance a short unit adds other bits than alone; empty if in none.

        Also what kept that from being seen. The circumstances are tried together, and one by one only if a difference
        is to be explained. Every rank runs the same passes, as ranks that gather weights need, whether or not it sees a
        difference itself.
        """
        trainer, widths = self.trainer, self._widths()
        clipper = trainer.new_clipper(trainer.row_losses, route)

        def contribution(batch: Microbatch) -> torch.Tensor:
            """Return what a batch adds to the clipped sum, in whole grid steps."""
            clipper.reset()
            clipper.accumulate(batch)
            return clipper.finish().clone()

        last, other_pad = trainer.packer.microbatch_size - 1, self._other_pad
        alone = self._arranged(0, False)
        with hooks.loud_rows(trainer.model, self._loud):
            reference = contribution(alone)
            # Loud rows whose gradients count, so that a trace of their backward pass would show too.
            for width in {widths[0], widths[-1]}:
                contribution(self._batch([self._record(width, 3, is_loud=True)], width, [hooks.LOUD_WEIGHT]))
            # Sums are exact, so what the unit adds beside others is the sum with it less the sum of the others.
            without_unit = contribution(self._arranged(last, True, other_pad, is_member=False))
            crowded = self._arranged(last, True, other_pad)
            # Circumstance, batch, and what its other rows add. In this order: one may leave a trace for the next.
            cases = (
                ("after a long row with huge activations", alone, 0),
                ("in another row of the batch, beside rows with huge activations", crowded, without_unit),
                ("after rows with gradients of their own", alone, 0),
            )
            for when, batch, others in cases:
                difference = contribution(batch) - others - reference
                if not trainer.backend.any_rank(bool(difference.any())):
                    continue
                # Of a crowded batch, name one circumstance that makes a difference by itself, if there is one. All
                # are tried in any case, since every rank must run the same passes.
                single = self._single_circumstances()
                added = {circumstance: contribution(rows) for circumstance, rows in single.items()}
                differing = [circumstance for circumstance in single if not _equal(added[circumstance], reference)]
                if batch is crowded and differing:
                    when = differing[0]
                    batch, difference = single[when], added[when] - reference
                share = float(difference.double().norm() / reference.double().norm())
                return (
                    f"a short unit does not add the same bits to the sum {when} as alone (off by {share:.2g} of its "
                    f"norm; precision {self._precision}), first in the output of {self._first_module(alone, batch)}"
                )
        if route == "one_unit":
            return ""
        fault = self._row_that_differs(contribution)
        # In a pass that was split each unit ran by itself, and nothing of the others could have reached it.
        if trainer.backend.any_rank(clipper.num_split > 0) and not fault:
            return (
                f"rows of huge activations are not finite (precision {self._precision}), so that what rows of a batch "
                "do to one another cannot be seen"
            )
        return fault

    def check_ranks(self, route: str) -> None:
        """Demand that a unit adds the same bits to the sum on every rank: who else is drawn decides on which it runs.

        A unit in rows of every width, and in lines if units are packed so, is given to all ranks. Compared are the sum,
        or the parts of it that several ranks hold alike, and, where a rank runs units of its own, their norm and loss.

        Args:
            route: clipping route of the job.

        Raises:
            SelfTestFailed: if a rank computes another one.
        """
        trainer, backend, shards = self.trainer, self.trainer.backend, self.trainer.placement.shards
        if backend.world_size == 1:
            return
        clipper = trainer.new_clipper(trainer.row_losses, route)
        own, sums = hashlib.sha256(), hashlib.sha256()
        for batch in self._of_every_shape():
            clipper.reset()
            clipper.accumulate(batch)
            sums.update(digest([clipper.finish()]))
            counts = clipper.diagnostics
            if shards is None or route != "one_unit":  # else ranks work on a unit together
                own.update(repr((counts.sum_norms, counts.sum_losses)).encode())
        num_parts = 1 if shards is None else shards.size  # ranks so far apart hold the same part of the sum
        by_rank = backend.gather_digests(sums.digest())
        differs = [value != by_rank[rank % num_parts] for rank, value in enumerate(by_rank)]
        is_same = all_equal(backend.gather_digests(own.digest())) and not any(differs)
        fault = (
            "ranks do not add the same bits to the sum for one unit. Which rank a unit is on depends on the others, so "
            "that a unit more would move them; give every rank the same type of machine, libraries, and settings of "
            "kernels in its environment (such as MKL_CBWR)"
        )
        self._agree("" if is_same else fault)

    def _of_every_shape(self) -> Iterator[Microbatch | Line]:
        """Yield one unit in each shape that the job computes in, up to the length of a line of its own."""
        for width in self._widths():
            yield self._batch([self._record(width, 0)], width, num_rows=self.trainer.packer.microbatch_size)
        packer = self.trainer.line_packer
        if packer is None or not self.trainer.packs_lines:
            return
        for size in sorted({packer.max_length, *(tokens for tokens, _ in packer.slots())}):
            lengths = record_lengths(size, packer.max_length)
            unit = [self._record(length, number) for number, length in enumerate(lengths)]
            yield packer.arranged([unit]).to(self.trainer.backend.device)

    def _single_circumstances(self) -> dict[str, Microbatch]:
        """Return the circumstances of a crowded batch one by one: in words → a batch in which only that one is so."""
        last = self.trainer.packer.microbatch_size - 1
        return {
            "beside rows with huge activations": self._arranged(0, True, is_counted=False),
            "in another row of the batch": self._arranged(last, False),
            "with other ids in its padding": self._arranged(0, False, self._other_pad),
        }

    def _row_that_differs(self, contribution: Callable[[Microbatch], torch.Tensor]) -> str:
        """Return, in words, that a unit adds other bits in some row of a batch than in the first; empty if in none.

        A batch of equal units, one in each row and as long as the row, must add exactly as many times what one adds.
        Kernels may round each row by its place, so the first row and the last alone would not show it; and attention
        may run another kernel where no row of a batch has padding.

        Args:
            contribution: returns what a batch adds to the clipped sum, in whole grid steps.
        """
        num_rows = self.trainer.packer.microbatch_size
        for width in self._widths():
            record = self._record(width, 0)
            alone = contribution(self._batch([record], width, num_rows=num_rows))
            difference = contribution(self._batch([record] * num_rows, width)) - num_rows * alone
            if self.trainer.backend.any_rank(bool(difference.any())):
                share = float(difference.double().norm() / alone.double().norm().clamp(min=1))
                return (
                    f"{num_rows} equal units of {width} tokens do not add {num_rows} times the bits of one to the sum "
                    f"(off by {share:.2g} of its norm; precision {self._precision}): rows of a batch are rounded by "
                    "their place, or by whether others have padding"
                )
        return ""

    def _arranged(
        self,
        place: int,
        is_crowded: bool,
        pad_id: int | None = None,
        *,
        width: int | None = None,
        is_counted: bool = True,
        is_member: bool = True,
    ) -> Microbatch:
        """Return a microbatch with the short unit in row ``place``, beside padding rows or loud ones.

        Args:
            place: row of the short unit, whose loss has weight 1. Unless crowded, the rows before it are copies of it
                with weight 0, and padding rows follow.
            is_crowded: whether all other rows are loud.
            pad_id: id that pads rows; by default the packer's.
            width: tokens of a row, by default the fewest; the short unit is two tokens shorter.
            is_counted: whether loud rows have weight, so that they add their own gradients to the sum.
            is_member: whether the short unit is there at all; without it, ``place`` must be the last row.
        """
        width, num_rows = width or self._widths()[0], self.trainer.packer.microbatch_size
        short = self._record(max(2, width - 2), 0)
        if is_crowded:
            loud = [self._record(width, 10 + i, is_loud=True) for i in range(num_rows)]
            before, after = loud[:place], loud[place + 1 :]
        else:
            before, after = [short] * place, []
        rows = [*before, short, *after] if is_member else [*before, *after]
        weight_of_others = hooks.LOUD_WEIGHT if is_crowded and is_counted else 0.0
        weights = [1.0 if is_member and i == place else weight_of_others for i in range(len(rows))]
        return self._batch(rows, width, weights, num_rows, pad_id)

    def _first_module(self, one: Microbatch, other: Microbatch) -> str:
        """Return in words the first module, in forward order, whose output for the short unit differs in the two."""
        name = self._first_differing(self._outputs(one), self._outputs(other))
        return self._named(name) if name else "no module (it is in the backward pass)"

    def _outputs(self, batch: Microbatch) -> dict[str, torch.Tensor]:
        """Return name of the module → its output for the short unit's row, without padding, in one forward pass."""
        # The short unit's is the row with weight that is not loud.
        row = int((batch.row_weight * (batch.input_ids[:, 0] != self._loud)).argmax())
        length = int(batch.target_mask[row].nonzero().max()) + 1
        share = length / batch.input_ids.shape[1]
        with hooks.outputs_of_row(self.trainer.model, row, len(batch.row_weight), share) as outputs:
            self._losses(batch)
        return outputs

    def _first_differing(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
        """Return the name of the first module whose outputs, of :meth:`_outputs`, differ; empty if none."""
        return next((name for name in one if name in other and not _equal(one[name], other[name])), "")

    def _named(self, name: str) -> str:
        return f"module {name!r} of type {type(self.trainer.model.get_submodule(name)).__name__}"

    # Causality and padding.

    def check_causality(self) -> None:
        """Demand that what is predicted at a token depends on the tokens up to it alone, and never on the padding.

        Tried in the narrowest and in the widest row that the job may have.

        Raises:
            SelfTestFailed: naming the model's class.
        """
        widths = self._widths()
        # Both are tried whatever the first one shows: every rank must run the same passes.
        faults = [self._looks_ahead(width) for width in sorted({widths[0], widths[-1]})]
        self._agree(next(filter(None, faults), ""))

    def _looks_ahead(self, width: int) -> str:
        """Return, in words, what comes later than some token of a record and yet changes its logits; empty if nothing.

        Three changes are made to a record in a row of ``width`` tokens, one at a time: other ids in its padding; more
        padding; and its second half changed or gone, which must leave the logits of the first half.
        """
        name, widest = type(refusals.unwrapped(self.trainer.model)).__name__, self._widths()[-1]
        record = self._record(max(2, width - 1), 4)
        is_causal, length = isinstance(self.trainer.objective, CausalLM), len(record)
        other_shape = self._tolerance(_OTHER_SHAPE)
        same_shape = other_shape if self._has_experts() else _SAME_SHAPE
        plain = self._logits(record, width, length)
        if torch.isnan(plain).any() or (plain == torch.inf).any():
            return (
                f"the outputs of {name} on made-up tokens are not finite: its weights hold NaN or infinity, or it "
                "overflows; fetch the model again, or set performance.precision: fp32"
            )
        by_pad_ids = _moved(plain, self._logits(record, width, length, pad_id=self._quiet))
        by_width = _moved(plain, self._logits(record, widest, length))
        half = -(-length // 2)  # rounded up
        moved = {"change": 0.0, "vanish": 0.0}  # what the second half does → how far the logits of the first half move
        if is_causal:
            changed = record.tokens.copy()
            changed[half:] = (changed[half:] + 1) % self.vocabulary_size
            for way, ids in {"change": changed, "vanish": record.tokens[:half]}.items():
                moved[way] = _moved(plain[:half], self._logits(Record.of(ids), width, half))
        way = max(moved, key=moved.__getitem__)  # the one that moves them most
        if moved[way] > same_shape:
            can_decode = getattr(refusals.unwrapped(self.trainer.model).config, "is_decoder", None) is False
            way_out = f"set is_decoder: true {_IN_CONFIG}" if can_decode else "choose a causal language model"
            return (
                f"the model class {name} is not causal: logits move by {moved[way]:.2g} when tokens behind {way}, "
                f"so it would learn to copy the token that it predicts; {way_out}"
            )
        if by_pad_ids > same_shape or by_width > other_shape:
            return (
                f"the model class {name} reads the padding behind a record: logits move by {by_pad_ids:.2g} with the "
                f"ids that stand there, by {by_width:.2g} with their number. Choose a model whose tokens do not depend "
                "on what stands behind them"
            )
        return ""

    def _logits(self, record: Record, width: int, length: int, pad_id: int | None = None) -> torch.Tensor:
        """Return the logits of a record in a row of ``width`` tokens: [length, ids] of its first ones, or [labels].

        Without autocast if the weights are fp32, so that rounding hides little. By default padded with the packer's id.
        """
        batch = self._batch([record], width, pad_id=self.trainer.packer.pad_id if pad_id is None else pad_id)
        outputs: list[torch.Tensor] = []
        handle = self.trainer.model.register_forward_hook(
            lambda _module, _inputs, output: outputs.append(output.logits if hasattr(output, "logits") else output[0])
        )
        try:
            if _weight_bytes(self.trainer.model) < 4:
                self._losses(batch)
            else:
                objective, model = self.trainer.objective, self.trainer.model
                self._passed(lambda: objective.losses(model, batch.input_ids, batch.target_mask))
        finally:
            handle.remove()
        logits = outputs[0][0].detach().float()  # of the first pass, and its only row
        if logits.ndim != 2:
            return logits  # a classifier's
        return logits[-width:][:length]  # without virtual tokens, which prompt tuning puts in front

    def _has_experts(self) -> bool:
        """Return whether the model routes tokens to experts, so that other tokens decide the shapes it computes in."""
        return any(refusals.has_experts(config) for config in refusals.configs(refusals.unwrapped(self.trainer.model)))

    # Planted rows.

    @property
    def _loud(self) -> int:
        """Id of the first token of loud rows; no other row begins with it, and it is not the padding's."""
        return 1 if self.trainer.packer.pad_id != 1 else 3

    @property
    def _quiet(self) -> int:
        """Id of the first token of all other planted rows; also an id for padding other than the packer's."""
        return 2 if self.trainer.packer.pad_id != 2 else 3

    @property
    def _other_pad(self) -> int:
        """Another id than the packer's for padding, which no token may read.

        The packer's for a model with experts: these run on all tokens that are routed to them, padding among them, and
        how many there are decides how kernels round.
        """
        return self.trainer.packer.pad_id if self._has_experts() else self._quiet

    @property
    def _precision(self) -> str:
        autocast = self.trainer.autocast
        return "bf16" if autocast.fast_dtype == torch.bfloat16 and autocast._enabled else "fp32"

    def _tolerance(self, by_bytes: dict[int, float]) -> float:
        """Return the tolerance of the job's precision, of those by bytes of a number: 4 for fp32, 2 for less."""
        is_low = self._precision == "bf16" or _weight_bytes(self.trainer.model) < 4
        return by_bytes[2 if is_low else 4]

    def _widths(self) -> list[int]:
        """Return the widths of rows that the packer makes, ascending, from the first that holds a short unit."""
        packer = self.trainer.packer
        widths = sorted({packer.width([np.zeros(n)]) for n in range(1, packer.max_length + 1)})
        return [width for width in widths if width >= _SHORT] or widths[-1:]

    def _record(self, length: int, seed: int, *, is_loud: bool = False) -> Record:
        """Return a planted record of random tokens; :func:`.hooks.loud_rows` makes it loud by its first token."""
        tokens = np.random.default_rng(seed).integers(0, self.vocabulary_size, size=length)
        tokens[0] = self._loud if is_loud else self._quiet
        return self.trainer.objective.plant(tokens)

    def _batch(
        self,
        rows: Sequence[Record],
        width: int,
        weights: Sequence[float] | None = None,
        num_rows: int | None = None,
        pad_id: int | None = None,
    ) -> Microbatch:
        """Return a microbatch of one row for each record, each a unit of its own, and then padding rows.

        Args:
            rows: the records.
            width: tokens of a row.
            weights: factor of each record's loss; by default 1.
            num_rows: rows in all; by default no padding rows.
            pad_id: id that pads rows; by default the packer's.
        """
        num_rows = num_rows or len(rows)
        input_ids = np.full((num_rows, width), self.trainer.packer.pad_id if pad_id is None else pad_id, dtype=np.int64)
        mask = np.zeros((num_rows, width), dtype=bool)
        row_weight = np.zeros(num_rows, dtype=np.float32)
        owner = np.full(num_rows, NOBODY, dtype=np.int64)
        for i, record in enumerate(rows):
            input_ids[i, : len(record)] = record.tokens
            mask[i, : len(record)] = record.is_target
            row_weight[i] = 1.0 if weights is None else weights[i]
            owner[i] = i
        tensors = (torch.from_numpy(array) for array in (input_ids, mask, row_weight, owner))
        batch = Microbatch(*tensors, owners=tuple(range(len(rows))), last_continues=False)
        return batch.to(self.trainer.backend.device)

    def _losses(self, batch: Microbatch) -> torch.Tensor:
        return self._passed(lambda: self.trainer.row_losses(batch.input_ids, batch.target_mask))

    def _passed(self, losses: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Return [rows] losses, leaving no gradients.

        Where a forward pass gathers sharded weights, a backward pass must follow, which frees them.
        """
        placement = self.trainer.placement
        if placement.shards is None and not placement.equal_passes:
            with torch.no_grad():
                return losses()
        # Sharded gradients are handed over and forgotten; whole ones are left on the parameters.
        collecting = contextlib.nullcontext() if placement.shards is None else placement.shards.collecting(_forget)
        with collecting:
            row_losses = losses()
            row_losses.sum().backward()
        if placement.shards is None:
            for parameter in placement.clipped.parameters.values():
                parameter.grad = None
        return row_losses.detach()

    def _agree(self, fault: str) -> None:
        agree_on_fault(fault, self.trainer.backend)


def _forget(_slot: Slot, _part: torch.Tensor) -> None:
    """Drop a gradient that a backward pass hands over."""


def _owners(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield whatever may hold a probability: the model's configs, then its modules."""
    for config in refusals.configs(refusals.unwrapped(model)):
        yield "the model's config", config
    for name, module in model.named_modules():
        yield f"module {name!r} of type {type(module).__name__}", module


def _weight_bytes(model: nn.Module) -> int:
    return min((p.element_size() for p in model.parameters() if p.is_floating_point()), default=4)


def _moved(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return max |one - other| / max |one|; infinite if that is NaN."""
    change = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(change) else change


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors are equal bit for bit, but for the sign of zero."""
    return one.shape == other.shape and bool(torch.all((one == other) | (one.isnan() & other.isnan())))
