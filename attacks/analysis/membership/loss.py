"""LOSS: a model finds what it was trained on likely (Yeom et al. 2018, arXiv 1709.01604)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return the mean log-probability per token."""
    return float(row.target_logp.mean(dtype=np.float64))


ATTACK = DocumentAttack("loss", "mean log p_target per token (Yeom et al. 2018)", score)
