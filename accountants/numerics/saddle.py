"""Where to tilt: the cumulant generating function of the privacy loss and its saddle points.

Nothing here is certified and nothing needs to be: any positive tilt gives a valid bound in
:mod:`accountants.methods.tilted`. A good tilt only makes it sharp.

A step compares P, the law of the outcome ``z`` without the unit, with Q, the law with it, and ``loss(z)`` is log dQ/dP.
For the direction *remove* the loss is ``loss(z)``, z ~ Q; for *add* it is ``-loss(z)``, z ~ P. With one function
``M(s) = E_P[exp(s * loss)]`` the moment generating functions are ``M(1 + t)`` and ``M(-t)``.

K(t) is the log of the moment generating function of the sum S of all steps' losses. The tilt t multiplies the density
of S by e^(tS). The best t for an epsilon is the saddle point, where ``K(t) - t epsilon - log t - log(1 + t)`` is least.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from accountants.mixtures import Array, Composition
from accountants.numerics.roots import bracketed_root

_NUM_NODES = 2001


class Cumulants(NamedTuple):
    """K, K' and K'' at one tilt."""

    log_normaliser: float
    mean: float  # of the tilted sum of losses
    variance: float  # of the tilted sum of losses


@dataclasses.dataclass(frozen=True)
class DirectedLoss:
    """One direction's loss of a composition, on trapezoid nodes of a truncated ``z`` axis.

    Attributes:
        losses: per phase, the loss at the nodes, in this direction.
        log_weights: per phase, the log of the quadrature weight under the direction's first law.
        counts: per phase, the number of steps.
    """

    losses: tuple[Array, ...]
    log_weights: tuple[Array, ...]
    counts: tuple[int, ...]

    def cumulants(self, tilt: float) -> Cumulants:
        """Return K, K' and K'' at ``tilt``."""
        log_normaliser, total_mean, total_variance = 0.0, 0.0, 0.0
        # All steps are independent, so each phase adds its own, times its count.
        for loss, log_weight, count in zip(self.losses, self.log_weights, self.counts, strict=True):
            logs = log_weight + tilt * loss
            top = float(np.max(logs))
            weight = np.exp(logs - top)
            total = float(np.sum(weight))
            mean = float(weight @ loss) / total
            variance = float(weight @ (loss - mean) ** 2) / total
            log_normaliser += count * (top + math.log(total))
            total_mean += count * mean
            total_variance += count * variance
        return Cumulants(log_normaliser, total_mean, total_variance)

    def epsilon_at(self, tilt: float) -> tuple[float, float]:
        """Return the epsilon for which ``tilt`` is the saddle point, and the saddle-point value of log delta there."""
        k, slope, curvature = self.cumulants(tilt)
        # Where the derivative of the module's exponent is 0, and then its second derivative.
        epsilon = slope - 1 / tilt - 1 / (1 + tilt)
        spread = curvature + tilt**-2 + (1 + tilt) ** -2
        log_delta = k - tilt * epsilon - math.log(tilt) - math.log1p(tilt) - 0.5 * math.log(2 * math.pi * spread)
        return epsilon, log_delta


@dataclasses.dataclass(frozen=True)
class Saddle:
    """A tilt with the epsilon it is best for, and the log of delta that the saddle-point formula gives there."""

    tilt: float
    epsilon: float
    log_delta: float


@functools.lru_cache(maxsize=64)
def truncation(composed: Composition, log_mass: float) -> tuple[float, float]:
    """Return an interval of ``z`` that all steps together leave with small probability.

    Below it P, and above it Q, have at most ``exp(log_mass)`` in all steps. P has the larger tail below, Q above.
    """
    log_tail = log_mass - math.log(max(composed.num_steps, 1))
    reach = -float(special.ndtri_exp(min(log_tail, -1.0)))
    return -reach, max(step.tail_quantile(log_tail) for step, _ in composed.phases)


def directed_loss(composed: Composition, *, add: bool, log_mass: float) -> DirectedLoss:
    """Tabulate one direction of a composition over the ``z`` of :func:`truncation`."""
    low, high = truncation(composed, log_mass)
    z = np.linspace(low, high, _NUM_NODES)
    base = -z * z / 2 - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])  # of P; that of Q is e^loss times as large
    losses: list[Array] = []
    log_weights: list[Array] = []
    for step, _ in composed.phases:
        loss = step.loss(z)
        losses.append(-loss if add else loss)
        log_weights.append(base if add else base + loss)
    return DirectedLoss(tuple(losses), tuple(log_weights), tuple(count for _, count in composed.phases))


#: The range in which a tilt is looked for.
_LOG_TILT = (math.log(1e-6), math.log(1e9))


def saddle_for_delta(law: DirectedLoss, delta: float) -> Saddle:
    """Return the saddle at which the approximate delta equals ``delta``, with epsilon held at or above 0."""
    target = math.log(delta)

    def gap(log_tilt: float) -> float:
        _, log_delta = law.epsilon_at(math.exp(log_tilt))
        return log_delta - target

    log_tilt = _root(gap)
    epsilon, log_delta = law.epsilon_at(math.exp(log_tilt))
    if epsilon < 0:
        return saddle_for_epsilon(law, 0.0)
    return Saddle(math.exp(log_tilt), epsilon, log_delta)


def saddle_for_epsilon(law: DirectedLoss, epsilon: float) -> Saddle:
    """Return the saddle of a given epsilon: the tilt that suits it, and the approximate log of delta."""

    def gap(log_tilt: float) -> float:
        epsilon_there, _ = law.epsilon_at(math.exp(log_tilt))
        return epsilon - epsilon_there

    tilt = math.exp(_root(gap))
    _, log_delta = law.epsilon_at(tilt)
    return Saddle(tilt, epsilon, log_delta)


def _root(decreasing: Callable[[float], float]) -> float:
    """Return the root of a decreasing function over log tilts, or the end of their range nearest to it."""
    low, high = _LOG_TILT
    if decreasing(low) <= 0:
        return low
    if decreasing(high) >= 0:
        return high
    return bracketed_root(decreasing, low, high, xtol=1e-4)
