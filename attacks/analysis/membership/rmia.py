"""RMIA: how many other units' ratios a unit's ratio beats (Zarifzadeh et al. 2024, arXiv 2312.03262).

p is exp(mean log p). The reference probability is the mean over shadows with and without the owner where there are
both; else OUT alone is corrected by (1 + a) / 2 · out + (1 - a) / 2 with the paper's a, not tuned on this split.
The units compared with are all others, whatever their side.
"""

from __future__ import annotations

import numpy as np

from attacks.analysis.protocol import FloatArray, ReferenceAttack, UnderOtherModels

GAMMA = 1.0
OFFLINE_A = 0.3


def score(models: UnderOtherModels) -> FloatArray:
    """Share of the other units z with ratio(x) / ratio(z) > gamma."""
    probabilities = UnderOtherModels(np.exp(models.target), np.exp(models.shadows), models.is_in)
    out_mean = probabilities.mean_where(~models.is_in)
    if models.is_in.sum(axis=1).min() >= 1:
        reference = (probabilities.mean_where(models.is_in) + out_mean) / 2.0
    else:
        reference = (1.0 + OFFLINE_A) / 2.0 * out_mean + (1.0 - OFFLINE_A) / 2.0
    ratio = probabilities.target / reference
    ordered = np.sort(ratio)
    return np.searchsorted(ordered, ratio / GAMMA, side="left") / max(1, ratio.size - 1)


ATTACK = ReferenceAttack(
    "rmia", "share of other units whose ratio to the shadows is lower (Zarifzadeh et al. 2024)", score
)
