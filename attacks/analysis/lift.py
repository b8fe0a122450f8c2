"""From numbers per document to one number per user (Kandpal et al. 2023: any record statistic lifts by its mean)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import scipy.stats

from attacks.analysis.arrays import FloatArray


def _trimmed(values: FloatArray) -> float:
    return float(scipy.stats.trim_mean(values, 0.1))


AGGREGATIONS: Mapping[str, Callable[[FloatArray], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "max": lambda values: float(np.max(values)),
    "min": lambda values: float(np.min(values)),
    "median": lambda values: float(np.median(values)),
    "trimmed": _trimmed,
}
"""``trimmed`` leaves out a tenth of the documents at each end."""


def lift(scores: FloatArray, owner: npt.NDArray[np.int64], num_users: int, aggregation: str = "mean") -> FloatArray:
    """Aggregate the scores of each user's documents to one number per user.

    Args:
        scores: [documents].
        owner: [documents] index of the document's user; ascending.
        num_users: in all.
        aggregation: a key of ``AGGREGATIONS``.

    Returns:
        [users]; NaN for a user without documents.
    """
    assert (np.diff(owner) >= 0).all(), "documents must be sorted by owner"
    lifted = np.full(num_users, np.nan)
    users, starts = np.unique(owner, return_index=True)
    # What stands before the first user's start is empty, so the first part is dropped.
    for user, values in zip(users, np.split(scores, starts)[1:], strict=True):
        lifted[user] = AGGREGATIONS[aggregation](values)
    return lifted
