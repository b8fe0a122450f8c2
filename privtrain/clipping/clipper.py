"""Exact joint clipping: the sum over units of each unit's whole gradient, scaled to at most the clipping norm.

A unit's gradient is formed over all of its rows in the step, also when they span microbatches, and clipped once
(user-wise DP-SGD: Chua et al. 2024, arXiv 2406.14322, section 3). Three routes lead to the same sum:

* ``batched``: one forward and backward pass for all rows, and a rule for each layer type (:mod:`.rules`).
* ``two_pass``: the same, but gradients beyond a memory budget are dropped once their norms are taken, and a second
  backward pass adds them (:mod:`.passes`). For full fine-tuning with gradient checkpointing.
* ``one_unit``: plain autograd, one unit after another, row by row. It needs no rule, so it is exact for any layer,
  and no memory for the other units, so it is the one for full fine-tuning on long records.

A unit that is not finite is alone: kernels exist that let a row's NaN into its neighbours (bf16 products on some CPUs
read past a row's end and multiply by zero). So if anything in a microbatch is not finite, nothing of it is added; each
of its units then runs by itself in a microbatch of the same shape, in its own rows and with its own dropout, the other
rows padding. What is not finite even so counts as zero; the others are what they would have been without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from privtrain.clipping import exact_sum, fallback, refusals, rules, styles
from privtrain.clipping.batched import UnitGradients, is_inexact, slots_by_tensor
from privtrain.clipping.capture import Calls, captured, owning_modules
from privtrain.clipping.diagnostics import ClippingDiagnostics
from privtrain.clipping.factors import exact_fp32, squared_norms
from privtrain.clipping.passes import Passes, slots_of
from privtrain.clipping.random_state import RandomState
from privtrain.clipping.rules import Gradient
from privtrain.data.lines import Line
from privtrain.data.microbatch import Microbatch
from privtrain.errors import GuaranteeLost, PrivtrainError, UnsupportedLayer
from privtrain.privacy.fixed_point import SLACK
from privtrain.privacy.layout import Layout, Slot

#: (input_ids, target_mask) → [rows] losses, each of its own row alone.
RowLosses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

#: Contributions of a unit's tokens that cancel to less than this share of what they could add up to (in squares) are
#: multiplied out before they are measured: rounding of the product would be a large part of what is left.
_CANCELLED = 1e-4
#: So are those that could add up to more than this, whatever cancels: fp32 ends at 3.4e38.
_LARGEST_LENGTH = 1e38
#: A unit that was measured by its factors may be added this much longer, as a share of its norm; else it is taken back,
#: multiplied out and measured again. Products of a thousand like tokens are biased by some 1e-6, of tokens that almost
#: cancel by up to 1e-4. The rest of 1e-5 is for rounding of the factor (:mod:`.exact_sum`).
_LONGER = 9e-6

#: Per-unit gradients that the two-pass route keeps, as a share of the weights and one fp32 gradient: less than what is
#: held in any case, and no more for a sum in int64 than for one in fp32.
_KEPT_SHARE = 0.45
#: ``auto`` takes two passes where checkpointing is on and at least this share of all weights is trained.
_MOSTLY_TRAINED = 0.5


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of a microbatch before anything of it is added; on the CPU, where no other unit changes an order.

    Attributes:
        losses: of its rows, or of the tokens of a line.
        squares: [slots, units] squared norms of the units' gradients, by trainable tensor.
        uncancelled: [slots, units] what these could be if none of a unit's tokens cancelled another.
    """

    losses: list[float]
    squares: torch.Tensor
    uncancelled: torch.Tensor

    def is_finite(self, losses: Sequence[float]) -> bool:
        """Return whether all gradients, and these ``losses`` of units, are finite."""
        return all(map(math.isfinite, losses)) and bool(np.isfinite(self.squares.numpy()).all())


#: Stands for an error where a microbatch failed because something in it is not finite.
_NOT_FINITE = ArithmeticError("not finite")


@dataclasses.dataclass
class _OpenUnit:
    """A unit whose rows continue in the next microbatch, with its gradient so far."""

    owner: int
    gradient: dict[str, torch.Tensor]


