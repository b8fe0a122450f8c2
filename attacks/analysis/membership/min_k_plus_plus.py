"""Min-K%++: the same with each token judged against its place's own distribution (Zhang et al. 2025, arXiv 2404.02936).

The moments are those of log p under p. Uniform moments over the vocabulary, as one public benchmark has them, are
another statistic.
"""

from __future__ import annotations

import numpy as np

from attacks.analysis.membership.min_k import mean_of_lowest
from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return the mean of the lowest fifth of (log p - mean) / standard deviation; 0 where the model is certain."""
    assert row.target_mean is not None
    assert row.target_variance is not None
    spread = np.sqrt(row.target_variance.astype(np.float64))
    surprise = row.target_logp.astype(np.float64) - row.target_mean.astype(np.float64)
    return mean_of_lowest(np.divide(surprise, spread, out=np.zeros_like(spread), where=spread > 0.0))


ATTACK = DocumentAttack(
    "min_k_plus_plus",
    "mean of the lowest 20 % of (log p - E_p log p) / SD_p log p (Zhang et al. 2025)",
    score,
    needs=("target_mean", "target_variance"),
)
