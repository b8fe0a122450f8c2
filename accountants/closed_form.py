"""A single step in closed form (any number of plain Gaussian steps is one; see :mod:`accountants.mixtures`).

The loss is increasing in the outcome ``z``, so by the Neyman-Pearson lemma the worst set is a half-line (Balle and Wang
2018, arXiv 1805.06530, theorem 5, for the plain Gaussian; Zhu, Dong, Wang 2022, arXiv 2106.08567, for the sampled one):

    remove: delta(eps) = Q(z > z*) - e^eps P(z > z*),   loss(z*) = eps
    add:    delta(eps) = P(z < z*) - e^eps Q(z < z*),   loss(z*) = -eps.

Certified ends are the value moved by a stated margin for round-off; the cutting point needs no margin, because the
difference is stationary there.
"""

from __future__ import annotations

import math

import numpy as np

from accountants.answer import Direction, Ends
from accountants.mixtures import MixtureStep
from accountants.roots import bracketed_root

#: Relative error of delta that the ends allow for, and absolute error relative to the two terms of the difference.
MARGIN = 1e-10
ROUND_OFF = 2.0**-49


def step_delta(step: MixtureStep, epsilon: float, *, add: bool, side: int = 0) -> float:
    """Delta of one step in one direction for any real ``epsilon``; ``side`` +-1 moves it by the round-off margin."""
    point = -epsilon if add else epsilon
    z = step.inverse_loss(np.array([point]))
    if add:
        first, second = float(step.cdf(z, False)[0]), float(step.cdf(z, True)[0])
    else:
        first, second = float(step.survival(z, True)[0]), float(step.survival(z, False)[0])
    scaled = math.exp(min(epsilon + math.log(second), 0.0)) if second > 0 else 0.0
    value = max(first - scaled, 0.0)
    return max(value + side * (MARGIN * value + ROUND_OFF * (first + scaled)), 0.0)


def step_epsilon(step: MixtureStep, delta: float, *, add: bool, side: int = 0) -> float:
    """The epsilon >= 0 at which one step's delta in one direction is ``delta``; ``side`` as in :func:`step_delta`."""
    if step_delta(step, 0.0, add=add, side=side) <= delta:
        return 0.0
    high = 1.0
    while step_delta(step, high, add=add, side=side) > delta:
        high *= 2
    return bracketed_root(lambda e: step_delta(step, e, add=add, side=side) - delta, 0.0, high, xtol=1e-300)


def epsilon_ends(step: MixtureStep, delta: float) -> Ends:
    """Certified ends of epsilon for one step, the worse direction."""
    lower = max(step_epsilon(step, delta, add=add, side=-1) for add in (False, True))
    ends = {add: step_epsilon(step, delta, add=add, side=1) for add in (False, True)}
    add = ends[True] > ends[False]
    return Ends(lower * (1 - MARGIN), ends[add] * (1 + MARGIN), Direction.ADD if add else Direction.REMOVE)


def delta_ends(step: MixtureStep, epsilon: float) -> Ends:
    """Certified ends of delta for one step, the worse direction."""
    lower = max(step_delta(step, epsilon, add=add, side=-1) for add in (False, True))
    values = {add: step_delta(step, epsilon, add=add, side=1) for add in (False, True)}
    add = values[True] > values[False]
    return Ends(lower, min(values[add], 1.0), Direction.ADD if add else Direction.REMOVE)
