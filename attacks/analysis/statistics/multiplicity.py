"""Many tests at once: p-values of one attack or one user, and Holm's correction over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats

FloatArray = npt.NDArray[np.float64]


def auroc_p_value(held_in: FloatArray, held_out: FloatArray) -> float:
    """One-sided Mann-Whitney test that held-in users score higher, with the correction for ties.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.

    Returns:
        1 where all scores are equal.
    """
    if np.ptp(np.concatenate([held_in, held_out])) == 0.0:
        return 1.0
    return float(scipy.stats.mannwhitneyu(held_in, held_out, alternative="greater").pvalue)


def rank_p_values(scores: FloatArray, held_out: FloatArray) -> FloatArray:
    """For each held-in user (1 + held-out users that score at least as high) / (held-out users + 1).

    Valid for a split drawn by coin: a user who was not trained on is exchangeable with the held-out ones.

    Args:
        scores: of held-in users.
        held_out: of held-out users.
    """
    num_lower = np.searchsorted(np.sort(held_out), scores, side="left")
    return np.asarray((1.0 + held_out.size - num_lower) / (held_out.size + 1.0), dtype=np.float64)


def holm(p_values: Sequence[float] | FloatArray) -> FloatArray:
    """Holm's (1979) adjusted p-values: reject those at most a level and any false rejection is that rare.

    Args:
        p_values: in [0, 1], however dependent.

    Returns:
        Adjusted values in the same order.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(raw.size, 0, -1))
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted
