"""BCa intervals of the AUROC from resampling users, with all their records, within each side.

Records of one user rise and fall together, so what is resampled is always users. BCa is the bias-corrected and
accelerated bootstrap interval. Resamples know nothing of scores that the sample happens to lack, so an interval is
widened to floors: perfect separation of as many users, the exact test of 1/2
(:func:`attacks.analysis.statistics.permutation.no_narrower_than_test`) and, where many users tie or stand between the
same two of the other side, :func:`worst_case`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.statistics import interval
from attacks.analysis.statistics.interval import Interval
from attacks.analysis.statistics.mann_whitney import Placements, check_sides
from attacks.analysis.statistics.permutation import Owners, influences, no_narrower_than_test, owner_places

NUM_RESAMPLES = 4000
"""Enough for the 2.5 % ends: their Monte Carlo error is a few hundredths of the interval's width."""

_DRAWS_PER_BLOCK = 2_000_000
"""Resamples times records held in memory at once: some tens of megabytes."""

_MAX_KEPT = 50_000_000
"""Counts of resamples kept for the next statistic of the same users: a hundred megabytes."""

_MANY_TIED = 0.1
"""Share of the scores in one tie from which on resamples may lack a value that matters."""

_MANY_ALIKE = 0.85
"""Share of a side's users between the same two of the other side from which on, without ties, it may lack a place."""

Draw = Callable[[np.random.Generator, int, int], FloatArray]
"""From (generator, resamples, users) to weights [resamples, users + 1]; the last column is of an invented user."""


def bootstrap_interval(
    held_in: FloatArray,
    held_out: FloatArray,
    *,
    seed: int,
    owners: Owners | None = None,
    level: float = interval.CONFIDENCE_LEVEL,
    num_resamples: int = NUM_RESAMPLES,
) -> Interval:
    """Return the BCa interval of the AUROC (Efron and Tibshirani 1993, chapter 14), with its floors.

    Args:
        held_in: one score per held-in user or record; at least two users.
        held_out: one score per held-out user or record; at least two users.
        seed: of the resampling; this randomness protects nobody.
        owners: of the records; None where each score is of a user of its own.
        level: confidence level.
        num_resamples: bootstrap resamples.

    Raises:
        ValueError: if a side has fewer than two users, or a score is not finite.
    """
    check_sides(held_in, held_out)
    places = owner_places(held_in, held_out, owners)
    num_in, num_out = _num_users(places)
    if min(num_in, num_out) < 2:
        raise ValueError(f"there are {num_in} held-in and {num_out} held-out users; expected at least two on each side")
    placements = Placements.of(held_in, held_out)
    area = float(placements.held_in.mean())
    of_users = influences(placements, places, area)
    ends = Interval(area, area)  # where no user moves the AUROC, resamples would all equal it
    if any(influence.any() for influence in of_users):
        drawn = _resampled(held_in, held_out, places, _multinomial, num_resamples, seed)
        # The number of records differs from resample to resample, so the weights do not cancel.
        ends = bca_interval(area, of_users, drawn.wins / (drawn.weight_in * drawn.weight_out), level)
    return floored(ends, held_in, held_out, level, owners, num_resamples=num_resamples, seed=seed)


def _num_users(places: Sequence[np.ndarray]) -> tuple[int, int]:
    """Return the number of users of each side, whose records' users are numbered from 0 in ``places``."""
    of_held_in, of_held_out = places
    return int(of_held_in.max()) + 1, int(of_held_out.max()) + 1


def bca_interval(area: float, influences: Sequence[FloatArray], resampled: FloatArray, level: float) -> Interval:
    """Return the BCa interval of a two-sample statistic.

    Args:
        area: the statistic of the sample.
        influences: for each side, what each independent unit adds to the error of the statistic; not all zero.
        resampled: the statistic of each resample.
        level: confidence level.
    """
    variance = sum(float((influence**2).sum()) for influence in influences)
    acceleration = sum(float((influence**3).sum()) for influence in influences) / (6.0 * variance**1.5)
    # A resample that draws every user once equals the point but for the order of its sum.
    is_tied = np.isclose(resampled, area, rtol=0.0, atol=1e-12)
    share_below = (np.count_nonzero((resampled < area) & ~is_tied) + is_tied.sum() / 2.0) / resampled.size
    bias = scipy.stats.norm.ppf(np.clip(share_below, 0.5 / resampled.size, 1.0 - 0.5 / resampled.size))
    ends = np.quantile(resampled, bca_levels(float(bias), acceleration, level))
    return Interval(float(ends[0]), float(ends[1]))


