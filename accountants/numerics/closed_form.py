"""A single step in closed form (any number of plain Gaussian steps is one; see :mod:`accountants.mixtures`).

A step compares P = N(0, 1), the law of the outcome z without the unit, with Q = sum_i p_i N(mu_i, 1), the law with it.
The loss is log dQ/dP(z).

It is increasing in ``z``, so by the Neyman-Pearson lemma the worst set is a half-line (Balle and Wang
2018, arXiv 1805.06530, theorem 5, for the plain Gaussian; Zhu, Dong, Wang 2022, arXiv 2106.08567, for the sampled one):

    remove: delta(eps) = Q(z > z*) - e^eps P(z > z*),   loss(z*) = eps
    add:    delta(eps) = P(z < z*) - e^eps Q(z < z*),   loss(z*) = -eps.

Neither difference is taken as it stands: far out both terms underflow, or agree in all their digits. With phi the
normal density, m the ratio of Mills and ``e^loss = sum_i p_i phi(z - mu_i) / phi(z)``, both are sums of positive terms,

    remove: delta(loss(z))  = sum_i p_i phi(z - mu_i) [m(z - mu_i) - m(z)]
    add:    delta(-loss(z)) = e^(-loss(z)) sum_i p_i phi(z - mu_i) [m(-z) - m(mu_i - z)],

exactly, for every z; a shift of 0 contributes nothing. They are computed in log space, at any size.

Certified ends. (a) The epsilon at which such a sum is delta is ``+-loss(z)``, known up to the loss's round-off; as
delta falls in epsilon, an upper end takes a z whose epsilon lies certainly at or below the one asked for, a lower end
one certainly at or above. (b) The round-off of every term is bounded by
units in the last place of the numbers that enter it, among them its own logarithm: the margin grows with |log delta|.
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import functools
import math
from typing import Protocol

import numpy as np
from scipy import special

from accountants.answer import Bounds, Direction
from accountants.mixtures import MixtureStep
from accountants.numerics.roots import bracketed_root
from accountants.numerics.tails import LOG_ROOT_TWO_PI, UNIT, log_difference, log_mills, log_sum, mills_error

#: A larger epsilon is taken for infinite.
_LARGEST = 1e18
#: Distances are cut here, so that float64 holds their squares.
_FARTHEST = 1e150


def step_log_delta(step: MixtureStep, epsilon: float, *, add: bool, side: int = 0) -> float:
    """Return log of one step's delta in one direction; with ``side`` 1 or -1, a certified upper or lower bound on it.

    Args:
        step: the step.
        epsilon: at least 0.
        add: the direction.
        side: 1 or -1 for a certified bound, 0 for the best value.
    """
    # The loss of add is at most -infimum: delta is 0 at every epsilon certainly above that.
    if add and -epsilon < step.infimum - loss_rounding(step, step.infimum, -math.inf):
        return -math.inf
    z = _cut(step, epsilon, add, side)
    if z is None:  # delta is in [0, 1], and nothing better is known
        return 0.0 if side > 0 else -math.inf
    return min(_log_sum_at(step, z, add, side), 0.0)


def loss_rounding(step: MixtureStep, loss: float, z: float) -> float:
    """Return a bound on the round-off of ``step.loss``, which gave ``loss`` at ``z``.

    The loss is log sum_i p_i exp(x_i) with x_i = mu_i z - mu_i^2/2. It is off by a few units in the last place of three
    things: itself; z and the shifts, times the slope; and, where it is near 0 and computed as log1p(sum_i p_i
    expm1(x_i)), the probabilities in that sum, to which a shift of 0 adds nothing.
    """
    from_exponents = step.slope(z) * (abs(z) + step.shifts[-1]) if math.isfinite(z) else 0.0
    from_probs = 1.0 if step.shifts[0] > 0 else math.fsum(step.probs[1:])
    return 16 * UNIT * (abs(loss) + from_exponents + from_probs)


def _cut(step: MixtureStep, epsilon: float, add: bool, side: int) -> float | None:
    """Return a ``z*`` for the module's formulas; None if none was found.

    For side 0 its epsilon is ``epsilon``, up to round-off. For an upper bound on delta (1) its epsilon is certainly not
    above that, for a lower bound (-1) certainly not below.
    """
    target = -epsilon if add else epsilon  # the loss at z*
    z = float(step.inverse_loss(np.array([target]))[0])
    if side == 0:
        return z if math.isfinite(z) else None
    # An upper bound needs an epsilon too small rather than too large. Epsilon is the loss for remove, minus it for add.
    upwards = side if add else -side  # whether the loss has to be moved up (1) or down (-1)
    size = loss_rounding(step, target, z)
    # By how much is found by trial: as soon as the loss computed at z is beyond the target by its own round-off.
    for factor in (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0):
        z = float(step.inverse_loss(np.array([target + upwards * factor * size]))[0])
        if math.isfinite(z):
            loss = float(step.loss(np.array([z]))[0])
            if upwards * (loss - target) >= loss_rounding(step, loss, z):
                return z
    return None


def _log_sum_at(step: MixtureStep, z: float, add: bool, side: int) -> float:
    """Return log of the module's sum of positive terms at ``z``, moved by its round-off to ``side`` (1, 0 or -1).

    Each term is ``p_i exp(log_first) (1 - e^-gap)``: ``near`` and ``far`` are logs of the two ratios of Mills, ``gap``
    their difference, and ``log_first`` the log of phi(z - mu_i) times the larger ratio.
    """
    first = 1 if step.shifts[0] == 0 else 0  # a shift of 0 contributes nothing
    shifts, log_probs = np.asarray(step.shifts[first:]), np.log(step.probs[first:])
    x = z - shifts
    z_of_terms = np.full(len(shifts), z)
    # Add is at most P(N < z), remove at most P(N > z - mu) of the largest mu.
    distance = -z if add else float(x[-1])
    if distance > _FARTHEST:
        return -_FARTHEST if side > 0 else -math.inf
    square = np.minimum(x * x, _FARTHEST**2)
    # `size` is that of the exponents in log_first: its round-off is relative to them.
    if add:
        near, far = log_mills(-z_of_terms), log_mills(-x)
        log_first = shifts * (z - shifts / 2) + special.log_ndtr(z) if z > 0 else -square / 2 - LOG_ROOT_TWO_PI + near
        size = np.abs(shifts) * (abs(z) + shifts) if z > 0 else square
    else:
        near, far = log_mills(x), log_mills(z_of_terms)
        log_first = np.where(x > 0, -square / 2 - LOG_ROOT_TWO_PI + near, special.log_ndtr(-x))
        size = np.where(x > 0, square, 0.0)
    gap = near - far + side * (mills_error(near) + mills_error(far))
    rounding = 4 * UNIT * (8 + size + np.abs(log_first) + np.abs(log_probs))
    total = log_sum(log_probs + log_first + side * rounding + log_difference(gap))
    if add:
        loss = float(step.loss(np.array([z]))[0])
        total += -loss + side * loss_rounding(step, loss, z)
    return total + side * 8 * UNIT * (len(shifts) + (abs(total) if math.isfinite(total) else 0.0))


def step_delta(step: MixtureStep, epsilon: float, *, add: bool, side: int = 0) -> float:
    """Return delta of one step in one direction; ``side`` as in :func:`step_log_delta`."""
    value = math.exp(step_log_delta(step, epsilon, add=add, side=side))
    # The exponential's own round-off, also where float64 thins out.
    return min(max(value + side * (2 * UNIT * value + 2 * math.ulp(0.0)), 0.0), 1.0)


def step_epsilon(step: MixtureStep, delta: float, *, add: bool, side: int = 0) -> float:
    """Return the epsilon >= 0 of one step in one direction at ``delta``; ``side`` as in :func:`step_log_delta`.

    A certified end was itself evaluated: the bound of its side on delta holds there. At a delta of 0 it is the supremum
    of the loss.
    """
    if delta == 0:
        if not add or math.isinf(step.infimum):
            return math.inf  # the loss has no upper limit
        return -step.infimum * (1 + side * 4 * UNIT)
    target = math.log(delta)
    target -= side * 4 * UNIT * (1 + abs(target))

    def excess(epsilon: float) -> float:
        return max(step_log_delta(step, epsilon, add=add, side=side) - target, -1e6)

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > _LARGEST:
            return math.inf if side >= 0 else high / 2
    root = bracketed_root(excess, 0.0, high, xtol=1e-300)
    if side == 0:
        return root
    # The root itself has round-off: move outwards until the bound holds where it ends.
    move = 2.0**-50
    while side * excess(root * (1 + side * move)) > 0:
        move *= 2
        if move >= 1 and side < 0:
            return 0.0
    return root * (1 + side * move)


def epsilon_bounds(step: MixtureStep, delta: float) -> Bounds:
    """Return certified ends of epsilon for one step, in the worse direction."""
    return _worse(functools.partial(step_epsilon, step, delta))


def delta_bounds(step: MixtureStep, epsilon: float) -> Bounds:
    """Return certified ends of delta for one step, in the worse direction."""
    return _worse(functools.partial(step_delta, step, epsilon))


class _ValueOf(Protocol):
    """Gives a value of one direction, or a certified end of it."""

    def __call__(self, *, add: bool, side: int) -> float:
        """Return the value; ``side`` as in :func:`step_log_delta`."""
        ...


def _worse(value_of: _ValueOf) -> Bounds:
    """Return the ends of the worse direction's value, with the best value moved between them."""
    lower = max(value_of(add=False, side=-1), value_of(add=True, side=-1))
    best = max(value_of(add=False, side=0), value_of(add=True, side=0))
    upper_of_remove, upper_of_add = value_of(add=False, side=1), value_of(add=True, side=1)
    upper = max(upper_of_remove, upper_of_add)
    assert lower <= upper, (lower, upper)
    direction = Direction.ADD if upper_of_add > upper_of_remove else Direction.REMOVE
    return Bounds(lower, upper, direction, min(max(best, lower), upper))
