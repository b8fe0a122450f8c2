"""Is the noise that a step releases the plan's, this rank's own, and that of this sum alone?"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from scipy import stats

from privtrain.clipping import PerUnitClipper
from privtrain.privacy.correlated import NoiseHistory
from privtrain.privacy.layout import Layout, Slot
from privtrain.privacy.noise import StepNoise, noised
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import SecretKey
from privtrain.training import auxiliary_sums
from privtrain.training.agreement import agree_on_fault
from privtrain.training.auxiliary_sums import noise_name
from privtrain.training.trainer import Trainer

#: The step whose release is tested: not 0, so that noise which ignores the step is found.
_STEP = 1
#: Chance that right noise fails the check of one tensor.
_FALSE_ALARM = 1e-10
#: Coordinates of a tensor whose noise is drawn a second time.
_NUM_COMPARED = 4096


def check_noise(trainer: Trainer, clipper: PerUnitClipper) -> None:
    """Check the noise that a step without units releases, under a throw-away key, in every tensor and auxiliary sum.

    In every tensor the noise must have the standard deviation that the plan asks for, and be that of the coordinates
    that this rank holds: some are drawn a second time, alone. For another sum the noise must be another one. Where
    noise is correlated, a second step must take back the plan's share of the first one's.

    Args:
        trainer: whose release is tested.
        clipper: of :func:`~privtrain.training.clipping_check.check_clipping`.
    """
    plan, backend, layout = trainer.plan, trainer.backend, trainer.placement.stepped
    # Release a step without units: its sums are zero, so what comes out is noise.
    key = SecretKey(backend.from_main(lambda: SecretKey.generate().reveal()))
    clipper.reset()
    history = trainer.new_history(clipper)
    vector, released, commitment = trainer.release(clipper, key, _STEP, history=history)
    # Compare it with the source of noise that belongs to sums of zeros, from which parts are drawn again.
    zeros = torch.zeros(layout.num_coordinates, dtype=torch.int64, device=backend.device)
    zero_totals = {auxiliary_sum.name: 0 for auxiliary_sum in plan.auxiliary_sums}
    noise = trainer.bound_sum(clipper, zeros, zero_totals, key, _STEP).noise
    faults = _tensor_faults(trainer, clipper, vector, noise)
    faults += _auxiliary_faults(plan, released, noise)
    # Release another sum, and a second step.
    faults += _noise_bound_faults(trainer, clipper, key, vector, released)
    if history is not None:
        clipper.reset()
        later = trainer.release(clipper, key, _STEP + 1, history=history, previous=commitment).vector
        faults += _correlation_faults(plan, layout, vector, later)
    agree_on_fault(faults[0] if faults else "", backend)


def _tensor_faults(trainer: Trainer, clipper: PerUnitClipper, vector: torch.Tensor, noise: StepNoise) -> list[str]:
    """Return faults of tensors whose noise has another spread than the plan's, or is not that of their coordinates.

    Args:
        trainer: with plan and placement.
        clipper: with the grid.
        vector: released by a step without units.
        noise: the source of its noise.
    """
    backend, layout, stddev = trainer.backend, trainer.placement.stepped, trainer.plan.noise_stddev
    # Ranks may share the drawing: this rank draws the noise of these parts, and gets the rest from others.
    drawn_here = {slot.name: slot for slot in backend.noised_layout(layout).slots}
    faults = []
    for slot in layout.slots:
        part = layout.view(vector, slot).double().flatten()
        if not len(part):
            continue
        if not _has_spread(part, stddev):
            measured = float(part.square().mean().sqrt())
            faults.append(
                f"tensor {slot.name!r}: noise has standard deviation {measured:.4g}, the plan asks for {stddev:.4g}"
            )
            continue
        # Compared at the beginning, and where this rank's own drawing begins: so every border is some rank's.
        starts = {0, drawn_here[slot.name].first - slot.first} - {len(part)}
        is_right = True
        for start in sorted(starts):
            sample = part[start : start + _NUM_COMPARED]
            expected = _own_noise(trainer, clipper, slot, start, len(sample), noise)
            is_right = is_right and torch.equal(sample.float(), expected.float())
        if not is_right:
            faults.append(
                f"tensor {slot.name!r}: ranks drew different noise, or that of another part; parameters would drift "
                "apart or share noise (mixed CPU types or libraries?)"
            )
    return faults


def _auxiliary_faults(plan: PrivacyPlan, released: Mapping[str, float], noise: StepNoise) -> list[str]:
    """Return faults of auxiliary sums of no unit that are not the noise itself, which is drawn again here.

    Args:
        plan: names the sums, and how much noise each has.
        released: name → the sum, released by a step without units.
        noise: the source of its noise.
    """
    faults = []
    for auxiliary_sum in plan.auxiliary_sums:
        zero, name = torch.zeros(1, dtype=torch.int64), noise_name(auxiliary_sum.name)
        drawn = noised(zero, exponent=auxiliary_sums.EXPONENT, stddev=auxiliary_sum.noise, noise=noise, name=name)
        expected_value = float(drawn) / plan.expected_batch_size
        value = released.get(auxiliary_sum.name, math.nan)
        if value != expected_value:
            faults.append(
                f"the sum {auxiliary_sum.name!r} of no unit was released as {value}, the plan's noise makes it "
                f"{expected_value}"
            )
    return faults


def _has_spread(noise: torch.Tensor, stddev: float) -> bool:
    """Return whether the sum of squares of some normal numbers can come of this standard deviation."""
    low, high = stats.chi2.interval(1 - _FALSE_ALARM, len(noise))
    return low * stddev**2 <= float(noise.square().sum()) <= high * stddev**2  # false for NaN


def _own_noise(
    trainer: Trainer, clipper: PerUnitClipper, slot: Slot, start: int, count: int, noise: StepNoise
) -> torch.Tensor:
    """Return the noise of a generation's first step on ``count`` coordinates of a slot, drawn without the others.

    Args:
        trainer: with the plan.
        clipper: with the grid.
        slot: this rank's part of a tensor.
        start: first of the coordinates, counted within the slot.
        count: number of coordinates.
        noise: the step's source of noise.
    """
    plan, device = trainer.plan, trainer.backend.device
    zeros = torch.zeros(count, dtype=torch.int64, device=device)
    grid = {"exponent": clipper.grid_exponent, "stddev": plan.noise_stddev}
    first = slot.first + start  # counted within the whole tensor
    if plan.correlated is None:
        return noised(zeros, noise=noise, name=slot.name, first=first, **grid)
    part = torch.nn.Parameter(torch.zeros(count, device=device))
    alone = Layout({slot.name: part}, {slot.name: (first, slot.whole_shape)})
    return NoiseHistory(plan.correlated, alone, device, **grid).release(zeros, noise)


def _correlation_faults(plan: PrivacyPlan, layout: Layout, first: torch.Tensor, second: torch.Tensor) -> list[str]:
    """Return faults unless a second step takes back c₁ times the first one's noise, as the plan's strategy says.

    Args:
        plan: with correlated noise, whose coefficients begin 1, c₁.
        layout: of both vectors.
        first: noise of a first step, released without units.
        second: of the step after it; with c₁ times ``first`` added, it must have the spread of fresh noise.
    """
    assert plan.correlated is not None
    stddev, faults = plan.noise_stddev, []
    fresh = second.double() + plan.correlated.coefficients[1] * first.double()
    # All together too: a small tensor alone shows little.
    parts = [(f"tensor {slot.name!r}", layout.view(fresh, slot).flatten()) for slot in layout.slots]
    for name, part in [*parts, ("all tensors", fresh)]:
        if len(part) and not _has_spread(part, stddev):
            faults.append(
                f"{name}: noise of a second step does not take back that of the first as the plan's strategy says; "
                "report this"
            )
    return faults


def _noise_bound_faults(
    trainer: Trainer,
    clipper: PerUnitClipper,
    key: SecretKey,
    vector: torch.Tensor,
    released: dict[str, float],
) -> list[str]:
    """Return a fault unless the smallest change of the sum, one grid step on one coordinate, changes all noise.

    Args:
        trainer: whose release is tested.
        clipper: its sum is changed, and reset.
        key: that ``vector`` was released under.
        vector: released by a step without units.
        released: auxiliary sums of the same step.
    """
    plan, backend = trainer.plan, trainer.backend
    if plan.noise_multiplier == 0:
        return []
    clipper.reset()
    if backend.is_main:
        clipper.total[0] = 1
    other = trainer.release(clipper, key, _STEP, history=trainer.new_history(clipper))
    counts = torch.tensor([int((other.vector == vector).sum()), len(vector)], dtype=torch.int64, device=backend.device)
    backend.reduce(counts)
    clipper.reset()
    num_equal, num_coordinates = counts.tolist()
    # Noise lies on a grid, so a few coordinates are equal by chance, but never half of them.
    is_shared = 2 * num_equal > num_coordinates
    is_shared |= any(other.auxiliary_sums[name] == value for name, value in released.items())
    return ["two different sums were released with the same noise: it is not keyed by the sum"] if is_shared else []
