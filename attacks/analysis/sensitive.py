"""Memorisation of sensitive tokens against other tokens (Das et al. 2025, arXiv 2502.13313).

Sensitive tokens are those in a labelled span, such as a name or a telephone number. A model that learned a domain finds
all its texts likelier; one that memorised finds the *sensitive tokens* of its *training* records likelier than those of
others. So the panel gives the negative log-likelihood of sensitive and of other tokens, on train and on test, under the
base and under the tuned model, and the difference in differences with an interval over users. Averages are over tokens.
Both splits are read by one rule, the records that training could use, so that without any leak users are exchangeable
between them.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import numpy as np
import scipy.stats

from attacks.analysis import statistics
from attacks.analysis.arrays import FloatArray
from attacks.analysis.statistics.permutation import MIN_NORMAL_USERS, user_choices
from attacks.signals import HELD_IN, HELD_OUT, TRAINING, DocumentSignals

TOKENS = ("sensitive", "other")
SPLITS = {"train": HELD_IN, "test": HELD_OUT}
_MAX_CHOSEN = 500_000
"""Users of permutations whose sums are in memory at once."""
_QUANTILES = {"p01": 0.01, "p10": 0.10, "p50": 0.50}


@dataclasses.dataclass
class _User:
    """Sums over one user's tokens.

    Attributes:
        sums: [2, 3]; row 0 of sensitive tokens, row 1 of others; columns: count, NLL under the tuned model, NLL under
            the base (negative log-likelihoods in nats).
    """

    sums: FloatArray = dataclasses.field(default_factory=lambda: np.zeros((2, 3)))


class SensitivePanel:
    """Gathers what the panel needs from the signals, one document at a time; ``facts`` then makes the panel."""

    def __init__(self) -> None:
        #: Split ("train" or "test") to pseudonym to the user's sums.
        self._users: dict[str, dict[str, _User]] = {split: collections.defaultdict(_User) for split in SPLITS}
        #: (split, "base" or "tuned") to the losses of all sensitive tokens, an array a record.
        self._losses: dict[tuple[str, str], list[FloatArray]] = collections.defaultdict(list)

    def watch(self, row: DocumentSignals) -> None:
        """Add a labelled record that training could use: of held-in users it is train, of held-out users test."""
        if row.sensitive is None or row.kind != TRAINING:
            return
        split = next(name for name, side in SPLITS.items() if side == row.side)
        tuned, base = -row.target_logp.astype(np.float64), -row.base_logp.astype(np.float64)
        for kind, is_of_kind in enumerate((row.sensitive, ~row.sensitive)):  # in the order of TOKENS
            sums = [float(is_of_kind.sum()), float(tuned[is_of_kind].sum()), float(base[is_of_kind].sum())]
            self._users[split][row.user].sums[kind] += sums
        self._losses[split, "tuned"].append(tuned[row.sensitive])
        self._losses[split, "base"].append(base[row.sensitive])

    def facts(self) -> dict[str, Any] | None:
        """Return the panel; None unless each split has at least two users with labelled records, and a sensitive token.

        A cell of it is a kind of tokens, a split and a model.
        """
        by_user = {split: _stack(users) for split, users in self._users.items()}  # [users, 2, 3] each
        totals = {split: sums.sum(axis=0) for split, sums in by_user.items()}  # [2, 3] each, as in _User
        for split in SPLITS:
            num_sensitive = totals[split][0, 0]
            if len(by_user[split]) < 2 or num_sensitive == 0.0:
                return None
        cells = []
        for row, tokens in enumerate(TOKENS):
            for split, total in totals.items():
                count, tuned, base = total[row]
                for model, loss in (("base", base), ("tuned", tuned)):
                    cell: dict[str, Any] = {"tokens": tokens, "split": split, "model": model, "num_tokens": int(count)}
                    cell["nll"] = float(loss / count) if count else None
                    if tokens == "sensitive":
                        values = np.concatenate(self._losses[split, model])
                        # One confidently wrong token moves a mean; what is remembered shows in the lower quantiles.
                        cell |= {name: float(np.quantile(values, level)) for name, level in _QUANTILES.items()}
                        cell["lowest"] = round(float(values.min()), 1)
                    cells.append(cell)
        return {"cells": cells, **_differences(by_user["train"], by_user["test"])}


def _stack(users: dict[str, _User]) -> FloatArray:
    """Return the users' sums as [users, 2 kinds of tokens, 3 sums], users in order of their names."""
    return np.array([users[name].sums for name in sorted(users)]).reshape(len(users), 2, 3)


