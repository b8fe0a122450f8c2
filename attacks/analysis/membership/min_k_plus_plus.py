"""Min-K%++: like Min-K%, with each token judged against the model's distribution there (Zhang et al. 2025).

arXiv 2404.02936. A text that was trained on has few very unlikely tokens, so the lowest fifth is read. A token counts
as unlikely by its distance from the mean of log p under p, in standard deviations of log p under p. Moments that weigh
the whole vocabulary equally, as one public benchmark has them, are another statistic.
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
