"""RMIA: how many other units' ratios a unit's ratio beats (Zarifzadeh et al. 2024, arXiv 2312.03262).

A unit's ratio is p / reference, where p is exp(mean log p) under the attacked model. The reference is the mean p under
shadow models: half from those trained on the unit's owner (IN), half from the others (OUT). Without IN shadows it is
(1 + a) / 2 · out + (1 - a) / 2 with the paper's a, not tuned on this split. The units compared with are all others,
whatever their side.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.special

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.protocol import ReferenceAttack, UnderOtherModels

GAMMA = 1.0
OFFLINE_A = 0.3


def score(models: UnderOtherModels) -> FloatArray:
    """Return, for each unit x, the share of other units z with ratio(x) / ratio(z) > gamma.

    All is computed in logarithms, since p may underflow.
    """
    out_mean = _log_mean_where(models, ~models.is_in)
    if models.is_in.sum(axis=1).min() >= 1:
        reference = np.logaddexp(_log_mean_where(models, models.is_in), out_mean) - math.log(2.0)
    else:
        reference = np.logaddexp(math.log((1.0 + OFFLINE_A) / 2.0) + out_mean, math.log((1.0 - OFFLINE_A) / 2.0))
    ratio = models.target - reference
    ordered = np.sort(ratio)
    return np.searchsorted(ordered, ratio - math.log(GAMMA), side="left") / max(1, ratio.size - 1)


def _log_mean_where(models: UnderOtherModels, chosen: BoolArray) -> FloatArray:
    """Return the logarithm of each unit's mean probability over the chosen shadows, [units, k], at least one a unit."""
    logs = np.where(chosen, models.shadows, -np.inf)
    return np.asarray(scipy.special.logsumexp(logs, axis=1) - np.log(chosen.sum(axis=1)))


ATTACK = ReferenceAttack(
    "rmia", "share of other units whose ratio to the shadows is lower (Zarifzadeh et al. 2024)", score
)
