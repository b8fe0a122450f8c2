"""Confidence intervals for counts, and the widest claim that a sample of users could ever support."""

from __future__ import annotations

import dataclasses

import scipy.special
import scipy.stats

CONFIDENCE_LEVEL = 0.95
"""Two-sided; half of the error goes to each end."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval.

    Attributes:
        lower: its lower end.
        upper: its upper end.
    """

    lower: float
    upper: float

    def __post_init__(self) -> None:
        assert self.lower <= self.upper, self

    def no_narrower_than(self, ceiling: Interval) -> Interval:
        """Widen this AUROC interval so that it claims no more than perfect separation of as many users would.

        Bootstrap and DeLong give zero width once the two sides are separated: 3 + 3 users would "prove" an AUROC of 1.

        Args:
            ceiling: the interval of as many users at perfect separation (:func:`perfect_separation`). Its upper end is
                1; mirrored at 1/2 it is the widest claim in the other direction.

        Returns:
            An interval with ``lower <= ceiling.lower`` and ``upper >= 1 - ceiling.lower``.
        """
        return Interval(min(self.lower, ceiling.lower), max(self.upper, 1.0 - ceiling.lower))

    def lower_at(self, level: float, area: float) -> float:
        """Return the lower end that this AUROC interval would have at a higher level, for many statistics at once.

        The distance from the AUROC grows, in logits, as a normal interval's would: quantiles that far out would need
        too many resamples. Apply :meth:`no_narrower_than` of the higher level afterwards.

        Args:
            level: at least ``CONFIDENCE_LEVEL``, which this interval has.
            area: the AUROC of the sample.
        """
        assert level >= CONFIDENCE_LEVEL, level
        has_logits = 0.0 < self.lower < area < 1.0  # and a distance that can grow
        if level == CONFIDENCE_LEVEL or not has_logits:
            return min(self.lower, area)
        growth = scipy.stats.norm.isf((1.0 - level) / 2.0) / scipy.stats.norm.isf((1.0 - CONFIDENCE_LEVEL) / 2.0)
        centre, lower = float(scipy.special.logit(area)), float(scipy.special.logit(self.lower))
        return float(scipy.special.expit(centre - growth * (centre - lower)))


def clopper_pearson(num_hits: int, num_trials: int, level: float = CONFIDENCE_LEVEL) -> Interval:
    """Return the exact binomial interval, of coverage at least ``level`` (Clopper and Pearson 1934)."""
    ends = scipy.stats.binomtest(num_hits, num_trials).proportion_ci(level, method="exact")
    return Interval(float(ends.low), float(ends.high))


def perfect_separation(num_held_in: int, num_held_out: int, level: float = CONFIDENCE_LEVEL) -> Interval:
    """Return the AUROC interval had every held-in user scored above every other: ``[((1 - level) / 2) ** (1 / n), 1]``.

    No sample of this size can show more. Pair the users off: n = min(num_held_in, num_held_out) disjoint pairs are
    independent and each is in order with probability AUROC, so perfect separation has probability at most AUROC^n.
    Inverting this at error (1 - level) / 2 gives the lower end. It is tight: an attack that misses each user of the
    smaller side outright with probability 1 - AUROC attains it.
    """
    return Interval(float(((1.0 - level) / 2.0) ** (1.0 / min(num_held_in, num_held_out))), 1.0)
