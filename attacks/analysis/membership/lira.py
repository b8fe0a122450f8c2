"""LiRA with few shadows: one variance for all units (Carlini et al. 2022, arXiv 2112.03570, section V-C).

With shadows on both sides of every unit the score is a log-likelihood ratio of two normals; with shadows that lack the
unit it is the one-sided log Φ. A two-sided density there would make a unit *far below* its OUT mean look like a member.
"""

from __future__ import annotations

import numpy as np
import scipy.stats

from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.protocol import ReferenceAttack, UnderOtherModels

_MIN_ONLINE = 2


def score(models: UnderOtherModels) -> FloatArray:
    """Return LiRA's score: online where every unit has two shadows on each side, else offline."""
    inside, outside = models.is_in, ~models.is_in
    out_mean, out_spread = models.mean_where(outside), _spread(models, outside)
    if inside.sum(axis=1).min() >= _MIN_ONLINE:
        in_mean, in_spread = models.mean_where(inside), _spread(models, inside)
        log_densities = scipy.stats.norm.logpdf(models.target, in_mean, in_spread)
        return log_densities - scipy.stats.norm.logpdf(models.target, out_mean, out_spread)
    return scipy.stats.norm.logcdf(models.target, out_mean, out_spread)


def _spread(models: UnderOtherModels, chosen: BoolArray) -> float:
    """Return the standard deviation of the shadows about each unit's own mean, pooled over units."""
    deviations = np.where(chosen, models.shadows - models.mean_where(chosen)[:, None], 0.0)
    freedom = max(1, int((chosen.sum(axis=1) - 1).clip(min=0).sum()))
    return max(float(np.sqrt((deviations**2).sum() / freedom)), 1e-12)


ATTACK = ReferenceAttack(
    "lira",
    "log N(target; in) - log N(target; out), else log Φ, pooled variance (Carlini et al. 2022)",
    score,
    min_out=2,
)