def _columns(sums: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the columns of [..., 3] sums: tokens, their loss under the tuned model, and under the base."""
    return sums[..., 0], sums[..., 1], sums[..., 2]


def _gain(sums: FloatArray) -> FloatArray:
    """Return how much tuning lowered the loss, in nats per token: [..., 2 kinds of tokens]; NaN without such tokens."""
    counts, tuned, base = _columns(sums)
    with np.errstate(invalid="ignore"):
        return (base - tuned) / counts


def _differences(train: FloatArray, test: FloatArray) -> dict[str, Any]:
    """Return the panel's three differences with their intervals, and the method of the intervals.

    The first two are what tuning gained (nats per token) on train less what it gained on test, of sensitive tokens and
    of others. The third is the first less the second: memorisation of sensitive tokens beyond that of others.

    Args:
        train: [users, 2, 3] sums of held-in users.
        test: [users, 2, 3] sums of held-out users.
    """
    points = _gaps(train.sum(axis=0), test.sum(axis=0))
    lower, upper = _student(points, train, test)
    tail = (1.0 - statistics.CONFIDENCE_LEVEL) / 2.0
    # With few users Student's interval alone may exclude 0 too often: then the permutation test must reject as well.
    excludes = (lower > 0.0) | (upper < 0.0)
    if excludes.any() and min(_num_effective(train).min(), _num_effective(test).min()) < MIN_NORMAL_USERS:
        above, below = _permuted(points, train, test)
        lower = np.where((lower > 0.0) & (above > tail), 0.0, lower)
        upper = np.where((upper < 0.0) & (below > tail), 0.0, upper)
    return {
        "difference_in_differences": {
            name: {"value": float(points[i]), "interval": [float(lower[i]), float(upper[i])]}
            for i, name in enumerate(("sensitive", "other", "excess_on_sensitive"))
            if math.isfinite(points[i])
        },
        "interval_method": f"Student's interval over users; below {MIN_NORMAL_USERS} effective ones on a side "
        "it holds 0 unless the test by permutation of users rejects",
    }


def _gaps(train: FloatArray, test: FloatArray) -> FloatArray:
    """Return the three differences, [..., 3], from sums over a split's users, [..., 2, 3]; NaN without such tokens."""
    gap = _gain(train) - _gain(test)  # [..., 2]: of sensitive tokens, of others
    return np.stack([gap[..., 0], gap[..., 1], gap[..., 0] - gap[..., 1]], axis=-1)


def _num_effective(sums: FloatArray) -> FloatArray:
    """Return the effective number of users (Kish) behind each difference: it is small if one user owns most tokens.

    The third difference uses both kinds of tokens and gets the smaller number.
    """
    counts, _, _ = _columns(sums)
    with np.errstate(invalid="ignore", divide="ignore"):
        num_users = counts.sum(axis=0) ** 2 / (counts**2).sum(axis=0)
    return np.append(num_users, num_users.min())


def _student(points: FloatArray, train: FloatArray, test: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the ends of Student's interval of each difference: (lower [3], upper [3]).

    The variance follows from what every user adds to the error; the degrees of freedom are Welch and Satterthwaite's
    over effective numbers of users.

    Args:
        points: [3] the differences.
        train: [users, 2, 3] sums of held-in users; see ``_User``.
        test: [users, 2, 3] sums of held-out users.
    """
    variances, freedoms = [], []
    for sums in (train, test):
        num_users = len(sums)
        variances.append((_errors(sums) ** 2).sum(axis=0) * num_users / (num_users - 1.0))
        freedoms.append(np.maximum(_num_effective(sums) - 1.0, 1.0))
    total = variances[0] + variances[1]
    with np.errstate(invalid="ignore", divide="ignore"):
        freedom = total**2 / (variances[0] ** 2 / freedoms[0] + variances[1] ** 2 / freedoms[1])
    quantile = scipy.stats.t.ppf((1.0 + statistics.CONFIDENCE_LEVEL) / 2.0, np.where(total > 0.0, freedom, 1.0))
    half = quantile * np.sqrt(total)
    return points - half, points + half


def _errors(sums: FloatArray) -> FloatArray:
    """Return what each user of a split adds to the error of each difference, [users, 3], to first order.

    The split's gain is the sum of its users' gains over its tokens. A user adds to its error the own gain less the gain
    of as many average tokens, over the split's tokens.
    """
    counts, tuned, base = _columns(sums)  # [users, 2 kinds of tokens] each
    with np.errstate(invalid="ignore", divide="ignore"):
        average_gains = _gain(sums.sum(axis=0)) * counts
        errors = (base - tuned - average_gains) / counts.sum(axis=0)
    of_sensitive, of_others = errors[:, 0], errors[:, 1]
    return np.stack([of_sensitive, of_others, of_sensitive - of_others], axis=1)


def _permuted(points: FloatArray, train: FloatArray, test: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return one-sided p-values of each difference, [3]: that it is above what chance gives, and that it is below.

    Without any leak users are exchangeable between the splits, so each choice of users as "train" is equally likely.
    """
    pooled = np.concatenate([train, test])
    choices, is_every = user_choices(len(pooled), min(len(train), len(test)))
    parts = np.array_split(choices, 1 + choices.size // _MAX_CHOSEN)
    chosen = np.concatenate([pooled[part].sum(axis=1) for part in parts])
    rest = pooled.sum(axis=0) - chosen
    drawn = _gaps(chosen, rest) if len(train) <= len(test) else _gaps(rest, chosen)
    # A choice without such tokens is NaN, says nothing, and counts as extreme: hence "not less", which NaN satisfies.
    as_high = (~(drawn < points - 1e-12)).sum(axis=0)
    as_low = (~(drawn > points + 1e-12)).sum(axis=0)
    observed = 0 if is_every else 1  # among drawn choices the observed one counts as one more
    num_choices = observed + len(drawn)
    return (observed + as_high) / num_choices, (observed + as_low) / num_choices
