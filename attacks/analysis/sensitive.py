"""Sensitive against other tokens (Das et al. 2025, arXiv 2502.13313): who remembers what, and at which cost.

A model that learned a domain finds all its texts likelier; one that memorised finds the *sensitive tokens* of its
*training* records likelier than those of others. So the panel gives the negative log-likelihood of sensitive and of
other tokens, on train and on test, under the base and under the tuned model, and the difference in differences with an
interval over users. Averages are over tokens.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.analysis import statistics
from attacks.signals import HELD_IN, HELD_OUT, TRAINING, DocumentSignals

FloatArray = npt.NDArray[np.float64]

TOKENS = ("sensitive", "other")
SPLITS = {"train": HELD_IN, "test": HELD_OUT}
_QUANTILES = {"p01": 0.01, "p10": 0.10, "p50": 0.50}
_NUM_RESAMPLES = 1000


@dataclasses.dataclass
class _User:
    """Sums of one user: a row for sensitive and for other tokens: count, NLL tuned, NLL base."""

    sums: FloatArray = dataclasses.field(default_factory=lambda: np.zeros((2, 3)))


class SensitivePanel:
    """Gathers what the panel needs from rows as they pass."""

    def __init__(self) -> None:
        self._users: dict[str, dict[str, _User]] = {split: collections.defaultdict(_User) for split in SPLITS}
        self._losses: dict[tuple[str, str], list[FloatArray]] = collections.defaultdict(list)

    def watch(self, row: DocumentSignals) -> None:
        """Add a labelled row: held-in users' training records are train, everything of held-out users is test."""
        split = next((name for name, side in SPLITS.items() if side == row.side), None)
        if row.sensitive is None or split is None or (split == "train" and row.kind != TRAINING):
            return
        tuned, base = -row.target_logp.astype(np.float64), -row.base_logp.astype(np.float64)
        for number, chosen in enumerate((row.sensitive, ~row.sensitive)):
            sums = [float(chosen.sum()), float(tuned[chosen].sum()), float(base[chosen].sum())]
            self._users[split][row.user].sums[number] += sums
        self._losses[split, "tuned"].append(tuned[row.sensitive])
        self._losses[split, "base"].append(base[row.sensitive])

    def facts(self, seed: int) -> dict[str, Any] | None:
        """Return the panel, or None without labelled tokens on both splits.

        Args:
            seed: of the bootstrap over users.
        """
        totals = {split: _stack(users) for split, users in self._users.items()}
        if any(total.shape[0] < 2 or total.sum(axis=0)[0, 0] == 0.0 for total in totals.values()):
            return None
        cells = []
        for number, kind in enumerate(TOKENS):
            for split, total in totals.items():
                count, tuned, base = total.sum(axis=0)[number]
                for model, loss in (("base", base), ("tuned", tuned)):
                    cell: dict[str, Any] = {"tokens": kind, "split": split, "model": model, "num_tokens": int(count)}
                    cell["nll"] = float(loss / count) if count else None
                    if kind == "sensitive":
                        values = np.concatenate(self._losses[split, model])
                        # One confidently wrong token moves a mean; what is remembered shows in the lower quantiles.
                        cell |= {name: float(np.quantile(values, level)) for name, level in _QUANTILES.items()}
                        cell["lowest"] = round(float(values.min()), 1)
                    cells.append(cell)
        return {"cells": cells, **_differences(totals["train"], totals["test"], seed)}


def _stack(users: dict[str, _User]) -> FloatArray:
    """[users, tokens, sums], users in order of their names."""
    return np.array([users[name].sums for name in sorted(users)]).reshape(len(users), 2, 3)


def _gain(sums: FloatArray) -> FloatArray:
    """Return how much tuning lowered the loss, in nats per token: [..., tokens]."""
    counts = np.maximum(sums[..., 0], 1.0)
    return (sums[..., 2] - sums[..., 1]) / counts


def _differences(train: FloatArray, test: FloatArray, seed: int) -> dict[str, Any]:
    """Train less test of what tuning gained: on sensitive tokens, on others, and the one over the other."""

    def compute(train_sums: FloatArray, test_sums: FloatArray) -> FloatArray:
        gap = _gain(train_sums) - _gain(test_sums)
        return np.stack([gap[..., 0], gap[..., 1], gap[..., 0] - gap[..., 1]], axis=-1)

    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(_NUM_RESAMPLES):
        picked = (side[rng.integers(0, len(side), len(side))].sum(axis=0) for side in (train, test))
        resampled.append(compute(*picked))
    tail = (1.0 - statistics.CONFIDENCE_LEVEL) / 2.0
    lower, upper = np.quantile(np.array(resampled), [tail, 1.0 - tail], axis=0)
    point = compute(train.sum(axis=0), test.sum(axis=0))
    names = ("sensitive", "other", "excess_on_sensitive")
    return {
        "difference_in_differences": {
            name: {"value": float(point[i]), "interval": [float(lower[i]), float(upper[i])]}
            for i, name in enumerate(names)
        },
        "interval_method": f"percentile bootstrap over users, {_NUM_RESAMPLES} resamples",
    }
