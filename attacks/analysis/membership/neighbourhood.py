"""Neighbourhood: a text that was trained on stands above texts that differ in a few words (Mattern et al. 2023).

arXiv 2305.18462. Neighbours here are proposed by the base model from the left context; see
``attacks.scoring.variants``.
"""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import DocumentAttack
from attacks.signals import DocumentSignals


def score(row: DocumentSignals) -> float:
    """Return the mean log-probability of the text less the average over its neighbours."""
    around = [value for name, value in sorted(row.variants.items()) if name.startswith("neighbour_")]
    return float(row.target_logp.mean(dtype=np.float64)) - float(np.mean(around))


ATTACK = DocumentAttack(
    "neighbourhood",
    "mean log p_target of the text - average over its neighbours (Mattern et al. 2023, causal proposals)",
    score,
    needs=("variants.neighbour_0",),
)
