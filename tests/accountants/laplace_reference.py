"""An independent exact reference: Laplace inversion along the saddle line.

With K(s) the sum of the steps' cumulant generating functions under a direction's first law, for any t > 0

    delta(eps) = (1/pi) int_0^inf Re exp(K(t + iy) - (t + iy) eps) / ((t + iy)(1 + t + iy)) dy,

because exp(s (S - eps)) / (s (1 + s)) is the two-sided Laplace kernel of (1 - e^(eps - S))_+. At the saddle point the
integrand decays like a Gaussian; the number of steps enters only as a factor of K. Both integrals, over z and y, use
the trapezoidal rule, which converges geometrically for integrands that are analytic and decay.

It shares no discretisation with :mod:`accountants.methods.tilted` or :mod:`accountants.methods.pld`, which is why it
serves as their reference; ``conftest.py`` registers it as the accountant ``contour``. It is an ``ESTIMATE``: its error
is far below theirs but is not bounded here. One step has a closed form instead.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
from typing_extensions import override

from accountants.answer import Bounds, Direction, point
from accountants.mixtures import Array, Composition, MixtureStep
from accountants.numerics import closed_form, saddle
from accountants.protocol import NormalFormAccountant

_DECAY = 34.0
_BLOCK = 128
_MAX_POINTS = 1 << 13
_MAX_NODES = 1 << 14


class ContourAccountant(NormalFormAccountant):
    """Reference accountant for any delta, by contour integration through the saddle point; not certified."""

    name = "contour"

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        remove = contour_epsilon(composed, delta, add=False)
        if _may_dominate(composed, remove, delta) and contour_delta(composed, remove, add=True) > delta:
            return point(contour_epsilon(composed, delta, add=True), direction=Direction.ADD)
        return point(remove, direction=Direction.REMOVE)

    @override
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        remove, add = (contour_delta(composed, epsilon, add=add) for add in (False, True))
        return point(max(remove, add), direction=Direction.ADD if add > remove else Direction.REMOVE)

    @override
    def trivial_bounds(self, value: float) -> Bounds:
        return point(value)


def _may_dominate(composed: Composition, epsilon: float, delta: float) -> bool:
    """Return whether the add direction's delta at ``epsilon`` comes near ``delta``, by the saddle-point formula."""
    if composed.num_steps <= 1 or math.isinf(epsilon):
        return composed.num_steps == 1
    law = saddle.directed_loss(composed, add=True, log_mass=-80.0)
    return saddle.saddle_for_epsilon(law, epsilon).log_delta > math.log(delta) - 10


def contour_delta(composed: Composition, epsilon: float, *, add: bool) -> float:
    """Return delta in the add or the remove direction, by contour integration through the saddle point.

    Raises:
        ValueError: if the integrand does not decay within the number of points allowed (very few steps).
    """
    if composed.non_private:
        return 1.0
    if not composed.phases:
        return 0.0
    if composed.num_steps == 1:
        return closed_form.step_delta(composed.phases[0][0], epsilon, add=add)
    law = saddle.directed_loss(composed, add=add, log_mass=-80.0)
    # A second table, now that the size of delta is known: its cut must be far below it.
    log_delta = max(saddle.saddle_for_epsilon(law, epsilon).log_delta, -700.0)
    law = saddle.directed_loss(composed, add=add, log_mass=min(log_delta - 40, -80.0))
    return math.exp(min(_log_delta(composed, _moderate_tilt(law, epsilon), epsilon, add), 0.0))


