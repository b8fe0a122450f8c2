"""Is the job's clipped and reduced sum the right one? Planted units are differentiated a second time by plain autograd.

Without hooks, and with dropout off: the two gradients must be of the same function. Three *planted* units of two
records each are used: one whose gradient is huge (10⁴ clipping norms), which must be clipped; a small one (half the
clipping norm), which must be left as it is; one whose loss is NaN, which must count as zero. Their losses are scaled to
these sizes: a unit is known by the first token of its rows, 1, 2 or 3. The huge unit is tried alone and with the
others.

The job may shard gradients. Then ranks of a shard group work together on a *joint* unit, one that is too large for a
rank. ``placement.clipped`` is the layout of the tensors whose clipped sum this rank accumulates, ``placement.stepped``
that of the tensors, or parts of them, that its optimizer steps. A *route* is a way of the clipper to the clipped sum,
``one_unit`` one unit at a time (:mod:`privtrain.clipping.clipper`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.hooks import RemovableHandle

from privtrain.backends import Backend, Placement
from privtrain.clipping import GradientShards, PerUnitClipper, ShardedClipper, exact_sum, styles
from privtrain.clipping.clipper import RowLosses
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.data.records import Record
from privtrain.privacy.fixed_point import SLACK
from privtrain.privacy.layout import Layout, Slot
from privtrain.privacy.plan import PrivacyPlan
from privtrain.training.agreement import agree_on_fault
from privtrain.training.trainer import Trainer, is_joint

#: Relative error allowed between the clipper and plain autograd, by precision of forward and backward. In bf16 both run
#: passes of the same shapes over the same rows, so that they differ by the last product alone: plain autograd rounds a
#: weight's gradient to bf16 (2**-9 relative, once a pass and a use of the weight), the clipper multiplies in fp32.
_TOLERANCE = {"fp32": 1e-3, "bf16": 1e-3 + 2 * 2**-8}

#: Tokens of the two records of each planted unit.
_PLANTED_LENGTHS = (7, 12)
#: Rows of a microbatch for the huge unit alone: its two records apart, and in one microbatch.
_ALONE_SIZES = (1, 2)
#: Rows of a microbatch for several planted units: all in one microbatch, or each with one row of padding.
_TOGETHER_SIZES = (6, 3)
#: Where gradients are sharded also 1: no unit fits into a microbatch, so all are joint.
_JOINT_SIZES = (*_TOGETHER_SIZES, 1)
#: Gradient norms of the huge and the small unit, in clipping norms. The small one shows what clipping hides: a mean in
#: place of a sum over a unit's rows, or units that are scaled up to the norm.
_HUGE, _SMALL = 1e4, 0.5


def check_clipping(trainer: Trainer, units: list[list[Record]], precision: str, route: str) -> PerUnitClipper:
    """Check the job's own clipper against plain autograd: the huge unit alone, then two, then all three planted units.

    Args:
        trainer: about to train.
        units: the three planted units, as records.
        precision: of forward and backward, ``"fp32"`` or ``"bf16"``.
        route: clipping route to test.

    Returns:
        The clipper that passed; its route is ``"one_unit"`` where that was needed.
    """
    backend, placement = trainer.backend, trainer.placement
    # Factor of a row's loss, by its first token. ``losses`` reads it in each pass: units are scaled one after another.
    by_token = torch.zeros(1 + len(units), device=backend.device)
    by_token[0] = 1.0  # padding rows
    losses = _scaled(trainer.row_losses, by_token)
    reference = _Reference(trainer, units, losses, trainer.clipper, is_by_shape=precision != "fp32")

    # The huge unit alone, by the clipper that this settles on.
    by_token[1] = reference.include(0, _HUGE)
    clipper = trainer.new_clipper(losses, _agreed_route(trainer, losses, units[0], route))
    reference.clipper, settled_route = clipper, clipper.route
    for size in _ALONE_SIZES:
        expected = reference.clipped_sum(num_units=1, microbatch_size=size)
        total = _clipped_and_reduced(clipper, placement, units[:1], size, backend)
        agree_on_fault(_difference(total, expected, trainer, precision, num_units=1), backend)

    # The small one beside it. Also without the third unit: beside one that is not finite the clipper takes the units of
    # a microbatch one by one.
    by_token[2] = reference.include(1, _SMALL)
    sizes = _TOGETHER_SIZES if placement.shards is None else _JOINT_SIZES
    for members, size in itertools.product((units[:2], units), sizes):
        expected = reference.clipped_sum(num_units=2, microbatch_size=size)
        by_token[3] = math.nan
        total = _clipped_and_reduced(clipper, placement, members, size, backend)
        by_token[3] = 0.0  # what follows is without the NaN
        fault = _difference(total, expected, trainer, precision, num_units=2)
        if fault:  # on every rank or on none: is it because of the third unit?
            total = _clipped_and_reduced(clipper, placement, members, size, backend)
            if not _difference(total, expected, trainer, precision, num_units=2):
                fault = (
                    "a planted unit whose loss is not a number changes the units beside it, which are right without "
                    f"it (precision {precision}); where a kernel reads past a row, set performance.precision: "
                    f"fp32. {fault}"
                )
        agree_on_fault(fault, backend)

    has_changed = clipper.route != settled_route
    fault = "the clipping route changed; set performance.clipping_route: one_unit" if has_changed else ""
    agree_on_fault(fault, backend)
    return clipper


def check_exact_sum(clipper: PerUnitClipper, trainer: Trainer, units: list[list[Record]]) -> None:
    """Check that two units together add, as integers, exactly what each adds alone.

    A sum in fp32 would round most coordinates. Each rounding is small, but with chosen values 10⁵ of them add up to
    many clipping norms.

    Args:
        clipper: of :func:`check_clipping`, on a route where no unit changes another's bits.
        trainer: whose reduction is tested.
        units: the planted units, of which the huge one and the small one are used.
    """
    backend = trainer.backend
    # A job of lines computes no rows of two units, so its model may round the rows of a batch by their place.
    microbatch_size = 1 if trainer.packs_lines else max(_TOGETHER_SIZES)
    huge = _reduced_total(clipper, trainer.placement, units[:1], microbatch_size, backend).clone()
    small = _reduced_total(clipper, trainer.placement, units[1:2], microbatch_size, backend).clone()
    both = _reduced_total(clipper, trainer.placement, units[:2], microbatch_size, backend)
    fault = ""
    if both.dtype != torch.int64 or not torch.equal(huge + small, both):
        fault = (
            f"two planted units do not add up exactly (sum of type {both.dtype}): an inexact sum moves by more than "
            "the clipping norm when one of many units leaves; report this"
        )
    agree_on_fault(fault, backend)


@dataclasses.dataclass
class _Reference:
    """Clipped sums of the planted units by plain autograd, without any reduction: every rank works through all.

    Attributes:
        trainer: whose model is differentiated.
        units: the planted units.
        losses: [rows] losses, scaled by unit; the factor of the NaN unit must be finite while these passes run.
        clipper: whose sums are compared with these.
        is_by_shape: whether rounding depends so much on the shape of a batch (as in bf16) that these passes must have
            the very shapes of the clipper's. Then the other units are in the batch too, without their losses.
    """

    trainer: Trainer
    units: list[list[Record]]
    losses: RowLosses
    clipper: PerUnitClipper
    is_by_shape: bool
    _sum: torch.Tensor | None = None

    def include(self, unit: int, size: float) -> float:
        """Take the next unit into :meth:`clipped_sum`, scaled to a gradient of ``size`` clipping norms.

        Returns:
            The factor of its loss that gives it such a gradient.
        """
        trainer, layout = self.trainer, self.trainer.placement.stepped
        gradient = self._plain([self.units[unit]], 0, microbatch_size=1, row_losses=trainer.row_losses)
        norm = math.hypot(*_norms(gradient, layout, trainer.backend))
        is_usable = 0 < norm < math.inf
        fault = "" if is_usable else f"a planted unit's gradient has norm {norm}: the loss moves nothing trained"
        agree_on_fault(fault, trainer.backend)
        factor = size * trainer.plan.clipping_norm / norm
        if not self.is_by_shape:  # one sum serves for all shapes; else clipped_sum forms it for each
            _clip(gradient.mul_(factor), layout, trainer.plan, trainer.backend)
            self._sum = gradient if self._sum is None else self._sum.add_(gradient)
        return factor

    def clipped_sum(self, num_units: int, microbatch_size: int) -> torch.Tensor:
        """Return what this rank steps of the sum over the first units, laid out as ``placement.stepped``.

        Args:
            num_units: 1 where the huge unit is alone; 2 where all planted units share microbatches.
            microbatch_size: rows of the clipper's passes.
        """
        if self._sum is not None:
            return self._sum
        total = self.trainer.placement.stepped.zeros(self.trainer.backend.device)
        present = self.units[:1] if num_units == 1 else self.units
        for unit in range(num_units):
            total += self._in_the_same_shapes(unit, present, microbatch_size)
        return total

    def _in_the_same_shapes(self, unit: int, present: list[list[Record]], microbatch_size: int) -> torch.Tensor:
        """Return a unit's clipped gradient by autograd in the shapes that the clipper's route computes in.

        Args:
            unit: index of the unit in ``units``.
            present: the units that the clipper is given together.
            microbatch_size: rows of the clipper's passes.
        """
        placement, clipper = self.trainer.placement, self.clipper
        packer = _packer(microbatch_size)
        alone = [self.units[unit]]
        if placement.shards is not None and is_joint(placement, clipper, packer, self.units[unit]):
            assert isinstance(clipper, ShardedClipper)
            # The ranks of a shard group divide a joint unit's rows among them, or take them one by one.
            rows_per_rank = math.ceil(len(self.units[unit]) / placement.shards.size)
            num_rows = rows_per_rank if clipper.joint_route == "two_pass" else 1
            gradient = self._plain(alone, 0, microbatch_size=num_rows, row_losses=self.losses)
        elif clipper.route == "one_unit":
            gradient = self._plain(alone, 0, microbatch_size=1, row_losses=self.losses)
        else:
            gradient = self._plain(present, unit, microbatch_size=microbatch_size, row_losses=self.losses)
        _clip(gradient, self.trainer.placement.stepped, self.trainer.plan, self.trainer.backend)
        return gradient

    def _plain(
        self, present: list[list[Record]], unit: int, *, microbatch_size: int, row_losses: RowLosses
    ) -> torch.Tensor:
        """Return a unit's gradient by autograd alone: what this rank steps of it, laid out as ``placement.stepped``.

        Args:
            present: units in the batches.
            unit: index of the one that is differentiated; the losses of the others are left out.
            microbatch_size: rows of a batch.
            row_losses: gives [rows] losses.
        """
        placement, device = self.trainer.placement, self.trainer.backend.device
        batches = _batches(present, microbatch_size, device)
        losses = [functools.partial(_unit_loss, row_losses, batch, unit) for batch in batches if unit in batch.owners]
        if placement.shards is not None:
            return _watched_gradient(self.trainer.model, placement.stepped, placement.shards, device, losses)
        return _whole_gradient(placement, device, losses)


def _unit_loss(row_losses: RowLosses, batch: Microbatch, unit: int) -> torch.Tensor:
    """Return [] the loss of one unit's rows in a batch."""
    is_of_unit = batch.owner == batch.owners.index(unit)
    rows = is_of_unit.nonzero().flatten()
    losses = row_losses(batch.input_ids, batch.target_mask)
    return (losses[rows] * batch.row_weight[rows]).sum()