def bca_levels(bias: float, acceleration: float, level: float) -> FloatArray:
    """Return which quantiles of the resamples are the ends of a BCa interval (Efron and Tibshirani 1993, chapter 14).

    Args:
        bias: normal quantile of the share of resamples below the estimate.
        acceleration: skewness of the influences, over six.
        level: confidence level.

    Returns:
        Two probabilities; ``(1 -+ level) / 2`` without bias and acceleration.
    """
    tails = bias + scipy.stats.norm.ppf([(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    # Past its pole the correction would come back from the other side; the extreme resample is the honest end there.
    shrinkage = np.maximum(1.0 - acceleration * tails, 1e-9)
    return scipy.stats.norm.cdf(bias + tails / shrinkage)


def floored(
    narrow: Interval,
    held_in: FloatArray,
    held_out: FloatArray,
    level: float,
    owners: Owners | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Widen an AUROC interval to what every interval must allow for: luck with few users, and with ties.

    Args:
        narrow: the interval, of any method.
        held_in: one score per held-in user or record.
        held_out: one score per held-out user or record.
        level: its confidence level.
        owners: of the records; None where each score is of a user of its own.
        num_resamples: of :func:`worst_case`, which is asked where many scores tie or stand alike.
        seed: of those resamples.
    """
    num_in, num_out = _num_users(owner_places(held_in, held_out, owners))
    widened = narrow.no_narrower_than(interval.perfect_separation(num_in, num_out, level))
    # Sides that do not overlap are what the floor of perfect separation is for.
    is_separated = held_in.min() > held_out.max() or held_out.min() > held_in.max()
    if not is_separated and _may_lack_a_value(held_in, held_out):
        worst = worst_case(held_in, held_out, level, owners, num_resamples=num_resamples, seed=seed)
        widened = Interval(min(widened.lower, worst.lower), max(widened.upper, worst.upper))
    return no_narrower_than_test(widened, held_in, held_out, level, owners)


def _may_lack_a_value(held_in: FloatArray, held_out: FloatArray) -> bool:
    """Return whether so many scores are alike that resamples cannot show what a few further users would do.

    Alike are scores that tie, and scores of one side that stand between the same two of the other.
    """
    # Users have the same placement (share of the other side below or above) if they stand between the same two.
    placements = Placements.of(held_in, held_out)
    return (
        _are_equal(np.concatenate([held_in, held_out]), _MANY_TIED)
        or _are_equal(placements.held_in, _MANY_ALIKE)
        or _are_equal(placements.held_out, _MANY_ALIKE)
    )


def _are_equal(values: FloatArray, share: float) -> bool:
    """Return whether at least this share of the values, and at least two, are equal."""
    _, counts = np.unique(values, return_counts=True)
    return bool(counts.max() >= max(share * values.size, 2))


def worst_case(
    held_in: FloatArray,
    held_out: FloatArray,
    level: float,
    owners: Owners | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the AUROC's Bayesian bootstrap interval with one invented user more on each side.

    For the lower end every pair with an invented user counts against the AUROC, for the upper end for it. A value that
    no user of the sample had may still belong to as many users as the size of the sample allows. With a side of n
    scores of which v are 1 and the others 0 the weights give that side's ends Beta(v, n - v + 1) and Beta(v + 1, n -
    v), which are Clopper and Pearson's (Gaffke 2005 for scores in general).
    """
    places = owner_places(held_in, held_out, owners)
    drawn = _resampled(held_in, held_out, places, _exponential, num_resamples, seed)
    # Weights of all pairs, and of those without an invented user; of those with one none is won, or all.
    total = (drawn.weight_in + drawn.invented_in) * (drawn.weight_out + drawn.invented_out)
    known = drawn.weight_in * drawn.weight_out
    tail = (1.0 - level) / 2.0
    lower, upper = drawn.wins / total, (drawn.wins + total - known) / total
    return Interval(float(np.quantile(lower, tail)), float(np.quantile(upper, 1.0 - tail)))


def bounded_mean_interval(
    values: FloatArray, low: float, high: float, level: float = interval.CONFIDENCE_LEVEL, *, seed: int = 0
) -> Interval:
    """Return the interval of a bounded mean, by the Bayesian bootstrap with one value more at each bound.

    For values that are all at a bound the interval is Clopper and Pearson's (Gaffke 2005): n values at the top do not
    make the mean certain.

    Args:
        values: at least one, within the bounds.
        low: the least that a value can be.
        high: the most.
        level: confidence level.
        seed: of the weights; this randomness protects nobody.

    Raises:
        ValueError: if there are none, or one lies outside of the bounds.
    """
    if not (values.size and ((low <= values) & (values <= high)).all()):
        raise ValueError(f"expected values between {low:g} and {high:g}, at least one")
    weights = np.random.default_rng(seed).standard_exponential((NUM_RESAMPLES, values.size + 1))
    total, tail = weights.sum(axis=1), (1.0 - level) / 2.0
    sums = weights[:, :-1] @ values
    lower = np.quantile((sums + weights[:, -1] * low) / total, tail)
    upper = np.quantile((sums + weights[:, -1] * high) / total, 1.0 - tail)
    return Interval(float(lower), float(upper))


def mean_exposure_interval(
    outranked: BoolArray, level: float = interval.CONFIDENCE_LEVEL, *, seed: int = 0
) -> Interval:
    """Return the interval of the mean exposure, in bits, of canaries that are all ranked among the same references.

    A canary is a planted secret; references are secrets drawn alike that were not planted. A canary that ranks r-th
    among N secrets has an exposure of log2 N - log2 r. All canaries share the luck of the references, so the Bayesian
    bootstrap draws weights of both. With M = N - 1 references of which the share s (by weight) is at least as likely as
    the canary, r = 1 + M s. For each end one invented reference and one invented canary are added, as bad for that end
    as can be.

    Args:
        outranked: [canaries, references] whether the reference is at least as likely as the canary.
        level: confidence level.
        seed: of the weights; this randomness protects nobody.
    """
    num_canaries, num_references = outranked.shape
    rng = np.random.default_rng(seed)
    # [resamples, references + 1] and [resamples, canaries + 1] weights; the last column is the invented one's.
    of_references = rng.standard_exponential((NUM_RESAMPLES, num_references + 1))
    of_canaries = rng.standard_exponential((NUM_RESAMPLES, num_canaries + 1))
    most_bits = float(np.log2(num_references + 1.0))
    tail = (1.0 - level) / 2.0
    above = of_references[:, :-1] @ outranked.T  # [resamples, canaries] weight of the references above each canary
    total = of_references.sum(axis=1, keepdims=True)
    # Lower end: the invented reference beats every canary, the invented canary has 0 bits. Upper end: the opposite.
    ends = []
    for above_or_more, invented_bits, quantile in (
        (above + of_references[:, -1:], 0.0, tail),
        (above, most_bits, 1.0 - tail),
    ):
        exposures = most_bits - np.log2(1.0 + num_references * above_or_more / total)
        sums = (of_canaries[:, :-1] * exposures).sum(axis=1) + of_canaries[:, -1] * invented_bits
        means = sums / of_canaries.sum(axis=1)
        ends.append(float(np.quantile(means, quantile)))
    return Interval(*ends)


def _multinomial(rng: np.random.Generator, num_resamples: int, num_users: int) -> FloatArray:
    """Draw how often each user is in each resample: the ordinary bootstrap, where the invented user has weight 0."""
    times = rng.multinomial(num_users, np.full(num_users, 1.0 / num_users), num_resamples)
    return np.pad(times, ((0, 0), (0, 1))).astype(np.float64)


def _exponential(rng: np.random.Generator, num_resamples: int, num_users: int) -> FloatArray:
    """Draw the weights of the Bayesian bootstrap, the invented user's included."""
    return rng.standard_exponential((num_resamples, num_users + 1))


class _Resamples(NamedTuple):
    """What became of each resample, [resamples] each. Its AUROC is ``wins / (weight_in * weight_out)``."""

    wins: FloatArray  # weight of the pairs whose held-in record scores above the held-out one, ties one half
    weight_in: FloatArray  # of all held-in records
    weight_out: FloatArray  # of all held-out records
    invented_in: FloatArray  # of the held-in side's invented user, with an average number of records; 0 without one
    invented_out: FloatArray  # of the held-out side's


def _resampled(
    held_in: FloatArray, held_out: FloatArray, places: list[np.ndarray], draw: Draw, num_resamples: int, seed: int
) -> _Resamples:
    """Resample users with all their records, in blocks, with O(records) work a resample and without sorting again.

    Args:
        held_in: scores of records of users trained on.
        held_out: those of others.
        places: by side, each record's user: 0 to the number of users less one.
        draw: gives [resamples, users + 1] weights; the last column is that of an invented user.
        num_resamples: how many.
        seed: of the draws.
    """
    # Held-out records in ascending order, and for each held-in record how many of them are below, and at most equal.
    order = np.argsort(held_out, kind="stable")
    below, at_most = (np.searchsorted(held_out[order], held_in, side) for side in ("left", "right"))
    num_users = _num_users(places)
    num_per_block = max(1, _DRAWS_PER_BLOCK // (held_in.size + held_out.size))
    block_sizes = tuple(min(num_per_block, num_resamples - start) for start in range(0, num_resamples, num_per_block))
    blocks = []
    for size, of_users in zip(block_sizes, _drawn(draw, seed, num_users, block_sizes), strict=True):
        users_in, users_out = of_users
        # A record weighs what its user weighs. Column j of ``cumulative`` is the weight of the j lowest records.
        weights_in, weights_out = users_in[:, places[0]], users_out[:, places[1][order]]
        cumulative = np.concatenate([np.zeros((size, 1)), weights_out.cumsum(axis=1)], axis=1)
        # Strictly below counts twice, a tie once; half of that is the weight below, ties one half.
        wins = (weights_in * (cumulative[:, below] + cumulative[:, at_most])).sum(axis=1) / 2.0
        invented = [
            weights[:, -1] * len(place) / num for weights, place, num in zip(of_users, places, num_users, strict=True)
        ]
        # In the order of the fields of ``_Resamples``.
        blocks.append(np.stack([wins, weights_in.sum(axis=1), cumulative[:, -1], *invented]))
    return _Resamples(*np.concatenate(blocks, axis=1))


def _drawn(
    draw: Draw, seed: int, num_users: tuple[int, int], block_sizes: tuple[int, ...]
) -> Iterator[list[FloatArray]]:
    """Yield the weights of each block of resamples, by side.

    The many statistics of one run resample the same users with the same seed, so counts are kept where they fit into
    memory.
    """
    if draw is _multinomial and sum(block_sizes) * sum(num_users) <= _MAX_KEPT:
        for counts in _multinomial_counts(seed, num_users, block_sizes):
            yield [side.astype(np.float64) for side in counts]
        return
    rng = np.random.default_rng(seed)
    for size in block_sizes:
        yield [draw(rng, size, count) for count in num_users]


@functools.lru_cache(maxsize=1)
def _multinomial_counts(
    seed: int, num_users: tuple[int, int], block_sizes: tuple[int, ...]
) -> list[list[npt.NDArray[np.uint16]]]:
    """Return the bootstrap's counts, [resamples, users + 1], by block and side, in two bytes each."""
    rng = np.random.default_rng(seed)
    return [[_multinomial(rng, size, count).astype(np.uint16) for count in num_users] for size in block_sizes]
