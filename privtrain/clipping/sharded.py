"""Data-parallel clipping of sharded gradients: each rank clips its own units, and hands each layer's sum to all ranks.

What a rank holds of weights and gradients is a part, and a layer is whole only while it computes. A unit's norm needs
activations and output gradients alone, so the first pass takes the norms of a rank's own units as
:class:`~.clipper.PerUnitClipper` does, without any communication of gradients. When the factors are known, each
tensor's clipped contributions are multiplied out, rounded to the grid unit by unit, and added up in int64; ranks add up
these integers by a reduce-scatter, bucket by bucket, and each keeps its part. So the sum has the same bits as that of
one process, whatever the number of ranks, and a rank holds its part of it, one tensor and a bucket on their way. What
fits into the bucket waits there, and is added to, until the step is over.

Where the factors of all layers are kept (route ``batched``), that follows the first pass. On the ``two_pass`` route
nothing is kept but what layers share; the other tensors are *deferred* and come by in a second backward pass. A unit
whose norm cannot be believed (tokens that cancel) is measured once more, multiplied out tensor by tensor; on the
``two_pass`` route that takes one more pass on every rank.

**All ranks run the same collectives in the same order.** Every rank has equally many microbatches, those without a unit
too; what is deferred is a function of the model; whether another pass is needed is decided by all ranks together; and
the order in which tensors came is compared once a step.

Ranks work together on one unit at a time (:class:`~.cooperative.CooperativeClipper`, route ``one_unit``) where a layer
has no rule. On any route they do so for units with more rows than a microbatch.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from typing_extensions import override

from privtrain.clipping import fallback, opacus_rules, rules
from privtrain.clipping.batched import UnitGradients
from privtrain.clipping.capture import Calls
from privtrain.clipping.clipper import Measured, PerUnitClipper, RowLosses
from privtrain.clipping.cooperative import CooperativeClipper, GradientShards
from privtrain.clipping.factors import exact_fp32, squared_norms
from privtrain.clipping.passes import Passes
from privtrain.clipping.rules import Gradient
from privtrain.data.microbatch import Microbatch
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.privacy.layout import Layout, Slot


class ShardedClipper(PerUnitClipper):
    """Accumulates this rank's part of Σ_u clip(g_u) over the units of all ranks of its shard group.

    Guarantee: as for :class:`~.clipper.PerUnitClipper`, whose numbers its own are bit for bit; for joint units as for
    :class:`~.cooperative.CooperativeClipper`. A unit is joint if it has more rows than a microbatch: every rank of the
    group gets its rows, and a clipper for these alone adds to the same ``total`` and ``diagnostics``.

    Args:
        model: the model that ``row_losses`` runs.
        shards: the backend's description of this rank's part of each gradient.
        clipping_norm: C > 0.
        row_losses: (input_ids, target_mask) → [rows] losses, each of its own row alone.
        device: where ``total`` lives.
        style: ``"flat"``, ``"per_layer"``, ``"automatic"`` or ``"adaptive"``.
        route: ``"batched"``, ``"two_pass"``, ``"one_unit"`` (together) or ``"auto"``: two passes with gradient
            checkpointing, else batched. Without a rule for a layer, ``"auto"`` and ``"two_pass"`` go one unit at a
            time; joint units take two passes on ``"two_pass"``.
        any_rank: whether a flag is set on any rank, asked by every rank at once.
        reduce_once: whether a rank adds up its own units' whole tensors until the step is over: 8 bytes a trained
            parameter on every rank, and one reduce-scatter a step instead of one a microbatch.

    Raises:
        UnsupportedLayer: if a layer shares statistics between units, or the route given has no exact rule for it.
    """

    def __init__(
        self,
        model: nn.Module,
        shards: GradientShards,
        clipping_norm: float,
        row_losses: RowLosses,
        device: torch.device,
        style: str = "flat",
        route: str = "auto",
        *,
        any_rank: Callable[[bool], bool],
        reduce_once: bool = False,
    ) -> None:
        shards.reshard()  # earlier passes may have left weights whole
        self._shards = shards
        # This clipper is for the rank's own units. Joint units have another one; both add to one sum, in parts.
        self._joint = CooperativeClipper(model, shards, clipping_norm, row_losses, device, style, route)
        self._sum = shards.scattered(self._joint.total, once=reduce_once)
        layout = _whole_layout(shards)
        super().__init__(
            model, layout, clipping_norm, row_losses, device, style, route, equal_passes=True, any_rank=any_rank
        )

    @property
    def joint_route(self) -> str:
        """The route of joint units: ``"two_pass"`` or ``"cooperative"``."""
        return self._joint.route

    @override
    def reset(self) -> None:
        super().reset()
        self._sum.reset()
        self._joint.reset()
        self._joint.diagnostics = self.diagnostics
        self._joint.clipping_norm = self._clipping_norm

    @override
    def accumulate(self, batch: Microbatch) -> None:
        """Add the clipped gradients of the units of ``batch``.

        Args:
            batch: whole units, on this clipper's device; every rank has equally many. If it is joint, or on the
                ``one_unit`` route, the ranks of a group have the same one, and units may continue in the next.
        """
        self._shards.reshard()
        if batch.is_joint or self.route == "one_unit":
            self._joint.accumulate(batch)
        elif batch.last_continues:
            raise GuaranteeLost("a unit of one rank's own spans microbatches; this is a bug, report it")
        else:
            super().accumulate(batch)

    @override
    def finish(self) -> torch.Tensor:
        """End the step and return this rank's part of the clipped sum: int64, in units of 2**``grid_exponent``.

        Raises:
            GuaranteeLost: if a unit was left open, an unclipped gradient exists on a trainable tensor, or ranks added
                up different tensors.
        """
        self._joint.finish()
        self._sum.flush()
        self._sum.check_order()
        return super().finish()

    @override
    def _new_total(self, device: torch.device) -> torch.Tensor:
        """Share the sum with the joint units' clipper."""
        return self._joint.total

    @override
    def _rule_for(self, name: str, module: nn.Module) -> rules.Rule:
        """Choose the rule by a stand-in with whole weights, and refuse one that reads them."""
        rule = rules.rule_for(name, _stand_in(module, self._slot_of, self._device))
        if rule is opacus_rules.per_row:
            raise UnsupportedLayer(
                f"the rule for module {name!r} of type {type(module).__name__} reads its weights, which are in parts "
                "on several ranks; set performance.clipping_route: one_unit"
            )
        return rule

    @override
    def _find_rules(self, model: nn.Module) -> None:
        """Find rules; without one for each layer even ``two_pass``, the choice for large models, gives way."""
        try:
            super()._find_rules(model)
        except UnsupportedLayer as refusal:
            if self.route != "two_pass":
                raise
            self.route, self.fallback_reason = "one_unit", str(refusal)

    @override
    def _budget(self, model: nn.Module) -> float:
        """Return 0 (two passes) or infinity: every rank decides the same, whatever the width of its rows."""
        has_matrices = any(len(slot.shape) > 1 for slot in self.layout.slots)  # gradients of vectors are small
        auto_takes_two = self.route == "auto" and self._checkpointing == "non_reentrant" and has_matrices
        return 0.0 if self.route == "two_pass" or auto_takes_two else math.inf

    @override
    def _refuse_reentrant(self) -> None:
        """Raise if the model has re-entrant checkpointing and the route is for non-reentrant checkpointing alone."""
        if self.route == "two_pass":  # joint units are differentiated without naming tensors
            super()._refuse_reentrant()

    @override
    def _new_passes(self, gradients: UnitGradients, num_rows: int) -> Passes:
        """Return passes that run from the losses to the end, since ranks gather weights in them together."""
        names = {module: name for name, module in self._modules.items()}
        return Passes(
            names,
            self._rules,
            self._slots,
            gradients,
            num_rows,
            self._memory_budget,
            self._device,
            repeats_forward=not self._shards.repeats_backward,
            starts_at_head=False,
            defers_refusals=True,
        )

    @override
    def _refuse_hidden_uses(self, batch: Microbatch) -> None:
        """Raise, on the first microbatch, unless hooks see every trainable tensor.

        Autograd cannot tell here whether an unseen one has a gradient all the same, since ranks hold parts of it.
        """
        if self._saw_every_use:
            return
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            seen = self._seen_by_hooks(batch)
        unseen = [slot.name for slot in self.layout.slots if slot.name not in seen]
        if unseen:
            raise UnsupportedLayer(
                f"tensor {unseen[0]!r} belongs to a module that is not called as one: a fused kernel that reads its "
                "weight would hide the activations. Set performance.clipping_route: one_unit"
            )
        self._saw_every_use = True

    @override
    def _fall_back(self, failure: Exception, batch: Microbatch) -> None:
        """Go one unit at a time, if ``auto`` may still choose and every rank has the same microbatch.

        So it is in the self-test: every rank fails alike and changes its route at the same place. Else ``failure`` is
        raised.
        """
        # No row is tried without hooks: a rank cannot run a pass on its own.
        reason = fallback.cause(failure, None, self.layout.parameters)
        may_change = self.route == "auto" and not self._is_settled
        # Asked only where it matters: it is a collective.
        self._go_one_unit(failure, reason, is_possible=may_change and self._is_everywhere(batch))
        self._shards.reshard()

    @override
    def _accumulate_units(self, batch: Microbatch) -> None:
        """Let all ranks of the shard group work on one unit at a time."""
        self._joint.accumulate(batch)

    def _is_everywhere(self, batch: Microbatch) -> bool:
        """Return whether all ranks of the shard group have this microbatch.

        Each rank hashes its microbatch to a number. Over n ranks, numbers with the sum n·x and the sum of squares n·x²
        all are x: their variance is 0.
        """
        sha = hashlib.sha256(repr(batch.owners).encode())
        for value in (batch.input_ids, batch.target_mask, batch.row_weight, batch.owner):
            sha.update(value.cpu().numpy().tobytes())
        number = int.from_bytes(sha.digest()[:3], "big")  # small enough that squares add up in int64
        sums = torch.tensor([number, number**2], dtype=torch.int64, device=self._device)
        self._shards.sum_over_group(sums)
        num_ranks = self._shards.size
        return sums.tolist() == [num_ranks * number, num_ranks * number**2]

    @override
    def _add_units(self, batch: Microbatch, passes: Passes, calls: Calls, measured: Measured) -> None:
        """Clip and contribute every unit of the microbatch; also without any, since the other ranks wait for it.

        Units ``apart``, whose tokens cancel, are measured once more before, multiplied out. Units that came out
        ``longer`` than measured as they were added are measured so too, taken back, and contributed again.
        """
        gradients, num_units = passes.gradients, len(batch.owners)
        apart = sorted(self._cancelled(measured.squares, measured.uncancelled)) if num_units else []
        squares = self._remeasured(passes, calls, measured.squares, apart)
        every_unit = torch.ones(num_units, dtype=torch.bool)
        factors = self._factors(squares, batch.owners)
        weights = self._on_grid(factors, every_unit)
        self._contribute(passes, calls, [weights])

        # Units that were measured multiplied out cannot come out longer.
        is_measured_by_factors = every_unit.clone()
        is_measured_by_factors[apart] = False
        longer = self._longer(gradients, squares, is_measured_by_factors) if num_units else []
        if self._any_rank(bool(longer)):  # the other ranks take part, with nothing to add
            squares = self._remeasured(passes, calls, squares, longer)
            factors = self._factors(squares, batch.owners)
            is_longer = torch.zeros(num_units, dtype=torch.bool)
            is_longer[longer] = True
            taken_back = torch.where(is_longer, -weights, 0.0)
            self._contribute(passes, calls, [taken_back, self._on_grid(factors, is_longer)])
        if num_units:
            self._count(squares, factors, every_unit, batch.owners)

    def _remeasured(self, passes: Passes, calls: Calls, squares: torch.Tensor, units: Sequence[int]) -> torch.Tensor:
        """Return ``squares`` ([slots, units]) with some ``units`` measured anew, multiplied out tensor by tensor.

        All ranks call it, since deferred tensors take another pass, which ranks run together.
        """
        # Where nothing was deferred, no pass follows, and what another rank does is of no account.
        is_needed = bool(units) if passes.is_complete else self._any_rank(bool(units))
        if not is_needed:
            return squares
        squares, gradients, deferred = squares.clone(), passes.gradients, passes.deferred
        with exact_fp32(self._device):
            for i, slot in enumerate(self.layout.slots):
                if slot.name in deferred:
                    continue
                for unit in units:
                    tensor = gradients.tensor_of_unit(slot, unit)
                    squares[i, unit] = 0.0 if tensor is None else float(squared_norms(tensor[None])[0])
        index_of = {slot.name: i for i, slot in enumerate(self.layout.slots)}

        def measure(slot: Slot, gradient: Gradient) -> None:
            """Store each unit's squared norm of a deferred slot, one tensor at a time."""
            for unit in units:
                tensor = torch.zeros(slot.shape, dtype=torch.float32, device=self._device)
                gradients.add_unit(tensor, gradient, unit)
                squares[index_of[slot.name], unit] = float(squared_norms(tensor[None])[0])

        if not passes.is_complete:
            used = torch.zeros(gradients.num_units, dtype=torch.bool)  # empty ``units`` are for the other ranks' sake
            used[list(units)] = True
            passes.again(calls, measure, gradients.rows_of(used))
        return squares

    def _contribute(self, passes: Passes, calls: Calls, weights: Sequence[torch.Tensor]) -> None:
        """Add the units to the sum with each of these [slots, units] weights: kept tensors, then deferred ones.

        A rank without units contributes nothing to every tensor, since all ranks contribute in the same order.
        """
        gradients, deferred = passes.gradients, passes.deferred
        own_weights = weights if gradients.num_units else ()
        index_of = {slot.name: i for i, slot in enumerate(self.layout.slots)}
        with exact_fp32(self._device):
            for slot in self.layout.slots:
                if slot.name not in deferred:
                    with self._sum.contribution(slot.name) as out:
                        for by_slot in own_weights:
                            gradients.add_kept(slot.name, out, by_slot[index_of[slot.name]])
        if not passes.is_complete:

            def add(slot: Slot, gradient: Gradient) -> None:
                """Contribute a deferred slot when the pass brings it back."""
                with self._sum.contribution(slot.name) as out:
                    for by_slot in own_weights:
                        gradients.add_now(slot.name, out, gradient, by_slot[index_of[slot.name]])

            is_used = torch.stack([(by_slot != 0).any(dim=0) for by_slot in weights]).any(dim=0)  # [units]
            passes.again(calls, add, gradients.rows_of(is_used))


