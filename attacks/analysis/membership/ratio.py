"""Likelihood ratio against the model that fine-tuning started from (Carlini et al. 2021, arXiv 2012.07805)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return mean gain in log-probability per token. A difference of logarithms: their quotient would be no ratio."""
    return float((row.target_logp.astype(np.float64) - row.base_logp.astype(np.float64)).mean())


ATTACK = DocumentAttack("ratio", "mean of log p_target - log p_base per token (Carlini et al. 2021)", score)
