"""Find the noise for a budget. Only certified upper bounds may decide."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize

from accountants.events import dp_sgd_event
from accountants.pld import pld_epsilon

#: Noise multipliers are rounded up to this many decimals: readable in a config, and on the safe side.
DECIMALS = 4

_SMALLEST, _LARGEST = 0.05, 1e4


class CalibrationError(ValueError):
    """No noise multiplier in the searched range meets the target."""


def calibrate_noise_multiplier(
    *, target_epsilon: float, target_delta: float, sampling_prob: float, num_steps: int
) -> float:
    """The smallest noise multiplier, rounded up, whose certified ε does not exceed the target.

    Args:
        target_epsilon: ε > 0 for the add-or-remove-one relation.
        target_delta: δ in [1e-11, 1).
        sampling_prob: Poisson sampling probability per unit and step.
        num_steps: the number of steps, at least 1.

    Returns:
        The noise multiplier (noise standard deviation over clipping norm), with at most four decimals.

    Raises:
        CalibrationError: if the target cannot be met below a noise multiplier of 1e4.
        ValueError: if an argument is outside its range.
    """
    if not target_epsilon > 0:
        raise ValueError(f"target_epsilon={target_epsilon} must be positive")
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")

    def spent(noise_multiplier: float) -> float:
        event = dp_sgd_event(noise_multiplier=noise_multiplier, sampling_prob=sampling_prob, num_steps=num_steps)
        return pld_epsilon(event, target_delta).certified_upper()

    low, high = _bracket(spent, target_epsilon)
    step = 10.0**-DECIMALS
    if low < high:
        root = optimize.brentq(lambda s: math.log(max(spent(s), 1e-300) / target_epsilon), low, high, xtol=step / 4)
        high = float(root)
    result = round(math.ceil(high / step) * step, DECIMALS)
    while spent(result) > target_epsilon:
        result = round(result + step, DECIMALS)
    return result


def _bracket(spent: Callable[[float], float], target_epsilon: float) -> tuple[float, float]:
    """Two noise multipliers around the answer, walking down from 1: tiny ones build huge distributions."""
    high = 1.0
    while spent(high) > target_epsilon:
        high *= 2
        if high > _LARGEST:
            raise CalibrationError(f"target_epsilon={target_epsilon} needs a noise multiplier above {_LARGEST:g}")
    low = high / 2
    while low > _SMALLEST and spent(low) <= target_epsilon:
        low, high = low / 2, low
    return (low, high) if spent(low) > target_epsilon else (low, low)