class PerUnitClipper:
    """Accumulates Σ_u clip(g_u) over the units of a step.

    Guarantee: for the add-or-remove-one relation the L2 sensitivity of ``total`` is ``sensitivity`` (C, and 1e-5 of
    it for fp32 rounding), whatever the unit's records and whatever precision forward and backward run in; a unit whose
    gradient is not finite contributes zero. Norms are of the very fp32 tensors that are summed, or of the fp32 factors
    whose product is summed (:func:`.factors.squared_norms_of`). What such a product is longer than its norm is seen
    when it is added: above 9e-6 the unit is taken out of the sum, multiplied out, and clipped by that. On the two-pass
    route the factors are had twice, and that they are the same is checked.
    Assumes that ``row_losses`` gives each row a loss of that row alone; the start-up self-test compares with plain
    autograd.

    Args:
        model: the model that ``row_losses`` runs.
        layout: its trainable tensors.
        clipping_norm: C > 0.
        row_losses: (input_ids, target_mask) → [rows] losses, each of its own row alone.
        device: where ``total`` lives.
        style: ``"flat"``, ``"per_layer"``, ``"automatic"`` or ``"adaptive"``, see :mod:`.styles`.
        route: ``"batched"``, ``"two_pass"``, ``"one_unit"`` or ``"auto"``: one unit at a time where a layer has no
            rule, two passes for full fine-tuning with gradient checkpointing, otherwise batched.
        equal_passes: every rank must run as many passes over the model as any other, whatever its units: padding rows
            run too, and two passes become one. For a sharded base, whose ranks gather its layers together.
        any_rank: whether a flag is set on any rank, asked by every rank at once; with ``equal_passes`` only.

    Attributes:
        fallback_reason: why ``auto`` goes one unit at a time; empty if it does not.
        num_split: microbatches (or lines) whose units ran one by one, since something in them was not finite.

    Raises:
        UnsupportedLayer: if a layer shares statistics between units, or on a route other than one unit at a time has no
            exact rule, or if re-entrant gradient checkpointing is on where it cannot work.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        clipping_norm: float,
        row_losses: RowLosses,
        device: torch.device,
        style: str = "flat",
        route: str = "auto",
        *,
        equal_passes: bool = False,
        any_rank: Callable[[bool], bool] | None = None,
    ) -> None:
        refusals.refuse_coupled_units(model)
        if not layout.slots:
            raise UnsupportedLayer("the model has no trainable tensor")
        known = {id(p) for p in layout.parameters.values()}  # by identity: a tied tensor has several names
        uncovered = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        if uncovered:
            raise UnsupportedLayer(
                f"{uncovered[:3]} require a gradient but are not in the layout, so nothing clips them"
            )
        self.layout = layout
        self.total = self._new_total(device)
        self.diagnostics = ClippingDiagnostics()
        self.route = route
        self.fallback_reason = ""
        self.num_split = 0
        self._equal_passes = equal_passes
        # Where ranks need not run equal passes, none has to know of another's flag.
        self._any_rank = any_rank if any_rank is not None and equal_passes else lambda flag: flag
        self._clipping_norm = clipping_norm
        self._row_losses = row_losses
        self._device = device
        self._style = style
        self._groups = styles.groups(style, layout)
        self._slot_of = slots_by_tensor(layout)  # id of a tensor → its place in the layout
        #: The modules with trainable tensors, by name; of each its rule, and its tensors' places in the layout.
        self._modules: dict[str, nn.Module] = {}
        self._rules: dict[nn.Module, rules.Rule] = {}
        self._slots: dict[nn.Module, dict[str, Slot]] = {}
        self._checkpointing = refusals.checkpointing(model)
        # Where gradients may be let go after the first pass, a tensor's norm is judged by itself.
        self._judges_each_norm = route == "two_pass" or (route == "auto" and self._checkpointing == "non_reentrant")
        self._memory_budget = self._budget(model)
        if route != "one_unit":
            self._find_rules(model)
        if self.route in ("one_unit", "two_pass"):
            self._refuse_reentrant()
        self._model = model
        self._widest = 0  # tokens of the widest row so far
        self._open: _OpenUnit | None = None
        self._saw_every_use = False  # whether hooks were found to see every trainable tensor
        self._is_rehearsed = False  # whether a second pass was found to work
        self._is_settled = False  # whether the route may not change any more

    @property
    def sensitivity(self) -> float:
        """Largest change of ``total``, over all ranks, when one unit joins or leaves: C (1 + 1e-5) in every style."""
        return self._clipping_norm * (1 + SLACK)

    @property
    def grid_exponent(self) -> int:
        """``total`` is in units of 2**grid_exponent: of this step, since adaptive clipping changes C."""
        return styles.grid_exponent(self._style, self._clipping_norm)

    @property
    def clipping_norm(self) -> float:
        """C of this step; adaptive clipping sets it between steps."""
        return self._clipping_norm

    @clipping_norm.setter
    def clipping_norm(self, value: float) -> None:
        assert self._open is None
        self._clipping_norm = value

    def reset(self) -> None:
        """Begin a step."""
        self.total.zero_()
        self.diagnostics = ClippingDiagnostics()
        self._open = None

    def settle(self, route: str) -> None:
        """Keep to a route that the self-test found: from now on what fails stops the job.

        Were a unit's rows to change the route of a step, they would change how everybody else's gradient is rounded.
        """
        self.route = route
        self._is_settled = True

    def accumulate(self, batch: Microbatch | Line) -> None:
        """Add the clipped gradients of the units that end in ``batch``; keep the one that continues.

        Args:
            batch: rows on this clipper's device; the units of a rank come in the same order in every microbatch. Lines
                are for :class:`~privtrain.clipping.lines.LineClipper` alone.

        Raises:
            UnsupportedLayer: if nothing but an approximation would do for this model and these rows.
        """
        assert isinstance(batch, Microbatch)
        width = batch.input_ids.shape[1]
        if width > self._widest:  # else rows as wide were let through before
            refusals.refuse_rescaled_positions(self._model, width)
            self._widest = width
        if self._open is not None and batch.owners[:1] != (self._open.owner,):
            raise GuaranteeLost("a unit's rows are not contiguous across microbatches; this is a bug, report it")
        if self.route == "one_unit":
            self._accumulate_units(batch)
            return
        if not self._accumulate_batch(batch):
            self._refuse_reentrant()
            self._accumulate_units(batch)

    def finish(self) -> torch.Tensor:
        """End the step on this rank and return the flat clipped sum: int64, in units of 2**``grid_exponent``.

        Raises:
            GuaranteeLost: if a unit was left open, or an unclipped gradient exists on a trainable tensor.
        """
        if self._open is not None:
            raise GuaranteeLost("the last unit of the step was never closed; this is a bug, report it")
        uncovered = [name for name, p in self.layout.parameters.items() if p.grad is not None]
        if uncovered:
            raise GuaranteeLost(
                f"unclipped gradients appeared on {uncovered[:3]}; another backward pass wrote to .grad outside the "
                "clipper"
            )
        return self.total

    def _find_rules(self, model: nn.Module) -> None:
        """Find a rule for every layer with a trained tensor, or take the route ``one_unit`` if that is open."""
        try:
            refusals.refuse_batched_route(model)
            self._modules = owning_modules(model, self._slot_of)
            self._rules = {module: self._rule_for(name, module) for name, module in self._modules.items()}
            self._slots = {module: slots_of(module, self._slot_of) for module in self._modules.values()}
        except UnsupportedLayer as refusal:
            if self.route != "auto":
                raise
            self.route, self.fallback_reason = "one_unit", str(refusal)

    def _new_total(self, device: torch.device) -> torch.Tensor:
        """Return where the sum is kept: zero, int64, flat."""
        return self.layout.zeros(device, torch.int64)

    def _rule_for(self, name: str, module: nn.Module) -> rules.Rule:
        """Return the rule of a module by its name in the model; subclasses choose in another way."""
        return rules.rule_for(name, module)

    def _new_passes(self, gradients: UnitGradients, num_rows: int) -> Passes:
        """Return the passes over a microbatch of so many rows, whose units' gradients ``gradients`` collects."""
        names = {module: name for name, module in self._modules.items()}
        return Passes(names, self._rules, self._slots, gradients, num_rows, self._memory_budget, self._device)

    def _budget(self, model: nn.Module) -> float:
        """Return the bytes that per-unit gradients of one microbatch may take: infinite on the batched route.

        A finite number means two passes, given as a route or chosen by ``auto``.
        """
        num_weights = sum(p.numel() for p in model.parameters())
        is_mostly_trained = self.layout.num_coordinates >= _MOSTLY_TRAINED * num_weights
        auto_takes_two = self.route == "auto" and self._checkpointing == "non_reentrant" and is_mostly_trained
        if self._equal_passes or not (self.route == "two_pass" or auto_takes_two):
            return math.inf
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        gradient_bytes = self.layout.num_coordinates * torch.float32.itemsize
        return _KEPT_SHARE * (weight_bytes + gradient_bytes)

    def _refuse_reentrant(self) -> None:
        """Raise if the model has re-entrant checkpointing, which gives no gradient of a tensor that is asked for."""
        if self._checkpointing == "reentrant":
            raise UnsupportedLayer(
                "clipping routes two_pass and one_unit need non-reentrant gradient checkpointing: call "
                "gradient_checkpointing_enable({'use_reentrant': False}), or set performance.clipping_route: batched"
            )

    # The batched and the two-pass route.

    def _accumulate_batch(self, batch: Microbatch) -> bool:
        """Add a whole microbatch and return true; or add nothing, change to route ``one_unit`` and return false."""
        unit_of_row: list[int] = batch.owner.numpy().tolist()  # an index of batch.owners; negative for padding
        units = [unit for unit in unit_of_row if unit >= 0]
        has_padding_before = any(unit < 0 for unit in unit_of_row[: len(units)])
        if units != sorted(units) or has_padding_before:
            raise GuaranteeLost("a unit's rows are not contiguous in a microbatch; this is a bug, report it")
        before = RandomState.of(self._device)
        failure = self._add_batch(batch)
        if failure is _NOT_FINITE:
            self._add_alone(batch, before)
            return True
        if failure is not None:
            self._fall_back(failure, batch)
        return failure is None

    def _add_alone(self, batch: Microbatch, before: RandomState) -> None:
        """Add the units of a microbatch one by one, each alone in its own rows and with its own dropout.

        Args:
            batch: in which something is not finite.
            before: the random state that its first pass began with.
        """
        self.num_split += 1
        # Where ranks must run equally many passes, each runs one for each row: no rank has more units.
        num_passes = len(batch.owner) if self._equal_passes else len(batch.owners)
        for index in range(num_passes):
            with before.replayed():
                failure = self._add_batch(batch.alone(index), is_alone=True)
            if failure is not None:
                raise failure

    def _add_batch(self, batch: Microbatch, *, is_alone: bool = False) -> Exception | None:
        """Add the units of one microbatch, or return why nothing of it was added.

        The only place of the clipper that catches whatever comes: nothing was added by then, and what becomes of the
        failure is decided in :meth:`_fall_back`, when the hooks are gone.

        Args:
            batch: the microbatch.
            is_alone: whether it holds one unit alone; what is not finite is added as zero then, and else a failure.
        """
        unit_of_row: list[int] = batch.owner.numpy().tolist()
        num_rows = len(unit_of_row)
        rows = [row for row, unit in enumerate(unit_of_row) if unit >= 0]
        rows_of_unit = [unit_of_row.count(unit) for unit in range(len(batch.owners))]
        gradients = UnitGradients(self.layout, rows_of_unit, self._device, first_row=rows[0] if rows else 0)
        passes = self._new_passes(gradients, num_rows)
        with contextlib.ExitStack() as stack:
            # Run the first pass, which takes losses and norms.
            try:
                self._refuse_hidden_uses(batch)
                calls = stack.enter_context(captured(self._modules, list(self.layout.parameters.values()), num_rows))
                row_losses = passes.first(
                    calls, lambda: self._row_losses(batch.input_ids, batch.target_mask) * batch.row_weight
                )
            except Exception as failure:  # noqa: BLE001 - see fallback: by comparison, not by a list of errors
                return failure

            # Leave, with nothing added, if the pass refused a layer or found something that is not finite.
            measured = self._measured_once(row_losses, gradients) if passes.refusal is None else None
            is_finite = measured is not None and measured.is_finite([measured.losses[row] for row in rows])
            # A single unit has no mates to harm, but ranks that run equal passes have to decide alike.
            may_split = not is_alone and (self._equal_passes or len(batch.owners) > 1)
            if may_split and self._any_rank(not is_finite):
                return passes.refusal or _NOT_FINITE
            if measured is None:
                return passes.refusal

            # On the first microbatch, see that a second pass works while nothing is added yet.
            try:
                if (rows or self._equal_passes) and not self._is_rehearsed:
                    passes.rehearse(calls)
                    self._is_rehearsed = True
            except Exception as failure:  # noqa: BLE001 - as above
                return failure

            for row in rows:
                self.diagnostics.add_loss(batch.owners[unit_of_row[row]], measured.losses[row])
            self._add_units(batch, passes, calls, measured)
        return None

    def _measured_once(self, losses: torch.Tensor, gradients: UnitGradients) -> Measured:
        """Bring losses and norms to the CPU in one transfer, so that the device is waited for once."""
        with exact_fp32(self._device):
            on_device = [losses, *gradients.squares_and_errors()]
            # One vector of all of them, which is cut up again on the CPU.
            numbers = torch.cat([value.double().flatten() for value in on_device]).cpu()
            flat = numbers.split([value.numel() for value in on_device])
            on_cpu = [part.view(value.shape) for part, value in zip(flat, on_device, strict=True)]
            losses, squares, uncancelled, errors = on_cpu
            doubts = self._doubts(squares, errors)
            if doubts.any():  # norms that fp32 leaves in doubt are taken again
                gradients.settle(doubts)
                settled, _, _ = gradients.squares_and_errors()
                squares = settled.cpu()
        return Measured(losses.flatten().numpy().tolist(), squares, uncancelled)

    def _doubts(self, squares: torch.Tensor, errors: torch.Tensor) -> np.ndarray:
        """Return which squared norms to take again in float64: [slots, units] bool.

        What counts is the norm that a unit's factor is made of, over a group of tensors. Where the errors of a group
        add up to little of that norm, an inexact tensor is a small part of it. Where gradients may be let go before the
        others are known, each tensor is judged by itself, whatever was kept.

        Args:
            squares: [slots, units] squared norms.
            errors: [slots, units], how far rounding may have moved them.
        """
        is_doubtful = is_inexact(squares, errors)
        if not self._judges_each_norm:
            of_group = is_inexact(styles.group_sums(squares, self._groups), styles.group_sums(errors, self._groups))
            is_doubtful &= of_group[self._groups]
        return is_doubtful.numpy()

    def _fall_back(self, failure: Exception, batch: Microbatch) -> None:
        """Go one unit at a time, if that was left open and the same rows succeed without hooks; else raise.

        Args:
            failure: what a pass under hooks raised.
            batch: its microbatch, of which the first row is tried without hooks.
        """
        is_open = self.route == "auto" and not self._is_settled
        if isinstance(failure, PrivtrainError) and not is_open:
            raise failure
        self._refuse_reentrant()
        row_loss: Callable[[], torch.Tensor] | None = None
        if not self._equal_passes:  # ranks that must run equal passes cannot run one more on their own
            row_loss = functools.partial(self._row_losses, batch.input_ids[:1], batch.target_mask[:1])
        with RandomState.of(self._device).replayed():
            reason = fallback.cause(failure, row_loss, self.layout.parameters)
        self._go_one_unit(failure, reason, is_possible=True)

    def _go_one_unit(self, failure: Exception, reason: str, *, is_possible: bool) -> None:
        """Take the route ``one_unit``; where that is not allowed, raise with the setting that allows it.

        Args:
            failure: what was raised on the present route.
            reason: the same in words.
            is_possible: whether every rank is able to change its route here.
        """
        if self.route != "auto" or self._is_settled or not is_possible:
            raise UnsupportedLayer(
                f"clipping route {self.route!r} does not work on this model: {reason}. Set performance.clipping_route: "
                "one_unit, which is exact for any layer"
            ) from failure
        self.route, self.fallback_reason = "one_unit", reason

    def _refuse_hidden_uses(self, batch: Microbatch) -> None:
        """Raise if a tensor that no hook saw has a gradient: a kernel that reads the weight itself hides it.

        Looked at once, on the first microbatch, whatever is in it: under a sharded base every rank must run the same
        passes.
        """
        if self._saw_every_use:
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # a replay may begin elsewhere, and must see the same dropout
            hidden = self._hidden_from_hooks(batch)
        if hidden:
            raise UnsupportedLayer(
                f"tensor {hidden[0]!r} has a gradient, but its module is not called as one: a fused kernel reads the "
                "weight and hides the activations. Switch it off, or set performance.clipping_route: one_unit"
            )
        self._saw_every_use = True

    def _hidden_from_hooks(self, batch: Microbatch) -> list[str]:
        """Return the names of the slots that hooks do not see in a pass over the first row, but autograd does."""
        seen = self._seen_by_hooks(batch)
        unseen = {name: p for name, p in self.layout.parameters.items() if name not in seen}
        if not unseen:
            return []
        loss = self._row_losses(batch.input_ids[:1], batch.target_mask[:1]).sum()
        gradients = torch.autograd.grad(loss, list(unseen.values()), allow_unused=True)
        return [name for name, gradient in zip(unseen, gradients, strict=True) if gradient is not None]

    def _seen_by_hooks(self, batch: Microbatch) -> set[str]:
        """Return the names of the trained tensors (slots) whose modules' hooks run in a pass over the first row.

        Clipping sees a tensor's gradient by these hooks alone. They run only if the module is called as one, and not if
        a fused kernel reads its weight.
        """
        seen: set[str] = set()

        def note_slots(module: nn.Module, _activation: torch.Tensor, _output_gradient: torch.Tensor) -> None:
            seen.update(slot.name for slot in self._slots[module].values())

        with captured(self._modules, list(self.layout.parameters.values()), num_rows=1) as calls:
            calls.sink = note_slots  # called for each module that the backward pass reaches
            loss = self._row_losses(batch.input_ids[:1], batch.target_mask[:1]).sum()
            calls.is_forward = False  # the hooks must know; gradient checkpointing calls modules in the backward pass
            loss.backward()
        return seen

    def _add_units(self, batch: Microbatch | Line, passes: Passes, calls: Calls, measured: Measured) -> None:
        """Clip and add the units of a microbatch.

        Most are added together, from dense gradients or factors. Some are multiplied out first and added one by one:
        those ``apart``, whose rows continue here or in the next microbatch or whose tokens cancel, and those that came
        out ``longer`` than measured when they were added, which are taken back before.
        """
        num_units = len(batch.owners)
        if not num_units:
            return
        gradients, squares = passes.gradients, measured.squares
        apart = self._apart(batch, measured)
        # Add most units together: what the first pass kept of them.
        together = torch.tensor([unit not in apart for unit in range(num_units)])
        with exact_fp32(self._device):
            factors = self._factors(squares, batch.owners)
            weights = self._on_grid(factors, together)
            gradients.add_weighted(self.total, weights)

        # Add what the first pass deferred, by a pass of its own. It can multiply out one unit besides: the first apart.
        first_apart = apart[0] if apart else None
        first_gradient: dict[str, torch.Tensor] = {}
        if first_apart is not None:
            first_gradient = self._with_earlier_rows(first_apart, gradients.unit(first_apart))
        if not passes.is_complete:
            self._pass_again(passes, calls, weights, first_apart, first_gradient)

        # Take back, of what was kept, the units that came out longer than measured.
        longer = self._longer(gradients, squares, together)
        taken_back = torch.zeros_like(weights)
        taken_back[:, longer] = -weights[:, longer]
        if longer:
            with exact_fp32(self._device):
                gradients.add_weighted(self.total, taken_back)
        together[longer] = False
        self._count(squares, factors, together, batch.owners)

        # Multiply out the other units, each with its deferred part, and add them one by one.
        for index in apart + longer:
            if index == first_apart:
                gradient = first_gradient
            else:
                gradient = gradients.unit(index)
                if not passes.is_complete:  # the same pass takes back what a longer unit has added of it
                    back = torch.zeros_like(weights)
                    back[:, index] = taken_back[:, index]
                    self._pass_again(passes, calls, back, index, gradient)
            with exact_fp32(self._device):
                self._add_unit(batch, index, gradient)

    def _apart(self, batch: Microbatch | Line, measured: Measured) -> list[int]:
        """Return the units, ascending, to multiply out at once: their tokens cancel, or they have rows elsewhere."""
        apart = self._cancelled(measured.squares, measured.uncancelled)
        if self._open is not None:  # the first unit began in the microbatch before
            apart.add(0)
        if batch.last_continues:
            apart.add(len(batch.owners) - 1)
        return sorted(apart)

    def _cancelled(self, squares: torch.Tensor, uncancelled: torch.Tensor) -> set[int]:
        """Return units to multiply out at once: their tokens cancel, or may leave fp32's range as they are added.

        Args:
            squares: [slots, units] squared norms.
            uncancelled: [slots, units] what these could be if no tokens cancelled.
        """
        # Not "uncancelled > ...": NaN is huge too, as of a token of infinite length beside one of length 0 (0 · inf).
        huge = ~(uncancelled <= _LARGEST_LENGTH**2) & torch.isfinite(squares)
        if self._style != "per_layer":
            squares, uncancelled = styles.summed(squares), styles.summed(uncancelled)
        cancelled = (squares < _CANCELLED * uncancelled).any(dim=0)
        return set(np.flatnonzero((cancelled | huge.any(dim=0)).numpy()).tolist())

    def _longer(self, gradients: UnitGradients, squares: torch.Tensor, together: torch.Tensor) -> list[int]:
        """Return units that came out longer, as they were added, than they were measured.

        fp32 products of many tokens may be biased so far.

        Args:
            gradients: what was added.
            squares: [slots, units] squared norms that the clipping factors were made of.
            together: [units] which were added.
        """
        added = gradients.added_squares(squares)
        if added is None:
            return []
        before, after = styles.group_norms(squares, self._groups), styles.group_norms(added, self._groups)
        is_longer = ~(after <= before * (1 + _LONGER)).all(dim=0) & together
        return np.flatnonzero(is_longer.numpy()).tolist()

    def _pass_again(
        self,
        passes: Passes,
        calls: Calls,
        weights: torch.Tensor,
        index: int | None,
        gradient: dict[str, torch.Tensor],
    ) -> None:
        """Add what the first pass deferred: units with a weight to ``total``, the unit ``index`` to ``gradient``.

        Args:
            passes: over this microbatch.
            calls: of the block that captures them.
            weights: [slots, units] factors on the grid; 0 leaves a unit out.
            index: a unit whose gradient is wanted whole and unclipped, since its rows continue; ``None`` for none.
            gradient: what there is of that; filled in place.
        """
        weights_of = {slot.name: weights[i] for i, slot in enumerate(self.layout.slots)}
        gradients = passes.gradients
        is_used = (weights != 0).any(dim=0)  # [units]
        if index is not None:
            is_used[index] = True

        def add(slot: Slot, contribution: Gradient) -> None:
            gradients.add_now(slot.name, self.layout.view(self.total, slot), contribution, weights_of[slot.name])
            if index is not None:
                if slot.name not in gradient:
                    gradient[slot.name] = torch.zeros(slot.shape, dtype=torch.float32, device=self._device)
                gradients.add_unit(gradient[slot.name], contribution, index)

        if is_used.numpy().any():
            passes.again(calls, add, gradients.rows_of(is_used))

    def _with_earlier_rows(self, index: int, gradient: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return a unit's ``gradient`` in this microbatch, with that of its rows in those before if it was left open.

        Only a microbatch's first unit can go on with one left open, which is closed here; ``gradient`` is emptied then.
        """
        if index > 0 or self._open is None:
            return gradient
        so_far, self._open = self._open.gradient, None
        for name in list(gradient):
            value = gradient.pop(name)
            so_far[name] = so_far[name].add_(value) if name in so_far else value
        return so_far

    # One unit at a time.

    def _accumulate_units(self, batch: Microbatch) -> None:
        """Add a microbatch one unit at a time, by autograd without hooks."""
        unit_of_row = batch.owner.tolist()  # negative for padding
        for index in range(len(batch.owners)):
            gradient: dict[str, torch.Tensor] = {}
            for row, unit in enumerate(unit_of_row):
                if unit == index:
                    self._add_row(batch, slice(row, row + 1), gradient)
            with exact_fp32(self._device):
                self._add_unit(batch, index, self._with_earlier_rows(index, gradient))
        if self._equal_passes:  # padding rows run too, so that every rank runs as many passes; nothing is added
            for row, unit in enumerate(unit_of_row):
                if unit < 0:
                    self._add_row(batch, slice(row, row + 1), {})

    def _add_row(self, batch: Microbatch, row: slice, gradient: dict[str, torch.Tensor]) -> None:
        """Add the gradient of the row that ``row`` cuts out to its unit's ``gradient`` (name → tensor), by one pass."""
        # One row a pass: which rows of a unit share a microbatch depends on other units, and so would bf16's rounding.
        loss = (self._row_losses(batch.input_ids[row], batch.target_mask[row]) * batch.row_weight[row]).sum()
        gradients = fallback.plain_gradients(loss, self.layout.parameters)
        unit = int(batch.owner[row])
        if unit >= 0:  # else a row of padding
            self.diagnostics.add_loss(batch.owners[unit], float(loss.detach()))
        for slot, value in zip(self.layout.slots, gradients, strict=True):
            if value is not None:
                value = value.float()
                gradient[slot.name] = gradient[slot.name].add_(value) if slot.name in gradient else value

    def _add_unit(self, batch: Microbatch | Line, index: int, gradient: dict[str, torch.Tensor]) -> None:
        """Add one unit's whole gradient, or keep it open if its rows continue."""
        if batch.last_continues and index == len(batch.owners) - 1:
            self._open = _OpenUnit(batch.owners[index], gradient)
            return
        self._add_whole(batch.owners[index], gradient)

    def add_gradient(self, owner: int, gradient: dict[str, torch.Tensor]) -> None:
        """Clip and add one unit's whole gradient that no row gave, such as a planted direction; after all microbatches.

        Args:
            owner: position among the rank's units, or a negative number for a unit without rows.
            gradient: tensor's name to its fp32 gradient, on this clipper's device.
        """
        assert self._open is None
        with exact_fp32(self._device):
            self._add_whole(owner, gradient)

    def _add_whole(self, owner: int, gradient: dict[str, torch.Tensor]) -> None:
        """Clip one unit's whole gradient by its own norm, and add it: as a microbatch of this unit alone."""
        on_device = torch.zeros(len(self.layout.slots), 1, dtype=torch.float64, device=self._device)
        for i, slot in enumerate(self.layout.slots):
            if slot.name in gradient:
                on_device[i] = squared_norms(gradient[slot.name][None])
        squares = on_device.cpu()  # [slots, units] for one unit, as factors and weights are below
        owners, every_unit = (owner,), torch.ones(1, dtype=torch.bool)
        factors = self._factors(squares, owners)
        self._count(squares, factors, every_unit, owners)
        weights = self._on_grid(factors, every_unit)
        for i, slot in enumerate(self.layout.slots):
            if slot.name in gradient:
                exact_sum.add_units(self.layout.view(self.total, slot), gradient[slot.name][None], weights[i])

    def _factors(self, squares: torch.Tensor, owners: Sequence[int]) -> torch.Tensor:
        """Return [groups, units] clipping factors; 0 for units that are not finite."""
        norms = styles.group_norms(squares, self._groups).masked_fill(self.diagnostics.is_lost(owners), torch.inf)
        return styles.factors(self._style, norms, self._clipping_norm)

    def _on_grid(self, factors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return [slots, units] weights that turn gradients into the grid steps in which ``total`` counts.

        Args:
            factors: [groups, units] clipping factors.
            chosen: [units] bool; the weight of the others is 0.
        """
        of_groups = torch.where(chosen, factors, 0.0)
        of_slots = of_groups[self._groups]
        return exact_sum.on_grid(of_slots, self.grid_exponent)

    def _count(self, squares: torch.Tensor, factors: torch.Tensor, chosen: torch.Tensor, owners: Sequence[int]) -> None:
        """Add the ``chosen`` units to the diagnostics.

        Args:
            squares: [slots, units] squared norms.
            factors: [groups, units] clipping factors.
            chosen: [units] bool.
            owners: the units' positions among the rank's.
        """
        norms = styles.summed(squares).squeeze(0).sqrt()  # [units], over all slots
        norms[self.diagnostics.is_lost(owners)] = torch.inf  # so that they are counted as not finite
        is_clipped = (factors < 1).any(dim=0)  # in any of the groups
        self.diagnostics.add_units(
            [owner for owner, is_chosen in zip(owners, chosen.tolist(), strict=True) if is_chosen],
            norms[chosen].numpy(),
            is_clipped[chosen].numpy(),
            self._clipping_norm,
        )
