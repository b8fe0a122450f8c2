"""Probe the real model at start-up: a forward pass leaves no trace, rows are independent, nobody looks ahead.

Exact clipping bounds what one unit adds to the sum. That bounds what the unit does to the *release* only if it does not
also change what the other units add. So, in training mode, before the first step:

* no pass over rows of any width, loud or long, changes a buffer, an attribute or a weight (:mod:`.traces`);
* what the clipper adds for a short unit has the same bits alone, after a long row, beside rows of huge activations that
  add gradients of their own, in every row, and whatever ids stand in its padding;
* no random number is shared between rows (layer drop, router jitter).

One probe is about what is learned, not about privacy: a token's loss does not move when later tokens change or vanish,
or when the row is padded further. A model that sees the token it predicts learns to copy it.

Every rank runs the same passes, as a sharded model needs, and what one rank finds stops all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import nn

from privtrain.clipping import refusals
from privtrain.data.microbatch import NOBODY, Microbatch
from privtrain.data.records import Record
from privtrain.errors import UnsupportedLayer
from privtrain.models.losses import CausalLM
from privtrain.privacy.layout import Slot
from privtrain.training import hooks, traces
from privtrain.training.agreement import agree_on_fault
from privtrain.training.trainer import Trainer

#: A row that moves by more than this share beside others is mixed with them; by less, kernels round it differently.
_MIXED = {4: 1e-5, 2: 2e-2}
#: Change of logits, relative to the largest, that the rounding of other shapes explains, by bytes of a weight.
_OTHER_SHAPE = {4: 1e-4, 2: 5e-2}
#: The same where every shape is the same: none is expected.
_SAME_SHAPE = 1e-6
#: Rows and tokens of the passes that look for shared random numbers. Two pairs, since one may be sizes of the model's.
_COIN_SHAPES = ((5, 7), (3, 11))
#: Keys of a config that toss one coin for a whole batch.
_COIN_KEYS = ("layerdrop", "layer_drop", "drop_path", "stochastic_depth", "jitter", "expert_drop")
#: Tokens of the short unit, at least.
_SHORT = 4
_IN_CONFIG = "in the model's config.json"


@dataclasses.dataclass(frozen=True)
class Probe:
    """The probes of one trainer.

    Attributes:
        trainer: about to train; its adapter has been moved off its starting point.
        vocabulary_size: planted tokens are below this.
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

        Dropout draws for every row apart, and stays on here.

        Raises:
            SelfTestFailed: naming the module.
        """
        trainer = self.trainer
        if trainer.clipper.route == "one_unit":
            return  # a batch is one row, or rows of one unit: its coin is the unit's own
        fault = ""
        for num_rows, num_tokens in _COIN_SHAPES:
            batch = self._batch([self._record(num_tokens, seed) for seed in range(num_rows)], num_tokens)
            losses, drew = zip(*(self._with_coins(batch, extreme) for extreme in (0.0, 1.0)), strict=True)
            if not fault and not _equal(*losses):
                fault = (
                    f"{drew[0] or type(refusals.unwrapped(trainer.model)).__name__} draws random numbers that all rows "
                    f"of a batch share, which couples units; switch them off {_IN_CONFIG}, or {refusals.ONE_UNIT}"
                )
        self._agree(fault)

    def _with_coins(self, batch: Microbatch, extreme: float) -> tuple[torch.Tensor, str]:
        """Return losses, and the module that drew, where every random number that rows share is 0 or 1."""
        device = self.trainer.backend.device
        num_rows, num_tokens = batch.input_ids.shape
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with hooks.SharedRandomNumbers(self.trainer.model, (num_rows, num_rows * num_tokens), extreme) as numbers:
                return self._losses(batch), numbers.owner

    # Traces.

    def check_traces(self) -> dict[str, object]:
        """Demand that passes over rows of every width, longest and loudest first, leave no trace; return the state.

        One short pass comes before: what a layer builds once, where nothing was, is a function of the model alone. The
        same pass at the end must have the same bits, whatever is kept where it cannot be seen.

        Raises:
            SelfTestFailed: naming the module and what it kept.
        """
        widths, before = self._widths(), self._state()
        short = self._batch([self._record(widths[0], 0)], widths[0])
        outputs = [self._outputs(short)]
        built = self._state()
        self._refuse_traces([place for place in traces.changes(before, built) if not traces.was_nothing(before, place)])
        with hooks.loud_rows(self.trainer.model, self._loud):
            for width in reversed(widths):
                self._losses(self._batch([self._record(width, 1, is_loud=True)], width))
        for width in widths:
            self._losses(self._batch([self._record(width, 2)], width))
        self.check_unchanged(built)
        outputs.append(self._outputs(short))
        name = self._first_differing(*outputs)
        self._refuse_traces([f"what {self._named(name)} returns for the same row"] if name else [])
        return built

    def check_unchanged(self, state: dict[str, object]) -> None:
        """Demand that the model is what it was, after whatever passes.

        Raises:
            SelfTestFailed: naming the module and what it kept.
        """
        self._refuse_traces(traces.changes(state, self._state()))

    def _state(self) -> dict[str, object]:
        return traces.snapshot(self.trainer.model, self.trainer.backend.local_tensors(self.trainer.model))

    def _refuse_traces(self, kept: Sequence[str]) -> None:
        fault = ""
        if kept:
            fault = (
                f"a pass over the model changes {kept[0]}: what one unit's rows leave there changes the gradients of "
                f"the others, which clipping does not bound. Switch that off {_IN_CONFIG} (for positions that are "
                "rescaled by length: data.max_length within the original context), or replace the module by one that "
                "keeps nothing"
            )
        self._agree(fault)

    # Independent rows.

    def check_rows(self) -> None:
        """Demand that a row's loss does not depend on the rows beside it, up to the rounding of kernels.

        Raises:
            SelfTestFailed: naming the first module that mixes rows.
        """
        trainer = self.trainer
        if trainer.clipper.route == "one_unit":
            return  # rows of different units never meet
        fault, widths = "", self._widths()
        for width in sorted({widths[0], widths[-1]}):
            with hooks.loud_rows(trainer.model, self._loud):
                alone, beside = (
                    self._outputs(self._arranged(0, is_crowded, width=width)) for is_crowded in (False, True)
                )
            # Experts return as many tokens as they get; what becomes of those is seen in the modules behind them.
            beside = {
                name: value for name, value in beside.items() if name in alone and value.shape == alone[name].shape
            }
            name = self._first_differing(alone, beside)
            if not fault and name and (share := _moved(alone[name], beside[name])) > self._tolerance(_MIXED):
                fault = (
                    f"rows of a batch are mixed by {self._named(name)}: what it returns for a row is off by "
                    f"{share:.2g} beside rows with huge activations. Replace it by one that works on each row alone, "
                    f"or {refusals.ONE_UNIT}"
                )
        self._agree(fault)

    def independent_route(self, route: str) -> str:
        """Demand that a short unit adds the same bits to the sum whatever is computed beside it or before it.

        And whatever ids stand in its padding, but for a model with experts.

        Args:
            route: clipping route to test, of which :meth:`check_rows` found no mixed rows.

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
        """Return what is wrong with a short unit's contribution, or nothing; on every rank if on any."""
        trainer, widths = self.trainer, self._widths()
        clipper = trainer.new_clipper(trainer.row_losses, route)

        def contribution(batch: Microbatch) -> torch.Tensor:
            clipper.reset()
            clipper.accumulate(batch)
            return clipper.finish().clone()

        last = trainer.packer.microbatch_size - 1
        # Which ids pad a row is a constant, so others need not give the same bits where experts are run on the tokens
        # that they get, padding among them, in a shape of that number. No token reads them: :meth:`check_causality`.
        other_pad = trainer.packer.pad_id if self._has_experts() else self._quiet
        alone = self._arranged(0, False)
        with hooks.loud_rows(trainer.model, self._loud):
            reference = contribution(alone)
            for width in {widths[0], widths[-1]}:  # with their gradients: what a backward pass keeps shows only so
                contribution(self._batch([self._record(width, 3, is_loud=True)], width, [hooks.LOUD_WEIGHT]))
            # Sums are exact, so what the short unit adds beside others is the difference that it makes.
            mates = contribution(self._arranged(last, True, other_pad, is_member=False))
            cases = {
                "after a long row with huge activations": (alone, 0),
                "in another row of the batch, beside rows with huge activations": (
                    self._arranged(last, True, other_pad),
                    mates,
                ),
                "after rows with gradients of their own": (alone, 0),
            }
            for when, (batch, others) in cases.items():
                difference = contribution(batch) - others - reference
                if not trainer.backend.any_rank(bool(difference.any())):
                    continue  # together: ranks that gather weights run equal passes
                single = {
                    "beside rows with huge activations": self._arranged(0, True, is_counted=False),
                    "in another row of the batch": self._arranged(last, False),
                    "with other ids in its padding": self._arranged(0, False, other_pad),
                }
                # All of them on every rank, differing or not: ranks that gather weights run equal passes.
                added = {circumstance: contribution(rows) for circumstance, rows in single.items()}
                differing = [circumstance for circumstance in single if not _equal(added[circumstance], reference)]
                if differing and batch is not alone:
                    when, batch = differing[0], single[differing[0]]
                    difference = added[when] - reference
                share = float(difference.double().norm() / reference.double().norm())
                return (
                    f"a short unit does not add the same bits to the sum {when} as alone (off by {share:.2g} of its "
                    f"norm; precision {self._precision}), first in the output of {self._first_module(alone, batch)}"
                )
        return "" if route == "one_unit" else self._row_that_differs(contribution)

    def _row_that_differs(self, contribution: Callable[[Microbatch], torch.Tensor]) -> str:
        """Return what is wrong if a unit adds other bits in some row of a batch than in the first, or nothing.

        Equal units fill all rows of each width at once, to the last place: products of few rows and features may round
        every other row in a way of its own, which neither the first nor the last one shows; and attention may run
        another kernel where no row of a batch has padding.
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
        """Return the short unit in row ``place`` of a microbatch, beside padding rows or loud ones.

        Args:
            place: its row; the rows before it hold itself, too, where they are not loud.
            is_crowded: whether the other rows are loud.
            pad_id: what pads rows.
            width: of the rows; the short unit is two tokens shorter. By default the shortest.
            is_counted: whether loud rows have weight, so that they add their own gradients to the sum.
            is_member: whether the short unit is there at all; only in the last row.
        """
        width, num_rows = width or self._widths()[0], self.trainer.packer.microbatch_size
        short = self._record(max(2, width - 2), 0)
        rows = [self._record(width, 10 + i, is_loud=True) for i in range(num_rows)] if is_crowded else [short] * place
        rows[place : place + 1] = [short] if is_member else []
        mates = hooks.LOUD_WEIGHT if is_crowded and is_counted else 0.0
        weights = [1.0 if is_member and i == place else mates for i in range(len(rows))]
        return self._batch(rows, width, weights, num_rows, self.trainer.packer.pad_id if pad_id is None else pad_id)

    def _first_module(self, one: Microbatch, other: Microbatch) -> str:
        """Return the first module, in the order of the forward pass, whose output for the row with weight differs."""
        name = self._first_differing(self._outputs(one), self._outputs(other))
        return self._named(name) if name else "no module (it is in the backward pass)"

    def _outputs(self, batch: Microbatch) -> dict[str, torch.Tensor]:
        """Return what every module returns for the row with weight that is not loud, without its padding."""
        row = int((batch.row_weight * (batch.input_ids[:, 0] != self._loud)).argmax())
        length = int(batch.target_mask[row].nonzero().max()) + 1
        share = length / batch.input_ids.shape[1]
        with hooks.outputs_of_row(self.trainer.model, row, len(batch.row_weight), share) as outputs:
            self._losses(batch)
        return outputs

    def _first_differing(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
        return next((name for name in one if name in other and not _equal(one[name], other[name])), "")

    def _named(self, name: str) -> str:
        return f"module {name!r} of type {type(self.trainer.model.get_submodule(name)).__name__}"

    # Causality and padding.

    def check_causality(self) -> None:
        """Demand that what is predicted at a token depends on the tokens up to it alone, and never on the padding.

        Raises:
            SelfTestFailed: naming the model's class.
        """
        widths = self._widths()
        faults = [fault for width in sorted({widths[0], widths[-1]}) if (fault := self._looks_behind(width))]
        self._agree(faults[0] if faults else "")

    def _looks_behind(self, width: int) -> str:
        """Return what moves the logits of a record of one width though it stands behind its tokens, or nothing."""
        name, widest = type(refusals.unwrapped(self.trainer.model)).__name__, self._widths()[-1]
        record = self._record(max(2, width - 1), 4)
        is_causal, length = isinstance(self.trainer.objective, CausalLM), len(record)
        of_shape = self._tolerance(_OTHER_SHAPE)
        of_bits = of_shape if self._has_experts() else _SAME_SHAPE
        plain = self._logits(record, width, length)
        if torch.isnan(plain).any() or (plain == torch.inf).any():
            return (
                f"the outputs of {name} on made-up tokens are not finite: its weights hold NaN or infinity, or it "
                "overflows; fetch the model again, or set performance.precision: fp32"
            )
        of_ids = _moved(plain, self._logits(record, width, length, pad_id=self._quiet))
        of_width = _moved(plain, self._logits(record, widest, length))
        cut = -(-length // 2)
        changed = record.tokens.copy()
        changed[cut:] = (changed[cut:] + 1) % self.vocabulary_size
        before, others = plain[:cut], {"change": changed, "vanish": record.tokens[:cut]}
        moved = {
            way: _moved(before, self._logits(Record.of(ids), width, cut)) if is_causal else 0.0
            for way, ids in others.items()
        }
        way = max(moved, key=moved.__getitem__)
        if moved[way] > of_bits:
            can_decode = getattr(refusals.unwrapped(self.trainer.model).config, "is_decoder", None) is False
            way_out = f"set is_decoder: true {_IN_CONFIG}" if can_decode else "choose a causal language model"
            return (
                f"the model class {name} is not causal: logits move by {moved[way]:.2g} when tokens behind {way}, "
                f"so it would learn to copy the token that it predicts; {way_out}"
            )
        if of_ids > of_bits or of_width > of_shape:
            return (
                f"the model class {name} reads the padding behind a record: logits move by {of_ids:.2g} with the ids "
                f"that stand there, by {of_width:.2g} with their number. Choose a model whose tokens do not depend on "
                "what stands behind them"
            )
        return ""

    def _logits(self, record: Record, width: int, length: int, pad_id: int | None = None) -> torch.Tensor:
        """Return what the model makes of a record: [tokens, …] up to ``length``, or [labels].

        Without autocast where the weights allow it, so that rounding hides little.
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
        logits = outputs[0][0].detach().float()
        return logits[-width:][:length] if logits.ndim == 2 else logits

    def _has_experts(self) -> bool:
        """Return whether tokens are sorted by expert, and each is rounded in a shape that others decide."""
        return any(refusals.has_experts(config) for config in refusals.configs(refusals.unwrapped(self.trainer.model)))

    # Planted rows.

    @property
    def _loud(self) -> int:
        """First token of loud rows, of no other row and no padding."""
        return 1 if self.trainer.packer.pad_id != 1 else 3

    @property
    def _quiet(self) -> int:
        return 2 if self.trainer.packer.pad_id != 2 else 3

    @property
    def _precision(self) -> str:
        return (
            "bf16" if self.trainer.autocast.fast_dtype == torch.bfloat16 and self.trainer.autocast._enabled else "fp32"
        )

    def _tolerance(self, by_bytes: dict[int, float]) -> float:
        return by_bytes[2 if self._precision == "bf16" or _weight_bytes(self.trainer.model) < 4 else 4]

    def _widths(self) -> list[int]:
        """Return the widths that the packer makes, from the shortest that holds a short unit."""
        packer = self.trainer.packer
        widths = sorted({packer.width([np.zeros(n)]) for n in range(1, packer.max_length + 1)})
        return [width for width in widths if width >= _SHORT] or widths[-1:]

    def _record(self, length: int, seed: int, *, is_loud: bool = False) -> Record:
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
        """Return the rows of a unit each, then padding rows."""
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
        """Return losses without gradients; where a pass gathers weights, its backward pass frees them."""
        placement = self.trainer.placement
        if placement.shards is None and not placement.equal_passes:
            with torch.no_grad():
                return losses()
        collecting = contextlib.nullcontext() if placement.shards is None else placement.shards.collecting(_forget)
        with collecting:
            row_losses = losses()
            row_losses.sum().backward()
        for parameter in placement.clipped.parameters.values() if placement.shards is None else ():
            parameter.grad = None
        return row_losses.detach()

    def _agree(self, fault: str) -> None:
        agree_on_fault(fault, self.trainer.backend)


def _forget(_slot: Slot, _part: torch.Tensor) -> None:
    pass


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
