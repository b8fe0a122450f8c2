"""The Edgeworth accountant of Wang et al. 2022 (arXiv 2206.04236), used by EW-Tune (arXiv 2210.15042).

A direction compares two laws of the output: its first law is Q, with the unit, for *remove*, and P for *add*; its
second law is the other one. With Y and X the sums of the steps' privacy losses under the first and the second law,

    delta(eps) = [1 - F_Y(eps)] - e^eps [1 - F_X(eps)]      (lossless),

and both distribution functions are expanded around the normal one in powers of one over the square root of the number
of steps.

**AEA** of order 1, 2, 3 puts the expansion in place of F. It is an ``ESTIMATE`` and no bound in either direction: at
the settings of EW-Tune it is up to a sixth too low, and an expansion is not even a distribution function.

**EEAI** adds an explicit bound Delta on the expansion's error (:mod:`accountants.numerics.edgeworth_error`):
delta <= 1 - F_Y + Delta_Y - e^eps (1 - F_X - Delta_X). It is certified, but says something only where Delta_Y + e^eps
Delta_X < delta. At any realistic delta it is not. An upper end that says nothing is infinity for epsilon and 1 for
delta, and bears the note ``vacuous``. For a bound of this family that is not vacuous see
:mod:`accountants.methods.tilted_edgeworth`.

Both directions are computed; steps may differ; the cost does not depend on their number.
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from scipy import special
from typing_extensions import override

from accountants.answer import Bounds, Direction, point
from accountants.mixtures import Array, Composition
from accountants.numerics.cumulants import step_moments, sum_cumulants
from accountants.numerics.edgeworth_error import sup_error
from accountants.protocol import NormalFormAccountant

#: Beyond it e^epsilon overflows.
_LARGEST_EXPONENT = 700.0

#: Smallest standard deviation of a sum that is expanded: its fifth power is still a normal float64 number.
_SMALLEST_SCALE = 1e-60

#: The ends of an interval: so many times its error each probability is moved.
_LOWER, _ESTIMATE, _UPPER = -1.0, 0.0, 1.0


@dataclasses.dataclass(frozen=True)
class Expansion:
    """The Edgeworth expansion of P(sum > x), for a sum of independent variables with known cumulants.

    Attributes:
        cumulants: of the sum, 1 (the mean) to 5.
        order: 1, 2 or 3; order k uses cumulants up to k + 2.
    """

    cumulants: tuple[float, float, float, float, float]
    order: int

    def survival(self, x: Array) -> Array:
        """Return the expansion of P(sum > x); can leave [0, 1] and need not be monotone."""
        k1, k2, k3, k4, k5 = self.cumulants
        scale = math.sqrt(k2)
        if scale < _SMALLEST_SCALE:
            raise ValueError(f"the loss's variance {k2:.3g} leaves float64 in an Edgeworth expansion; use 'tilted'")
        z = (x - k1) / scale
        skew, kurtosis, fifth = k3 / scale**3, k4 / scale**4, k5 / scale**5
        # Each cumulant (or product of some) goes with a Hermite polynomial of z.
        terms = skew / 6 * (z**2 - 1)
        if self.order >= 2:
            terms = terms + kurtosis / 24 * (z**3 - 3 * z) + skew**2 / 72 * (z**5 - 10 * z**3 + 15 * z)
        if self.order >= 3:
            he4, he6 = z**4 - 6 * z**2 + 3, z**6 - 15 * z**4 + 45 * z**2 - 15
            he8 = z**8 - 28 * z**6 + 210 * z**4 - 420 * z**2 + 105
            terms = terms + fifth / 120 * he4 + skew * kurtosis / 144 * he6 + skew**3 / 1296 * he8
        return special.ndtr(-z) + np.exp(-z * z / 2) / math.sqrt(2 * math.pi) * terms


@dataclasses.dataclass(frozen=True)
class DirectedExpansion:
    """The expansions of one direction's loss under its first and its second law: see the module.

    The errors bound how far an expansion is off, at any point; 0 where only an estimate is wanted.
    """

    first: Expansion
    second: Expansion
    first_error: float = 0.0
    second_error: float = 0.0

    def delta(self, epsilon: Array, end: float = _ESTIMATE) -> Array:
        """Return delta at each ``epsilon``: the estimate, or its ``_LOWER`` or ``_UPPER`` end.

        It is 1 - F_Y(eps) - e^eps (1 - F_X(eps)), each probability moved by its error to the side asked for.
        """
        first = self.first.survival(epsilon) + end * self.first_error
        second = self.second.survival(epsilon) - end * self.second_error
        value = first - np.exp(np.minimum(epsilon, _LARGEST_EXPONENT)) * second
        if end == _LOWER:
            # Where e^epsilon is cut, the value comes out too large: still an upper end, but no lower one.
            return np.where(epsilon > _LARGEST_EXPONENT, -math.inf, value)
        return value

    def epsilon(self, delta: float, end: float = _ESTIMATE) -> float:
        """Return the epsilon at which the curve crosses ``delta``, by bracketing on ever finer grids; infinity if none.

        The curve of an expansion is not monotone. Of several crossings the estimate and the lower end take the last,
        from which on delta stays below; the upper end takes the first, where the bound holds.
        """
        k1, k2, *_ = self.first.cumulants
        high = max(k1, 0.0) + 12 * math.sqrt(k2) + 1.0  # twelve deviations above the mean loss
        grid: Array = np.linspace(0.0, min(high, 600.0), 513)
        for _ in range(8):  # each round keeps the cell of the crossing and cuts it into 64
            values = self.delta(grid, end)
            if end == _UPPER:
                allowed = np.flatnonzero(values <= delta)
                if len(allowed) == 0:
                    return math.inf
                right = int(allowed[0])  # the cell's right end
            else:
                above = np.flatnonzero(values > delta)
                right = int(above[-1]) + 1 if len(above) else 0
                if right == len(grid):
                    return math.inf
            if right == 0:
                return float(grid[0])  # no crossing: from the start the curve is where it has to be
            grid = np.linspace(grid[right - 1], grid[right], 65)
        return float(grid[-1])


def expand(composed: Composition, order: int, *, add: bool) -> DirectedExpansion:
    """Return the expansions of one direction without errors, for a point estimate."""
    return DirectedExpansion(
        Expansion(sum_cumulants(composed, add=add, first_law=True), order),
        Expansion(sum_cumulants(composed, add=add, first_law=False), order),
    )


class AeaAccountant(NormalFormAccountant):
    """The approximate Edgeworth accountant of one order: an estimate that never certifies.

    The published accountant is ``direction = REMOVE``. The registry's is not that one: by default it takes the larger
    of both directions, as every accountant here does.

    Attributes:
        direction: ``BOTH`` takes the larger of the two; EW-Tune's code computes ``REMOVE`` only.
    """

    order: ClassVar[int]

    def __init__(self, direction: Direction = Direction.BOTH) -> None:
        self.direction = direction

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        return self.trivial_bounds(max(side.epsilon(delta) for side in self._sides(composed)))

    @override
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        """Return the estimate of delta, clipped to [0, 1], which the expansion may leave."""
        return self.trivial_bounds(_largest_delta(self._sides(composed), epsilon))

    @override
    def trivial_bounds(self, value: float) -> Bounds:
        """Return an estimate that bounds nothing."""
        return point(value, direction=self.direction)

    def _sides(self, composed: Composition) -> list[DirectedExpansion]:
        """Return the expansions of every direction that counts."""
        directions = (Direction.REMOVE, Direction.ADD) if self.direction is Direction.BOTH else (self.direction,)
        return [expand(composed, self.order, add=direction is Direction.ADD) for direction in directions]


class Aea1Accountant(AeaAccountant):
    """Order 1, the point estimate that EW-Tune used."""

    name = "aea1"
    order = 1


class Aea2Accountant(AeaAccountant):
    """The approximate Edgeworth accountant of order 2."""

    name = "aea2"
    order = 2


class Aea3Accountant(AeaAccountant):
    """The approximate Edgeworth accountant of order 3."""

    name = "aea3"
    order = 3


class EeaiAccountant(NormalFormAccountant):
    """The exact Edgeworth accountant interval of order 1: certified, and vacuous at realistic delta."""

    name = "eeai"

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        """Return the interval of epsilon; an infinite one bears the note ``vacuous``."""
        remove, add = with_error(composed, add=False), with_error(composed, add=True)
        lower = max(remove.epsilon(delta, _LOWER), add.epsilon(delta, _LOWER))
        estimate = max(remove.epsilon(delta), add.epsilon(delta))
        upper = max(remove.epsilon(delta, _UPPER), add.epsilon(delta, _UPPER))
        # A lower end of infinity says that no crossing was found: nothing is known.
        lower = 0.0 if math.isinf(lower) else min(lower, upper)
        error = max(remove.first_error, add.first_error)
        note = f"vacuous: the distribution functions are known to {error:.2g} only" if math.isinf(upper) else ""
        return Bounds(lower, upper, estimate=estimate, note=note)

    @override
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        """Return the interval of delta; an upper end of 1 says nothing and bears the note ``vacuous``."""
        sides = [with_error(composed, add=False), with_error(composed, add=True)]
        lower = _largest_delta(sides, epsilon, _LOWER)
        upper = _largest_delta(sides, epsilon, _UPPER)
        note = "vacuous: the error bound exceeds 1" if upper == 1 else ""  # larger ends were cut to 1
        return Bounds(lower, upper, estimate=_largest_delta(sides, epsilon), note=note)


def _largest_delta(sides: Sequence[DirectedExpansion], epsilon: float, end: float = _ESTIMATE) -> float:
    """Return the larger delta of the directions, or one end of it, clipped to [0, 1], which an expansion may leave."""
    largest = max(float(side.delta(np.array([epsilon]), end)[0]) for side in sides)
    return min(max(largest, 0.0), 1.0)


def with_error(composed: Composition, *, add: bool) -> DirectedExpansion:
    """Return the order-1 expansions of one direction with certified errors."""
    errors: list[float] = []
    for first in (True, False):
        steps = [(step_moments(step, add=add, first_law=first), count) for step, count in composed.phases]
        errors.append(sup_error(steps))
    return dataclasses.replace(expand(composed, 1, add=add), first_error=errors[0], second_error=errors[1])
