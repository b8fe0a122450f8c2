"""The start-up self-test: on the real model and process group, before any private row is touched.

It does not trust the clipper, the reduction or the noise: a planted unit is differentiated a second time by plain
autograd, without hooks, and what comes out of the job's own path is compared with it. Any doubt stops the job.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats

from privtrain.backends import Backend
from privtrain.clipping import PerUnitClipper, styles
from privtrain.clipping.clipper import RowLosses
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.data.records import Record
from privtrain.errors import SelfTestFailed
from privtrain.layout import Layout
from privtrain.secret import SecretKey

#: Relative error allowed between the clipper and plain autograd, by precision of forward and backward.
_TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2}

_PLANTED_LENGTHS = (7, 12)
#: The planted unit must survive being split, and must be right in one piece.
_MICROBATCH_SIZES = (1, 2)
_LOSS_FACTOR = 1e4
#: Chance that right noise fails the check of one tensor.
_FALSE_ALARM = 1e-10


def run_self_test(
    *,
    model: torch.nn.Module,
    layout: Layout,
    row_losses: RowLosses,
    clipping_norm: float,
    noise_multiplier: float,
    backend: Backend,
    vocabulary_size: int,
    precision: str,
    clipping_style: str = "flat",
    clipping_route: str = "auto",
    plant: Callable[[np.ndarray], Record] = Record.of,
) -> str:
    """Check coverage, clipping, reduction, noise and agreement of the ranks.

    The adapter is moved to a random point for the test (a fresh LoRA has zero gradients in half of its tensors) and
    moved back bit by bit.

    Returns:
        The clipping route that passed: ``"one_unit"`` where ``"auto"`` found a layer that needs it. Train on that one.

    Raises:
        SelfTestFailed: naming the check and the tensor or setting.
    """
    before = {name: p.detach().clone() for name, p in layout.parameters.items()}
    if not backend.in_sync(list(before.values())):
        raise SelfTestFailed("ranks start with different trainable parameters; check that all load the same base model")
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in layout.parameters.values():
                p.add_((torch.randn(p.shape, generator=generator) * 0.02).to(p))
        was_training = model.training
        model.eval()  # dropout off: the two gradients must be of the same function
        scaled = _scaled(row_losses)
        unit = [plant(tokens) for tokens in _planted_unit(vocabulary_size)]
        for microbatch_size in _MICROBATCH_SIZES:
            clipper = PerUnitClipper(
                model, layout, clipping_norm, scaled, backend.device, clipping_style, clipping_route
            )
            total = _clipped_and_reduced(clipper, unit, microbatch_size, backend)
            clipping_route = clipper.route
            expected = _plain_gradient(layout, scaled, _batches([unit], 1, backend.device))
            _clip(expected, layout, clipping_norm, clipping_style)
            _compare(total, expected, layout, clipping_norm, _TOLERANCE[precision])
        _check_noise(layout, clipping_norm, noise_multiplier, backend)
        model.train(was_training)
    finally:
        with torch.no_grad():
            for name, p in layout.parameters.items():
                p.copy_(before[name])
                p.grad = None
    return clipping_route


def _scaled(row_losses: RowLosses) -> RowLosses:
    return lambda input_ids, target_mask: _LOSS_FACTOR * row_losses(input_ids, target_mask)


def _planted_unit(vocabulary_size: int) -> list[np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, vocabulary_size, size=sum(_PLANTED_LENGTHS))
    return [tokens[: _PLANTED_LENGTHS[0]], tokens[_PLANTED_LENGTHS[0] :]]


def _batches(units: list[list[Record]], microbatch_size: int, device: torch.device) -> list[Microbatch]:
    packer = Packer(microbatch_size, max_length=max(_PLANTED_LENGTHS), pad_id=0)
    num_batches = -(-len(_PLANTED_LENGTHS) // microbatch_size)
    return [batch.to(device) for batch in packer.pack(units, num_batches)]


def _clipped_and_reduced(
    clipper: PerUnitClipper, unit: list[Record], microbatch_size: int, backend: Backend
) -> torch.Tensor:
    """The last rank holds one unit with a huge gradient, the others none: the reduced sum is that unit, clipped."""
    holds_unit = backend.rank == backend.world_size - 1
    clipper.reset()
    for batch in _batches([unit] if holds_unit else [], microbatch_size, backend.device):
        clipper.accumulate(batch)
    total = clipper.finish().clone()
    backend.reduce(total)
    return total


def _clip(gradient: torch.Tensor, layout: Layout, clipping_norm: float, style: str) -> None:
    """What the plan's clipping style makes of one unit's gradient, in place, by the definition alone."""
    if style == "automatic":
        gradient *= clipping_norm / (_norm(gradient) + styles.AUTOMATIC_GAMMA)
    elif style in ("flat", "adaptive"):
        gradient *= clipping_norm / max(_norm(gradient), clipping_norm)
    else:
        modules: dict[str, list[torch.Tensor]] = {}
        for slot in layout.slots:
            modules.setdefault(slot.name.rpartition(".")[0], []).append(layout.view(gradient, slot))
        bound = clipping_norm / math.sqrt(len(modules))
        for parts in modules.values():
            norm = math.hypot(*map(_norm, parts))
            for part in parts:
                part *= bound / max(norm, bound)


def _compare(
    total: torch.Tensor, expected: torch.Tensor, layout: Layout, clipping_norm: float, tolerance: float
) -> None:
    norm = _norm(total)
    if not norm <= clipping_norm * (1 + 1e-5):
        raise SelfTestFailed(
            f"one planted unit moved the reduced sum by {norm:.6g}, above clipping_norm={clipping_norm}"
        )
    for slot in layout.slots:
        difference = _norm(layout.view(total - expected, slot))
        size = _norm(layout.view(expected, slot))
        if not difference <= tolerance * (size + clipping_norm / math.sqrt(len(layout.slots))):
            raise SelfTestFailed(
                f"tensor {slot.name!r}: the clipped and reduced gradient is off by {difference:.3g} of {size:.3g}; "
                "a layer is not covered, used in a way its rule does not know (performance.clipping_route: one_unit "
                "needs no rules), or the reduction is not a sum"
            )


def _norm(value: torch.Tensor) -> float:
    # In float64: an fp32 sum over millions of squares is off by more than the bound that is checked.
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))


def _plain_gradient(layout: Layout, row_losses: RowLosses, batches: list[Microbatch]) -> torch.Tensor:
    """The unit's gradient by autograd alone."""
    parameters = list(layout.parameters.values())
    result = layout.zeros(batches[0].input_ids.device)
    for batch in batches:
        loss = (row_losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for slot, gradient in zip(layout.slots, gradients, strict=True):
            if gradient is not None:
                layout.view(result, slot).add_(gradient.float())
    return result


def _check_noise(layout: Layout, clipping_norm: float, noise_multiplier: float, backend: Backend) -> None:
    """Noise alone, under a throw-away key: the right spread in every tensor, and the same on every rank."""
    secret = backend.broadcast_bytes(SecretKey.generate().reveal() if backend.is_main else None)
    vector = layout.zeros(backend.device)
    backend.reduce(vector)
    stddev = noise_multiplier * clipping_norm
    backend.add_noise(vector, layout, SecretKey(secret), 0, stddev)
    if not backend.in_sync([vector]):
        raise SelfTestFailed(
            "ranks drew different noise; their parameters would drift apart (mixed CPU types or libraries?)"
        )
    for slot in layout.slots:
        part = layout.view(vector, slot).double()
        measured = float(part.square().mean().sqrt())
        low, high = stats.chi2.interval(1 - _FALSE_ALARM, slot.num_coordinates)
        if not low * stddev**2 <= float(part.square().sum()) <= high * stddev**2:
            raise SelfTestFailed(
                f"tensor {slot.name!r}: noise has standard deviation {measured:.4g}, the plan asks for {stddev:.4g}"
            )
