"""Likelihood against the text in lower case, which the model has seen less (Carlini et al. 2021, arXiv 2012.07805)."""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return the mean log-probability of the text less that of its lower-case form."""
    return float(row.target_logp.mean(dtype=np.float64)) - row.variants["lowercase"]


ATTACK = DocumentAttack(
    "lowercase",
    "mean log p_target of the text - of its lower-case form (Carlini et al. 2021)",
    score,
    needs=("variants.lowercase",),
)
