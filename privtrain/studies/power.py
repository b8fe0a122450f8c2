"""What a design can decide: the power of verdicts that rest on a t-interval over seeds.

A claim is decided by the 95 % interval of a mean over n seeds, of differences that are paired by seed. A difference is
*shown* if the whole interval has its sign; the chance of that is the *power*. If one seed's difference is N(d, s²),
with *spread* s, the noncentral t distribution gives the power exactly (n - 1 degrees of freedom, noncentrality
d √n / s; Cohen 1988, chapter 2). Nothing here looks at whether a claim held: what is planned for is the paper's
difference where it states one.

The spread s comes from few seeds, so that a plan which takes it at face value is too small half of the time. Each plan
is therefore made twice: at the spread as seen, and at its upper 80 % confidence limit, with which the wanted power is
reached in at least 80 % of pilots (Browne 1995, Statistics in Medicine 14, 1933-1940).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import optimize, stats

from privtrain.studies.results import CONFIDENCE

#: The wanted power.
POWER = 0.8
#: Confidence of the spread's upper limit.
SPREAD_CONFIDENCE = 0.8
#: No study has more seeds; what needs them is said to be out of reach.
MOST_SEEDS = 1000

#: Gauss-Legendre quadrature on [-1, 1].
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclasses.dataclass(frozen=True)
class Design:
    """How much a number of seeds can show at a spread.

    Attributes:
        num_seeds: seeds that the interval is over, at least 2.
        spread: standard deviation of one seed's difference.
    """

    num_seeds: int
    spread: float

    def chance_shown(self, difference: float) -> float:
        """Return the probability that the interval lies above zero, were this the true difference."""
        if self.spread == 0:
            return float(difference > 0)
        degrees = self.num_seeds - 1
        return float(stats.nct.sf(_critical(degrees), degrees, difference * self.num_seeds**0.5 / self.spread))

    def chance_within(self, margin: float, difference: float = 0.0) -> float:
        """Return the probability that the interval lies within ± margin of zero, were this the true difference."""
        if self.spread == 0:
            return float(abs(difference) <= margin)
        degrees = self.num_seeds - 1
        standard_error = self.spread / self.num_seeds**0.5
        # Let r be the seen spread over the true one. The interval is mean ± r * half_width, so it is within ± margin if
        # the mean is within ± (margin - r * half_width). r is independent of the mean, and r² * degrees has a
        # chi-squared law: the chance is the integral, over quantiles of that law, of the mean's chance given r.
        half_width = _critical(degrees) * standard_error
        largest_ratio = margin / half_width  # beyond it the interval is wider than ± margin
        last_quantile = float(stats.chi2.cdf(degrees * largest_ratio**2, degrees))
        # Nodes and weights of [-1, 1], moved to [0, last_quantile].
        quantiles = last_quantile * (_NODES + 1) / 2
        weights = last_quantile / 2 * _WEIGHTS
        ratios = np.sqrt(stats.chi2.ppf(quantiles, degrees) / degrees)  # r
        room = margin - ratios * half_width
        below_upper = stats.norm.cdf((room - difference) / standard_error)
        below_lower = stats.norm.cdf((-room - difference) / standard_error)
        return float(weights @ (below_upper - below_lower))

    def detectable(self, power: float = POWER) -> float:
        """Return the least true difference that is shown with this power."""
        if self.spread == 0:
            return 0.0
        most = self.spread  # doubled until it is above the root
        while self.chance_shown(most) < power:
            most *= 2
        root = optimize.brentq(lambda difference: self.chance_shown(difference) - power, 0.0, most)
        assert isinstance(root, float), "brentq was not asked for more"
        return root


def upper_spread(spread: float, num_seeds: int) -> float:
    """Return the upper confidence limit of a spread that was seen over so many seeds."""
    degrees = num_seeds - 1
    return spread * math.sqrt(degrees / stats.chi2.ppf(1 - SPREAD_CONFIDENCE, degrees))


def seeds_to_show(difference: float, spread: float, power: float = POWER) -> int | None:
    """Return the fewest seeds that show a true difference with this probability; ``None`` beyond ``MOST_SEEDS``."""
    return _fewest(lambda n: Design(n, spread).chance_shown(difference) >= power)


def seeds_to_exclude(margin: float, spread: float, power: float = POWER) -> int | None:
    """Return the fewest seeds that show a true zero to be within ± margin; ``None`` beyond ``MOST_SEEDS``."""
    return _fewest(lambda n: Design(n, spread).chance_within(margin) >= power)


def users_to_show(
    difference: float, spread: float, num_seeds: int, users_variance: float | None = None, power: float = POWER
) -> float:
    """Return by which factor more users would show a true difference with as many seeds; infinity if none would.

    A finite number of users adds to the spread a variance that falls in proportion as their number grows; the rest of
    the variance is the runs' own randomness, which no number of users takes away.

    Args:
        difference: to be shown.
        spread: standard deviation of one seed's difference.
        num_seeds: seeds that there are.
        users_variance: the part of ``spread``² that users add; if ``None`` all of it, so that the factor is a minimum.
        power: wanted.
    """
    variance = spread**2
    # What is detectable is proportional to the spread, so this is the largest variance at which the difference shows.
    largest = (difference / Design(num_seeds, spread=1.0).detectable(power)) ** 2
    if variance <= largest:
        return 1.0
    of_users = variance if users_variance is None else min(users_variance, variance)
    of_runs = variance - of_users
    left_for_users = largest - of_runs
    return of_users / left_for_users if left_for_users > 0 else math.inf


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one claim would need; see :func:`plan`.

    Attributes:
        num_seeds: seeds of the runs that exist.
        spread: standard deviation of one seed's difference, over these seeds.
        detectable: the least true difference that these seeds show with power 80 %.
        difference: the difference that is planned for.
        whose: where that is from: "the paper's", "the least that counts" or "as seen".
        seeds: numbers of seeds that show it, at the spread as seen and at its upper limit; ``None`` beyond
            ``MOST_SEEDS``.
        users: by which factor more users would show it with as many seeds; infinity if none would.
        users_share: users' share of the spread's variance; ``None`` if not known, and then ``users`` is a minimum.
        margin: for a claim of no effect: what is to be shown is that a true zero lies within it.
    """

    num_seeds: int
    spread: float
    detectable: float
    difference: float
    whose: str
    seeds: tuple[int | None, int | None]
    users: float
    users_share: float | None = None
    margin: float | None = None

    def text(self, digits: int = 3, factor: float = 1.0) -> str:
        """Return the plan as a sentence."""
        shown = f"{factor * self.difference:.{digits}f}"
        seen = f"spread {factor * self.spread:.{digits}f} over {self.num_seeds} seeds"
        if self.margin is not None:
            return f"{seen}: that a true zero is within ± {shown} takes {_seeds(self.seeds)}"
        detectable = f"{factor * self.detectable:.{digits}f}"
        plan = f"{seen}: shows {detectable} with power {100 * POWER:.0f} %; {shown} ({self.whose}) "
        if self.difference == 0:
            return plan + "cannot be planned for"
        return f"{plan}takes {_seeds(self.seeds)}{self._more_users()}"

    def to_json(self) -> dict[str, Any]:
        """Return what the report holds of it; JSON has no infinity."""
        facts = dataclasses.asdict(self)
        return {**facts, "users": None if math.isinf(self.users) else self.users}

    def _more_users(self) -> str:
        """Return the end of the sentence: how many more users would do in place of more seeds."""
        if self.users == 1:
            return ""
        share = "" if self.users_share is None else f" (users make {100 * self.users_share:.0f} % of its variance)"
        if math.isinf(self.users):
            return f"; no number of users alone does{share}"
        least = "at least " if self.users_share is None else ""
        return f", or {self.num_seeds} with {least}{self.users:.2g} times the users{share}"


