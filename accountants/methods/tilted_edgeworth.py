"""A finite-sample Edgeworth bound that is not vacuous: tilt first, expand second.

With S the sum of the steps' privacy losses in one direction, K(t) = log E[e^(tS)], and P_t the tilted law, whose
density is proportional to e^(tS) (:mod:`accountants.methods.tilted`), for every t > 0

    delta(eps) = e^(K(t) - t eps) E_t[g(S - eps)],   g(x) = e^(-tx) (1 - e^(-x))_+,   0 <= g <= c_t = t^t / (1+t)^(1+t).

If H is any function (a distribution function or an expansion) with sup |P_t(S <= x) - H(x)| <= Delta, integration by
parts and the total variation 2 c_t of g give  |E_t g - int g dH| <= 2 c_t Delta,  so that

    delta(eps) <= e^(K(t) - t eps) min{ c_t,  int g dH + 2 c_t Delta }.

Two choices of (H, Delta), the better counts:

* the normal law and the bound of Berry and Esseen;
* the first-order Edgeworth expansion and its explicit error (both: :mod:`accountants.numerics.edgeworth_error`).

The branch c_t alone is the conversion from Renyi divergence, so the bound is never worse than that at the same order:
unlike an error of F, an error of E_t g is measured against a delta that the prefactor has already taken out. What the
theory allows: Delta is of order n^(-1/2) times the tilted skewness, and g needs Delta << 1/(t sd), so at EW-Tune's
settings a quarter to two fifths of the noise between Renyi's and the least goes. The rest needs the smoothness of the
law, which :mod:`accountants.methods.tilted` uses numerically.

All laws are cut where one step's noise exceeds a bound that all steps together exceed with probability at most e^-16
delta, which is added to delta: without the cut, Renyi divergences of sampled steps explode at orders near 2
ln(1/q)/mu^2. Quadrature: 2000-point composite Gauss-Legendre rules over that stretch; K carries a margin of 1e-12 a
step.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from typing_extensions import override

from accountants.answer import Bounds
from accountants.mixtures import Composition
from accountants.numerics import saddle
from accountants.numerics.cumulants import Moments, step_moments
from accountants.numerics.edgeworth_error import normal_error, sup_error
from accountants.protocol import NormalFormAccountant

#: Margin of K for the error of quadrature, a step.
_K_MARGIN = 1e-12
#: Below it a step's tilted law is one point to float64, and its higher moments leave the range.
_SMALLEST_VARIANCE = 1e-60
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclasses.dataclass(frozen=True)
class TiltedSum:
    """The tilted sum of one direction, as far as the bounds need it.

    Attributes:
        tilt: t.
        log_moment: K(t), with its margin.
        mean, scale: of S under the tilted law.
        skew: third cumulant over scale^3.
        normal_error: Berry-Esseen bound.
        edgeworth_error: bound for the first-order expansion.
    """

    tilt: float
    log_moment: float
    mean: float
    scale: float
    skew: float
    normal_error: float
    edgeworth_error: float

    def log_upper_delta(self, epsilon: float) -> float:
        """Return log of the upper bound on delta: the module's last formula."""
        if self.scale == 0:
            # Tilted so far that float64 sees one point: nothing to expand, but the branch c_t needs no law.
            return self._log_peak + self.log_moment - self.tilt * epsilon
        peak = math.exp(self._log_peak)  # c_t
        bounds_on_mean = [peak, *self._bounds(epsilon, error_factor=2 * peak)]
        return self._log_delta(min(bounds_on_mean), epsilon)

    def log_lower_delta(self, epsilon: float) -> float:
        """Return log of the lower bound on delta: that formula with the other sign of Delta, and 0 in place of c_t."""
        if self.scale == 0:
            return -math.inf
        peak = math.exp(self._log_peak)
        bounds_on_mean = [0.0, *self._bounds(epsilon, error_factor=-2 * peak)]
        return self._log_delta(max(bounds_on_mean), epsilon)

    def _log_delta(self, mean: float, epsilon: float) -> float:
        """Return log delta where E_t[g] is ``mean``."""
        if mean <= 0:
            return -math.inf
        return math.log(mean) + self.log_moment - self.tilt * epsilon

    @property
    def _log_peak(self) -> float:
        """Log of c_t, the maximum of g."""
        return self.tilt * math.log(self.tilt) - (1 + self.tilt) * math.log1p(self.tilt)

    def _bounds(self, epsilon: float, *, error_factor: float) -> list[float]:
        """Return both choices' bounds on E_t[g]: the integral of g dH, and ``error_factor`` times the error Delta.

        What is not a number, of an infinite error or skew, bounds nothing and is left out.
        """
        values = (
            self._integral(epsilon, skew=0.0) + error_factor * self.normal_error,
            self._integral(epsilon, skew=self.skew) + error_factor * self.edgeworth_error,
        )
        return [value for value in values if not math.isnan(value)]

    def _integral(self, epsilon: float, skew: float) -> float:
        """Return the integral of g(S - epsilon) over the normal law of S with a skew (0: without), where g matters."""
        # Beyond it, relative to g's peak, e^(-tx) is below e^-45, or the density is beyond 14 deviations.
        top = min(45 / self.tilt, max(self.mean - epsilon, 0.0) + 14 * self.scale)
        # A square map: the kink of g at 0 and its peak near 1/t get most of the nodes.
        unit = (1 + _NODES) / 2
        x = top * unit**2
        weight = _WEIGHTS * top * unit
        # Beyond 40 the density is zero in float64, and a polynomial in an infinite u would make it undefined.
        u = np.clip(x + epsilon - self.mean, -40 * self.scale, 40 * self.scale) / self.scale
        normal = np.exp(-u * u / 2) / (math.sqrt(2 * math.pi) * self.scale)
        density = normal * (1 + skew / 6 * (u**3 - 3 * u))
        return float(weight @ (np.exp(-self.tilt * x) * -np.expm1(-x) * density))


