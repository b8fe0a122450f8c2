"""Probe the real model at start-up: a forward pass leaves no trace, and rows are independent.

Exact clipping bounds what one unit adds to the sum. That bounds what the unit does to the *release* only if it does not
also change what the other units add. So, in training mode, before the first step:

* no pass over rows of any width, loud or long, changes a buffer, an attribute or a weight (:mod:`.traces`);
* what the clipper adds for a short unit has the same bits alone, after a long row, beside rows of huge activations that
  add gradients of their own, in every row, and whatever ids stand in its padding; if the huge ones are not finite, that
  proves nothing, since the clipper then runs each unit by itself;
* a unit adds the same bits on every rank;
* no random number is shared between rows (layer drop, router jitter): such a number is called a *coin*.

*Loud* rows enter the model with huge activations (:func:`.hooks.loud_rows`), so that whatever of them reaches another
row is seen. A *width* is a number of tokens, padding included, that the packer makes rows of. The *short unit* is one
row of the fewest tokens. The *route* is how the clipper computes gradients of units; ``one_unit`` runs one unit at a
time, so rows of different units never meet.

Every rank runs the same passes, as a sharded model needs, and what one rank finds stops all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from privtrain.backends.base import all_equal, digest
from privtrain.clipping import PerUnitClipper, refusals
from privtrain.data.lines import Line, record_lengths
from privtrain.data.microbatch import Microbatch
from privtrain.errors import UnsupportedLayer
from privtrain.training import hooks, traces
from privtrain.training.planted_rows import PlantedRows, are_equal, moved

#: A row whose outputs change by more than this share beside others is mixed with them; by less, kernels round it
#: differently. By bytes of a number in forward passes: 4 for fp32, 2 for bf16.
_MIXED = {4: 1e-5, 2: 2e-2}
#: (rows, tokens) of the passes that look for coins. Rows are told by these sizes, which a dimension of the model may
#: have too, so two pairs are tried.
_COIN_SHAPES = ((5, 7), (3, 11))
#: Parts of a config key's name by which it tosses one coin for a whole batch.
_COIN_KEYS = ("layerdrop", "layer_drop", "drop_path", "stochastic_depth", "jitter", "expert_drop")
_IN_CONFIG = "in the model's config.json"


class Probe(PlantedRows):
    """The probes of one trainer. Each ``check_...`` raises on every rank if any rank finds a fault."""

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
                is_coin = any(part in key.lower() for part in _COIN_KEYS)
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if is_coin and is_number and value > 0:
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
            if not fault and not are_equal(losses_at_0, losses_at_1):
                drawer = module or type(refusals.unwrapped(trainer.model)).__name__
                fault = (
                    f"{drawer} draws random numbers that all rows of a batch share, which couples units; switch them "
                    f"off {_IN_CONFIG}, or {refusals.ONE_UNIT}"
                )
        self._agree(fault)

    def _with_coins(self, batch: Microbatch, extreme: float) -> tuple[torch.Tensor, str]:
        """Return losses with all random numbers that rows share at ``extreme``, and the module that drew the first."""
        device = self.trainer.backend.device
        num_rows, num_tokens = batch.input_ids.shape
        row_sizes = (num_rows, num_rows * num_tokens)  # a first dimension of these sizes has an entry for each row
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            with hooks.SharedRandomNumbers(self.trainer.model, row_sizes, extreme) as numbers:
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
        widths = self._widths()
        short = self._batch([self._record(widths[0], 0)], widths[0])
        before = self._state()
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
        """Return whatever a pass could leave in the model, by its place."""
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
                crowded = self._outputs(self._arranged(0, is_crowded=True, width=width))
            # An expert's outputs have other shapes beside other rows: it returns the tokens that are routed to it. A
            # mixture there shows in the modules after it.
            comparable = [name for name in alone if name in crowded and crowded[name].shape == alone[name].shape]
            beside = {name: crowded[name] for name in comparable}
            name = self._first_differing(alone, beside)
            share = moved(alone[name], beside[name]) if name else 0.0
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
        way_out = refusals.ONE_UNIT if route in ("batched", "two_pass") else "choose another model or precision"
        self._agree(f"{difference}; {way_out}")
        raise AssertionError("unreachable")

    def _first_difference(self, route: str) -> str:
        """Return, in words, in which circumstance a short unit adds other bits than alone, or why that cannot be seen.

        Empty if it adds the same bits in all. Every rank runs the same passes, as ranks that gather weights need,
        whether or not it sees a difference itself.
        """
        trainer, widths = self.trainer, self._widths()
        clipper = trainer.new_clipper(trainer.row_losses, route)
        # Three batches: the short unit beside padding rows; the unit in the last row, beside loud rows whose gradients
        # count, with another id for padding; and the same loud rows without the unit.
        last_row = trainer.packer.microbatch_size - 1
        alone = self._arranged(0, is_crowded=False)
        crowded = self._arranged(last_row, is_crowded=True, pad_id=self._other_pad)
        crowd = self._arranged(last_row, is_crowded=True, pad_id=self._other_pad, is_member=False)
        with hooks.loud_rows(trainer.model, self._loud):
            reference = _contribution(clipper, alone)  # before any loud row

            # Loud rows whose gradients count, so that a trace of their backward pass would show too.
            for width in {widths[0], widths[-1]}:
                loud = self._batch([self._record(width, 3, is_loud=True)], width, [hooks.LOUD_WEIGHT])
                _contribution(clipper, loud)
            # Sums are exact, so what the unit adds beside others is the sum with it less the sum of the others.
            of_others = _contribution(clipper, crowd)

            # What the unit adds after loud rows, then beside them, then after having been beside them. The last batch
            # is the first one again, since the one between may leave a trace.
            difference = _contribution(clipper, alone) - reference
            if trainer.backend.any_rank(bool(difference.any())):
                return self._explained("after a long row with huge activations", difference, reference, alone)
            difference = _contribution(clipper, crowded) - of_others - reference
            if trainer.backend.any_rank(bool(difference.any())):
                return self._explained_crowd(clipper, difference, reference, crowded)
            difference = _contribution(clipper, alone) - reference
            if trainer.backend.any_rank(bool(difference.any())):
                return self._explained("after rows with gradients of their own", difference, reference, alone)

        if route == "one_unit":
            return ""  # rows of different units never meet, and a row's place in a batch is not tried
        fault = self._row_that_differs(clipper)  # on every rank or on none
        if fault:
            return fault
        # The clipper splits a batch in which something is not finite: each unit then ran by itself, so equal bits above
        # prove nothing.
        if trainer.backend.any_rank(clipper.num_split > 0):
            return (
                f"rows of huge activations are not finite (precision {self._precision}), so that what rows of a batch "
                "do to one another cannot be seen"
            )
        return ""

    def _explained_crowd(
        self, clipper: PerUnitClipper, difference: torch.Tensor, reference: torch.Tensor, crowded: Microbatch
    ) -> str:
        """Return in words that a unit adds other bits in a crowded batch than alone, and why as far as can be told.

        A crowded batch differs in several circumstances. Each is tried by itself, and the first that makes a difference
        is named; if none does, all of them. All are tried in any case, since every rank must run the same passes.

        Args:
            clipper: adds batches.
            difference: what the unit adds in the crowded batch less ``reference``.
            reference: what it adds alone, in whole grid steps.
            crowded: the batch.
        """
        last_row = self.trainer.packer.microbatch_size - 1
        circumstances = {
            "beside rows with huge activations": self._arranged(0, is_crowded=True, is_counted=False),
            "in another row of the batch": self._arranged(last_row, is_crowded=False),
            "with other ids in its padding": self._arranged(0, is_crowded=False, pad_id=self._other_pad),
        }
        differences = {when: _contribution(clipper, batch) - reference for when, batch in circumstances.items()}
        for when, batch in circumstances.items():
            if differences[when].any():
                return self._explained(when, differences[when], reference, batch)
        all_of_them = "in another row of the batch, beside rows with huge activations"
        return self._explained(all_of_them, difference, reference, crowded)

    def _explained(self, when: str, difference: torch.Tensor, reference: torch.Tensor, batch: Microbatch) -> str:
        """Return in words that a short unit adds other bits in ``batch`` than alone, by how much, and where it begins.

        Args:
            when: the circumstance, in words.
            difference: what the unit adds less ``reference``.
            reference: what it adds alone.
            batch: in which it adds them.
        """
        share = float(difference.double().norm() / reference.double().norm())
        name = self._first_differing(self._outputs(self._arranged(0, is_crowded=False)), self._outputs(batch))
        module = self._named(name) if name else "no module (it is in the backward pass)"
        return (
            f"a short unit does not add the same bits to the sum {when} as alone (off by {share:.2g} of its norm; "
            f"precision {self._precision}), first in the output of {module}"
        )

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
        norms_and_losses, sums = hashlib.sha256(), hashlib.sha256()
        for batch in self._of_every_shape():
            sums.update(digest([_contribution(clipper, batch)]))
            counts = clipper.diagnostics
            if shards is None or route != "one_unit":  # else ranks work on a unit together
                norms_and_losses.update(repr((counts.sum_norms, counts.sum_losses)).encode())

        sums_by_rank = backend.gather_digests(sums.digest())
        num_parts = 1 if shards is None else shards.size  # ranks so far apart hold the same part of the sum
        are_sums_equal = all(value == sums_by_rank[rank % num_parts] for rank, value in enumerate(sums_by_rank))
        are_others_equal = all_equal(backend.gather_digests(norms_and_losses.digest()))
        fault = (
            "ranks do not add the same bits to the sum for one unit. Which rank a unit is on depends on the others, so "
            "that a unit more would move them; give every rank the same type of machine, libraries, and settings of "
            "kernels in its environment (such as MKL_CBWR)"
        )
        self._agree("" if are_sums_equal and are_others_equal else fault)

    def _of_every_shape(self) -> Iterator[Microbatch | Line]:
        """Yield one unit in each shape that the job computes in, up to the length of a line of its own."""
        for width in self._widths():
            yield self._batch([self._record(width, 0)], width, num_rows=self.trainer.packer.microbatch_size)
        packer = self.trainer.line_packer
        if packer is None or not self.trainer.packs_lines:
            return
        slot_sizes = {num_tokens for num_tokens, _ in packer.slots()}  # the most tokens of a unit in a shared line
        for size in sorted({packer.max_length, *slot_sizes}):
            lengths = record_lengths(size, packer.max_length)
            unit = [self._record(length, seed) for seed, length in enumerate(lengths)]
            yield packer.arranged([unit]).to(self.trainer.backend.device)

    def _row_that_differs(self, clipper: PerUnitClipper) -> str:
        """Return, in words, that a unit adds other bits in some row of a batch than in the first; empty if in none.

        A batch of equal units, one in each row and as long as the row, must add exactly as many times what one adds.
        Kernels may round each row by its place, so the first row and the last alone would not show it; and attention
        may run another kernel where no row of a batch has padding.

        Args:
            clipper: adds batches.
        """
        num_rows = self.trainer.packer.microbatch_size
        for width in self._widths():
            record = self._record(width, 0)
            alone = _contribution(clipper, self._batch([record], width, num_rows=num_rows))
            difference = _contribution(clipper, self._batch([record] * num_rows, width)) - num_rows * alone
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
        *,
        is_crowded: bool,
        pad_id: int | None = None,
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
            rows = [self._record(width, 10 + i, is_loud=True) for i in range(num_rows)]
        else:
            rows = [short] * (place + 1)
        weight_of_others = hooks.LOUD_WEIGHT if is_crowded and is_counted else 0.0
        weights = [weight_of_others] * len(rows)
        rows[place], weights[place] = short, 1.0
        if not is_member:
            del rows[place], weights[place]
        return self._batch(rows, width, weights, num_rows, pad_id)

    def _outputs(self, batch: Microbatch) -> dict[str, torch.Tensor]:
        """Return name of the module → its output for the short unit's row, without padding, in one forward pass."""
        # The short unit's is the row with weight that is not loud.
        is_loud = batch.input_ids[:, 0] == self._loud
        row = int((batch.row_weight * ~is_loud).argmax())
        last_target = int(batch.target_mask[row].nonzero().max())  # the record's last token
        share = (last_target + 1) / batch.input_ids.shape[1]
        with hooks.outputs_of_row(self.trainer.model, row, len(batch.row_weight), share) as outputs:
            self._losses(batch)
        return outputs

    def _first_differing(self, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> str:
        """Return the name of the first module, in forward order, whose outputs differ; empty if none.

        Both are of :meth:`_outputs`.
        """
        for name, output in one.items():
            if name in other and not are_equal(output, other[name]):
                return name
        return ""

    def _named(self, name: str) -> str:
        """Return a module's name and type in words."""
        return f"module {name!r} of type {type(self.trainer.model.get_submodule(name)).__name__}"


def _contribution(clipper: PerUnitClipper, batch: Microbatch | Line) -> torch.Tensor:
    """Return what a batch adds to a clipper's sum, in whole grid steps."""
    clipper.reset()
    clipper.accumulate(batch)
    return clipper.finish().clone()


def _owners(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield whatever may hold a probability: the model's configs, then its modules."""
    for config in refusals.configs(refusals.unwrapped(model)):
        yield "the model's config", config
    for name, module in model.named_modules():
        yield f"module {name!r} of type {type(module).__name__}", module
