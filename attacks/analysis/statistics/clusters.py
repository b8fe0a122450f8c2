"""AUROC over records whose interval still resamples *users*: records of one user rise and fall together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.stats

from attacks.analysis.statistics import interval
from attacks.analysis.statistics.interval import Interval
from attacks.analysis.statistics.mann_whitney import Placements, bca_interval, multiplicities

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int_]

NUM_RESAMPLES = 1000


def cluster_p_value(held_in: FloatArray, held_out: FloatArray, users_in: IntArray, users_out: IntArray) -> float:
    """One-sided test that held-in records score higher, by the normal law of sums over users.

    Never below the probability 1/2^n with which n pairs of users are in order by chance.

    Args:
        held_in: one score per record of held-in users.
        held_out: one score per record of held-out users.
        users_in: the owner of each held-in record.
        users_out: the owner of each held-out record.
    """
    owners = [np.unique(users, return_inverse=True)[1] for users in (users_in, users_out)]
    placements = Placements.of(held_in, held_out)
    area = float(placements.held_in.mean())
    variance = sum(
        float((np.bincount(owner, (side - area) / side.size) ** 2).sum())
        for owner, side in zip(owners, (placements.held_in, placements.held_out), strict=True)
    )
    floor = 0.5 ** min(int(owner.max()) + 1 for owner in owners)
    if variance == 0.0:
        return floor if area > 0.5 else 1.0
    return max(float(scipy.stats.norm.sf((area - 0.5) / variance**0.5)), floor)


def cluster_interval(
    held_in: FloatArray,
    held_out: FloatArray,
    users_in: IntArray,
    users_out: IntArray,
    *,
    seed: int,
    level: float = interval.CONFIDENCE_LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """BCa interval of the record AUROC from resampling users, with all their records, within each side.

    Args:
        held_in: one score per record of held-in users.
        held_out: one score per record of held-out users.
        users_in: the owner of each held-in record.
        users_out: the owner of each held-out record.
        seed: of the resampling; this randomness protects nobody.
        level: confidence level.
        num_resamples: bootstrap resamples.

    Returns:
        The interval, never narrower than perfect separation of as many *users* supports.
    """
    owners_in, owners_out = (np.unique(users, return_inverse=True)[1] for users in (users_in, users_out))
    num_in, num_out = (int(owners.max()) + 1 for owners in (owners_in, owners_out))
    assert min(num_in, num_out) >= 2, (num_in, num_out)
    placements = Placements.of(held_in, held_out)
    area = float(placements.held_in.mean())
    influences = [
        np.bincount(owners, (side - area) / side.size).astype(np.float64)
        for owners, side in ((owners_in, placements.held_in), (owners_out, placements.held_out))
    ]
    ceiling = interval.perfect_separation(num_in, num_out, level)
    if sum(float((influence**2).sum()) for influence in influences) == 0.0:
        return Interval(area, area).no_narrower_than(ceiling)
    order = np.argsort(held_out, kind="stable")
    below, at_most = (np.searchsorted(held_out[order], held_in, side) for side in ("left", "right"))
    rng = np.random.default_rng(seed)
    resampled = []
    for times_in, times_out in multiplicities(num_in, num_out, num_resamples, held_in.size + held_out.size, rng):
        weights_in, weights_out = times_in[:, owners_in], times_out[:, owners_out[order]]
        cumulative = np.concatenate([np.zeros((len(weights_out), 1)), weights_out.cumsum(axis=1)], axis=1)
        wins = (cumulative[:, below] + cumulative[:, at_most]) / 2.0
        # The number of records differs from resample to resample, so the weights do not cancel.
        resampled.append((weights_in * wins).sum(axis=1) / (weights_in.sum(axis=1) * cumulative[:, -1]))
    return bca_interval(area, influences, np.concatenate(resampled), level).no_narrower_than(ceiling)
