"""Certified ends of epsilon and delta from bounds on the delta of a lattice law, which dominates the true one.

delta is the true privacy curve of a composition in one direction. delta' is that of the same composition with every
step's loss moved onto a lattice, which can only raise it. :mod:`accountants.methods.tilted` composes the lattice laws
and proves the bounds (its points 4 and 5).
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
from scipy import special

from accountants.mixtures import Array

#: Errors that are added on purpose are kept below exp(-MARGIN) times delta.
MARGIN = 16.0


@dataclasses.dataclass(frozen=True)
class Window:
    """Bounds on the lattice delta' at lattice points; between two of them delta' is linear in e^epsilon.

    Attributes:
        points: increasing epsilons.
        upper_values, lower_values: the bounds at each, decreasing, to be multiplied by ``exp(log_scale)``.
        log_scale: keeps the values within float64 where delta is tiny.
        margin: relative error of all values.
        shift: absolute error of every loss.
        added: to be added to the upper bound, for what lies above the window.
        removed: to be subtracted from the lower bound, for what was folded into the window.
        reliable_from: least epsilon at which the lower bound holds.
        num_steps: the number of lattice laws composed: what moving losses onto the lattice can cost grows with it.
    """

    points: Array
    upper_values: Array
    lower_values: Array
    log_scale: float
    margin: float
    shift: float
    added: float
    removed: float
    reliable_from: float
    num_steps: int

    def upper_delta(self, epsilon: float) -> float | None:
        """Return a certified upper bound on delta; None outside the window."""
        value = self._value_at(self.upper_values, epsilon - self.shift)
        return None if value is None else min(self._scaled(value, self.margin) + self.added, 1.0)

    def upper_epsilon(self, delta: float) -> float | None:
        """Return the smallest epsilon of the window at which ``upper_delta`` is at most ``delta``; None outside."""
        if delta <= self.added:
            return None
        log_target = math.log(delta - self.added) - self.log_scale - self.margin
        if log_target > 600:  # beyond all values of the window, and soon beyond float64
            return None
        target = math.exp(log_target)
        after = int(np.searchsorted(-self.upper_values, -target, side="left"))
        if after == 0 or after == len(self.points):
            return None
        left, right = self.points[after - 1], self.points[after]
        high, low = self.upper_values[after - 1], self.upper_values[after]
        # Between two points values are linear in e^epsilon.
        part = float((high - target) / (high - low))
        return float(left) + math.log1p(part * math.expm1(right - left)) + self.shift

    def lower_delta(self, epsilon: float) -> float | None:
        """Return a certified lower bound on delta; None outside the window.

        With g = e^epsilon, the true D(g) and the lattice's D'(g) satisfy D <= D' and D'(g) <= E[D(g e^(-Xi))], Xi the
        random jumps onto the lattice. D is convex, so for jumps within ``width`` it lies below the chords from (g, v),
        v = D(g), to D' at the two ends, and elsewhere below D'. Hence D'(g) <= rest + weight v, solved for v; every
        width gives a bound, and the best counts.
        """
        epsilon += self.shift
        spacing = float(self.points[1] - self.points[0])
        lower_value = self._value_at(self.lower_values, epsilon)
        upper_value = self._value_at(self.upper_values, epsilon)
        if lower_value is None or not upper_value or epsilon < self.reliable_from:
            return None
        lattice_delta = self._scaled(lower_value, -self.margin) - self.removed
        if lattice_delta <= 0:
            return 0.0

        # How far jumps are followed: to where, by Hoeffding around the mean of Xi / h, which is n tanh(h / 4), those
        # beyond are negligible. Rounded to multiples of 8, so that near epsilons share one table of `_jump_law`.
        steps = self.num_steps
        log_needed = 8 * math.ceil((MARGIN - math.log(lattice_delta)) / 8)
        deviation = math.ceil(math.sqrt(steps * log_needed))
        reach = min(steps, deviation + math.ceil(steps * math.tanh(spacing / 4)))
        jumps = np.arange(-reach, reach + 1)
        epsilons = epsilon - spacing * jumps
        if spacing * reach > 50 or epsilons[0] >= self.points[-2] or epsilons[-1] <= self.points[0]:
            return None

        # Of each array below entry `reach + j` is for a jump of j. The delta at each jump left out is at most 1.
        jump_probability = _jump_law(steps, reach, spacing)
        outside = 0.0 if reach == steps else 2 * math.exp(-deviation * deviation / steps)
        values = self._values_at(self.upper_values, epsilons)

        best = 0.0
        ratio = np.exp(epsilons - epsilon)  # of each jump's g to that of epsilon
        for factor in (1.0, 1.5, 2.0, 3.0):
            width = min(max(1, round(factor * math.sqrt(steps / 2))), reach)  # in jumps
            # Each inner value is part · end + (1 - part) · v, on the chord from v to the value at the end of its side.
            left, right = ratio[reach + width], ratio[reach - width]
            part: Array = np.where(jumps > 0, (1 - ratio) / (1 - left), (ratio - 1) / (right - 1))
            end: Array = np.where(jumps > 0, values[reach + width], values[reach - width])
            inside = np.abs(jumps) <= width
            known = float(jump_probability @ np.where(inside, part * end, values))
            weight = float(jump_probability @ np.where(inside, 1 - part, 0.0))  # of v
            rest = self._scaled(known, self.margin) + self.added + outside
            if weight > 0:
                best = max(best, (lattice_delta - rest) / weight)
        return best

    def lower_epsilon(self, delta: float, upper: float) -> float | None:
        """Return an epsilon of the window, as large as found, at which ``lower_delta`` is at least ``delta``.

        Goes down from ``upper`` (an upper end of epsilon) by doubling steps, then bisects; None if none is found.
        """
        spacing = float(self.points[1] - self.points[0])
        # The first step is of the size of the lattice's effect on epsilon, or less.
        step = max(spacing / 8, self.num_steps * spacing**2 / 24)
        while True:
            value = self.lower_delta(upper - step)
            if value is None:
                return None  # outside the window
            if value >= delta:
                break
            step *= 2
        good, bad = upper - step, upper - step / 2
        for _ in range(4):
            middle = (good + bad) / 2
            value = self.lower_delta(middle)
            good, bad = (middle, bad) if value is not None and value >= delta else (good, middle)
        return good

    def _scaled(self, value: float, margin: float) -> float:
        """Return a tabulated value as a delta, moved by a relative ``margin``; at most 1."""
        return math.exp(min(math.log(value) + self.log_scale + margin, 0.0)) if value > 0 else 0.0

    def _value_at(self, values: Array, epsilon: float) -> float | None:
        """Return tabulated ``values`` at one epsilon; None outside the window."""
        if not self.points[0] <= epsilon < self.points[-1]:
            return None
        return float(self._values_at(values, np.array([epsilon]))[0])

    def _values_at(self, values: Array, epsilons: Array) -> Array:
        """Interpolate ``values`` at ``epsilons``, linearly in e^epsilon."""
        spacing = self.points[1] - self.points[0]
        before = np.clip(((epsilons - self.points[0]) / spacing).astype(np.int64), 0, len(self.points) - 2)
        part = np.expm1(epsilons - self.points[before]) / math.expm1(spacing)
        return values[before] * (1 - part) + values[before + 1] * part


def largest_jump(num_steps: int, spacing: float) -> float:
    """Return how many lattice points below its epsilon :meth:`Window.lower_delta` may read, at the smallest delta.

    That delta is about e^-700, where its deviation is at most the root of 720 n, and tanh(h / 4) is at most h / 4.
    """
    return min(27 * math.sqrt(num_steps) + num_steps * spacing / 4, num_steps) + 2


@functools.lru_cache(maxsize=8)
def _jump_law(steps: int, reach: int, spacing: float) -> Array:
    """Return the probabilities that all steps' losses together jump by -reach, ..., reach lattice points.

    Xi / h is Binomial(2n, 1 / (1 + e^(-h/2))) - n for n steps and spacing h (:mod:`.lattice`).
    """
    jumps = np.arange(-reach, reach + 1)
    return np.exp(_log_binomial(2 * steps, jumps + steps, 1 / (1 + math.exp(-spacing / 2))))


def _log_binomial(count: int, successes: np.typing.NDArray[np.int64], prob: float) -> Array:
    """Return logs of the binomial probabilities of so many successes in ``count`` trials."""
    failures = count - successes
    logs = special.gammaln(count + 1) - special.gammaln(successes + 1) - special.gammaln(failures + 1)
    return logs + successes * math.log(prob) + failures * math.log1p(-prob)
