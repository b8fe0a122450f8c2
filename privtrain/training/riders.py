"""Sums over units that ride on a step: adaptive clipping's count, and the metrics that are released with noise.

Each unit adds a number in [-1/2, 1/2] that depends on it alone, so a unit that is added or removed moves a sum by at
most 1/2, and noise of standard deviation ``noise`` makes it a Gaussian release of multiplier ``2 * noise`` (Andrew et
al. 2021, arXiv 1905.03871, theorem 1). Gradient and riders are one Gaussian release of the plan's noise multiplier: the
gradient's noise is raised for it (:attr:`~privtrain.plan.PrivacyPlan.gradient_noise_multiplier`), and the step is
accounted for once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from privtrain.backends import Backend
from privtrain.clipping import ClippingDiagnostics
from privtrain.noise import gaussian
from privtrain.plan import LOSS, WITHIN_NORM, PrivacyPlan
from privtrain.secret import SecretKey


def noise_name(rider: str) -> str:
    """Name of a rider's noise; no tensor is called so."""
    return f"rider: {rider}"


def sums(plan: PrivacyPlan, counts: ClippingDiagnostics) -> dict[str, float]:
    """This rank's part of every rider's sum, without noise: private.

    A loss that is not a number counts as the largest: it says nothing of how large it would be.
    """
    found = {}
    for rider in plan.riders:
        if rider.name == WITHIN_NORM:
            found[rider.name] = counts.sum_within - counts.num_units / 2
        else:
            assert rider.name == LOSS
            assert plan.noised_metrics is not None
            low, high = plan.noised_metrics.loss_range
            found[rider.name] = math.fsum(_centred(loss, low, high) for loss in counts.unit_losses.values())
    return found


def release(
    plan: PrivacyPlan, counts: ClippingDiagnostics, *, backend: Backend, key: SecretKey, step: int
) -> dict[str, float]:
    """Release every rider. All ranks call it together.

    Args:
        plan: which riders, and their noise.
        counts: this rank's units.
        backend: adds up the ranks'.
        key: secret of the run's current generation.
        step: the logical step.

    Returns:
        Rider → its sum with noise, divided by the expected batch size, the constant that stands for the number of
        units; the same on every rank.
    """
    if not plan.riders:
        return {}
    # Whole and fractional parts apart: fp32 adds both without error that a unit could hide in.
    parts = [(math.floor(value), value - math.floor(value)) for value in sums(plan, counts).values()]
    vector = torch.tensor(parts, dtype=torch.float32, device=backend.device)
    backend.reduce(vector)
    totals = vector.double().sum(dim=1).tolist()
    return {
        rider.name: (total + rider.noise * _standard_normal(key, step, rider.name)) / plan.expected_batch_size
        for rider, total in zip(plan.riders, totals, strict=True)
    }


def share_within(released: Mapping[str, float]) -> float:
    """The share of units within the clipping norm, with noise."""
    return 0.5 + released[WITHIN_NORM]


def metrics(plan: PrivacyPlan, released: Mapping[str, float]) -> dict[str, float]:
    """The noised metrics of a step and the standard deviation of their noise: post-processing of what was released."""
    if plan.noised_metrics is None:
        return {}
    low, high = plan.noised_metrics.loss_range
    stddevs = plan.metric_stddevs
    found = {}
    for metric in plan.noised_metrics.release:
        value = (low + high) / 2 + (high - low) * released[LOSS] if metric == "loss" else 1 - share_within(released)
        found |= {f"noised/{metric}": value, f"noised/{metric}_stddev": stddevs[metric]}
    return found


def _centred(loss: float, low: float, high: float) -> float:
    inside = high if math.isnan(loss) else min(max(loss, low), high)
    return (inside - low) / (high - low) - 0.5


def _standard_normal(key: SecretKey, step: int, rider: str) -> float:
    return float(gaussian(key, step, noise_name(rider), 0, 1)[0])
