"""The start-up self-test: on the real model and process group, before any private row is touched.

It does not trust the clipper, the reduction or the noise: a planted unit is differentiated a second time by plain
autograd, without hooks, and what comes out of the job's own path is compared with it. Any doubt stops the job.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch.utils.hooks import RemovableHandle

from privtrain.backends import Backend, Placement
from privtrain.clipping import CooperativeClipper, GradientShards, PerUnitClipper, styles
from privtrain.clipping.clipper import RowLosses
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.data.records import Record
from privtrain.errors import SelfTestFailed
from privtrain.layout import Layout, Slot
from privtrain.noise import gaussian
from privtrain.secret import SecretKey

#: Relative error allowed between the clipper and plain autograd, by precision of forward and backward.
_TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2}

_PLANTED_LENGTHS = (7, 12)
#: The planted unit must survive being split, and must be right in one piece.
_MICROBATCH_SIZES = (1, 2)
_LOSS_FACTOR = 1e4
#: Chance that right noise fails the check of one tensor.
_FALSE_ALARM = 1e-10
#: Coordinates of a tensor whose noise is drawn a second time.
_NUM_COMPARED = 4096


def run_self_test(
    *,
    model: torch.nn.Module,
    placement: Placement,
    new_clipper: Callable[[RowLosses], PerUnitClipper | CooperativeClipper],
    row_losses: RowLosses,
    clipping_norm: float,
    noise_multiplier: float,
    backend: Backend,
    vocabulary_size: int,
    precision: str,
    clipping_style: str = "flat",
    plant: Callable[[np.ndarray], Record] = Record.of,
) -> str:
    """Check coverage, clipping, reduction, noise and agreement of the ranks.

    An adapter is moved to a random point for the test (a fresh LoRA has zero gradients in half of its tensors) and
    moved back bit by bit. Every rank calls it, and on a failure of any, all fail.

    Returns:
        The clipping route that passed: ``"one_unit"`` where ``"auto"`` found a layer that needs it. Train on that one.

    Raises:
        SelfTestFailed: naming the check and the tensor or setting.
    """
    if not backend.parameters_agree(model):
        raise SelfTestFailed("ranks start with different trainable parameters; check that all load the same base model")
    _check_coverage(model, placement, backend)
    is_adapter = placement.shards is None
    layout = placement.stepped
    before = {name: p.detach().clone() for name, p in layout.parameters.items()} if is_adapter else {}
    was_training = model.training
    try:
        model.eval()  # dropout off: the two gradients must be of the same function
        if is_adapter:
            _move(layout, backend)
        route = _check_clipping(
            model,
            placement,
            new_clipper,
            row_losses,
            backend,
            unit=[plant(tokens) for tokens in _planted_unit(vocabulary_size)],
            clipping_norm=clipping_norm,
            style=clipping_style,
            tolerance=_TOLERANCE[precision],
        )
        _check_noise(placement, clipping_norm, noise_multiplier, backend)
    finally:
        model.train(was_training)
        with torch.no_grad():
            for name, value in before.items():
                layout.parameters[name].copy_(value)
        if is_adapter:
            for parameter in placement.clipped.parameters.values():
                parameter.grad = None
            backend.publish()
    return route


def _move(layout: Layout, backend: Backend) -> None:
    key = SecretKey.insecure(0, "self-test")
    with torch.no_grad():
        for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
            nudge = gaussian(key, 0, slot.name, slot.first, slot.first + slot.num_coordinates) * 0.02
            parameter.add_(nudge.view(slot.shape).to(parameter))
    backend.publish()


def _check_coverage(model: torch.nn.Module, placement: Placement, backend: Backend) -> None:
    """What is trained is what is clipped and stepped, and over the ranks each coordinate is stepped once."""
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for layout in (placement.clipped, placement.stepped):
        stray = trained.symmetric_difference(layout.parameters)
        if stray:
            raise SelfTestFailed(
                f"tensors {sorted(stray)[:3]} are frozen but listed as trained, or trained but not listed; something "
                "changed requires_grad after the model was made"
            )
    counts = torch.zeros(2, len(placement.stepped.slots), dtype=torch.float64, device=backend.device)
    for i, slot in enumerate(placement.stepped.slots):
        first, count = slot.first, slot.num_coordinates
        counts[0, i], counts[1, i] = count, count * first + count * (count - 1) / 2  # the sum of its coordinates
    backend.sum_parts(counts)
    for i, slot in enumerate(placement.stepped.slots):
        size = math.prod(slot.whole_shape)
        if counts[:, i].tolist() != [size, size * (size - 1) / 2]:
            raise SelfTestFailed(f"tensor {slot.name!r}: the parts of the ranks do not add up to it; report this")


def _check_clipping(
    model: torch.nn.Module,
    placement: Placement,
    new_clipper: Callable[[RowLosses], PerUnitClipper | CooperativeClipper],
    row_losses: RowLosses,
    backend: Backend,
    *,
    unit: list[Record],
    clipping_norm: float,
    style: str,
    tolerance: float,
) -> str:
    """The job's own path against plain autograd, for a huge gradient and, where ranks share a unit, for a small one.

    Returns:
        The route that passed.
    """
    factors = [_LOSS_FACTOR]
    norm, routes = math.inf, []
    while factors:
        scaled = _scaled(row_losses, factors.pop())
        expected = _plain_gradient(model, placement, scaled, _batches([unit], 1, backend.device))
        plain_norm = _clip(expected, placement.stepped, clipping_norm, style, backend)
        for microbatch_size in _MICROBATCH_SIZES:
            clipper = new_clipper(scaled)
            total = _clipped_and_reduced(clipper, placement, unit, microbatch_size, backend)
            _compare(total, expected, placement.stepped, clipping_norm, tolerance, backend)
            routes.append(clipper.route)
        if placement.shards is not None and norm == math.inf and 0 < plain_norm < math.inf:
            # Clipping hides a mean in place of a sum over a unit's rows; half the clipping norm does not.
            factors.append(_LOSS_FACTOR * 0.5 * clipping_norm / plain_norm)
        norm = plain_norm
    return "one_unit" if "one_unit" in routes else routes[-1]


def _scaled(row_losses: RowLosses, factor: float) -> RowLosses:
    return lambda input_ids, target_mask: factor * row_losses(input_ids, target_mask)


def _planted_unit(vocabulary_size: int) -> list[np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, size=sum(_PLANTED_LENGTHS))
    return [tokens[: _PLANTED_LENGTHS[0]], tokens[_PLANTED_LENGTHS[0] :]]


def _batches(units: list[list[Record]], microbatch_size: int, device: torch.device) -> list[Microbatch]:
    packer = Packer(microbatch_size, max_length=max(_PLANTED_LENGTHS), pad_id=0)
    num_batches = -(-len(_PLANTED_LENGTHS) // microbatch_size)
    return [batch.to(device) for batch in packer.pack(units, num_batches)]


def _clipped_and_reduced(
    clipper: PerUnitClipper | CooperativeClipper,
    placement: Placement,
    unit: list[Record],
    microbatch_size: int,
    backend: Backend,
) -> torch.Tensor:
    """The last hand holds one unit with a huge gradient, the others none: the reduced sum is that unit, clipped."""
    holds_unit = placement.hand == placement.num_hands - 1
    clipper.reset()
    for batch in _batches([unit] if holds_unit else [], microbatch_size, backend.device):
        clipper.accumulate(batch)
    return backend.reduce_total(clipper.finish()).clone()


def _clip(gradient: torch.Tensor, layout: Layout, clipping_norm: float, style: str, backend: Backend) -> float:
    """What the plan's clipping style makes of one unit's gradient, in place, by the definition; its norm before."""
    norms = _norms(gradient, layout, backend)
    whole = math.hypot(*norms)
    if style == "automatic":
        gradient *= clipping_norm / (whole + styles.AUTOMATIC_GAMMA)
    elif style in ("flat", "adaptive"):
        gradient *= clipping_norm / max(whole, clipping_norm)
    else:
        modules: dict[str, list[int]] = {}
        for i, slot in enumerate(layout.slots):
            modules.setdefault(slot.name.rpartition(".")[0], []).append(i)
        bound = clipping_norm / math.sqrt(len(modules))
        for members in modules.values():
            norm = math.hypot(*(norms[i] for i in members))
            for i in members:
                part = layout.view(gradient, layout.slots[i])
                part *= bound / max(norm, bound)
    return whole


def _compare(
    total: torch.Tensor,
    expected: torch.Tensor,
    layout: Layout,
    clipping_norm: float,
    tolerance: float,
    backend: Backend,
) -> None:
    norm = math.hypot(*_norms(total, layout, backend))
    if not norm <= clipping_norm * (1 + 1e-5):
        raise SelfTestFailed(
            f"one planted unit moved the reduced sum by {norm:.6g}, above clipping_norm={clipping_norm}"
        )
    differences = _norms(total - expected, layout, backend)
    sizes = _norms(expected, layout, backend)
    for slot, difference, size in zip(layout.slots, differences, sizes, strict=True):
        if not difference <= tolerance * (size + clipping_norm / math.sqrt(len(layout.slots))):
            raise SelfTestFailed(
                f"tensor {slot.name!r}: the clipped and reduced gradient is off by {difference:.3g} of {size:.3g}; "
                "a layer is not covered, used in a way its rule does not know (performance.clipping_route: one_unit "
                "needs no rules), or the reduction is not a sum"
            )


def _norms(vector: torch.Tensor, layout: Layout, backend: Backend) -> list[float]:
    """The norm of each whole tensor, whichever parts of it are here.

    In float64: an fp32 sum over millions of squares is off by more than the bound that is checked.
    """
    squares = torch.zeros(len(layout.slots), dtype=torch.float64, device=vector.device)
    for i, slot in enumerate(layout.slots):
        squares[i] = torch.linalg.vector_norm(layout.view(vector, slot), dtype=torch.float64).square()
    backend.sum_parts(squares)
    return squares.sqrt().tolist()


def _plain_gradient(
    model: torch.nn.Module, placement: Placement, row_losses: RowLosses, batches: list[Microbatch]
) -> torch.Tensor:
    """The unit's gradient by autograd alone, without any reduction: every rank works through the whole unit.

    Returns:
        What this rank steps of it, laid out as ``placement.stepped``.
    """
    if placement.shards is not None:
        return _watched_gradient(model, placement.stepped, placement.shards, row_losses, batches)
    parameters = list(placement.clipped.parameters.values())
    whole = placement.clipped.zeros(batches[0].input_ids.device)
    for batch in batches:
        loss = (row_losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for slot, gradient in zip(placement.clipped.slots, gradients, strict=True):
            if gradient is not None:
                placement.clipped.view(whole, slot).add_(gradient.float())
    result = placement.stepped.zeros(whole.device)
    for slot, part in zip(placement.clipped.slots, placement.stepped.slots, strict=True):
        values = placement.clipped.view(whole, slot).flatten()[part.first : part.first + part.num_coordinates]
        placement.stepped.view(result, part).copy_(values.view(part.shape))
    return result


def _watched_gradient(
    model: torch.nn.Module,
    layout: Layout,
    shards: GradientShards,
    row_losses: RowLosses,
    batches: list[Microbatch],
) -> torch.Tensor:
    """The same where weights or gradients are sharded: each whole gradient is looked at where autograd hands it over.

    That is before any reduction, and only this rank's part is kept, so no whole gradient outlives its layer.
    """
    result = layout.zeros(batches[0].input_ids.device)
    slots = {slot.name: slot for slot in layout.slots}
    first_name: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first_name.setdefault(id(parameter), name)
    canonical = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    handles: dict[int, RemovableHandle] = {}

    def keep(slot: Slot, gradient: torch.Tensor) -> None:
        flat = gradient.detach().flatten()[slot.first : slot.first + slot.num_coordinates]
        layout.view(result, slot).add_(flat.float())

    def watch(prefix: str, module: torch.nn.Module, _: object) -> None:
        for name, tensor in module.named_parameters(recurse=False):
            slot = slots.get(canonical.get(f"{prefix}.{name}" if prefix else name, ""))
            if slot is not None and tensor.requires_grad and id(tensor) not in handles:
                handles[id(tensor)] = tensor.register_hook(functools.partial(keep, slot))

    entries = [
        module.register_forward_pre_hook(functools.partial(watch, name)) for name, module in model.named_modules()
    ]
    try:
        for batch in batches:
            with shards.collecting():
                (row_losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum().backward()
    finally:
        for handle in [*entries, *handles.values()]:
            handle.remove()
    return result


def _check_noise(placement: Placement, clipping_norm: float, noise_multiplier: float, backend: Backend) -> None:
    """Noise alone, under a throw-away key: the right spread in every tensor, and of just the coordinates held here."""
    key = SecretKey(backend.broadcast_bytes(SecretKey.generate().reveal() if backend.is_main else None))
    vector = backend.reduce_total(placement.clipped.zeros(backend.device))
    stddev = noise_multiplier * clipping_norm
    layout = placement.stepped
    backend.add_noise(vector, layout, key, 0, stddev)
    faults = []
    for slot in layout.slots:
        part = layout.view(vector, slot).double().flatten()
        if not len(part):
            continue
        low, high = stats.chi2.interval(1 - _FALSE_ALARM, len(part))
        if not low * stddev**2 <= float(part.square().sum()) <= high * stddev**2:
            measured = float(part.square().mean().sqrt())
            faults.append(
                f"tensor {slot.name!r}: noise has standard deviation {measured:.4g}, the plan asks for {stddev:.4g}"
            )
            continue
        sample = part[:_NUM_COMPARED].cpu()
        own = gaussian(key, 0, slot.name, slot.first, slot.first + len(sample)) * stddev
        if not torch.allclose(sample, own, rtol=1e-5, atol=1e-6 * stddev):
            faults.append(
                f"tensor {slot.name!r}: ranks drew different noise, or that of another part; parameters would drift "
                "apart or share noise (mixed CPU types or libraries?)"
            )
    _agree_on_faults(faults[0] if faults else "", backend)


def _agree_on_faults(fault: str, backend: Backend) -> None:
    """One rank's fault stops every rank, which would otherwise wait for it until the time-out."""
    num_faulty = torch.tensor([float(bool(fault))], device=backend.device)
    backend.reduce(num_faulty)
    if fault or float(num_faulty) > 0:
        raise SelfTestFailed(fault or "another rank's noise is not what the plan asks for; see its message")
