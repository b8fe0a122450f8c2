"""An independent exact reference: Laplace inversion along the saddle line.

With K(s) the sum of the steps' cumulant generating functions under a direction's first law, for any t > 0

    delta(eps) = (1/pi) int_0^inf Re exp(K(t + iy) - (t + iy) eps) / ((t + iy)(1 + t + iy)) dy,

because exp(s (S - eps)) / (s (1 + s)) is the two-sided Laplace kernel of (1 - e^(eps - S))_+. At the saddle point the integrand
decays like a Gaussian; the number of steps enters only as a factor of K. Both integrals, over z and y, use the trapezoidal rule, which
converges geometrically for integrands that are analytic and decay.

It shares no discretisation with :mod:`accountants.tilted` or :mod:`accountants.pld`, which is why it serves as their reference. It
is an ``ESTIMATE``: its error is far below theirs but is not bounded here. One step has a closed form instead.
"""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
from scipy import optimize

from accountants import closed_form, saddle
from accountants.answer import OWN_VERSION, BoundKind, Direction, PrivacyAnswer, estimate_answer
from accountants.mixtures import Composition, MixtureStep, composition
from accountants.protocol import check_delta, check_epsilon, check_plain_relation

NeighboringRelation = dp_accounting.NeighboringRelation

_DECAY = 34.0
_BLOCK = 128
_MAX_POINTS = 1 << 15


class ContourAccountant:
    """The saddle-line reference."""

    name = "contour"

    def epsilon(
        self,
        event: dp_accounting.DpEvent,
        delta: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; any delta."""
        check_delta(delta)
        return self._answer("epsilon", event, delta, relation)

    def delta(
        self,
        event: dp_accounting.DpEvent,
        epsilon: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`."""
        check_epsilon(epsilon)
        return self._answer("delta", event, epsilon, relation)

    def _answer(
        self, quantity: str, event: dp_accounting.DpEvent, argument: float, relation: NeighboringRelation
    ) -> PrivacyAnswer:
        check_plain_relation(self.name, relation)
        composed = composition(event)
        function = contour_epsilon if quantity == "epsilon" else contour_delta
        values = {add: function(composed, argument, add=add) for add in (False, True)}
        add = values[True] > values[False]
        direction = Direction.ADD if add else Direction.REMOVE
        return estimate_answer(quantity, values[add], BoundKind.ESTIMATE, self.name, OWN_VERSION, direction)


def contour_delta(composed: Composition, epsilon: float, *, add: bool) -> float:
    """delta in one direction.

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
    start = saddle.saddle_for_epsilon(law, epsilon)
    return math.exp(min(_log_delta(composed, start.tilt, epsilon, add), 0.0))


def contour_epsilon(composed: Composition, delta: float, *, add: bool) -> float:
    """epsilon >= 0 in one direction, by Newton's method in log delta; see :func:`contour_delta`."""
    if composed.non_private:
        return math.inf
    if not composed.phases:
        return 0.0
    if composed.num_steps == 1:
        return closed_form.step_epsilon(composed.phases[0][0], delta, add=add)
    law = saddle.directed_loss(composed, add=add, log_mass=min(math.log(delta) - 40, -80.0))

    def gap(epsilon: float) -> float:
        tilt = saddle.saddle_for_epsilon(law, epsilon).tilt
        return _log_delta(composed, tilt, epsilon, add) - math.log(delta)

    start = saddle.saddle_for_delta(law, delta)
    if gap(0.0) <= 0:
        return 0.0
    low, high = 0.0, max(start.epsilon, 1 / start.tilt)
    while gap(high) > 0:
        low, high = high, 2 * high
    return float(optimize.brentq(gap, low, high, xtol=1e-13, rtol=1e-11))


def _log_delta(composed: Composition, tilt: float, epsilon: float, add: bool) -> float:
    law = saddle.directed_loss(composed, add=add, log_mass=-80.0)
    log_k, mean, variance = law.cumulants(tilt)
    spread = math.sqrt(variance)
    # The folded image of the loss, at distance 2 pi / spacing, must be negligible, as must the poles' contribution.
    reach = 14 * spread + abs(mean - epsilon) + 30 / tilt + 6 * max(step.shifts[-1] ** 2 for step, _ in composed.phases)
    spacing = 2 * math.pi / (2 * reach)
    total = 0.0
    for first in range(0, _MAX_POINTS, _BLOCK):
        y = spacing * np.arange(first, first + _BLOCK)
        log_transform = np.zeros(_BLOCK, dtype=np.complex128)
        for step, count in composed.phases:
            log_transform += count * _log_moment(step, tilt, y, add)
        s = tilt + 1j * y
        log_terms = log_transform - log_k - s * epsilon + tilt * epsilon - np.log(s) - np.log1p(s)
        terms = np.exp(log_terms).real
        if first == 0:
            terms[0] /= 2
        total += float(np.sum(terms))
        if float(np.max(log_terms.real)) < math.log(abs(total)) - _DECAY:
            return math.log(total * spacing / math.pi) + log_k - tilt * epsilon
    raise ValueError("the contour integral has not converged: too few steps; use 'tilted'")


def _log_moment(step: MixtureStep, tilt: float, y: np.typing.NDArray[np.float64], add: bool) -> np.ndarray:
    """log E[exp((tilt + iy) loss)] for one step."""
    largest = step.shifts[-1]
    order = -tilt if add else 1 + tilt
    reach = 13.0
    low, high = -reach + min(0.0, order * largest), reach + max(largest, order * largest, 0.0)
    spacing = 1 / (1.4 + (largest * float(y[-1]) + abs(order) * largest * 0.25) / 6)
    z = np.arange(low, min(high, 60.0 + 2 * largest), min(spacing, 0.3))
    loss = step.loss(z)
    log_weight = -z * z / 2 + order * loss - 0.5 * math.log(2 * math.pi) + math.log(z[1] - z[0])
    top = float(np.max(log_weight))
    phase = -1j if add else 1j
    moments = np.exp(phase * y[:, None] * loss[None, :]) @ np.exp(log_weight - top)
    return np.log(moments) + top
