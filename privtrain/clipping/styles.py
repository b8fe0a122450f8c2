"""From a unit's norms to the factor that its gradient is multiplied by: one function a clipping style.

Every style but ``batch`` bounds the L2 norm of a unit's contribution, over all trainable tensors, by the plan's
clipping norm C; that is the sensitivity that the clipper states and the noise is scaled by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from privtrain.privacy import fixed_point
from privtrain.privacy.layout import Layout

#: Gamma of automatic clipping (Bu et al. 2022, arXiv 2206.07136, section 3.2): limits how far small ones are blown up.
AUTOMATIC_GAMMA = 0.01

#: Width of the band around the clipping norm in which :func:`within` steps down, relative to it.
_BAND = 0.02

#: Style ``batch`` bounds the mean of a step and no unit. So that integers cannot overflow, a unit is bounded all the
#: same, by the larger of two norms: the first, far above any gradient that still trains, and the second in clipping
#: norms, above any that the self-test plants.
_BATCH_BOUND, _BATCH_CLIPPING_NORMS = 2.0**13, 2.0**14


def groups(style: str, layout: Layout) -> list[int]:
    """Return the number of the group that each slot (trainable tensor) is in: one norm is taken over each group.

    ``per_layer`` puts the tensors of a module (weight and bias) in a group; the other styles have one group.
    """
    if style != "per_layer":
        return [0] * len(layout.slots)
    modules = [slot.name.rpartition(".")[0] for slot in layout.slots]
    # Numbered in the order of their first slots.
    numbers = {name: i for i, name in enumerate(dict.fromkeys(modules))}
    return [numbers[name] for name in modules]


def factors(style: str, norms: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    """Return [groups, units]: what to multiply gradients by; 0 for a unit with a norm that is not finite.

    * ``flat``: min(1, C/‖g‖), Abadi et al. 2016 (arXiv 1607.00133); ``adaptive`` is the same with a C that changes.
    * ``per_layer``: min(1, (C/√L)/‖g_l‖) for each of L layers, so that the whole has norm at most C
      (McMahan et al. 2018, arXiv 1812.06210, section 2).
    * ``automatic``: C/(‖g‖ + gamma), Bu et al. 2022 (arXiv 2206.07136): every unit counts alike.
    * ``batch``: 1 for every norm up to 8192, no unit is bounded; :func:`batch_factor` is for the sum. Never with noise,
      which it would not match.

    Args:
        style: one of the above.
        norms: [groups, units], not negative.
        clipping_norm: C.
    """
    if style == "batch":
        bound = _bound(style, clipping_norm)
        scaled = bound / norms.clamp(min=bound)
    elif style == "automatic":
        scaled = clipping_norm / (norms + AUTOMATIC_GAMMA)
    else:
        bound = clipping_norm / math.sqrt(norms.shape[0])
        scaled = bound / norms.clamp(min=bound)
    return torch.where(torch.isfinite(norms).all(dim=0), scaled, 0.0)


def grid_exponent(style: str, clipping_norm: float) -> int:
    """Return the exponent e: the sum over units is in multiples of 2**e (:mod:`.exact_sum`)."""
    return fixed_point.grid_exponent(_bound(style, clipping_norm))


def _bound(style: str, clipping_norm: float) -> float:
    """Return the norm that no unit's contribution exceeds."""
    return max(_BATCH_BOUND, _BATCH_CLIPPING_NORMS * clipping_norm) if style == "batch" else clipping_norm


def batch_factor(norm_of_mean: float, clipping_norm: float) -> float:
    """Return what ``batch`` multiplies a step's mean gradient by: min(1, C/‖mean‖)."""
    return min(1.0, clipping_norm / norm_of_mean) if norm_of_mean > 0 else 1.0


def within(norms: torch.Tensor, clipping_norm: float) -> torch.Tensor:
    """Return [units] from 1 well within the clipping norm to 0 beyond, or not finite: for adaptive clipping's count.

    Steps down over a narrow band around C instead of at C: a unit at exactly C, whose norm is rounded one way or the
    other by who else is in the step, would otherwise move the count although nobody added or removed it.

    Args:
        norms: [units] over all tensors.
        clipping_norm: C.
    """
    share = 0.5 + (clipping_norm - norms) / (_BAND * clipping_norm)
    return torch.where(torch.isfinite(norms), share.clamp(0, 1), 0.0)


def summed(squares: torch.Tensor) -> torch.Tensor:
    """Return [1, units] sums over slots, added one after another.

    The order in which torch adds up a column depends on the column's place, so a unit's sum would depend on the others.

    Args:
        squares: [slots, units] on the CPU.
    """
    return torch.from_numpy(np.add.accumulate(squares.numpy(), axis=0)[-1:])


def group_norms(squares: torch.Tensor, group_of_slot: Sequence[int]) -> torch.Tensor:
    """Return [groups, units] norms from [slots, units] squared norms; ``group_of_slot`` is that of :func:`groups`."""
    return group_sums(squares, group_of_slot).sqrt()


def group_sums(values: torch.Tensor, group_of_slot: Sequence[int]) -> torch.Tensor:
    """Return [groups, units] sums of [slots, units] values; ``group_of_slot`` is that of :func:`groups`."""
    index = torch.tensor(group_of_slot, device=values.device)
    sums = torch.zeros(max(group_of_slot) + 1, values.shape[1], dtype=values.dtype, device=values.device)
    return sums.index_add_(0, index, values)
