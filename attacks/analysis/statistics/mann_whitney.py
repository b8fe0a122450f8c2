"""AUROC as the Mann-Whitney probability, and the variance that its placements give (DeLong et al. 1988).

The AUROC here is P(held-in > held-out) + P(tie) / 2 over pairs of users. It is not oriented after the fact and not
taken of the convex hull, so pure noise averages exactly 1/2 and a value below 1/2 can be seen.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from attacks.analysis.arrays import FloatArray


def check_sides(held_in: FloatArray, held_out: FloatArray, fewest: int = 1) -> None:
    """Raise ValueError unless each side has ``fewest`` scores, all of them finite: NaN would rank above everybody."""
    for side, scores in (("held-in", held_in), ("held-out", held_out)):
        if scores.size < fewest:
            raise ValueError(f"there are {scores.size} {side} scores; expected at least {fewest}")
        faults = np.flatnonzero(~np.isfinite(scores))
        if faults.size:
            raise ValueError(f"{side} score {faults[0]} is {scores[faults[0]]}; expected finite scores")


@dataclasses.dataclass(frozen=True)
class Placements:
    """Where each user stands against the other side: the components of DeLong, DeLong and Clarke-Pearson (1988).

    Attributes:
        held_in: for each held-in user, the share of held-out users scoring lower, ties one half.
        held_out: for each held-out user, the share of held-in users scoring higher, ties one half.
    """

    held_in: FloatArray
    held_out: FloatArray

    @classmethod
    def of(cls, held_in: FloatArray, held_out: FloatArray) -> Placements:
        """Rank the two sides against each other in O(n log n).

        Args:
            held_in: one score per held-in user.
            held_out: one score per held-out user.

        Returns:
            The placements, in the order in which the scores are given.
        """
        check_sides(held_in, held_out)
        num_lower = _rank(held_in, held_out)
        num_higher = held_in.size - _rank(held_out, held_in)
        return cls(num_lower / held_out.size, num_higher / held_in.size)


def auroc(held_in: FloatArray, held_out: FloatArray) -> float:
    """Return the probability that a random held-in user scores above a random held-out user, ties one half.

    Args:
        held_in: one score per held-in user.
        held_out: one score per held-out user.
    """
    return float(Placements.of(held_in, held_out).held_in.mean())


def delong_variance(held_in: FloatArray, held_out: FloatArray) -> float:
    """Return DeLong's estimate of the variance of the sample AUROC.

    Args:
        held_in: one score per held-in user, at least two.
        held_out: one score per held-out user, at least two.

    Returns:
        The variance; 0 when the two sides are separated or when all scores are equal.
    """
    check_sides(held_in, held_out, 2)
    placements = Placements.of(held_in, held_out)
    return float(
        placements.held_in.var(ddof=1) / placements.held_in.size
        + placements.held_out.var(ddof=1) / placements.held_out.size
    )


def _rank(scores: FloatArray, among: FloatArray) -> FloatArray:
    """Return for each score how many of ``among`` are lower, ties one half."""
    ordered = np.sort(among)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / 2.0
