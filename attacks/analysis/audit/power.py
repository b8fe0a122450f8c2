"""Before training: how many coins an audit needs to show a wanted epsilon, or to notice a broken mechanism.

A coin decides for each planted unit (canary) whether it is trained on; the audit guesses the coins. The attack is
modelled: a unit's score is N(mu, 1) if it was in and N(0, 1) if not, and mu = infinity is the perfect attack. A
mechanism with exactly the claimed (epsilon, delta) gives even an attacker who reads everything no more than the mu of
the Gaussian curve through that point. One whose noise is f times too small gives f times that mu; f is called the
failure here. Real attacks get less out of a model, so every number of coins here is the fewest that could do.

A *guess* (:class:`.guesses.Guess`) says how many of the most extreme scores are guessed. The audit declares several
beforehand; those that could show anything are *telling*, and share the error equally.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import scipy.optimize
import scipy.stats

from accountants.methods import gdp
from attacks.analysis.audit import one_run
from attacks.analysis.audit.evaluate import SIGNIFICANCE, epsilon_ceiling
from attacks.analysis.audit.guesses import Guess, telling_guesses

MOST_COINS = 20_000
"""Beyond this the answer is that no audit will do."""

NUM_COINS = (20, 50, 100, 200, 500, 1000, 2000, 5000)
DELTAS = (1e-3, 1e-4, 1e-5, 1e-6)
"""At which an audit may be made, beside the claim's own."""

FAILURES = (1.0, 2.0, 4.0, 8.0, math.inf)
"""How much too small the noise is; infinity for none at all."""

