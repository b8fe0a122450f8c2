"""Balanced accuracy: the mean over labels of the share of a label's records that a classifier recognises.

A classifier that always names one label, or guesses, has 1 / labels, however frequent the labels are. Plain accuracy
has no such fixed point: always naming the most frequent label may look better than a classifier that learned something.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

#: Weightings of the users that the interval is taken from.
_NUM_DRAWS = 1000
_TAILS = (0.025, 0.975)


@dataclasses.dataclass(frozen=True)
class BalancedAccuracy:
    """The mean over labels of the share of their records that are recognised.

    Attributes:
        value: from 0 to 1.
        lower, upper: 95 % interval, by a bootstrap over users.
        chance: 1 / labels.
    """

    value: float
    lower: float
    upper: float
    chance: float

    @property
    def is_above_chance(self) -> bool:
        """Whether chance lies below the interval."""
        return self.lower > self.chance

    @classmethod
    def of(cls, is_right: Sequence[bool], labels: Sequence[str], users: Sequence[str]) -> BalancedAccuracy:
        """Return the balanced accuracy of a classifier's answers.

        Users are weighted afresh in each draw, each by an exponential weight of mean one (Rubin's Bayesian bootstrap),
        so that no label is ever without records. Two users are added to those who are weighted, with one record of
        each label: one is always recognised, the other never. Without them ten right answers of ten would give an
        interval of no width.

        Args:
            is_right: whether each record's label was recognised.
            labels: the true label of each record.
            users: the user of each record.
        """
        names, label_of = np.unique(np.asarray(labels), return_inverse=True)
        _, user_of = np.unique(np.asarray(users), return_inverse=True)
        shape = (int(user_of.max()) + 1, len(names))
        num_records, num_right = np.zeros(shape), np.zeros(shape)
        np.add.at(num_records, (user_of, label_of), 1)
        np.add.at(num_right, (user_of, label_of), np.asarray(is_right, dtype=float))
        value = float(np.mean(num_right.sum(0) / num_records.sum(0)))
        lower, upper = np.quantile(_draws(num_records, num_right), _TAILS)
        return cls(value, min(float(lower), value), max(float(upper), value), 1 / len(names))


def _draws(num_records: npt.NDArray[np.float64], num_right: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return balanced accuracies [draws] under weights of users; both arguments are counts [users, labels]."""
    ones, zeros = np.ones((1, num_records.shape[1])), np.zeros((1, num_records.shape[1]))
    num_records = np.concatenate([num_records, ones, ones])
    num_right = np.concatenate([num_right, ones, zeros])
    generator = np.random.default_rng(0)  # the same records give the same interval
    draws = np.empty(_NUM_DRAWS)
    for number in range(_NUM_DRAWS):
        weights = generator.standard_exponential(len(num_records))
        draws[number] = np.mean(weights @ num_right / (weights @ num_records))
    return draws
