"""Sums over units released with the gradient in one Gaussian mechanism: adaptive clipping's count, noised metrics.

Each unit adds a number in [-1/2, 1/2] that depends on it alone, so a unit that is added or removed moves a sum by at
most 1/2, and noise of standard deviation ``noise`` makes it a Gaussian release of multiplier ``2 * noise`` (Andrew et
al. 2021, arXiv 1905.03871, theorem 1). Gradient and auxiliary sums are one Gaussian release of the plan's noise
multiplier: the gradient's noise is raised for it
(:attr:`~privtrain.privacy.plan.PrivacyPlan.gradient_noise_multiplier`), and the step is accounted for once.

The numbers are rounded towards zero to a public grid and added as integers, so that a sum does not depend on order,
microbatches or ranks; it leaves through the same door as the gradient (:mod:`privtrain.privacy.noise`).

Adaptive clipping (arXiv 1905.03871): after a step with norm C the count Σ_u (b_u - 1/2) is released with noise of
standard deviation ``count_noise``, where b_u says whether unit u's norm was within C. With b the released share, C is
then multiplied by exp(-learning_rate · (b - target_quantile)). So every norm is a function of counts released before:
public, the same on all ranks and in a replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from privtrain.backends import Backend
from privtrain.clipping import ClippingDiagnostics
from privtrain.errors import GuaranteeLost
from privtrain.privacy import fixed_point
from privtrain.privacy.noise import StepNoise, noised
from privtrain.privacy.plan import LOSS, WITHIN_NORM, AdaptiveClipping, PrivacyPlan

#: Most that one unit adds to a sum, and the exponent of the grid that the sums lie on.
SENSITIVITY = 0.5
EXPONENT = fixed_point.grid_exponent(SENSITIVITY)


def noise_name(auxiliary_sum: str) -> str:
    """Return the name of an auxiliary sum's noise; no tensor is called so."""
    return f"rider: {auxiliary_sum}"  # part of the noise key: runs in progress depend on it


def sums(plan: PrivacyPlan, counts: ClippingDiagnostics) -> dict[str, int]:
    """Return this rank's part of every auxiliary sum, without noise: private.

    Args:
        plan: says which sums are released: the count of units within the clipping norm, the sum of losses, or both.
        counts: what the clipper noted of this rank's units in the step.

    Returns:
        Name of the sum → an integer, in steps of 2**EXPONENT.
    """
    totals = {}
    for auxiliary_sum in plan.auxiliary_sums:
        if auxiliary_sum.name == WITHIN_NORM:
            totals[auxiliary_sum.name] = sum(_on_grid(share - 0.5) for share in counts.shares_within)
        else:
            assert auxiliary_sum.name == LOSS
            assert plan.noised_metrics is not None
            low, high = plan.noised_metrics.loss_range
            totals[auxiliary_sum.name] = sum(
                _on_grid(_centred(loss, low, high)) for loss in counts.unit_losses.values()
            )
    return totals


def reduced(plan: PrivacyPlan, counts: ClippingDiagnostics, backend: Backend) -> dict[str, int]:
    """Return every auxiliary sum over all ranks, exactly. All ranks call it together."""
    mine = sums(plan, counts)
    if not mine:
        return {}
    vector = torch.tensor(list(mine.values()), dtype=torch.int64, device=backend.device)
    backend.reduce(vector)
    return dict(zip(mine, vector.tolist(), strict=True))


def release(plan: PrivacyPlan, totals: Mapping[str, int], noise: StepNoise) -> dict[str, float]:
    """Add each auxiliary sum's noise.

    Args:
        plan: with the sums' noise and the expected batch size.
        totals: of :func:`reduced`: over all ranks, without noise.
        noise: the step's source of noise, the same on every rank.

    Returns:
        Name of the sum → its value with noise, divided by the expected batch size, a public constant that stands for
        the number of units; the same on every rank.
    """
    released = {}
    for auxiliary_sum in plan.auxiliary_sums:
        name = auxiliary_sum.name
        total = noised(
            torch.tensor([totals[name]]),
            exponent=EXPONENT,
            stddev=auxiliary_sum.noise,
            noise=noise,
            name=noise_name(name),
        )
        released[name] = float(total) / plan.expected_batch_size
    return released


def share_within(released: Mapping[str, float]) -> float:
    """Return the share of units within the clipping norm, with noise."""
    return 0.5 + released[WITHIN_NORM]


def metrics(plan: PrivacyPlan, released: Mapping[str, float]) -> dict[str, float]:
    """Return a step's noised metrics, e.g. ``noised/loss``, and the standard deviation of the noise in each.

    They cost no ε: they are computed from the released sums, ``released`` of :func:`release`, alone.
    """
    if plan.noised_metrics is None:
        return {}
    low, high = plan.noised_metrics.loss_range
    stddevs = plan.metric_stddevs
    values = {}
    for metric in plan.noised_metrics.release:
        # A loss is mapped back from what _centred made of it; the other metric is the share of units that were clipped.
        value = (low + high) / 2 + (high - low) * released[LOSS] if metric == "loss" else 1 - share_within(released)
        values |= {f"noised/{metric}": value, f"noised/{metric}_stddev": stddevs[metric]}
    return values


def _centred(loss: float, low: float, high: float) -> float:
    """Return a loss cut to [``low``, ``high``] and mapped to [-1/2, 1/2]; NaN counts as the largest."""
    inside = high if math.isnan(loss) else min(max(loss, low), high)
    return (inside - low) / (high - low) - 0.5


def _on_grid(value: float) -> int:
    """Return a unit's contribution as an integer multiple of 2**EXPONENT, rounded towards zero."""
    assert abs(value) <= SENSITIVITY
    return math.trunc(math.ldexp(value, -EXPONENT))


#: The norm changes by at most a factor e in a step, whatever the noise.
_MOST_LOG_CHANGE = 1.0

#: The norm may grow or shrink by this factor over the run.
_FURTHEST = 1e12


def next_norm(settings: AdaptiveClipping, clipping_norm: float, share: float, *, initial_norm: float) -> float:
    """Return the next step's clipping norm, computed from released values alone.

    Args:
        settings: learning rate and target of the share within the norm.
        clipping_norm: of this step.
        share: of units within it, with noise, as released.
        initial_norm: of the first step.

    Raises:
        GuaranteeLost: if it has left [1e-12, 1e12] times ``initial_norm``, beyond which fp32 may lose noise or sum.
    """
    change = settings.learning_rate * (settings.target_quantile - share)
    norm = clipping_norm * math.exp(min(max(change, -_MOST_LOG_CHANGE), _MOST_LOG_CHANGE))
    if not initial_norm / _FURTHEST <= norm <= initial_norm * _FURTHEST:
        raise GuaranteeLost(
            f"the clipping norm went from privacy.clipping_norm {initial_norm:g} to {norm:g}, past a factor of "
            f"{_FURTHEST:g}; start a new run with another privacy.clipping_norm, a lower "
            "privacy.adaptive_clipping.learning_rate or a target_quantile nearer to 0.5"
        )
    return norm