POWER = 0.8
_DECIDING_TESTS = 2
"""Tests that share the error of each source of coins: the one-run bound and the test of the claimed curve."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What coins can show.

    Attributes:
        epsilon: claimed.
        delta: claimed.
        mu: of the Gaussian curve through that point: what an attacker gets at most if the claim is exact.
        target_epsilon: lower bound that is wanted; the claim by default.
        significance: error of the one-run bound.
        power: chance with which a bound in the table is reached.
        rows: for each number of coins the ceiling, the right guesses needed and the bound by failure.
        needed: failure (factor by which noise is too small) to the fewest coins with which the bound exceeds the
            target; None if more than ``MOST_COINS``.
        ceilings: delta of an audit to one ceiling for each row; the claim's own delta and others that could be chosen.
    """

    epsilon: float
    delta: float
    mu: float
    target_epsilon: float
    significance: float
    power: float
    rows: tuple[Row, ...]
    needed: dict[float, int | None]
    ceilings: dict[float, tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One number of coins.

    Attributes:
        num_coins: m.
        ceiling: bound if every guess is right.
        correct_needed: right guesses, of all m, with which the bound exceeds the target; None if all would not do.
        bounds: failure (factor by which noise is too small) to the bound that is reached with the plan's power.
    """

    num_coins: int
    ceiling: float
    correct_needed: int | None
    bounds: dict[float, float]


def plan(
    epsilon: float,
    delta: float,
    *,
    target_epsilon: float | None = None,
    num_sources: int = 1,
    power: float = POWER,
    num_coins: tuple[int, ...] = NUM_COINS,
) -> Plan:
    """Work out what coins can show of a claim.

    Args:
        epsilon: claimed, in the unit whose coins are flipped.
        delta: claimed.
        target_epsilon: lower bound that is wanted; the claimed epsilon if None.
        num_sources: sources of coins that share the error: 2 where canary users are planted beside the split's users.
        power: chance with which the bound is to be reached.
        num_coins: rows of the table.
    """
    target = epsilon if target_epsilon is None else target_epsilon
    significance = SIGNIFICANCE / (num_sources * _DECIDING_TESTS)
    mu = mu_of(epsilon, delta)
    rows = []
    for count in num_coins:
        share = _share(count, delta, significance)
        row = Row(
            num_coins=count,
            ceiling=epsilon_ceiling(count, delta, significance),
            correct_needed=one_run.correct_guesses_needed(count, count, target, delta, share),
            bounds={failure: reached(count, failure * mu, delta, significance, power) for failure in FAILURES},
        )
        rows.append(row)
    ceilings = {}
    for audit_delta in sorted({delta, *DELTAS}, reverse=True):
        ceilings[audit_delta] = tuple(epsilon_ceiling(count, audit_delta, significance) for count in num_coins)
    return Plan(
        epsilon=epsilon,
        delta=delta,
        mu=mu,
        target_epsilon=target,
        significance=significance,
        power=power,
        rows=tuple(rows),
        needed={failure: coins_needed(target, failure * mu, delta, significance, power) for failure in FAILURES},
        ceilings=ceilings,
    )


def mu_of(epsilon: float, delta: float) -> float:
    """Return the mu of the Gaussian privacy curve (mu-GDP) that passes through (``epsilon``, ``delta``), by bisection.

    Raises:
        ValueError: if delta is 0, which no Gaussian has at a finite epsilon.
    """
    if not 0.0 < delta < 1.0:
        raise ValueError(f"delta={delta}; expected 0 < delta < 1")
    low, high = 1e-6, 1.0
    while gdp.gdp_epsilon(high, delta) < epsilon:
        high *= 2.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        low, high = (low, middle) if gdp.gdp_epsilon(middle, delta) >= epsilon else (middle, high)
    return high


def reached(num_coins: int, mu: float, delta: float, significance: float, power: float) -> float:
    """Return the one-run lower bound on epsilon that an attack of this mu reaches with chance ``power``.

    It is the best over the telling guesses.
    """
    share = _share(num_coins, delta, significance)
    best = 0.0
    for guess in telling_guesses(num_coins, delta, significance):
        num_right = _num_right(guess, num_coins, mu, power)
        best = max(best, one_run.epsilon_lower_bound(num_coins, guess.num, num_right, delta, share))
    return best


def _share(num_coins: int, delta: float, significance: float) -> float:
    """Return the share of the error that each telling guess gets."""
    num_telling = len(telling_guesses(num_coins, delta, significance))
    return significance / max(num_telling, 1)


def coins_needed(target: float, mu: float, delta: float, significance: float, power: float) -> int | None:
    """Return the fewest coins, to within 2 %, whose lower bound exceeds ``target``; None beyond ``MOST_COINS``.

    Args:
        target: epsilon to be exceeded.
        mu: of the attack; infinity guesses every coin.
        delta: of the audit.
        significance: error of the bound.
        power: chance with which the bound is to be reached.
    """

    def is_enough(num_coins: int) -> bool:
        """Return whether some telling guess among so many coins would contradict ``target``."""
        share = _share(num_coins, delta, significance)
        for guess in telling_guesses(num_coins, delta, significance):
            num_right = _num_right(guess, num_coins, mu, power)
            if one_run.p_value(num_coins, guess.num, num_right, target, delta) <= share:
                return True
        return False

    # Double until it is enough, then bisect between the last two.
    low, high = 1, 2
    while not is_enough(high):
        low, high = high, 2 * high
        if low >= MOST_COINS:
            return None
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high if high <= MOST_COINS else None


def _num_right(guess: Guess, num_coins: int, mu: float, power: float) -> int:
    """Return how many of a guess's units an attack of this mu guesses rightly, or more, with chance ``power``.

    Each is guessed rightly with the chance :func:`accuracy`, independently, so their number is binomial.
    """
    # ``accuracy`` is of guesses on both sides. Guesses of "in" alone are the upper half of twice as many on both sides.
    num_both_sides = 2 * guess.num if guess.only_in else guess.num
    share = min(num_both_sides / num_coins, 1.0)
    return int(scipy.stats.binom.ppf(1.0 - power, guess.num, accuracy(mu, share)))


@functools.cache
def accuracy(mu: float, share: float) -> float:
    """Return the chance that a guess is right, where the units with the most extreme scores are guessed.

    Args:
        mu: scores are N(mu, 1) of units that were in, N(0, 1) of others, half of the units each.
        share: of all units that are guessed: half of them, the highest, as "in", and the lowest as "out".
    """
    if math.isinf(mu):
        return 1.0
    normal = scipy.stats.norm

    def excess(threshold: float) -> float:
        share_above = float(normal.sf(threshold) + normal.sf(threshold - mu)) / 2.0
        return share_above - share / 2.0

    threshold = scipy.optimize.root_scalar(excess, bracket=(-40.0, mu + 40.0)).root
    # Of those guessed "in"; by symmetry the lowest scores give the same rate.
    right, wrong = float(normal.sf(threshold - mu)), float(normal.sf(threshold))
    return right / (right + wrong)
