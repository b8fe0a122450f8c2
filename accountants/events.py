"""What a training run released, as ``dp_accounting`` event values."""

from __future__ import annotations

import dp_accounting


def dp_sgd_event(*, noise_multiplier: float, sampling_prob: float, num_steps: int) -> dp_accounting.DpEvent:
    """The event of ``num_steps`` Poisson-sampled Gaussian releases.

    Args:
        noise_multiplier: standard deviation of the noise divided by the clipping norm; 0 means no noise at all.
        sampling_prob: the probability with which each privacy unit joins a step, independently, in (0, 1].
        num_steps: the number of steps; 0 gives the event that releases nothing.

    Returns:
        An event for the add-or-remove-one relation over the unit that is sampled and clipped: if users are sampled and
        each user's whole gradient is clipped once, the unit is the user (Chua et al. 2024, arXiv 2406.14322).

    Raises:
        ValueError: if an argument is outside its range.
    """
    if not 0 < sampling_prob <= 1:
        raise ValueError(f"sampling_prob={sampling_prob} must lie in (0, 1]")
    if noise_multiplier < 0:
        raise ValueError(f"noise_multiplier={noise_multiplier} must not be negative")
    if num_steps < 0:
        raise ValueError(f"num_steps={num_steps} must not be negative")
    if num_steps == 0:
        return dp_accounting.NoOpDpEvent()
    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_prob < 1:
        step = dp_accounting.PoissonSampledDpEvent(sampling_prob, step)
    return dp_accounting.SelfComposedDpEvent(step, num_steps)