def _agreed_route(trainer: Trainer, losses: RowLosses, unit: list[Record], route: str) -> str:
    """Return ``route``, or ``"one_unit"`` on every rank if on any the clipper falls back to that on this model.

    Ranks must agree, since a sharded model needs equal passes. Every rank tries the same unit.
    """
    clipper = trainer.new_clipper(losses, route)
    for batch in _batches([unit], max(_ALONE_SIZES), trainer.backend.device):
        clipper.accumulate(batch)
    if clipper.fallback_reason:
        trainer.clipper.fallback_reason = clipper.fallback_reason
    return "one_unit" if trainer.backend.any_rank(clipper.route == "one_unit") else route


def _scaled(row_losses: RowLosses, by_token: torch.Tensor) -> RowLosses:
    """Return losses multiplied by ``by_token[t]``, where t is a row's first token: 1 to 3 of a planted unit, or 0."""
    return lambda input_ids, target_mask: by_token[input_ids[:, 0]] * row_losses(input_ids, target_mask)


def planted_units(vocabulary_size: int) -> list[list[np.ndarray]]:
    """Return records of a huge unit, a small one and one that is not a number; they begin with token 1, 2 and 3."""
    rng = np.random.default_rng(0)
    units = []
    for first_token in (1, 2, 3):
        records = [rng.integers(0, vocabulary_size, size=length) for length in _PLANTED_LENGTHS]
        for tokens in records:
            tokens[0] = first_token
        units.append(records)
    return units


