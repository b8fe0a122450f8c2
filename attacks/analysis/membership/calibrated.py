"""Likelihood against models that were not trained on the unit's owner (Watson et al. 2022, arXiv 2111.08440)."""

from __future__ import annotations

from attacks.analysis.arrays import FloatArray
from attacks.analysis.protocol import ReferenceAttack, UnderOtherModels


def score(models: UnderOtherModels) -> FloatArray:
    """Return the mean log-probability less its mean over the shadows that did not see the owner."""
    return models.target - models.mean_where(~models.is_in)


ATTACK = ReferenceAttack(
    "calibrated", "mean log p_target - mean over shadows without the owner (Watson et al. 2022)", score
)
