"""DeLong, DeLong and Clarke-Pearson's (1988) intervals over users: of one AUROC, and of the difference of two scores'.

Both are laws of large samples. With few users the interval of one is held up by the floors of
:mod:`attacks.analysis.statistics.bootstrap`, and the difference is tested by exchanging a user's two scores at random.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.special
import scipy.stats

from attacks.analysis.arrays import FloatArray
from attacks.analysis.statistics import interval
from attacks.analysis.statistics.bootstrap import floored
from attacks.analysis.statistics.interval import Interval
from attacks.analysis.statistics.mann_whitney import Placements, auroc, check_sides, delong_variance
from attacks.analysis.statistics.permutation import MAX_NUMBERS, MIN_NORMAL_USERS, NUM_PERMUTATIONS


def delong_interval(held_in: FloatArray, held_out: FloatArray, level: float = interval.CONFIDENCE_LEVEL) -> Interval:
    """Return DeLong's interval of the AUROC, on the logit scale, so that it cannot leave [0, 1] as Wald's does.

    Args:
        held_in: one score per held-in user, at least two.
        held_out: one score per held-out user, at least two.
        level: confidence level.

    Returns:
        The interval, widened to the floors of :func:`attacks.analysis.statistics.bootstrap.floored`.
    """
    area = auroc(held_in, held_out)
    error = math.sqrt(delong_variance(held_in, held_out))
    logit_interval = Interval(area, area)
    if error > 0.0:
        half_width = scipy.stats.norm.ppf((1.0 + level) / 2.0) * error / (area * (1.0 - area))
        ends = scipy.special.expit(scipy.special.logit(area) + np.array([-half_width, half_width]))
        logit_interval = Interval(float(ends[0]), float(ends[1]))
    return floored(logit_interval, held_in, held_out, level)


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """First AUROC less the second, on the same users.

    Attributes:
        difference: in [-1, 1].
        interval: Student's, cut to [-1, 1]; it holds 0 unless the test rejects at its level.
        p_value: two-sided, of no difference; 1 where the two scores rank every user alike.
    """

    difference: float
    interval: Interval
    p_value: float


def paired_difference(
    first: tuple[FloatArray, FloatArray],
    second: tuple[FloatArray, FloatArray],
    level: float = interval.CONFIDENCE_LEVEL,
) -> PairedDifference:
    """Compare two attacks, or two checkpoints under one attack, on the same users.

    With at least ``MIN_NORMAL_USERS`` users on each side the test is DeLong's. With fewer it is a permutation test,
    which exchanges each user's two ranks with chance 1/2, and rejects only if Student's test does too. The interval is
    Student's, with Welch and Satterthwaite's degrees of freedom.

    Args:
        first: (held-in, held-out) scores, at least two users a side.
        second: (held-in, held-out) other scores of the same users in the same order.
        level: confidence level of the interval.
    """
    sizes = [side.size for side in first]
    assert sizes == [side.size for side in second]
    check_sides(*first, 2)
    check_sides(*second, 2)
    ours, theirs = Placements.of(*first), Placements.of(*second)
    changes_in, changes_out = ours.held_in - theirs.held_in, ours.held_out - theirs.held_out
    difference = float(changes_in.mean())  # an AUROC is the mean of either side's placements
    # The variance of the differences of placements holds the covariance of the two AUROCs already.
    variances = [float(changes.var(ddof=1)) / changes.size for changes in (changes_in, changes_out)]
    if sum(variances) == 0.0:
        return _of_equal_changes(difference, first, second, level)

    # Student's test and interval.
    error = math.sqrt(sum(variances))
    shares = [variance**2 / (size - 1) for variance, size in zip(variances, sizes, strict=True)]
    freedom = sum(variances) ** 2 / sum(shares)
    if min(sizes) < MIN_NORMAL_USERS:
        # An exchange of one user's ranks leaves the others' as they are, so the permutation test alone is not exact: at
        # 5 + 5 users it rejects 6.4 % where 5 % is nominal.
        student = float(2.0 * scipy.stats.t.sf(abs(difference) / error, freedom))
        p_value = max(_exchanged(first, second), student)
    else:
        p_value = float(2.0 * scipy.stats.norm.sf(abs(difference) / error))
    half = float(scipy.stats.t.ppf((1.0 + level) / 2.0, freedom)) * error
    lower, upper = max(-1.0, difference - half), min(1.0, difference + half)
    if p_value > 1.0 - level:
        lower, upper = min(lower, 0.0), max(upper, 0.0)
    return PairedDifference(difference, Interval(lower, upper), p_value)


def _of_equal_changes(
    difference: float,
    first: tuple[FloatArray, FloatArray],
    second: tuple[FloatArray, FloatArray],
    level: float,
) -> PairedDifference:
    """Return :func:`paired_difference` where every user's placement changed alike, by ``difference``.

    The sample says nothing then of how far other users would move, at most in which direction.
    """
    if difference == 0.0:
        return PairedDifference(0.0, Interval(0.0, 0.0), 1.0)
    p_value = _exchanged(first, second)
    if p_value > 1.0 - level:
        ends = Interval(-1.0, 1.0)
    else:
        ends = Interval(0.0, 1.0) if difference > 0.0 else Interval(-1.0, 0.0)
    return PairedDifference(difference, ends, p_value)


def _exchanged(first: tuple[FloatArray, FloatArray], second: tuple[FloatArray, FloatArray]) -> float:
    """Return the two-sided p-value of the AUROC difference over exchanges of each user's two ranks.

    All 2^users exchanges are tried where there are at most ``NUM_PERMUTATIONS``; else as many are drawn.
    """
    ranks, other_ranks = scipy.stats.rankdata(np.concatenate(first)), scipy.stats.rankdata(np.concatenate(second))
    held_in, held_out = first
    sizes = np.repeat([held_in.size, -held_out.size], [held_in.size, held_out.size])  # of each user's side
    # What each user adds to the difference, up to a common factor; an exchange turns its sign.
    changes = (ranks - other_ranks) / sizes
    num_users, observed = changes.size, abs(float(changes.sum())) - 1e-9
    if 2**num_users <= NUM_PERMUTATIONS:
        # [exchanges, users] of 1 and -1: the binary digits of 0 to 2^users - 1.
        signs = 1 - 2 * (np.arange(2**num_users)[:, None] >> np.arange(num_users) & 1)
        return float(np.mean(np.abs(signs @ changes) >= observed))
    rng, num_as_far = np.random.default_rng(num_users), 0
    most = max(1, MAX_NUMBERS // num_users)  # at a time, so that memory does not grow with the users
    for start in range(0, NUM_PERMUTATIONS, most):
        shape = min(most, NUM_PERMUTATIONS - start), num_users
        signs = 1 - 2 * rng.integers(0, 2, shape, dtype=np.int8)
        num_as_far += int(np.count_nonzero(np.abs(signs @ changes) >= observed))
    return (1 + num_as_far) / (1 + NUM_PERMUTATIONS)