def _whole_layout(shards: GradientShards) -> Layout:
    """Return the layout of the whole tensors, of which this rank holds parts.

    Its ``parameters`` are the model's own tensors, whatever a rank holds of them.
    """
    shapes = {slot.name: slot.whole_shape for slot in shards.layout.slots}
    # Slots are laid out by the whole shapes, on "meta", which takes no memory; hooks need the weights themselves.
    layout = Layout({name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in shapes.items()})
    layout.parameters = {name: shards.weights[name] for name in layout.parameters}
    return layout


def _stand_in(module: nn.Module, slot_of: dict[int, Slot], device: torch.device) -> nn.Module:
    """Return a copy of a module in which tensors have their whole shapes, to choose the module's rule by.

    A rule computes a layer's per-row gradients from its input and output gradient (:mod:`.rules`); which one is right
    follows from the layer's type and from the shapes, which the parts that a rank holds do not show.

    Vectors are ones, since rules of norm layers are tried on them. Larger tensors have a shape and no memory ("meta").

    Args:
        module: its tensors may be in parts.
        slot_of: id of each trainable tensor → its slot, of the whole layout.
        device: where vectors are made.
    """
    twin = copy.copy(module)
    whole: dict[str, nn.Parameter | None] = {}
    for name, parameter in module._parameters.items():
        if parameter is not None:
            slot = slot_of.get(id(parameter))
            # DeepSpeed's stage 3 holds a part of a frozen tensor (which has no slot), and its whole shape as ds_shape.
            shape_if_frozen = tuple(getattr(parameter, "ds_shape", parameter.shape))
            shape = shape_if_frozen if slot is None else slot.whole_shape
            where = device if len(shape) == 1 else torch.device("meta")
            parameter = nn.Parameter(torch.ones(shape, dtype=parameter.dtype, device=where), requires_grad=False)
        whole[name] = parameter
    # The copy must not run the module's hooks, which would gather weights. Torch keeps each kind of hook in a
    # dictionary (such as _forward_hooks): an empty one of the same type takes its place.
    no_hooks = {}
    for name, hooks in vars(module).items():
        if name.startswith("_") and "_hooks" in name:
            no_hooks[name] = type(hooks)()
    vars(twin).update(no_hooks, _parameters=whole)
    return twin
