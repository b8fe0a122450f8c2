"""LiRA with few shadows: one variance for all units (Carlini et al. 2022, arXiv 2112.03570, section V-C).

A shadow model is IN for a unit if it was trained on the unit's owner, else OUT. Where every unit has shadows of both
kinds ("online") the score is a log-likelihood ratio of two normals. With OUT shadows only ("offline") it is the
one-sided log Φ: a two-sided density would make a unit *far below* its OUT mean look like a member.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.protocol import ReferenceAttack, UnderOtherModels

_MIN_ONLINE = 2
"""IN shadows of each unit from which on the score is the online one."""


def score(models: UnderOtherModels) -> FloatArray:
    """Return LiRA's score of each unit: online where every unit has two IN shadows, else offline."""
    inside, outside = models.is_in, ~models.is_in
    out_mean, out_spread = models.mean_where(outside), _spread(models, outside)
    if inside.sum(axis=1).min() >= _MIN_ONLINE:
        in_mean, in_spread = models.mean_where(inside), _spread(models, inside)
        log_densities = scipy.stats.norm.logpdf(models.target, in_mean, in_spread)
        return log_densities - scipy.stats.norm.logpdf(models.target, out_mean, out_spread)
    return scipy.stats.norm.logcdf(models.target, out_mean, out_spread)


def _spread(models: UnderOtherModels, chosen: BoolArray) -> float:
    """Return one standard deviation for all units: of the chosen shadows' log-probabilities about each unit's mean."""
    deviations = np.where(chosen, models.shadows - models.mean_where(chosen)[:, None], 0.0)
    freedom = max(1, int((chosen.sum(axis=1) - 1).clip(min=0).sum()))
    return max(float(np.sqrt((deviations**2).sum() / freedom)), 1e-12)


ATTACK = ReferenceAttack(
    "lira",
    "log N(target; in) - log N(target; out), else log Φ, pooled variance (Carlini et al. 2022)",
    score,
    min_out=2,
)
