"""A lower bound on epsilon from one training run (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, theorem 5.2).

m units each had an independent fair coin; heads went into training. Someone who sees the model guesses r of the coins
and abstains from the rest; v guesses are right. If the model is (epsilon, delta)-DP for adding or removing one unit
then, whatever the guesser does and however the units' scores hang together,

    P[at least v right] <= P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i,   B ~ Binomial(r, e^eps / (1 + e^eps)).

r is a constant: whoever tries several and keeps the best has to pay for the search
(:mod:`attacks.analysis.audit.guesses`).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special

_PRECISION = 1e-7


def p_value(num_coins: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> float:
    """Return the largest chance that an (epsilon, delta)-DP mechanism gives to this many right guesses or more.

    Args:
        num_coins: m, coins flipped, guessed or not.
        num_guesses: r, fixed before the scores were seen.
        num_correct: v.
        epsilon: of the claim, at least 0.
        delta: of the claim.
    """
    assert 0 <= num_correct <= num_guesses <= num_coins, (num_correct, num_guesses, num_coins)
    assert epsilon >= 0.0, epsilon
    assert 0.0 <= delta <= 1.0, delta
    if num_correct == 0:
        return 1.0
    prob = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(_at_least(np.array([num_correct]), num_guesses, prob)[0])
    if delta == 0.0:
        return tail
    # The i of the theorem, up to where v - i lies far below the mean of B (10 sqrt(r), above ten standard deviations):
    # beyond it P[v > B >= v - i] grows no more, so its quotient by i only falls.
    most = num_correct - num_guesses * prob + 10.0 * math.sqrt(num_guesses)
    counts = np.arange(1, min(num_correct, max(1, math.ceil(most))) + 1)
    # Upper tails throughout: differences of lower ones would cancel.
    slack = float(np.max((_at_least(num_correct - counts, num_guesses, prob) - tail) / counts))
    return min(tail + 2.0 * num_coins * delta * slack, 1.0)


def _at_least(counts: npt.NDArray[np.int64], num: int, prob: float) -> npt.NDArray[np.float64]:
    """Return P[Binomial(num, prob) >= count] for each count; not by scipy.stats, which takes ten times as long."""
    tails = scipy.special.betainc(np.maximum(counts, 1), num - counts + 1, prob)
    return np.where(counts <= 0, 1.0, tails)


@functools.lru_cache(maxsize=4096)  # tables of ceilings ask for the same few thousand bounds again and again
def epsilon_lower_bound(num_coins: int, num_guesses: int, num_correct: int, delta: float, significance: float) -> float:
    """Return the smallest epsilon, at least 0, that this many right guesses do not contradict.

    The true epsilon at ``delta`` is below it with probability at most ``significance``, for add-or-remove-one of the
    unit whose coins were flipped.

    Args:
        num_coins: m.
        num_guesses: r, fixed before the scores were seen.
        num_correct: v.
        delta: at which epsilon is asked for.
        significance: in (0, 1).
    """

    def excess(epsilon: float) -> float:
        return p_value(num_coins, num_guesses, num_correct, epsilon, delta) - significance

    if num_guesses == 0 or excess(0.0) >= 0.0:
        return 0.0
    high = 1.0
    while excess(high) < 0.0:
        high *= 2.0
    # The last doubling crossed the root, so it lies between the last two values of ``high``.
    bracket = (0.0 if high == 1.0 else high / 2.0, high)
    root = scipy.optimize.root_scalar(excess, bracket=bracket, xtol=_PRECISION).root
    return max(float(root) - _PRECISION, 0.0)


def correct_guesses_needed(
    num_coins: int, num_guesses: int, epsilon: float, delta: float, significance: float
) -> int | None:
    """Return the fewest right guesses whose bound exceeds ``epsilon``; None if even all of them would not do.

    Args:
        num_coins: m.
        num_guesses: r.
        epsilon: to be exceeded.
        delta: at which.
        significance: of the bound.
    """
    low, high = 0, num_guesses  # bisection: ``high`` right guesses always suffice
    if p_value(num_coins, num_guesses, num_guesses, epsilon, delta) > significance:
        return None
    while low < high:
        middle = (low + high) // 2
        # The bound exceeds ``epsilon`` exactly if the guesses reject it.
        if p_value(num_coins, num_guesses, middle, epsilon, delta) <= significance:
            high = middle
        else:
            low = middle + 1
    return high