def _batches(units: list[list[Record]], microbatch_size: int, device: torch.device) -> list[Microbatch]:
    """Return the units' records in microbatches of padded rows; a microbatch's ``owners`` are indices of ``units``."""
    packer = _packer(microbatch_size)
    return [batch.to(device) for batch in packer.pack(units, packer.num_batches(units))]


def _packer(microbatch_size: int) -> Packer:
    """Return a packer for the planted units' records."""
    return Packer(microbatch_size, max_length=max(_PLANTED_LENGTHS), pad_id=0)


def _clipped_and_reduced(
    clipper: PerUnitClipper,
    placement: Placement,
    units: list[list[Record]],
    microbatch_size: int,
    backend: Backend,
) -> torch.Tensor:
    """Return :func:`_reduced_total` in fp32, laid out as ``placement.stepped``."""
    total = _reduced_total(clipper, placement, units, microbatch_size, backend)
    return exact_sum.as_float32(total, clipper.grid_exponent)


def _reduced_total(
    clipper: PerUnitClipper,
    placement: Placement,
    units: list[list[Record]],
    microbatch_size: int,
    backend: Backend,
) -> torch.Tensor:
    """Return the clipped sum of these units over all ranks, in whole steps of the clipper's grid.

    All units are given to the last rank's share, and joint ones to the last shard group (*replica*), so that a
    reduction which leaves out other ranks than rank 0 is found.
    """
    packer = _packer(microbatch_size)
    single = [records for records in units if not is_joint(placement, clipper, packer, records)]
    shares: list[list[list[Record]]] = [[] for _ in range(placement.num_shares)]
    shares[-1] = single
    is_last_replica = placement.replica == placement.num_replicas - 1
    joint: list[list[Record]] = []
    if is_last_replica:
        joint = [records for records in units if is_joint(placement, clipper, packer, records)]
    clipper.reset()
    for batch in packer.pack_share(shares, placement.share, joint):
        clipper.accumulate(batch.to(backend.device))
    return backend.reduce_total(clipper.finish())


