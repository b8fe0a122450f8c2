"""One-sided tests of an AUROC: by permutation of the users' sides where users are few, by the normal law where many.

A coin decided each user's side, so without any leak the users are exchangeable and so are all choices of as many of
them: the share of choices whose AUROC is at least the observed one is a p-value that is right at every size, with ties,
unequal sides and users with many records, who change sides with all of them. Where there are more choices than
``NUM_PERMUTATIONS``, that many are drawn and the observed one counts as one more (Phipson and Smyth 2010).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats

from attacks.analysis.arrays import FloatArray
from attacks.analysis.statistics.interval import Interval
from attacks.analysis.statistics.mann_whitney import Placements, check_sides

IntArray = npt.NDArray[np.integer]
Owners = tuple[IntArray, IntArray]
"""The owner of each held-in and of each held-out record."""

NUM_PERMUTATIONS = 9999
MIN_NORMAL_USERS = 50
"""Effective users on the smaller side from which on the normal law is used."""

MAX_NUMBERS = 5_000_000
"""Entries of drawn permutations in memory at once."""

_MAX_PAIRS = 20_000
"""Pairs of users up to which scipy's exact law is computed."""


def auroc_p_value(held_in: FloatArray, held_out: FloatArray, owners: Owners | None = None) -> float:
    """Return the p-value of a one-sided test that the held-in side scores higher.

    Args:
        held_in: one score per held-in user, or record.
        held_out: one score per held-out user, or record.
        owners: of the records; None where each score is of a user of its own.

    Returns:
        1 where all scores are equal. From ``MIN_NORMAL_USERS`` effective users on by the normal law: Mann-Whitney's
        with the correction for ties, or, of records, that of sums over users. With fewer users exact or by permutation.

    Raises:
        ValueError: if a side has no score, or a score is not finite.
    """
    check_sides(held_in, held_out)
    if np.ptp(np.concatenate([held_in, held_out])) == 0.0:
        return 1.0
    is_large = effective_users(held_in, held_out, owners) >= MIN_NORMAL_USERS
    if owners is not None:
        test = _cluster_normal if is_large else _permuted
        return test(held_in, held_out, owners)
    has_ties = np.unique(np.concatenate([held_in, held_out])).size < held_in.size + held_out.size
    # The cost of scipy's exact law grows with the square of the number of pairs: it has a probability for each number
    # of pairs that are in order, and computes each from all those before it.
    if not is_large and (has_ties or held_in.size * held_out.size > _MAX_PAIRS):
        return _permuted(held_in, held_out, None)
    method = "asymptotic" if is_large else "exact"
    return float(scipy.stats.mannwhitneyu(held_in, held_out, alternative="greater", method=method).pvalue)


def effective_users(held_in: FloatArray, held_out: FloatArray, owners: Owners | None = None) -> float:
    """Return how many users of the smaller side the test effectively rests on.

    A side whose users have unequal numbers of records counts as fewer users (Kish's effective number). Of equal scores
    the largest group is left out, since it says nothing of who is who.

    Args:
        held_in: one score per held-in user, or record.
        held_out: one score per held-out user, or record.
        owners: of the records; None where each score is of a user of its own.
    """
    scores = np.concatenate([held_in, held_out])
    _, num_equal = np.unique(scores, return_counts=True)  # scores of each value
    share_untied = 1.0 - float(num_equal.max()) / scores.size
    if owners is None:
        return share_untied * min(held_in.size, held_out.size)
    num_effective: list[float] = []  # users of each side
    for side in owners:
        _, counts = np.unique(side, return_counts=True)
        num_records = counts.astype(np.float64)  # of each user
        num_effective.append(float(num_records.sum() ** 2 / (num_records**2).sum()))
    return share_untied * min(num_effective)


def no_narrower_than_test(
    narrow: Interval, held_in: FloatArray, held_out: FloatArray, level: float, owners: Owners | None = None
) -> Interval:
    """Widen an AUROC interval to hold 1/2, unless the exact test says that the AUROC is on the interval's side of 1/2.

    The test has the error (1 - level) / 2, one-sided. So without any leak either end is on the wrong side of 1/2 with
    probability at most that, at every size.

    Args:
        narrow: the interval, of any method.
        held_in: one score per held-in user, or record.
        held_out: one score per held-out user, or record.
        level: confidence level of the interval.
        owners: of the records; None where each score is of a user of its own.
    """
    tail, lower, upper = (1.0 - level) / 2.0, narrow.lower, narrow.upper
    if lower > 0.5 and auroc_p_value(held_in, held_out, owners) > tail:
        lower = 0.5
    exchanged_owners: Owners | None = None
    if owners is not None:
        owners_in, owners_out = owners
        exchanged_owners = owners_out, owners_in
    if upper < 0.5 and auroc_p_value(held_out, held_in, exchanged_owners) > tail:
        upper = 0.5
    return Interval(lower, upper)


