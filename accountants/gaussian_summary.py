"""One number for a whole privacy curve: the mu of Gaussian differential privacy, with what it gives away.

(epsilon, delta) is one point of the curve. A mu says all of it at once: the mechanism is at least as private as telling
N(0, 1) from N(mu, 1), as Gomez et al. 2025 (arXiv 2503.10945) propose to report. What a finite table of certified upper
bounds can show is that, for every epsilon >= 0, ``delta(epsilon) <= delta_mu(epsilon) + slack``: between two points of
the table delta is at most the value at the left one, a Gaussian's at least its value at the right one, and beyond the
last point delta is at most the slack.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses

import numpy as np
from scipy import special

from accountants.methods.gdp import gdp_delta
from accountants.mixtures import Array
from accountants.tradeoff import PrivacyCurve

_LARGEST_MU = 100.0
#: Steps of bisection: they find mu to within 100 / 2**50, about 1e-13.
_ROUNDS = 50


@dataclasses.dataclass(frozen=True)
class GaussianSummary:
    """The smallest mu that a table of a privacy curve shows.

    Attributes:
        mu: ``delta(epsilon) <= delta_mu(epsilon) + slack`` for every epsilon >= 0.
        slack: the last delta of the table.
        regret: the most that a true-positive rate under mu exceeds the curve's own cap, over 2,000 false-positive rates
            from 1e-6 to 1: how much worse than the curve the one number makes the mechanism look.
        certified: whether the table's deltas are certified upper bounds.
    """

    mu: float
    slack: float
    regret: float
    certified: bool


def _gaussian_deltas(mu: float, epsilons: Array) -> Array:
    """Return delta of mu-GDP at each epsilon, up to float64's cancellation: for the search alone."""
    first = special.ndtr(mu / 2 - epsilons / mu)
    return first - np.exp(epsilons + special.log_ndtr(-mu / 2 - epsilons / mu))


def gaussian_summary(curve: PrivacyCurve) -> GaussianSummary | None:
    """Return the summary of a curve; ``None`` where no mu up to 100 is enough.

    Args:
        curve: its deltas do not increase; the finer the table, the smaller mu.
    """
    slack = float(curve.deltas[-1])
    # Between two points the curve is at most its left value, the Gaussian's at least its right one: see the module.
    right, needed = curve.epsilons[1:], curve.deltas[:-1] - slack

    def suffices(mu: float) -> bool:
        return bool(np.all(_gaussian_deltas(mu, right) >= needed))

    low, high = 0.0, _LARGEST_MU
    if not suffices(high):
        return None
    for _ in range(_ROUNDS):
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    # The search may err in the last digits; exact values of the Gaussian's curve decide.
    while any(gdp_delta(high, float(e)) < d for e, d in zip(right, needed, strict=True)):
        high *= 1 + 1e-9
    rates = np.geomspace(1e-6, 1.0, 2000)[:-1]  # false-positive rates
    reached = special.ndtr(special.ndtri(rates) + high)  # the true-positive rates that mu allows
    caps = np.asarray([curve.true_positive_cap(float(rate)) for rate in rates])
    return GaussianSummary(high, slack, float(max(0.0, np.max(reached - caps))), curve.certified)
