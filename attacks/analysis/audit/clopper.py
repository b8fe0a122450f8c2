"""Epsilon from true and false positive rates with Clopper-Pearson bounds (Jagielski et al. 2020, arXiv 2006.07709).

(epsilon, delta)-DP allows a test TPR <= e^epsilon FPR + delta and TNR <= e^epsilon FNR + delta, so

    epsilon >= ln((TPR_low - delta) / FPR_high)    and    epsilon >= ln((TNR_low - delta) / FNR_high).

Both read the same two one-sided bounds (TNR_low = 1 - FPR_high), so both hold on the event that those two hold: half of
the error goes to each, and the second rule costs nothing more at the same threshold.

The rates are binomial only if units are scored independently of each other: one unit a run over many runs. Within one
training run all scores hang on one model. So in one run this is an estimate under that assumption, and the verdict
rests on :mod:`attacks.analysis.audit.one_run`, which needs no such thing.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import scipy.special

from attacks.analysis.arrays import FloatArray
from attacks.analysis.statistics.roc import threshold_of

Strategy = Literal["bonferroni", "split"]

RANK_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5)
"""Declared shares of one side that may lie beyond the threshold."""

_MAX_THRESHOLDS = 100


def lower_rate(num_hits: int, num_trials: int, significance: float) -> float:
    """Return the Clopper-Pearson lower bound of a rate: wrong (too high) with probability at most ``significance``."""
    if num_hits == 0:
        return 0.0
    return float(scipy.special.betaincinv(num_hits, num_trials - num_hits + 1, significance))


def upper_rate(num_hits: int, num_trials: int, significance: float) -> float:
    """Return the Clopper-Pearson upper bound of a rate: wrong (too low) with probability at most ``significance``."""
    if num_hits == num_trials:
        return 1.0
    return float(scipy.special.betainccinv(num_hits + 1, num_trials - num_hits, significance))


def epsilon_of_counts(
    true_positives: int, num_in: int, false_positives: int, num_out: int, delta: float, significance: float
) -> float:
    """Return the lower bound on epsilon at a threshold fixed beforehand: the better of the module's two rules, or 0.

    Args:
        true_positives: held-in units beyond the threshold.
        num_in: held-in units.
        false_positives: held-out units beyond it.
        num_out: held-out units.
        delta: at which epsilon is asked for.
        significance: of the bound, one-sided, for both rates together.
    """
    tpr = lower_rate(true_positives, num_in, significance / 2.0)
    fpr = upper_rate(false_positives, num_out, significance / 2.0)
    return max(_log_ratio(tpr - delta, fpr), _log_ratio(1.0 - fpr - delta, 1.0 - tpr), 0.0)


def epsilon_lower_bound(
    held_in: FloatArray,
    held_out: FloatArray,
    delta: float,
    significance: float,
    *,
    strategy: Strategy = "bonferroni",
    seed: int = 0,
) -> float:
    """Return the best lower bound on epsilon over several thresholds, corrected for the choice; 0 if a side is empty.

    ``bonferroni``: a threshold at each declared rank of the held-out scores ("at most 5 % of them lie above"), and, in
    the mirror image, of the held-in scores. All share the error equally. Such a threshold has a false positive rate
    that Clopper-Pearson bounds exactly, since it does not depend on the other side's scores. ``split``: a random half
    of the scores chooses the threshold, the other half is counted.

    Args:
        held_in: one score per held-in unit.
        held_out: one score per held-out unit.
        delta: at which epsilon is asked for.
        significance: of the bound, one-sided.
        strategy: ``bonferroni`` or ``split``.
        seed: of the split; not used otherwise.
    """
    if not held_in.size or not held_out.size:
        return 0.0
    if strategy == "split":
        return _by_split(held_in, held_out, delta, significance, seed)
    # (scores of the positives, scores that the threshold is read off). In the mirror image, negated and exchanged, the
    # held-out units are the positives.
    sides = ((held_in, held_out), (-held_out, -held_in))
    share = significance / sum(len(_ranks(others.size)) for _, others in sides)
    bounds: list[float] = []
    for positives, others in sides:
        bounds += [_at_rank(positives, others, rank, delta, share) for rank in _ranks(others.size)]
    return max(bounds)


def ceiling(
    num_in: int, num_out: int, delta: float, significance: float, *, strategy: Strategy = "bonferroni"
) -> float:
    """Return the bound had every held-in unit scored above every held-out unit."""
    return epsilon_lower_bound(np.ones(num_in), np.zeros(num_out), delta, significance, strategy=strategy)


def _ranks(num_units: int) -> list[int]:
    """Return the declared numbers of units beyond the threshold."""
    return sorted({math.floor(share * num_units) for share in RANK_SHARES})


def _at_rank(positives: FloatArray, others: FloatArray, rank: int, delta: float, significance: float) -> float:
    """Return the bound at the threshold above which ``rank`` of ``others`` lie."""
    # Units that tie with the threshold count as below it on both sides, so at most ``rank`` of ``others`` lie above.
    num_above = int(np.count_nonzero(positives > threshold_of(others, rank)))
    return epsilon_of_counts(
        true_positives=num_above,
        num_in=positives.size,
        false_positives=rank,
        num_out=others.size,
        delta=delta,
        significance=significance,
    )


def _by_split(held_in: FloatArray, held_out: FloatArray, delta: float, significance: float, seed: int) -> float:
    """Choose a threshold on half of the scores and return its bound on the other half, which no search biases."""
    rng = np.random.default_rng(seed)
    halves = [np.array_split(rng.permutation(scores), 2) for scores in (held_in, held_out)]
    (choose_in, count_in), (choose_out, count_out) = halves
    if not count_in.size or not count_out.size:
        return 0.0
    thresholds = np.unique(np.concatenate([choose_in, choose_out]))
    # Every k-th is enough: which threshold is chosen decides how tight the bound is, never whether it holds.
    thresholds = thresholds[:: math.ceil(thresholds.size / _MAX_THRESHOLDS)]

    def bound(threshold: float, scores_in: FloatArray, scores_out: FloatArray) -> float:
        return epsilon_of_counts(
            true_positives=int(np.count_nonzero(scores_in >= threshold)),
            num_in=scores_in.size,
            false_positives=int(np.count_nonzero(scores_out >= threshold)),
            num_out=scores_out.size,
            delta=delta,
            significance=significance,
        )

    best = max(thresholds, key=lambda threshold: bound(threshold, choose_in, choose_out))
    return bound(best, count_in, count_out)


def _log_ratio(low: float, high: float) -> float:
    """Return ln(low / high), the epsilon of one rule: 0 if the numerator shows nothing, infinite if high is 0."""
    if low <= 0.0:
        return 0.0
    return math.log(low / high) if high > 0.0 else math.inf
