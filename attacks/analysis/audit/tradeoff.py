"""The one-run audit against a whole trade-off curve (Mahloujifar, Melis and Chaudhuri 2024, arXiv 2410.22235).

Setting and counts of :mod:`attacks.analysis.audit.one_run`: m fair coins, c' guesses, exactly i of them right with
probability p_i. Take a unit j at random and the event "j was guessed right, and i of all guesses were". Exchange j's
coin alone: the same output now has j wrong and i - 1 right. So if no test of one unit has a true positive rate above
g(false positive rate), g concave, then for every c

    (1/m) sum_{i >= c} i p_i  <=  g( (1/m) sum_{i >= c - 1} (c' - i) p_i ).

Given the tail p_{>= c} = a, these lines for c, c - 1, .., 1 force probability onto smaller counts; where more than 1 is
forced, a tail of a is impossible. No delta is paid for m times, which is why this beats the (epsilon, delta) form.

Two uses, and only the first speaks of what the run claims:

* the certified curve of the run itself, and then a rejection contradicts mechanism or accounting as claimed;
* a Gaussian curve. A rejection then says "not this Gaussian". It is not an assumption-free epsilon: a mechanism of
  another shape may have a smaller one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import scipy.optimize
import scipy.special

from accountants.methods import gdp
from attacks.analysis.statistics import Bound, CurveBound, DpBound

InverseCurve = Callable[[float], float]
"""From a true positive rate to the smallest false positive rate that a test of that rate must have."""

_PRECISION = 1e-6
_LARGEST_MU = 64.0


def gaussian(mu: float) -> InverseCurve:
    """Return the curve of mu-GDP: telling N(0, 1) from N(mu, 1)."""
    return lambda rate: float(scipy.special.ndtr(scipy.special.ndtri(rate) - mu))


def of_points(bound: Bound) -> InverseCurve:
    """Return the inverse of the trade-off curve that all of a bound's (epsilon, delta) points allow together."""
    points = bound.points if isinstance(bound, CurveBound) else (bound,)
    assert all(isinstance(point, DpBound) for point in points), points
    # (e^-epsilon, delta) of each point; past epsilon 700 float64 would underflow to 0.
    lines = [(math.exp(-min(point.epsilon, 700.0)), point.delta) for point in points if isinstance(point, DpBound)]

    def inverse(rate: float) -> float:
        # A point bounds the TPR by two lines, e^eps x + delta and 1 - e^-eps (1 - delta - x). Solve both for the FPR x.
        # The lowest of all lines binds, and the inverse of the lowest is the largest of the inverses.
        least = 0.0
        for shrink, delta in lines:
            of_first, of_second = shrink * (rate - delta), 1.0 - delta - (1.0 - rate) / shrink
            least = max(least, of_first, of_second)
        return min(least, 1.0)

    return inverse


def is_possible(inverse: InverseCurve, num_coins: int, num_guesses: int, num_correct: int, tail: float) -> bool:
    """Return whether the curve leaves room for at least ``num_correct`` right guesses with probability ``tail``.

    The tail is placed on the count that forces least. Then, for each smaller count in turn, the module's inequality
    says how much probability must lie there at least. If all of it adds up to more than 1, the tail is impossible.

    Args:
        inverse: of the trade-off curve: the module's g, concave, and the same in both directions of the relation.
        num_coins: m.
        num_guesses: c', fixed before the scores were seen.
        num_correct: c.
        tail: a.
    """
    # The two sums of the module's inequality over the probability placed so far: (1/m) sum i p_i of right guesses, and
    # (1/m) sum (c' - i) p_i of wrong ones. All of the tail at exactly c forces the least.
    right = tail * num_correct / num_coins
    wrong = tail * (num_guesses - num_correct) / num_coins
    for count in range(num_correct - 1, -1, -1):
        # ``right`` is the left side of the inequality for c = count + 1; ``wrong`` is the argument of g on its right
        # side, still without the probability of exactly ``count``.
        forced = inverse(right)
        if forced <= wrong:
            # Nothing is forced here, and with the same two sums nothing will be further down.
            break
        # The missing weight goes to exactly ``count`` right guesses: it adds to both sums, in proportion.
        right += (forced - wrong) * count / (num_guesses - count)
        wrong = forced
        # The two sums add up to c' / m times the probability that is placed, which is at most 1.
        if right + wrong > num_guesses / num_coins:
            return False
    return right + wrong <= num_guesses / num_coins


def p_value(inverse: InverseCurve, num_coins: int, num_guesses: int, num_correct: int) -> float:
    """Return the largest chance that a mechanism within the curve gives to this many right guesses or more.

    Returns:
        An upper bound in (0, 1], found by bisection to one part in a hundred.
    """
    if num_correct == 0 or is_possible(inverse, num_coins, num_guesses, num_correct, 1.0):
        return 1.0
    low, high = 1e-12, 1.0  # no smaller p-value is told apart
    if not is_possible(inverse, num_coins, num_guesses, num_correct, low):
        return low
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        if is_possible(inverse, num_coins, num_guesses, num_correct, middle):
            low = middle
        else:
            high = middle
    return high


def mu_lower_bound(num_coins: int, num_guesses: int, num_correct: int, significance: float) -> float:
    """Return the smallest mu whose Gaussian curve these guesses do not contradict.

    Args:
        num_coins: m.
        num_guesses: c', fixed beforehand.
        num_correct: c.
        significance: in (0, 1).

    Returns:
        At least 0; holds for mechanisms that are mu-GDP for some mu, in the unit whose coins were flipped.
    """

    def contradicts(mu: float) -> bool:
        return not is_possible(gaussian(mu), num_coins, num_guesses, num_correct, significance)

    if num_guesses == 0 or not contradicts(0.0):
        return 0.0
    # Double until it is not contradicted any more, then bisect; ``low`` is contradicted throughout.
    low, high = 0.0, 1.0
    while contradicts(high):
        low, high = high, 2.0 * high
        if high > _LARGEST_MU:
            return low
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        low, high = (middle, high) if contradicts(middle) else (low, middle)
    return low


def gaussian_epsilon_lower_bound(
    num_coins: int, num_guesses: int, num_correct: int, delta: float, significance: float
) -> float:
    """Return epsilon at ``delta`` of the curve of :func:`mu_lower_bound`; it holds for Gaussian mechanisms only."""
    mu = mu_lower_bound(num_coins, num_guesses, num_correct, significance)
    return gdp.gdp_epsilon(mu, delta) if mu > 0.0 else 0.0
