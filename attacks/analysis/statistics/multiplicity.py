"""Many tests at once: p-values of users, Holm's correction over attacks, the false discovery rate over users."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.stats

from attacks.analysis.arrays import FloatArray
from attacks.analysis.statistics.mann_whitney import check_sides


def rank_p_values(scores: FloatArray, held_out: FloatArray) -> FloatArray:
    """Return, for each held-in user, the p-value that they were not trained on, by rank among the held-out users.

    It is (1 + held-out users that score at least as high) / (held-out users + 1), which is valid for a split drawn by
    coins: a user who was not trained on is exchangeable with the held-out ones.

    Args:
        scores: one score per held-in user.
        held_out: one score per held-out user.

    Raises:
        ValueError: if a score is not finite.
    """
    check_sides(scores, held_out, 0)
    num_lower = np.searchsorted(np.sort(held_out), scores, side="left")
    return np.asarray((1.0 + held_out.size - num_lower) / (held_out.size + 1.0), dtype=np.float64)


def holm(p_values: Sequence[float] | FloatArray) -> FloatArray:
    """Return Holm's (1979) adjusted p-values, in the order given.

    If all tests are rejected whose adjusted p-value is at most a, the chance of any false rejection is at most a.

    Args:
        p_values: in [0, 1], however dependent.
    """
    raw = np.asarray(p_values, dtype=np.float64)
    if not ((raw >= 0.0) & (raw <= 1.0)).all():
        raise ValueError("expected p-values in [0, 1]")
    order = np.argsort(raw, kind="stable")
    stepped = np.maximum.accumulate(raw[order] * np.arange(raw.size, 0, -1))
    adjusted = np.empty_like(raw)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def false_discovery_rate(p_values: Sequence[float] | FloatArray) -> FloatArray:
    """Return Benjamini and Hochberg's (1995) adjusted p-values.

    If all users are rejected whose adjusted p-value is at most q, the expected share of false rejections is at most q.
    p-values of users against the same held-out users are positively dependent on each other, as the procedure needs it
    (Bates et al. 2023, "Testing for outliers with conformal p-values", theorem 2). Holm's correction over n users
    cannot reject anybody against fewer than 20 n - 1 held-out users.
    """
    return np.asarray(scipy.stats.false_discovery_control(p_values, method="bh"), dtype=np.float64)


def fewest_discoveries(num_tested: int, num_held_out: int, rate: float) -> int | None:
    """Return how many tested users must exceed every held-out user before any is rejected at a false discovery rate.

    Each such user has the smallest p-value, 1 / (held-out users + 1); k of them are rejected if it is at most
    rate * k / tested users. None if even all tested users are too few.
    """
    fewest = math.ceil(num_tested / ((num_held_out + 1.0) * rate) - 1e-9)
    return fewest if fewest <= num_tested else None
