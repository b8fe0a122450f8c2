"""Min-K%: a text that was trained on has few very unlikely tokens (Shi et al. 2024, arXiv 2310.16789)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.arrays import FloatArray
from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals

SHARE = 0.2


def mean_of_lowest(values: FloatArray, share: float = SHARE) -> float:
    """Return the mean of the max(1, ⌊share · n⌋) lowest values: the floor alone gives short texts no score."""
    count = max(1, int(share * values.size + 1e-9))  # 0.29 * 100 is a little below 29 in floats: count it as 29
    return float(np.partition(values, count - 1)[:count].mean())


def score(row: DocumentSignals) -> float:
    """Return the mean of the lowest fifth of the tokens' log-probabilities."""
    return mean_of_lowest(row.target_logp.astype(np.float64))


ATTACK = DocumentAttack("min_k", "mean of the lowest 20 % of log p_target (Shi et al. 2024)", score)
