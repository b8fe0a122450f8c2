"""From (epsilon, delta) to what an attacker can do: the trade-off curve, the advantage, and the cap on every attack.

For a test of "the unit took part" against "it did not", with false-positive rate a and true-positive rate b, a pair
(eps, delta) gives b <= e^eps a + delta and b <= 1 - e^(-eps) (1 - delta - a) (Kairouz, Oh, Viswanath 2015, arXiv
1311.0776), so every certified point of the privacy curve cuts the region of possible attacks and their intersection is
the trade-off function (Dong, Roth, Su 2022, arXiv 1905.02383, proposition 2.12). Using upper bounds on delta keeps the
cap certified.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses

import dp_accounting
import numpy as np

from accountants.mixtures import Array
from accountants.protocol import Accountant


@dataclasses.dataclass(frozen=True)
class PrivacyCurve:
    """Points of a privacy curve: delta as a function of epsilon.

    Attributes:
        epsilons: increasing, from 0.
        deltas: a value of delta at each, none above the one before.
        certified: whether all deltas are certified upper bounds, and with them the caps.
        method: the accountant.
    """

    epsilons: Array
    deltas: Array
    certified: bool
    method: str

    def true_positive_cap(self, false_positive_rate: float) -> float:
        """Return the largest true-positive rate that any attack can have at ``false_positive_rate``."""
        if not 0 <= false_positive_rate <= 1:
            raise ValueError(f"false_positive_rate={false_positive_rate} must lie in [0, 1]")
        growth = np.exp(np.minimum(self.epsilons, 700.0))  # e^709 overflows
        # The module's two bounds at every epsilon, of which the least counts.
        first = growth * false_positive_rate + self.deltas
        second = 1 - (1 - self.deltas - false_positive_rate) / growth
        return float(min(np.min(first), np.min(second), 1.0))

    def advantage(self) -> float:
        """Return the largest difference of true- and false-positive rate: delta at epsilon 0, the total variation."""
        return float(self.deltas[0])


def privacy_curve(
    event: dp_accounting.DpEvent, accountant: Accountant, *, largest_epsilon: float, points: int = 25
) -> PrivacyCurve:
    """Tabulate delta over epsilon.

    Args:
        event: what was released; add-or-remove-one.
        accountant: any; certified caps need a certified accountant.
        largest_epsilon: the end of the table.
        points: how many epsilons.
    """
    epsilons = np.linspace(0.0, largest_epsilon, points)
    answers = [accountant.delta(event, float(epsilon)) for epsilon in epsilons]
    certified = all(answer.is_certified for answer in answers)
    deltas = np.array([answer.upper if certified else answer.estimate for answer in answers])
    # A later delta can never exceed an earlier one; each is a bound at the later epsilon too.
    return PrivacyCurve(epsilons, np.minimum.accumulate(deltas), certified, accountant.name)
