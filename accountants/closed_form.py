"""A single step in closed form (any number of plain Gaussian steps is one; see :mod:`accountants.mixtures`).

The loss is increasing in the outcome ``z``, so by the Neyman-Pearson lemma the worst set is a half-line (Balle and Wang 2018,
arXiv 1805.06530, theorem 5, for the plain Gaussian; Zhu, Dong, Wang 2022, arXiv 2106.08567, for the sampled one):

    remove: delta(eps) = Q(z > z*) - e^eps P(z > z*),   loss(z*) = eps
    add:    delta(eps) = P(z < z*) - e^eps Q(z < z*),   loss(z*) = -eps.

Certified ends are the value moved by a stated margin for round-off; the cutting point needs no margin, because the
difference is stationary there.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import optimize

from accountants.answer import Direction, Interval
from accountants.mixtures import MixtureStep

#: Relative error of delta that the ends allow for.
MARGIN = 1e-10


def step_delta(step: MixtureStep, epsilon: float, *, add: bool) -> float:
    """Delta of one step in one direction, for any real ``epsilon``."""
    point = -epsilon if add else epsilon
    z = step.inverse_loss(np.array([point]))
    if add:
        first, second = step.cdf(z, False)[0], step.cdf(z, True)[0]
    else:
        first, second = step.survival(z, True)[0], step.survival(z, False)[0]
    if first == 0:
        return 0.0
    return max(float(first - math.exp(epsilon + math.log(second))) if second > 0 else float(first), 0.0)


def step_epsilon(step: MixtureStep, delta: float, *, add: bool) -> float:
    """The epsilon >= 0 at which one step's delta in one direction is ``delta``."""
    if step_delta(step, 0.0, add=add) <= delta:
        return 0.0
    if add and math.isfinite(step.infimum) and step_delta(step, -step.infimum, add=True) > delta:
        raise AssertionError("delta vanishes at the supremum of the loss")
    high = 1.0
    while step_delta(step, high, add=add) > delta:
        high *= 2
    return float(optimize.brentq(lambda e: step_delta(step, e, add=add) - delta, 0.0, high, xtol=1e-300, rtol=1e-14))


def epsilon_ends(step: MixtureStep, delta: float) -> Interval:
    """Certified ends of epsilon for one step, the worse direction."""
    lower = max(step_epsilon(step, min(delta * (1 + MARGIN), 1 - 1e-16), add=add) for add in (False, True))
    ends = {add: step_epsilon(step, delta * (1 - MARGIN), add=add) for add in (False, True)}
    add = ends[True] > ends[False]
    return Interval(lower * (1 - MARGIN), ends[add] * (1 + MARGIN), Direction.ADD if add else Direction.REMOVE)


def delta_ends(step: MixtureStep, epsilon: float) -> Interval:
    """Certified ends of delta for one step, the worse direction."""
    values = {add: step_delta(step, epsilon, add=add) for add in (False, True)}
    add = values[True] > values[False]
    direction = Direction.ADD if add else Direction.REMOVE
    return Interval(values[add] * (1 - MARGIN), min(values[add] * (1 + MARGIN), 1.0), direction)
