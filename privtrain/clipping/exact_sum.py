"""The sum over units as integers: where a clipped contribution is rounded to the public grid and added.

A unit's gradient g (fp32) is multiplied by its clipping factor w, rounded towards zero to a multiple of the grid step
s = 2**e (:func:`privtrain.privacy.fixed_point.grid_exponent`) and added as int64. In units of s a contribution is

    Q_i = trunc(fl(g_i / u)),    u = fl(1 / v),    v = fl(w / s),

where fl rounds to fp32. What that means for the sensitivity, for a clipping norm C and 2**40 ≤ C/s < 2**41:

* **A contribution is no longer than C.** fl adds at most 2⁻²⁴ of a value, in v, in u and in g_i / u; trunc shortens. So
  |Q_i| s ≤ (1 + 2⁻²⁴)² / (1 - 2⁻²⁴) w |g_i|, coordinate by coordinate, and ‖Q‖ s ≤ (1 + 1.8e-7) w ‖g‖. The norm that w
  was made of is that of g in float64 (off by 1e-10), or of factors whose product g is. Then ‖Q‖ is measured as it is
  added, and one that is longer than w times the norm by more than 9e-6 is taken out again, by adding
  trunc(fl(g_i / -u)) = -Q_i, and clipped by ‖g‖ itself: together below C (1 + 1e-5). u and v are normal numbers: w / s
  is folded in float64, and lies above 2**-64 for every fp32 gradient and below 2**126 for every clipping norm that a
  plan accepts. So a small factor is never rounded up by more than that.
* **One unit moves the sum by its own contribution.** Integers are added without rounding, so the sum over any set of
  units is the same in every order, in any number of microbatches, ranks and parts; the difference of two sums that
  differ in one unit is that unit's Q, whatever the values of the others.
* **Nothing overflows.** |Q_i| < 2**41 (1 + 1e-5), so 2**21 units add up to less than 2**62 (1 + 1e-5): a plan may
  expect that many (``config.privacy.MAX_UNITS``), and a draw of a binomial number of units never comes near twice that.
* **What it costs in signal.** trunc moves each coordinate of a unit by less than s ≤ C · 2**-40 towards zero: less than
  1e-12 C a coordinate and unit, 3e-8 C in the norm of a unit with 10⁹ coordinates; fp32 rounding moves it by more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

#: Numbers that are rounded at a time, by device type: on a CPU so few that they stay in its cache. Other devices take
#: more, since each piece costs them kernels.
_CHUNK = {"cpu": 1 << 18}
_LARGEST_CHUNK = 1 << 26
#: Coordinates of a unit that are measured at a time, by device type; on a CPU fewer than torch cuts among threads.
_MEASURED = {"cpu": 1 << 14}
_LARGEST_MEASURED = 1 << 20
#: Units whose contributions are added up in float64 before the sum is: 2**11 times 2**41 (1 + 1e-5) is below 2**53.
_MOST_UNITS = 1 << 11


def on_grid(factors: torch.Tensor, exponent: int) -> torch.Tensor:
    """Return float32 weights v = w / s that turn a gradient into its contribution in grid steps.

    Args:
        factors: clipping factors, float64: a factor below fp32's normal numbers would be rounded by more than 2**-24.
        exponent: the grid is 2**exponent.
    """
    assert factors.dtype == torch.float64
    return (factors * 2.0**-exponent).float()


def add_units(total: torch.Tensor, gradients: torch.Tensor, weights: torch.Tensor) -> None:
    """Add ``Σ_u trunc(weight_u · gradient_u)`` to ``total``, exactly; weight zero adds nothing, NaN or not.

    Args:
        total: int64, contiguous.
        gradients: [units, *shape of total] float32.
        weights: [units] float32 of :func:`on_grid`, on the CPU, so that nobody waits to see which are zero.
    """
    used = np.flatnonzero(weights.numpy()).tolist()
    if not used:
        return
    values = gradients.flatten(1)
    if len(used) == 1:
        (unit,) = used
        values, weights = values[unit : unit + 1], weights[used]  # a view: one unit needs no copy
    elif len(used) < len(weights):
        values, weights = values[used], weights[used]
    for some_values, some_weights in zip(values.split(_MOST_UNITS), weights.split(_MOST_UNITS), strict=True):
        steps = _steps(some_weights, some_values)
        for piece, columns in _pieces(total, some_values):
            _add(piece, torch.div(columns, steps, rounding_mode="trunc"))


def add_groups(totals: Sequence[torch.Tensor], gradients: torch.Tensor, weights: torch.Tensor) -> None:
    """Add units as :func:`add_units` does, for tensors of one shape together.

    Args:
        totals: each int64, contiguous.
        gradients: [units, tensors, *shape of a total] float32.
        weights: [tensors, units] float32 of :func:`on_grid`, on the CPU.
    """
    used = np.flatnonzero(weights.numpy().any(axis=0)).tolist()
    if not used:
        return
    values = gradients.flatten(2) if len(used) == gradients.shape[0] else gradients[used].flatten(2)
    weights = weights[:, used].T.contiguous()  # [units, tensors], as ``values``
    # One tensor at a time where a unit counts for some of them only, or float64 cannot add up so many units exactly.
    if values.shape[0] > _MOST_UNITS or not weights.numpy().all():
        for i, total in enumerate(totals):
            add_units(total, values[:, i], weights[:, i])
        return
    steps = _steps(weights.flatten(), values).view(*weights.shape, 1)
    num_at_once = max(1, _CHUNK.get(values.device.type, _LARGEST_CHUNK) // values[:, 0].numel())  # tensors
    for first in range(0, len(totals), num_at_once):
        some = slice(first, first + num_at_once)
        contributions = torch.div(values[:, some], steps[:, some], rounding_mode="trunc")
        outs = [total.view(-1) for total in totals[some]]
        torch._foreach_add_(outs, list(_over_units(contributions).unbind(0)))


def add_measured(total: torch.Tensor, gradients: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Add units as :func:`add_units` does, overwriting ``gradients``.

    Returns:
        [units] float64 squared norms of what was added, in grid steps.
    """
    of_units = zip(gradients.flatten(1).split(_MOST_UNITS), weights.split(_MOST_UNITS), strict=True)
    return torch.cat([_add_measured(total, some_values, some_weights) for some_values, some_weights in of_units])