def owner_places(held_in: FloatArray, held_out: FloatArray, owners: Owners | None) -> list[np.ndarray]:
    """Return, for each side, [records] the owner of each record as a number from 0 to the side's users less one."""
    if owners is None:
        return [np.arange(held_in.size), np.arange(held_out.size)]
    owners_in, owners_out = owners
    _, places_in = np.unique(owners_in, return_inverse=True)
    _, places_out = np.unique(owners_out, return_inverse=True)
    return [places_in, places_out]


def influences(placements: Placements, places: Sequence[np.ndarray], area: float) -> list[FloatArray]:
    """Return, for each side, [users] what the records of each user add to the AUROC's error; each side sums to 0.

    Args:
        placements: of each record.
        places: :func:`owner_places`.
        area: the AUROC.
    """
    return [
        np.bincount(place, (side - area) / side.size).astype(np.float64)
        for place, side in zip(places, (placements.held_in, placements.held_out), strict=True)
    ]


def _permuted(held_in: FloatArray, held_out: FloatArray, owners: Owners | None) -> float:
    """Return the share of choices of users as "held in" whose AUROC is at least the observed one: the exact p-value.

    A user moves with all their records. The AUROC of a choice follows from the sum of ranks of its records.
    """
    places_in, places_out = owner_places(held_in, held_out, owners)
    num_in, num_out = int(places_in.max()) + 1, int(places_out.max()) + 1
    user = np.concatenate([places_in, num_in + places_out])
    ranks = scipy.stats.rankdata(np.concatenate([held_in, held_out]))
    sums, counts = np.bincount(user, ranks), np.bincount(user)
    is_in = np.arange(num_in + num_out) < num_in
    # Choosing the smaller side is cheaper; the larger one is what is left. If the held-out side is chosen, its own
    # AUROC counts the other way.
    sign, chosen = (1.0, is_in) if num_in <= num_out else (-1.0, ~is_in)

    def area(rank_sum: FloatArray, count: FloatArray) -> FloatArray:
        """Return the AUROC, with its sign, of ``count`` chosen records with these ranks against all others."""
        return sign * (rank_sum - count * (count + 1) / 2.0) / (count * (user.size - count))

    choices, is_every = user_choices(num_in + num_out, min(num_in, num_out))
    areas = area(sums[choices].sum(axis=1), counts[choices].sum(axis=1))
    observed = area(sums[chosen].sum(), counts[chosen].sum())
    num_as_high = int(np.count_nonzero(areas >= observed - 1e-12))
    return num_as_high / len(areas) if is_every else (1 + num_as_high) / (1 + len(areas))


@functools.lru_cache(maxsize=4)
def user_choices(num_users: int, num_chosen: int) -> tuple[IntArray, bool]:
    """Return choices of ``num_chosen`` users as [choices, num_chosen] indices, and whether these are all choices.

    Up to ``NUM_PERMUTATIONS`` all are listed; beyond, so many are drawn, or fewer where they would fill the memory.
    """
    if math.comb(num_users, num_chosen) <= NUM_PERMUTATIONS:
        return np.array(list(itertools.combinations(range(num_users), num_chosen))), True
    rng = np.random.default_rng((num_users, num_chosen))
    count = min(NUM_PERMUTATIONS, max(MAX_NUMBERS // num_chosen, 199))
    drawn = [rng.choice(num_users, num_chosen, replace=False, shuffle=False) for _ in range(count)]
    return np.array(drawn, dtype=np.int32), False


def _cluster_normal(held_in: FloatArray, held_out: FloatArray, owners: Owners) -> float:
    """Return the p-value that the AUROC of records is above 1/2, by the normal law of sums over independent users."""
    placements = Placements.of(held_in, held_out)
    area = float(placements.held_in.mean())
    places = owner_places(held_in, held_out, owners)
    variance = sum(float((influence**2).sum()) for influence in influences(placements, places, area))
    if variance == 0.0:
        return _permuted(held_in, held_out, owners)
    return float(scipy.stats.norm.sf((area - 0.5) / variance**0.5))
