"""What (epsilon, delta)-differential privacy lets a membership test achieve, and what a finite sample may show of it.

Let T be a test that reads the released model. For neighbouring data sets (user u in, user u out) and the event
E = "T accuses u",

    P(E | in)     <=     e^epsilon P(E | out) + delta          (DP on E)
    P(not E | out) <= e^epsilon P(not E | in) + delta          (DP on the complement, the data sets exchanged)

so a test with false positive rate x has true positive rate at most

    f(x) = min(e^epsilon x + delta, 1 - e^-epsilon (1 - delta - x), 1).

The two lines meet at x = (1 - delta) / (1 + e^epsilon), and the area above them is (1 - delta)^2 / (1 + e^epsilon), so

    AUROC <= 1 - (1 - delta)^2 / (1 + e^epsilon).

(Kairouz, Oh and Viswanath 2015 for f; Kandpal et al. 2023 for user inference.)

A sample needs one step more. All users are scored under ONE model, and the threshold comes from the held-out users
themselves, so "at zero false positives out of 68" is not "at false positive rate 0", where the cap would be delta.
With a split drawn at random, u and the n held-out users are exchangeable while u is out: the number of held-out users
that score at least as high as u is then uniform on 0..n. "At most k of them do" is an event of probability (k + 1) /
(n + 1), and DP gives, exactly and for every n,

    E[TPR with k of n false positives allowed] <= f((k + 1) / (n + 1)),
    E[sample AUROC] <= mean of f(j / (n + 1)) over j = 1..n,

which falls to the area under f as n grows. Ties count one half, as if broken by coin.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Bound(Protocol):
    """A guarantee that limits how high the ROC of any membership test may be."""

    def max_tpr(self, fpr: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the largest true positive rate at each false positive rate."""
        ...

    def max_auroc(self) -> float:
        """Return the largest area under the ROC."""
        ...


@dataclasses.dataclass(frozen=True)
class DpBound:
    """An (epsilon, delta) guarantee whose unit is the unit that the attack scores.

    Attributes:
        epsilon: at least 0; infinity allows everything.
        delta: in [0, 1].
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not (self.epsilon >= 0.0 and 0.0 <= self.delta <= 1.0):
            raise ValueError(f"epsilon={self.epsilon}, delta={self.delta}; expected epsilon >= 0 and 0 <= delta <= 1")

    def max_tpr(self, fpr: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the largest true positive rate of any test with these false positive rates: f above.

        Args:
            fpr: false positive rates in [0, 1].
        """
        fpr = np.asarray(fpr, dtype=np.float64)
        # Past epsilon 700 exp overflows; e^-epsilon has underflowed to 0 in meaning long before.
        if self.epsilon > 700.0:
            return np.ones_like(fpr)
        growth = math.exp(self.epsilon)
        return np.clip(np.minimum(growth * fpr + self.delta, 1.0 - (1.0 - self.delta - fpr) / growth), 0.0, 1.0)

    def max_auroc(self) -> float:
        """Return the largest area under the ROC of any test: the cap for a whole population."""
        if self.epsilon > 700.0:
            return 1.0
        return 1.0 - (1.0 - self.delta) ** 2 / (1.0 + math.exp(self.epsilon))


@dataclasses.dataclass(frozen=True)
class CurveBound:
    """A whole privacy curve: every certified point cuts the region of possible tests (Dong, Roth and Su 2022).

    Attributes:
        points: (epsilon, delta) pairs that all hold for one mechanism.
        source: where they come from, for the report.
    """

    points: tuple[DpBound, ...]
    source: str = ""

    def max_tpr(self, fpr: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the smallest of the points' own caps."""
        return np.min([point.max_tpr(fpr) for point in self.points], axis=0)

    def max_auroc(self) -> float:
        """Return the area under that smallest cap, by strips that err upwards."""
        return float(self.max_tpr(np.arange(1, 4001) / 4000).mean())


def auroc_cap(bound: Bound, num_held_out: int) -> float:
    """Return the largest expected AUROC of a sample whose held-out side has this many users.

    Args:
        bound: the guarantee, with the user as its unit.
        num_held_out: held-out users, at least one.

    Returns:
        A value a little above ``bound.max_auroc()``, equal to it in the limit.
    """
    assert num_held_out >= 1, num_held_out
    return float(bound.max_tpr(np.arange(1, num_held_out + 1) / (num_held_out + 1)).mean())


def tpr_cap(bound: Bound, num_false_positives_allowed: int, num_held_out: int) -> float:
    """Return the largest expected TPR at the threshold that lets this many held-out users through.

    Args:
        bound: the guarantee, with the user as its unit.
        num_false_positives_allowed: k of the module's docstring.
        num_held_out: held-out users, at least one.

    Returns:
        f((k + 1) / (n + 1)).
    """
    assert 0 <= num_false_positives_allowed <= num_held_out, (num_false_positives_allowed, num_held_out)
    return float(bound.max_tpr((num_false_positives_allowed + 1) / (num_held_out + 1)))
