"""Adaptive quantile clipping: the norm follows a quantile of the units' norms (Andrew et al. 2021, arXiv 1905.03871).

After a step with norm C, the count Σ_u (b_u - 1/2) is released with Gaussian noise of standard deviation
``count_noise``, where b_u says whether unit u's norm was within C. With b the released share, C is then multiplied by
exp(-learning_rate · (b - target_quantile)). One unit moves the count by at most 1/2, so it is a Gaussian release of
multiplier 2 · count_noise that rides on the step, and the gradient's noise is raised so that both together have the
plan's noise multiplier (theorem 1): the step is accounted for once.

Every norm is a function of counts released before, so it is public, the same on all ranks and in a replay.
"""

from __future__ import annotations

import math

import torch

from privtrain.backends import Backend
from privtrain.clipping import ClippingDiagnostics
from privtrain.errors import GuaranteeLost
from privtrain.noise import gaussian
from privtrain.plan import AdaptiveClipping
from privtrain.secret import SecretKey

#: Name of the count's noise; no tensor is called so.
COUNT_NOISE_NAME = "adaptive clipping: count"

#: The norm changes by at most a factor e in a step, whatever the noise.
_MOST_LOG_CHANGE = 1.0

#: A norm this many times the first one, or its share, is no clipping norm of anything.
_FURTHEST = 1e12


def release_share(
    settings: AdaptiveClipping,
    counts: ClippingDiagnostics,
    *,
    backend: Backend,
    key: SecretKey,
    step: int,
    expected_batch_size: float,
) -> float:
    """Release the share of a step's units whose norm was within the clipping norm. All ranks call it together.

    Args:
        settings: gives the noise.
        counts: this rank's units.
        backend: adds up the ranks'.
        key: secret of the run's current generation.
        step: the logical step.
        expected_batch_size: the constant that stands for the number of units.

    Returns:
        The share, with noise of standard deviation ``count_noise / expected_batch_size``: the same on every rank.
    """
    # Whole and fractional parts apart: fp32 adds both without error that a unit could hide in.
    shifted = counts.sum_within - counts.num_units / 2
    whole = math.floor(shifted)
    sums = torch.tensor([whole, shifted - whole], dtype=torch.float32, device=backend.device)
    backend.reduce(sums)
    noise = settings.count_noise * float(gaussian(key, step, COUNT_NOISE_NAME, 0, 1)[0])
    return 0.5 + (float(sums.double().sum()) + noise) / expected_batch_size


def next_norm(settings: AdaptiveClipping, clipping_norm: float, share: float, *, initial_norm: float) -> float:
    """The next step's clipping norm: post-processing of the released share.

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
