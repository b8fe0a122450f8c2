"""The ROC as the step function that the sample is, and the true positive rate at a small false positive rate.

No interpolation and no convex hull. Interpolating between two thresholds claims an operating point that needs a coin
no attacker was given; the area under the hull of pure noise averages about .61 at 20 + 20 users.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from attacks.analysis.statistics import interval
from attacks.analysis.statistics.interval import Interval

FloatArray = npt.NDArray[np.float64]


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
        tpr_interval: Clopper-Pearson interval of the true positive rate, the threshold taken as given.
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
    """The largest k with k / num_held_out <= target_fpr.

    Args:
        target_fpr: in [0, 1].
        num_held_out: users on the held-out side.

    Returns:
        k, immune to 0.29 * 100 = 28.999999999999996.
    """
    return math.floor(target_fpr * num_held_out * (1.0 + 1e-12))


def tpr_at_fpr(
    held_in: FloatArray, held_out: FloatArray, target_fpr: float, level: float = interval.CONFIDENCE_LEVEL
) -> OperatingPoint:
    """The true positive rate at the largest achievable false positive rate <= ``target_fpr``.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.
        target_fpr: in [0, 1).
        level: of the interval.

    Returns:
        The operating point with its counts. Below ``1 / num_held_out`` it is the point at zero false positives, and
        says so.
    """
    assert 0.0 <= target_fpr < 1.0, target_fpr
    allowed = num_false_positives_allowed(target_fpr, held_out.size)
    threshold = np.sort(held_out)[held_out.size - 1 - allowed]
    num_true_positives = int(np.count_nonzero(held_in > threshold))
    return OperatingPoint(
        target_fpr=target_fpr,
        num_false_positives_allowed=allowed,
        num_false_positives=int(np.count_nonzero(held_out > threshold)),
        num_held_out=held_out.size,
        num_true_positives=num_true_positives,
        num_held_in=held_in.size,
        tpr_interval=interval.clopper_pearson(num_true_positives, held_in.size, level),
    )


def roc_points(held_in: FloatArray, held_out: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The corners of the ROC.

    Tied scores move both rates at once, a diagonal edge; the area under the straight edges is the Mann-Whitney AUROC
    with ties at one half.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.

    Returns:
        (fpr, tpr), both non-decreasing, from (0, 0) to (1, 1).
    """
    thresholds = np.unique(np.concatenate([held_in, held_out]))[::-1]
    num_false, num_true = (
        np.concatenate([[0], scores.size - np.searchsorted(np.sort(scores), thresholds, side="left")])
        for scores in (held_out, held_in)
    )
    # A vertex in the middle of a straight edge adds nothing but size.
    across, up = np.diff(num_false), np.diff(num_true)
    is_corner = np.concatenate([[True], across[:-1] * up[1:] != across[1:] * up[:-1], [True]])
    return num_false[is_corner] / held_out.size, num_true[is_corner] / held_in.size


def roc_band(
    held_in: FloatArray,
    held_out: FloatArray,
    num_allowed: npt.NDArray[np.int_],
    *,
    num_resamples: int,
    seed: int,
    level: float = interval.CONFIDENCE_LEVEL,
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """The step ROC at given numbers of false positives, with a pointwise band from resampling users within each side.

    Pointwise: at any one false positive rate the band means ``level``; the whole curve lies inside it less often.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.
        num_allowed: numbers of false positives to allow, each below the number of held-out users.
        num_resamples: bootstrap resamples.
        seed: of the resampling; this randomness protects nobody.
        level: of the band.

    Returns:
        (tpr, lower, upper), each of the shape of ``num_allowed``.
    """
    rng = np.random.default_rng(seed)

    def step_curve(scores_in: FloatArray, scores_out: FloatArray) -> FloatArray:
        thresholds = np.sort(scores_out)[scores_out.size - 1 - num_allowed]
        return 1.0 - np.searchsorted(np.sort(scores_in), thresholds, side="right") / scores_in.size

    curves = np.array(
        [
            step_curve(rng.choice(held_in, held_in.size), rng.choice(held_out, held_out.size))
            for _ in range(num_resamples)
        ]
    )
    lower, upper = np.quantile(curves, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0)
    return step_curve(held_in, held_out), lower, upper
