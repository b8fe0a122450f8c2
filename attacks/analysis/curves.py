"""How the headline attack depends on what the attacker holds and on whom they accuse."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from attacks.analysis import statistics
from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.features import DocumentTable, Scored
from attacks.analysis.lift import lift

MIN_USERS = 5
"""Fewer users on a side are not shown: a bucket of two says too much about both."""

_NUM_BUCKETS = 4
_PSEUDOCOUNT = 0.5


def by_num_documents(scored: Scored, table: DocumentTable, scores: FloatArray, seed: int) -> list[dict[str, Any]]:
    """Return AUROC against the number of documents that the attacker holds of each user, 1, 2, 4, ...

    Only users with that many documents take part, each with that many drawn at random. ``auroc_with_one`` is of the
    same users with one document each, since users with many may differ from the others in more than their number.
    """
    # All documents grouped by owner, in random order within each owner.
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(scores))
    order = shuffled[np.argsort(table.owner[shuffled], kind="stable")]
    owners = table.owner[order]
    place = np.arange(len(scores)) - np.searchsorted(owners, owners, side="left")  # among the owner's, from 0
    num_held = np.bincount(table.owner, minlength=len(scored.users))[owners]  # documents of the same owner

    points, count = [], 1
    while True:  # until too few users have so many documents
        owner_has_enough = num_held >= count
        with_count = order[owner_has_enough & (place < count)]
        point = _point(lift(scores[with_count], table.owner[with_count], len(scored.users)), scored.is_held_in)
        if point is None:
            return points
        with_one = order[owner_has_enough & (place == 0)]
        alone = _point(lift(scores[with_one], table.owner[with_one], len(scored.users)), scored.is_held_in)
        assert alone is not None, "the same users"
        points.append({"num_documents": count, **point, "auroc_with_one": alone["auroc"]})
        count *= 2


def by_bucket(values: FloatArray, statistic: FloatArray, is_held_in: BoolArray) -> list[dict[str, Any]]:
    """Return AUROC within each quarter of the users by ``values``, so that only users alike in it are compared.

    Args:
        values: [users] what the users of a quarter are alike in; NaN where not known.
        statistic: [users] the attack's score; NaN where there is none.
        is_held_in: [users].

    Returns:
        One entry per quarter with at least ``MIN_USERS`` users a side: its ends (rounded), AUROC, interval and counts.
    """
    known = ~np.isnan(values) & ~np.isnan(statistic)
    if not known.any() or np.ptp(values[known]) == 0.0:
        return []
    edges = np.unique(np.quantile(values[known], np.linspace(0.0, 1.0, _NUM_BUCKETS + 1)))
    # The largest value lies on the last edge and belongs to the last quarter, hence the clip.
    quarter = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    quarters = []
    for number, (low, high) in enumerate(itertools.pairwise(edges.tolist())):
        inside = known & (quarter == number)
        point = _point(np.where(inside, statistic, np.nan), is_held_in)
        if point is not None:
            quarters.append({"from": _two_digits(low), "to": _two_digits(high), **point})
    return quarters


def shares(scored: Scored) -> FloatArray:
    """Return each user's bytes of text over the bytes of all held-in users; held-out users are counted alike."""
    total = scored.num_bytes[scored.is_held_in].sum()
    return scored.num_bytes / max(float(total), 1.0)


def distinctness(scored: Scored) -> FloatArray:
    """Return, for each user, the KL divergence of their token frequencies from everybody else's (smoothed), in nats.

    For a model of single tokens, proposition 1 of Kandpal et al. 2023 bounds the user-inference statistic with it.
    NaN for users without tokens, and for all without token ids.
    """
    if scored.tokens is None:
        return np.full(len(scored.users), np.nan)
    everybody = np.asarray(scored.tokens.sum(axis=0)).ravel()
    divergences = np.empty(len(scored.users))
    for user in range(len(scored.users)):
        counts = np.asarray(scored.tokens[user].todense()).ravel()
        if not counts.sum():
            divergences[user] = np.nan
            continue
        counts_of_others = everybody - counts + _PSEUDOCOUNT
        used = counts > 0.0  # other tokens add nothing
        own = counts[used] / counts.sum()
        others = counts_of_others[used] / counts_of_others.sum()
        divergences[user] = float((own * np.log(own / others)).sum())
    return divergences


def most_exposed(scored: Scored, statistic: FloatArray, share: float = 0.01) -> dict[str, Any]:
    """Return how many of the users with the highest scores were trained on, and how many would be by chance.

    Args:
        scored: the users.
        statistic: [users] the attack's score; NaN where there is none.
        share: of the users that count as most exposed. Users who tie for its last places share them, so a count of
            users need not be whole.
    """
    known = np.flatnonzero(~np.isnan(statistic))
    count = max(1, math.ceil(share * known.size))
    last = np.sort(statistic[known])[-count]
    above, tied = known[statistic[known] > last], known[statistic[known] == last]
    top = np.concatenate([above, tied])
    places = count - above.size  # for the tied users
    return {
        "share": share,
        "num_users": count,
        "num_held_in": float(scored.is_held_in[above].sum() + places * scored.is_held_in[tied].mean()),
        "num_held_in_by_chance": count * float(scored.is_held_in[known].mean()),
        "median_num_records": _two_digits(float(np.median(scored.num_records[top]))),
        "median_num_records_of_all": _two_digits(float(np.median(scored.num_records[known]))),
    }


def _point(statistic: FloatArray, is_held_in: BoolArray) -> dict[str, Any] | None:
    """Return AUROC and interval of the known values; None with fewer than ``MIN_USERS`` on a side."""
    known = ~np.isnan(statistic)
    held_in, held_out = statistic[known & is_held_in], statistic[known & ~is_held_in]
    if min(held_in.size, held_out.size) < MIN_USERS:
        return None
    interval = statistics.delong_interval(held_in, held_out)
    return {
        "auroc": statistics.auroc(held_in, held_out),
        "interval": [interval.lower, interval.upper],
        "num_held_in": int(held_in.size),
        "num_held_out": int(held_out.size),
    }


def _two_digits(value: float) -> float:
    """Round, so that an edge is not one user's exact value."""
    return float(f"{value:.2g}")