def _clip(gradient: torch.Tensor, layout: Layout, plan: PrivacyPlan, backend: Backend) -> None:
    """Clip one unit's gradient in place by the definition of the plan's clipping style.

    Args:
        gradient: this rank's part, laid out as ``layout``.
        layout: ``placement.stepped``.
        plan: with clipping norm and style.
        backend: adds up norms over the parts of ranks.
    """
    clipping_norm = plan.clipping_norm
    norms = _norms(gradient, layout, backend)
    whole = math.hypot(*norms)
    if plan.clipping_style == "automatic":
        gradient *= clipping_norm / (whole + styles.AUTOMATIC_GAMMA)
    elif plan.clipping_style == "batch":
        return  # the sum is what is bounded, after the reduction
    elif plan.clipping_style in ("flat", "adaptive"):
        gradient *= clipping_norm / max(whole, clipping_norm)
    else:  # per layer: each module's tensors to an equal share of the squared norm
        modules: dict[str, list[int]] = {}
        for i, slot in enumerate(layout.slots):
            module, _, _ = slot.name.rpartition(".")  # "layer.0.weight" is of "layer.0"
            modules.setdefault(module, []).append(i)
        bound = clipping_norm / math.sqrt(len(modules))
        for members in modules.values():
            norm = math.hypot(*(norms[i] for i in members))
            for i in members:
                part = layout.view(gradient, layout.slots[i])
                part *= bound / max(norm, bound)


def _difference(
    total: torch.Tensor, expected: torch.Tensor, trainer: Trainer, precision: str, *, num_units: int
) -> str:
    """Return in words what is wrong with the clipped and reduced sum of some units; empty if nothing.

    The same on every rank, since norms are of whole tensors.

    Args:
        total: the job's own sum, laid out as ``placement.stepped``.
        expected: the reference.
        trainer: with plan and placement.
        precision: of forward and backward, which sets the tolerance.
        num_units: units in the sum.
    """
    layout, backend, clipping_norm = trainer.placement.stepped, trainer.backend, trainer.plan.clipping_norm
    norm = math.hypot(*_norms(total, layout, backend))
    differences = _norms(total - expected, layout, backend)
    sizes = _norms(expected, layout, backend)
    # "not <=" rather than ">", here and below, so that NaN is a fault.
    # Style "batch" bounds no unit: Trainer.release scales the step's whole sum, which is not done here.
    if trainer.plan.clipping_style != "batch" and not norm <= num_units * clipping_norm * (1 + SLACK):
        return f"{num_units} planted unit(s) moved the sum by {norm:.6g}, above clipping_norm={clipping_norm} each"
    # What each tensor's norm would be, were all equal and clipping_norm that of all together. An error is measured
    # against it too, so that a tensor of almost no gradient may be off by rounding.
    equal_share = clipping_norm / math.sqrt(len(layout.slots))
    for slot, difference, size in zip(layout.slots, differences, sizes, strict=True):
        if not difference <= _TOLERANCE[precision] * (size + equal_share):
            return (
                f"tensor {slot.name!r}: the clipped and reduced gradient is off by {difference:.3g} of {size:.3g} in "
                f"precision {precision}; a layer is not covered, used in a way its rule does not know "
                "(performance.clipping_route: one_unit needs no rules), units are mixed or not clipped as the plan "
                "says, the model is random without dropout, or the reduction is not a sum"
            )
    return ""


