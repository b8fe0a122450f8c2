"""From scores and coins to counts of right guesses, with several thresholds tried and corrected for.

A coin decided for each unit (user or canary) whether it went into training. The guesser sees one score a unit and
guesses the coins. It says "in" of the highest scores, "out" of the lowest, and abstains between: for a model that knows
every unit a little. Or it says "in" of the highest alone, for a model that memorised a few units and shows nothing of
the others.

Which guesses are made is declared here, before any score is seen: all units, half and a fifth of them on both sides,
and five shares of the highest, each at an equal share of the error (Bonferroni). A search over all thresholds without
that correction reports a positive epsilon on a third of runs that leak nothing. Of these guesses the one-run bound uses
those that can show anything at the audit's delta (:func:`telling_guesses`).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.audit import one_run

GUESS_SHARES = (1.0, 0.5, 0.2)
"""Shares of the units that are guessed: few for a weak attack that is sure of some, all for one that is sure of all."""

BLACK_BOX = "released model"
"""What an outsider sees: likelihoods under what was released."""

TOP_SHARES = (0.2, 0.1, 0.05, 0.025, 0.0125)
"""Shares of the units that are guessed "in", those with the highest scores, and nobody "out"."""


@dataclasses.dataclass(frozen=True, order=True)
class Guess:
    """One declared way of guessing.

    Attributes:
        num: r, guesses made.
        only_in: whether all of them are "in".
    """

    num: int
    only_in: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Coins:
    """Units whose inclusion in training a coin of their own decided, and how member-like each looks.

    Attributes:
        scores: [m] higher is more member-like; by one rule for all units, which must not know the coins.
        is_in: [m] whether the coin put the unit into training.
        prob_in: chance of that, the same for all units.
        unit: ``"user"`` or ``"example"``: what a coin moved in or out, with everything that belongs to it.
        name: of the source, for the report.
        most_records: the most records of any of them, whichever way its coin fell.
        score: which score it is and why, for the report.
        access: what the attacker saw.
        are_independent: whether scores are independent of each other by their making, given who was in training.
    """

    scores: FloatArray
    is_in: BoolArray
    prob_in: float
    unit: str
    name: str
    most_records: int = 1
    score: str = ""
    access: str = BLACK_BOX
    are_independent: bool = False

    def __post_init__(self) -> None:
        assert self.scores.shape == self.is_in.shape == (self.scores.size,), (self.scores.shape, self.is_in.shape)
        assert np.isfinite(self.scores).all(), "scores"
        assert 0.0 < self.prob_in < 1.0, self.prob_in

    @property
    def num_coins(self) -> int:
        """How many, m."""
        return self.scores.size

    @property
    def is_constant(self) -> bool:
        """Whether all units have the same score."""
        return self.num_coins == 0 or bool(np.ptp(self.scores) == 0.0)


def fair(coins: Coins, seed: int) -> Coins:
    """Drop units at random until those left were in or out with chance 1/2 each, as the audit's theorems need it.

    Each unit of the likelier side is dropped by a draw of its own, with the chance that makes both sides equally
    likely. Given who is left, the coins of those left are independent and fair. The dropped units count as fixed data,
    for which the theorems hold unchanged. With a share h held out about 2 min(h, 1 - h) of the units stay.

    Args:
        coins: with any ``prob_in``.
        seed: of the dropping; it must not be chosen after the result.
    """
    if coins.prob_in == 0.5:
        return coins
    prob_of_rarer = min(coins.prob_in, 1.0 - coins.prob_in)
    is_of_likelier_side = coins.is_in == (coins.prob_in > 0.5)
    draws = np.random.default_rng(seed).random(coins.num_coins)
    kept = ~is_of_likelier_side | (draws < prob_of_rarer / (1.0 - prob_of_rarer))
    return dataclasses.replace(coins, scores=coins.scores[kept], is_in=coins.is_in[kept], prob_in=0.5)


def declared_guesses(num_coins: int) -> list[Guess]:
    """Return all guesses that are declared for so many coins, without repeats; they share the error equally."""
    if not num_coins:
        return []
    both_sides = {Guess(max(1, math.floor(share * num_coins))) for share in GUESS_SHARES}
    only_in = {Guess(max(1, math.floor(share * num_coins)), only_in=True) for share in TOP_SHARES}
    return sorted(both_sides | only_in)


@functools.lru_cache(maxsize=4096)
def telling_guesses(num_coins: int, delta: float, significance: float) -> tuple[Guess, ...]:
    """Return the declared guesses that could show an epsilon above 0 at this delta, were all of them right.

    The one-run theorem adds about 4 δ m / r to the p-value of r guesses among m coins. So at a large delta small
    guesses cannot reject anything and would only use up error. The choice does not look at any score.
    """
    # The smallest p-value that each guess could give against epsilon = 0: had all of it been right.
    floors = {
        guess: one_run.p_value(num_coins, guess.num, guess.num, 0.0, delta) for guess in declared_guesses(num_coins)
    }
    ordered = sorted(floors, key=lambda guess: (floors[guess], guess))  # those that could show most first
    # k guesses share the error, so keep the most for which the worst of them still fits into significance / k.
    num_kept = 0
    for k, guess in enumerate(ordered, start=1):
        if floors[guess] <= significance / k:
            num_kept = k
    return tuple(sorted(ordered[:num_kept]))


def correct_guesses(coins: Coins, guess: Guess, seed: int) -> int:
    """Return how many guesses are right: units far above a cut are guessed "in", far below it "out", others not at all.

    The cut is the widest gap between neighbouring scores near the middle, since fair coins put about half of the units
    on each side. The exact middle would guess some units wrongly even for a perfect attack, as the sides are rarely
    equal. The cut is read off the scores, never off the coins; the theorems allow any such rule as long as the number
    of guesses is fixed.

    Args:
        coins: scores and fair coins.
        guess: how many of the m coins are guessed; with ``only_in`` the highest scores, and no cut is needed.
        seed: orders units of equal scores at random, since the order of the units might depend on the coins.
    """
    num_coins, num_guesses = coins.num_coins, guess.num
    assert 0 < num_guesses <= num_coins, (num_guesses, num_coins)
    shuffle = np.random.default_rng(seed).permutation(num_coins)
    order = shuffle[np.argsort(coins.scores[shuffle], kind="stable")]  # units by ascending score, ties at random
    if guess.only_in:
        num_out = 0
    else:
        # Half of the units that are not guessed lie below the cut; the rest of those below are guessed "out".
        num_out = _cut(coins.scores[order]) - (num_coins - num_guesses) // 2
        num_out = min(max(num_out, 0), num_guesses)
    num_in = num_guesses - num_out
    right_out = np.count_nonzero(~coins.is_in[order[:num_out]])
    right_in = np.count_nonzero(coins.is_in[order[num_coins - num_in :]])
    return int(right_out + right_in)


def _cut(ordered: FloatArray) -> int:
    """Return how many of the ascending scores lie below the widest gap near the middle; half if all gaps are 0.

    "Near" is within two standard deviations of the number of heads among n fair coins, which is sqrt(n) / 2.
    """
    half, two_deviations = ordered.size // 2, math.isqrt(ordered.size)
    # A gap with k scores below it is entry k - 1 of the differences; both sides of the cut have a score.
    fewest, most = max(half - two_deviations, 1), half + two_deviations
    gaps = np.diff(ordered)[fewest - 1 : most]
    if not gaps.size or gaps.max() == 0.0:
        return half
    return fewest + int(np.argmax(gaps))
