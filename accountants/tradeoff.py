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
import math

import dp_accounting
import numpy as np
from scipy import special

from accountants.mixtures import Array
from accountants.protocol import Accountant


@dataclasses.dataclass(frozen=True)
class PrivacyCurve:
    """Points of a privacy curve.

    Attributes:
        epsilons: increasing, from 0.
        deltas: a value of delta at each.
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
        growth = np.exp(np.minimum(self.epsilons, 700.0))
        first = growth * false_positive_rate + self.deltas
        second = 1 - (1 - self.deltas - false_positive_rate) / growth
        return float(min(np.min(first), np.min(second), 1.0))

    def advantage(self) -> float:
        """Return the largest difference of true- and false-positive rate: delta at epsilon 0, the total variation."""
        return float(self.deltas[0])

    def auc_cap(self, points: int = 1001) -> float:
        """Return the largest area under any attack's ROC curve."""
        rates = np.linspace(0.0, 1.0, points)
        caps = np.array([self.true_positive_cap(float(rate)) for rate in rates])
        # The right end of each strip: the cap increases, so this errs upwards.
        return float(min(np.sum(caps[1:] * np.diff(rates)), 1.0))


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


def shuffle_lower_bound(noise_multiplier: float, num_batches: int, num_epochs: int, delta: float) -> float:
    """Return a certified lower bound on epsilon for shuffled fixed batches (zero-out): what shuffling certainly costs.

    The other units contribute so that, after a shift, every batch without the unit has mean 0 and the unit's own batch
    has mean 2 with it and 1 without (all others -1, the unit +1 or 0, in units of the clipping norm). The test is the
    largest batch sum w, with laws F_with(c) = Phi((c-2)/s) Phi(c/s)^(t-1) and F_without(c) = Phi((c-1)/s)
    Phi(c/s)^(t-1) (the shape of Chua et al. 2024, arXiv
    2403.17673). Post-processing to buckets of w and rounding the composed buckets' losses down can only lower epsilon.
    """
    spread = noise_multiplier
    cuts = np.linspace(-10 * spread, 2 + 10 * spread, 4001)
    shared = (num_batches - 1) * special.log_ndtr(cuts / spread)
    laws: list[Array] = []
    for own in (2.0, 1.0):
        cdf = np.exp(special.log_ndtr((cuts - own) / spread) + shared)
        laws.append(np.maximum(np.diff(np.concatenate([[0.0], cdf, [1.0]])), 0.0))
    return _compose_buckets(laws[0], laws[1], num_epochs, delta)


def _compose_buckets(first: Array, second: Array, count: int, delta: float) -> float:
    spacing = 1e-3
    keep = (first > 1e-300) & (second > 1e-300)
    index = np.floor((np.log(first[keep]) - np.log(second[keep])) / spacing).astype(np.int64)
    low = int(index.min())
    span = int(index.max()) - low
    length = 1 << max(1, math.ceil(math.log2(span * count + 1)))
    mass = np.bincount(index - low, weights=first[keep], minlength=length)
    total = np.maximum(np.fft.irfft(np.fft.rfft(mass) ** count, length) - 1e-15, 0.0)
    losses = spacing * (low * count + np.arange(length))
    best = 0.0
    exceed = np.cumsum(total[::-1])[::-1]
    discounted = np.cumsum((total * np.exp(-np.clip(losses, -500, 500)))[::-1])[::-1]
    curve = exceed - np.exp(np.clip(losses, -500, 500)) * discounted
    good = np.flatnonzero(curve >= delta)
    if len(good):
        best = max(float(losses[good[-1]]), 0.0)
    return best