def plan(
    values: Sequence[float],
    *,
    papers: float | None = None,
    least: float = 0.0,
    margin: float | None = None,
    users_variance: float | None = None,
) -> Plan | None:
    """Return what a claim would need, from the existing seeds' differences; ``None`` for fewer than two.

    Planned for is the paper's difference; if that is unknown the least one that counts, if that is 0 the size of the
    mean as seen.

    Args:
        values: differences, one a seed.
        papers: the paper's difference in the same unit, if it states one.
        least: the least difference that counts; 0 if any does.
        margin: for a claim of no effect, what counts as none: planned for is to show that a true zero is within it.
        users_variance: what a finite number of users adds to the variance of one seed's difference, if known.
    """
    num_seeds = len(values)
    if num_seeds < 2:
        return None
    spread = float(np.std(values, ddof=1))
    if papers is not None:
        difference, whose = papers, "the paper's"
    elif least > 0:
        difference, whose = least, "the least that counts"
    else:
        difference, whose = abs(float(np.mean(values))), "as seen"
    fewest: Callable[[float, float], int | None] = seeds_to_show
    if margin is not None:
        difference, fewest = margin, seeds_to_exclude
    seeds, users = (None, None), math.inf
    if difference > 0:  # no number of seeds or users shows a zero difference
        seeds = (fewest(difference, spread), fewest(difference, upper_spread(spread, num_seeds)))
        users = users_to_show(difference, spread, num_seeds, users_variance)
    share = None if users_variance is None or spread == 0 else min(1.0, users_variance / spread**2)
    return Plan(
        num_seeds=num_seeds,
        spread=spread,
        detectable=Design(num_seeds, spread).detectable(),
        difference=difference,
        whose=whose,
        seeds=seeds,
        users=users,
        users_share=share,
        margin=margin,
    )


def _critical(degrees: int) -> float:
    """Return the half width of the 95 % interval in standard errors."""
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, degrees))


def _fewest(suffices: Callable[[int], bool]) -> int | None:
    """Return the fewest seeds by bisection: power grows with the seeds."""
    if not suffices(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # low does not suffice: one seed has no interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


def _seeds(seeds: tuple[int | None, int | None]) -> str:
    """Return e.g. ``8 to 14 seeds``."""
    seen, upper = (f"over {MOST_SEEDS}" if n is None else str(n) for n in seeds)
    return f"{seen} seeds" if seen == upper else f"{seen} to {upper} seeds"