def contour_epsilon(composed: Composition, delta: float, *, add: bool) -> float:
    """Epsilon >= 0 in one direction, by the secant method in log delta; see :func:`contour_delta`."""
    if composed.non_private:
        return math.inf
    if not composed.phases:
        return 0.0
    if composed.num_steps == 1:
        return closed_form.step_epsilon(composed.phases[0][0], delta, add=add)
    law = saddle.directed_loss(composed, add=add, log_mass=min(math.log(delta) - 40, -80.0))

    start = saddle.saddle_for_delta(law, delta)
    target = math.log(delta)
    epsilon, slope = start.epsilon, -start.tilt
    previous: tuple[float, float] | None = None
    for _ in range(40):
        value = _log_delta(composed, _moderate_tilt(law, epsilon), epsilon, add)
        if previous is not None and previous[0] != epsilon:
            slope = min((value - previous[1]) / (epsilon - previous[0]), slope / 4)
        previous = epsilon, value
        step = (target - value) / slope
        if epsilon == 0 and step <= 0:
            return 0.0
        if abs(step) <= 1e-11 * max(epsilon, 1e-9):
            return epsilon + step
        epsilon = max(epsilon + step, 0.0)
    raise ValueError("the contour's secant iteration has not converged; use 'tilted'")


def _moderate_tilt(law: saddle.DirectedLoss, epsilon: float) -> float:
    """The saddle, or half of it where the tilted law would be dominated by rare huge losses; any tilt is exact."""
    tilt = saddle.saddle_for_epsilon(law, epsilon).tilt
    return min((tilt, tilt / 2), key=lambda t: math.sqrt(law.cumulants(t)[2]) + 2 / t)


def _log_delta(composed: Composition, tilt: float, epsilon: float, add: bool) -> float:
    law = saddle.directed_loss(composed, add=add, log_mass=-80.0)
    largest = max(float(np.max(loss)) for loss in law.losses)
    log_k, mean, variance = law.cumulants(tilt)
    spread = math.sqrt(variance)
    # The folded image of the loss, at distance 2 pi / spacing, must be negligible, as must the poles' contribution.
    reach = 14 * spread + abs(mean - epsilon) + 30 / tilt + 3 * largest
    spacing = 2 * math.pi / (2 * reach)
    total = size = 0.0
    for first in range(0, _MAX_POINTS, _BLOCK):
        y = spacing * np.arange(first, first + _BLOCK)
        log_transform = np.zeros(_BLOCK, dtype=np.complex128)
        for step, count in composed.phases:
            log_transform += count * _log_moment(step, tilt, y, add)
        s = tilt + 1j * y
        log_terms = log_transform - log_k - s * epsilon + tilt * epsilon - np.log(s) - np.log1p(s)
        if float(np.max(log_terms.real)) > 600:
            raise ValueError("the contour lies outside the strip of convergence; use 'tilted'")
        terms: Array = np.real(np.exp(log_terms))
        if first == 0:
            terms[0] /= 2
        total += float(np.sum(terms))
        size += float(np.sum(np.abs(terms)))
        if total <= 1e-9 * size:
            continue
        if float(np.max(log_terms.real)) < math.log(total) - _DECAY:
            return math.log(total * spacing / math.pi) + log_k - tilt * epsilon
    raise ValueError("the contour integral has not converged: too few steps; use 'tilted'")


def _log_moment(step: MixtureStep, tilt: float, y: Array, add: bool) -> np.typing.NDArray[np.complexfloating[Any, Any]]:
    """Return log E[exp((tilt + iy) loss)] for one step."""
    largest = step.shifts[-1]
    order = -tilt if add else 1 + tilt
    # A loss bounded on one side (add) cannot shift the tilted mass far to the right, nor beyond the cut-off of P to the
    # left.
    low, high = (-40.0, 14.0 + largest) if add else (-14.0, min(14.0 + order * largest, 60.0 + 2 * largest))
    # The loss is analytic for |Im z| < pi / largest only.
    spacing = min(0.3, 0.5 / largest, 1 / (1.4 + (largest * float(y[-1]) + abs(order) * largest / 4) / 6))
    if (high - low) / spacing > _MAX_NODES:
        raise ValueError("the contour integral oscillates too fast; use 'tilted'")
    z = np.arange(low, high, spacing)
    loss = step.loss(z)
    log_weight = -z * z / 2 + order * loss - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])
    top = float(np.max(log_weight))
    phase = -1j if add else 1j
    moments = np.exp(phase * y[:, None] * loss[None, :]) @ np.exp(log_weight - top)
    return cast(Any, np.log(moments) + top)
