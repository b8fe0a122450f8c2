"""The ROC as the step function that the sample is, and the true positive rate at a small false positive rate.

No interpolation and no convex hull. Interpolating between two thresholds claims an operating point that needs a coin
no attacker was given; the area under the hull of pure noise averages about .61 at 20 + 20 users.

The threshold is estimated too. It is the (k + 1)-th highest of n held-out scores, and its true false positive rate X is
not k / n: where no scores tie X follows Beta(k + 1, n - k), whose mean is x = (k + 1) / (n + 1), whatever the scores'
law. Given X = t, each of the m held-in users lies above it with probability R(t), R being the attack's true ROC. If R
lies below a concave curve f from (0, f(0) >= 0), as every ROC does that (epsilon, delta)-DP allows, then f(t) / t falls
and so f(t) <= f(x) max(1, t / x). With B from Beta(v, m - v + 1), independent of X,

    P(at least v above) <= P(B <= f(x) max(1, X / x)) = P(B / max(1, X / x) <= f(x)).

So the alpha / 2 quantile of B / max(1, X / x) exceeds f(x) with probability at most alpha / 2. It is Clopper and
Pearson's bound, the quantile of B alone, with the threshold's luck divided out. Likewise the 1 - alpha / 2 quantile of
B' / min(1, X / x), B' from Beta(v + 1, m - v), is below R(x) with probability at most alpha / 2 where R itself is
concave. Without any leak R(t) = t, and all that is needed is that users are exchangeable between the sides.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import scipy.optimize
import scipy.special

from attacks.analysis.arrays import FloatArray, IntArray
from attacks.analysis.statistics import interval
from attacks.analysis.statistics.interval import Interval
from attacks.analysis.statistics.mann_whitney import check_sides

_NUM_NODES = 1000
"""Midpoints of the law of the threshold: they move the error of an end by less than .0005."""


@dataclasses.dataclass(frozen=True)
class OperatingPoint:
    """The true positive rate at the largest achievable false positive rate that does not exceed a target.

    Attributes:
        target_fpr: what was asked for.
        num_false_positives_allowed: the largest whole number of held-out users within the target.
        num_false_positives: held-out users above the threshold; fewer than allowed where scores tie.
        num_held_out: users on the held-out side.
        num_true_positives: held-in users above the threshold.
        num_held_in: users on the held-in side.
        tpr_interval: of the true positive rate at a false positive rate of (allowed + 1) / (held-out + 1), the mean of
            the threshold's own; see :func:`rate_interval`.
    """

    target_fpr: float
    num_false_positives_allowed: int
    num_false_positives: int
    num_held_out: int
    num_true_positives: int
    num_held_in: int
    tpr_interval: Interval

    @property
    def tpr(self) -> float:
        """True positive rate."""
        return self.num_true_positives / self.num_held_in

    @property
    def achieved_fpr(self) -> float:
        """False positive rate at the same threshold."""
        return self.num_false_positives / self.num_held_out

    @property
    def is_resolved(self) -> bool:
        """Whether the held-out side is large enough to tell the target from zero."""
        return self.num_false_positives_allowed > 0


def num_false_positives_allowed(target_fpr: float, num_held_out: int) -> int:
    """Return the largest k with k / num_held_out <= target_fpr."""
    # 0.29 * 100 = 28.999999999999996 counts as 29.
    return math.floor(target_fpr * num_held_out * (1.0 + 1e-12))


def threshold_of(held_out: FloatArray, num_allowed: int) -> float:
    """Return the lowest threshold with at most ``num_allowed`` of the held-out scores above: the next score itself."""
    return float(np.sort(held_out)[held_out.size - 1 - num_allowed])


def tpr_at_fpr(
    held_in: FloatArray, held_out: FloatArray, target_fpr: float, level: float = interval.CONFIDENCE_LEVEL
) -> OperatingPoint:
    """Return the true positive rate at the largest achievable false positive rate <= ``target_fpr``.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.
        target_fpr: in [0, 1).
        level: of the interval.

    Returns:
        The operating point with its counts. For a target below ``1 / num_held_out`` it is the point at zero false
        positives, and ``is_resolved`` is False.
    """
    assert 0.0 <= target_fpr < 1.0, target_fpr
    check_sides(held_in, held_out)
    allowed = num_false_positives_allowed(target_fpr, held_out.size)
    threshold = threshold_of(held_out, allowed)
    num_true_positives = int(np.count_nonzero(held_in > threshold))
    return OperatingPoint(
        target_fpr=target_fpr,
        num_false_positives_allowed=allowed,
        num_false_positives=int(np.count_nonzero(held_out > threshold)),
        num_held_out=held_out.size,
        num_true_positives=num_true_positives,
        num_held_in=held_in.size,
        tpr_interval=rate_interval(held_in, held_out, allowed, level),
    )


def rate_interval(
    held_in: FloatArray, held_out: FloatArray, num_allowed: int, level: float = interval.CONFIDENCE_LEVEL
) -> Interval:
    """Return the confidence interval of the true positive rate at a threshold estimated from the held-out side.

    It allows for the luck of both sides. Derived in the module's docstring for users who are independent of each other
    given the model. The lower end exceeds f((k + 1) / (n + 1)) with probability at most (1 - level) / 2 for *every*
    concave f above the attack's ROC on the model at hand; without any leak exchangeable users are enough. An (epsilon,
    delta) cap bounds the ROC averaged over models: a mechanism that releases everything with probability delta exceeds
    it on such models. The upper end holds for attacks whose own ROC is concave. Ties widen the interval on either side.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.
        num_allowed: k, held-out users let through, below their number.
        level: of the interval.

    Returns:
        For the rate at the false positive rate (k + 1) / (n + 1), which such a threshold has on average.
    """
    check_sides(held_in, held_out)
    threshold = threshold_of(held_out, num_allowed)
    # Users who tie with the threshold count as below it for the lower end, and as above it for the upper end.
    above, at_least = int(np.count_nonzero(held_in > threshold)), int(np.count_nonzero(held_in >= threshold))
    return _rate_interval(above, at_least, held_in.size, num_allowed, held_out.size, level)


@functools.lru_cache(maxsize=4096)
def _rate_interval(
    num_above: int, num_at_least: int, num_held_in: int, num_allowed: int, num_held_out: int, level: float
) -> Interval:
    """Return :func:`rate_interval` from counts: held-in users above, and at or above, the threshold."""
    tail, luck = (1.0 - level) / 2.0, _threshold_luck(num_allowed, num_held_out)
    lower, upper = 0.0, 1.0
    if num_above:
        lower = _quantile(tail, a=num_above, b=num_held_in - num_above + 1, scale=np.maximum(luck, 1.0))
    if num_at_least < num_held_in:
        upper = _quantile(1.0 - tail, a=num_at_least + 1, b=num_held_in - num_at_least, scale=np.minimum(luck, 1.0))
    return Interval(lower, upper)


def _quantile(chance: float, *, a: int, b: int, scale: FloatArray) -> float:
    """Return the quantile at ``chance`` of B / scale, B from Beta(a, b), at most 1.

    ``scale`` lists equally likely values, so P(B / scale <= rate) is a mean over them.
    """

    def excess(rate: float) -> float:
        return float(scipy.special.betainc(a, b, np.minimum(rate * scale, 1.0)).mean()) - chance

    if excess(1.0) <= 0.0:
        return 1.0
    return float(scipy.optimize.root_scalar(excess, bracket=(0.0, 1.0), xtol=1e-9).root)


@functools.lru_cache(maxsize=256)
def _threshold_luck(num_allowed: int, num_held_out: int) -> FloatArray:
    """Return X / x of the module, a threshold's true false positive rate over its mean, as equally likely values."""
    chances = (np.arange(_NUM_NODES) + 0.5) / _NUM_NODES
    rates = scipy.special.betaincinv(num_allowed + 1, num_held_out - num_allowed, chances)
    return np.asarray(rates * (num_held_out + 1) / (num_allowed + 1), dtype=np.float64)


def roc_points(held_in: FloatArray, held_out: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the corners of the ROC.

    Tied scores move both rates at once, a diagonal edge; the area under the straight edges is the Mann-Whitney AUROC
    with ties at one half.

    Returns:
        (fpr, tpr), both non-decreasing, from (0, 0) to (1, 1).
    """
    thresholds = np.unique(np.concatenate([held_in, held_out]))[::-1]
    num_false, num_true = _num_at_least(held_out, thresholds), _num_at_least(held_in, thresholds)
    # Drop vertices in the middle of a straight edge, where the slope does not change.
    across, up = np.diff(num_false), np.diff(num_true)
    is_corner = np.concatenate([[True], across[:-1] * up[1:] != across[1:] * up[:-1], [True]])
    return num_false[is_corner] / held_out.size, num_true[is_corner] / held_in.size


def _num_at_least(scores: FloatArray, thresholds: FloatArray) -> IntArray:
    """Return 0, and then how many scores are at least as high as each of the descending thresholds."""
    num_below = np.searchsorted(np.sort(scores), thresholds, side="left")
    return np.concatenate([[0], scores.size - num_below])