def tilted_sum(composed: Composition, tilt: float, *, add: bool, margin: float, log_mass: float) -> TiltedSum:
    """Return moments and error bounds of the tilted sum of one direction.

    Args:
        composed: the steps.
        tilt: t.
        add: the direction.
        margin: +1 for an upper and -1 for a lower bound on delta: K is moved to that side by the steps' margin.
        log_mass: log of the probability that is cut off the laws, over all steps.
    """
    limits = saddle.truncation(composed, log_mass)
    steps: list[tuple[Moments, int]] = []
    for step, count in composed.phases:
        moments = step_moments(step, add=add, first_law=True, tilt=tilt, limits=limits)
        steps.append((moments, count))
    variance = math.fsum(count * moments.variance for moments, count in steps)
    log_moment = math.fsum(count * (moments.log_normaliser + margin * _K_MARGIN) for moments, count in steps)
    mean = math.fsum(count * moments.mean for moments, count in steps)
    if min(moments.variance for moments, _ in steps) < _SMALLEST_VARIANCE:
        # A scale of 0 says that there is nothing to expand.
        return TiltedSum(tilt, log_moment, mean, scale=0.0, skew=0.0, normal_error=1.0, edgeworth_error=1.0)
    return TiltedSum(
        tilt,
        log_moment,
        mean,
        scale=math.sqrt(variance),
        skew=math.fsum(count * moments.third for moments, count in steps) / variance**1.5,
        normal_error=min(normal_error(steps), 1.0),
        edgeworth_error=sup_error(steps),
    )


#: Tilts that are tried for an upper end, as multiples of the saddle point's: the error terms favour smaller ones.
_FACTORS = (0.35, 0.5, 0.65, 0.75, 0.85, 0.95, 1.0, 1.05)
#: Log of the probability cut away where delta is not known beforehand.
_DELTA_CUT = -60.0


class TiltedEdgeworthAccountant(NormalFormAccountant):
    """Certified ends from the tilted expansions of this module; any delta."""

    name = "tilted-edgeworth"

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        return _larger(_epsilon_bounds(composed, delta, add=False), _epsilon_bounds(composed, delta, add=True))

    @override
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        return _larger(_delta_bounds(composed, epsilon, add=False), _delta_bounds(composed, epsilon, add=True))


def _larger(remove: Bounds, add: Bounds) -> Bounds:
    """Return the bounds of both directions together: the truth is the larger one of theirs."""
    upper = max(remove.upper, add.upper)
    lower = min(max(remove.lower, add.lower), upper)
    return Bounds(lower, upper, estimate=max(remove.best, add.best))


def _delta_bounds(composed: Composition, epsilon: float, *, add: bool) -> Bounds:
    """Return one direction's bounds on delta; the upper is the best of a few tilts."""
    law = saddle.directed_loss(composed, add=add, log_mass=_DELTA_CUT)
    start = saddle.saddle_for_epsilon(law, epsilon)
    log_upper = math.inf
    for factor in _FACTORS:
        tilted = tilted_sum(composed, start.tilt * factor, add=add, margin=1, log_mass=_DELTA_CUT)
        # What was cut off is added to every upper end.
        log_upper = min(log_upper, float(np.logaddexp(tilted.log_upper_delta(epsilon), _DELTA_CUT)))
    below = tilted_sum(composed, start.tilt, add=add, margin=-1, log_mass=_DELTA_CUT)
    # Delta is at most 1.
    lower, estimate, upper = (
        math.exp(min(log_delta, 0.0)) for log_delta in (below.log_lower_delta(epsilon), start.log_delta, log_upper)
    )
    return Bounds(lower, upper, estimate=estimate)


def _epsilon_bounds(composed: Composition, delta: float, *, add: bool) -> Bounds:
    """Return one direction's bounds on epsilon; the upper is the best of a few tilts."""
    log_delta = math.log(delta)
    cut = log_delta - 16  # so much is cut off the laws
    log_uncut_delta = log_delta + math.log1p(-math.exp(-16))  # delta less what is cut
    law = saddle.directed_loss(composed, add=add, log_mass=cut)
    start = saddle.saddle_for_delta(law, delta)
    scale = max(start.epsilon, 1 / start.tilt)
    upper = math.inf
    for factor in _FACTORS:
        tilted = tilted_sum(composed, start.tilt * factor, add=add, margin=1, log_mass=cut)
        _, crossing_end = _crossing(tilted.log_upper_delta, log_uncut_delta, scale)
        upper = min(upper, crossing_end)
    below = tilted_sum(composed, start.tilt, add=add, margin=-1, log_mass=cut)
    lower, _ = _crossing(below.log_lower_delta, log_delta, scale)
    return Bounds(lower, upper, estimate=start.epsilon)


def _crossing(log_bound: Callable[[float], float], log_delta: float, scale: float) -> tuple[float, float]:
    """Return two close epsilons between which a bound on delta falls to delta: it is above it at the first alone.

    Both are 0 if the bound is not above delta from the start. The second is infinite if the first exceeds 5e8.

    Args:
        log_bound: epsilon → log of the bound.
        log_delta: log of delta.
        scale: about the epsilon expected.
    """
    is_above = log_bound(0.0) > log_delta
    if not is_above:
        return 0.0, 0.0
    low, high = 0.0, scale
    while log_bound(high) > log_delta:
        low, high = high, 2 * high
        if high > 1e9:
            return low, math.inf
    for _ in range(36):
        middle = (low + high) / 2
        low, high = (middle, high) if log_bound(middle) > log_delta else (low, middle)
    return low, high
