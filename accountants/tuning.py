"""The price of choosing the best of several runs.

Papernot and Steinke 2022 (arXiv 2110.03620). A random number of runs is drawn, each is (q, sigma, T)-DP-SGD
under one common bound, and only the best by a score that is itself private or post-processing is released. The number
of runs must be random: a fixed number of tries has no such bound. Renyi accounting only.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math

import dp_accounting
from dp_accounting import dp_event

from accountants.numerics.roots import bracketed_root

#: Shapes of the number of runs by name: truncated negative binomial, and Poisson as its limit.
SHAPES = {"logarithmic": 0.0, "geometric": 1.0, "poisson": math.inf}


def tuning_event(event: dp_accounting.DpEvent, *, mean_runs: float, shape: str = "geometric") -> dp_accounting.DpEvent:
    """Return the event of releasing the best of a random number of runs.

    Args:
        event: one run.
        mean_runs: the expected number of runs, at least 1.
        shape: ``"logarithmic"``, ``"geometric"`` or ``"poisson"`` (which may draw no run at all).

    Raises:
        ValueError: if the shape is unknown or the mean below 1.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape={shape!r} is unknown; choose from {', '.join(SHAPES)}")
    if not mean_runs >= 1:
        raise ValueError(f"mean_runs={mean_runs} must be at least 1")
    return dp_event.RepeatAndSelectDpEvent(event, mean_runs, SHAPES[shape])


def draw_num_runs(uniform: float, *, mean_runs: float, shape: str) -> int:
    """Return the random number of runs that a uniform random number stands for.

    It is the smallest number at which the distribution function of the number of runs reaches ``uniform``.

    With a uniform on a grid of 2**-52 the number has the distribution of :func:`tuning_event` up to a total variation
    of 2**-52 a value.

    Args:
        uniform: strictly between 0 and 1, secret: the guarantee needs that nobody learns the number.
        mean_runs: the expected number of runs, at least 1.
        shape: ``"logarithmic"`` or ``"geometric"``, which draw at least one run.

    Raises:
        ValueError: if an argument is outside its range.
    """
    if not 0 < uniform < 1 or not mean_runs >= 1 or shape not in ("logarithmic", "geometric"):
        raise ValueError(f"uniform={uniform}, mean_runs={mean_runs}, shape={shape!r}: not a number of runs")
    if mean_runs == 1:
        return 1  # both shapes draw at least one run
    if shape == "geometric":
        return max(1, math.ceil(math.log1p(-uniform) / math.log1p(-1 / mean_runs)))
    rate = _rate_of_logarithmic(mean_runs)
    # Add up P(1), P(2), ... until `uniform` is reached, or they are too small for float64.
    ratio = -math.expm1(-rate)  # 1 - g: P(k) = (1 - g)^k / (k r)
    probability, below, count = ratio / rate, 0.0, 1  # P(count), and P of less than count
    while below + probability < uniform and probability > 0:
        below += probability
        probability *= ratio * count / (count + 1)
        count += 1
    return count


def _rate_of_logarithmic(mean_runs: float) -> float:
    """Return r = log(1/g), where P(k) = (1 - g)^k / (k r) has the mean (1/g - 1) / r; r is near 2 (mean - 1) at 1."""
    return bracketed_root(lambda rate: math.expm1(rate) / rate - mean_runs, 1e-17, 700.0)