def _add_measured(total: torch.Tensor, values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Do :func:`add_measured` for as many units as are added up at once: ``values`` are [units, coordinates]."""
    assert len(weights) <= _MOST_UNITS
    squares = torch.zeros(len(weights), dtype=torch.float64, device=total.device)
    steps = _steps(weights, values)
    size = max(1, min(_MEASURED.get(values.device.type, _LARGEST_MEASURED), total.numel()))
    # One buffer: to get it anew for each piece costs a CPU as much as to fill it.
    buffer = torch.empty(len(weights), size, dtype=torch.float64, device=total.device)
    for piece, columns in zip(total.view(-1).split(size), values.split(size, dim=1), strict=True):
        torch.div(columns, steps, rounding_mode="trunc", out=columns)
        wide = buffer[:, : columns.shape[1]].copy_(columns)
        # A unit by itself, and as much of it whoever else is added: both decide in which order kernels add up, and the
        # last bits decide whether the unit is taken back.
        squares += torch.stack(torch._foreach_norm(list(wide.unbind(0)))).square()
        _add(piece, wide)
    return squares


def _steps(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return [units, 1]: u = 1 / v, by which each unit's gradient is divided to get grid steps.

    Dividing and truncating is one kernel, while torch.trunc by itself is not vectorised on CPUs.
    """
    assert values.dtype == weights.dtype == torch.float32
    return weights.reciprocal()[:, None].to(values.device, non_blocking=True)


def _pieces(total: torch.Tensor, values: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Cut ``total`` and ``values`` ([units, coordinates]) into pairs of the same coordinates, a chunk at a time."""
    size = max(1, _CHUNK.get(values.device.type, _LARGEST_CHUNK) // max(1, len(values)))
    return zip(total.view(-1).split(size), values.split(size, dim=1), strict=True)


def _add(total: torch.Tensor, contributions: torch.Tensor) -> None:
    """Add [units, coordinates] contributions in grid steps to ``total``."""
    assert total.dtype == torch.int64
    total.add_(_over_units(contributions))


def _over_units(contributions: torch.Tensor) -> torch.Tensor:
    """Return the int64 sum over at most 2**11 units: below 2**53, where float64 adds integers exactly."""
    summed = contributions[0] if len(contributions) == 1 else contributions.sum(dim=0, dtype=torch.float64)
    return summed.to(torch.int64)


def add_unit(total: torch.Tensor, gradient: torch.Tensor, weight: float) -> None:
    """Add one unit: ``total += trunc(weight · gradient)``."""
    add_units(total, gradient[None], torch.tensor([weight]))


def as_float32(total: torch.Tensor, exponent: int) -> torch.Tensor:
    """Return an int64 sum in units of 2**``exponent`` as fp32 values: to compare, and where no noise is to be added."""
    vector = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    for part, out in zip(total.split(_LARGEST_CHUNK), vector.split(_LARGEST_CHUNK), strict=True):
        out.copy_(part.double().mul_(2.0**exponent))
    return vector