def _norms(vector: torch.Tensor, layout: Layout, backend: Backend) -> list[float]:
    """Return the norm of each whole tensor, in the order of ``layout.slots``; the same on every rank.

    In float64: an fp32 sum over millions of squares is off by more than the bound that is checked.
    """
    squares = torch.zeros(len(layout.slots), dtype=torch.float64, device=vector.device)
    for i, slot in enumerate(layout.slots):
        squares[i] = torch.linalg.vector_norm(layout.view(vector, slot), dtype=torch.float64).square()
    backend.sum_parts(squares)
    return squares.sqrt().tolist()


def _whole_gradient(
    placement: Placement, device: torch.device, losses: Sequence[Callable[[], torch.Tensor]]
) -> torch.Tensor:
    """Return the gradient of the sum of some losses, where this rank computes whole gradients.

    By ``backward``, since re-entrant gradient checkpointing gives none to ``torch.autograd.grad``.

    Args:
        placement: the result is the part that this rank steps, laid out as ``placement.stepped``.
        device: of the result.
        losses: each runs a forward pass and returns a loss.
    """
    whole = placement.clipped.zeros(device)
    for loss in losses:
        loss().backward()
        for slot, parameter in zip(placement.clipped.slots, placement.clipped.parameters.values(), strict=True):
            if parameter.grad is not None:
                placement.clipped.view(whole, slot).add_(parameter.grad.float())
                parameter.grad = None
    result = placement.stepped.zeros(whole.device)
    for slot, part in zip(placement.clipped.slots, placement.stepped.slots, strict=True):
        values = placement.clipped.view(whole, slot).flatten()[part.first : part.first + part.num_coordinates]
        placement.stepped.view(result, part).copy_(values.view(part.shape))
    return result


def _watched_gradient(
    model: torch.nn.Module,
    layout: Layout,
    shards: GradientShards,
    device: torch.device,
    losses: Sequence[Callable[[], torch.Tensor]],
) -> torch.Tensor:
    """Return the gradient of the sum of some losses, where weights are sharded: the part that this rank steps.

    A whole tensor's gradient is read by a hook, before any reduction, and only this rank's part of it is kept; so no
    whole gradient outlives its layer's backward pass.

    Args:
        model: whose modules gather their weights when they run.
        layout: ``placement.stepped``.
        shards: of the placement; takes the gradients out of the framework's way.
        device: of the result.
        losses: each runs a forward pass and returns a loss.
    """
    result = layout.zeros(device)
    slots = _slots_by_every_name(model, layout)
    handles: dict[int, RemovableHandle] = {}  # by id of the hooked tensor

    def add_own_part(slot: Slot, gradient: torch.Tensor) -> None:
        """Add this rank's part of a whole tensor's gradient to the result."""
        part = gradient.detach().flatten()[slot.first : slot.first + slot.num_coordinates]
        layout.view(result, slot).add_(part.float())

    def hook_tensors(prefix: str, module: torch.nn.Module, _inputs: object) -> None:
        """Hook a module's trained tensors, each once: before its forward pass, when they have been gathered."""
        for local_name, tensor in module.named_parameters(recurse=False):
            slot = slots.get(f"{prefix}.{local_name}" if prefix else local_name)
            if slot is not None and tensor.requires_grad and id(tensor) not in handles:
                handles[id(tensor)] = tensor.register_hook(functools.partial(add_own_part, slot))

    forward_handles = [
        module.register_forward_pre_hook(functools.partial(hook_tensors, name))
        for name, module in model.named_modules()
    ]
    try:
        for loss in losses:
            with shards.collecting(lambda _slot, _part: None):
                loss().backward()
    finally:
        for handle in [*forward_handles, *handles.values()]:
            handle.remove()
    return result


def _slots_by_every_name(model: torch.nn.Module, layout: Layout) -> dict[str, Slot]:
    """Return name → slot of every trained tensor, by all of a tied tensor's names; the layout has the first alone."""
    by_first_name = {slot.name: slot for slot in layout.slots}
    first_names: dict[int, str] = {}  # by id of the tensor
    slots: dict[str, Slot] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name = first_names.setdefault(id(parameter), name)
        if first_name in by_first_name:
            slots[name] = by_first_name[first_name]
    return slots
