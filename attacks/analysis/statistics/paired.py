"""Two scores of the same users: DeLong, DeLong and Clarke-Pearson's test (1988) of the difference of their AUROCs."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import scipy.stats

from attacks.analysis.statistics import interval
from attacks.analysis.statistics.interval import Interval
from attacks.analysis.statistics.mann_whitney import Placements

FloatArray = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class PairedDifference:
    """First AUROC less the second, on the same users.

    Attributes:
        difference: in [-1, 1].
        interval: Wald, cut to [-1, 1].
        p_value: two-sided, of no difference; 1 where the two scores place every user alike.
    """

    difference: float
    interval: Interval
    p_value: float


def paired_difference(
    first: tuple[FloatArray, FloatArray],
    second: tuple[FloatArray, FloatArray],
    level: float = interval.CONFIDENCE_LEVEL,
) -> PairedDifference:
    """Compares two attacks, or two checkpoints under one attack, on the same users.

    Args:
        first: held-in and held-out scores, at least two users a side.
        second: other scores of the same users in the same order.
        level: confidence level.
    """
    assert [side.size for side in first] == [side.size for side in second]
    ours, theirs = Placements.of(*first), Placements.of(*second)
    changes = [ours.held_in - theirs.held_in, ours.held_out - theirs.held_out]
    difference = float(changes[0].mean())
    # The variance of the difference is that of the differences of the placements: covariances come along by themselves.
    error = math.sqrt(sum(float(change.var(ddof=1)) / change.size for change in changes))
    if error == 0.0:
        return PairedDifference(difference, Interval(difference, difference), float(difference == 0.0))
    half = float(scipy.stats.norm.ppf((1.0 + level) / 2.0)) * error
    ends = Interval(max(-1.0, difference - half), min(1.0, difference + half))
    return PairedDifference(difference, ends, float(2.0 * scipy.stats.norm.sf(abs(difference) / error)))
