"""Certified ends by inverting a smoothed sum: the number of steps is only an exponent, so its size costs nothing.

Let S be the sum of the steps' losses in one direction, and t > 0 a tilt (:mod:`accountants.methods.tilted`). Let
``U ~ N(m^2/2, m^2)`` be the loss of a Gaussian mechanism of its own, ``S' = S + U`` and ``delta'`` its privacy curve,
of which the Fourier integral soon ends: its transform falls like ``exp(-m^2 y^2 / 2)`` whatever the law of S.

1. Upper end. ``E[e^-U] = 1`` and the hockey-stick divergence is convex in ``e^-S``: ``delta <= delta'``.
2. Inversion. ``F(eps) = e^(t eps) delta'(eps)`` has the transform ``M'(s)/(s(1+s))``, ``s = t + iy``, with ``M'`` the
   moment generating function of S'. By Poisson's summation formula, with frequencies ``y_k = 2 pi k / W``,

       A(eps) = e^(-t eps)/W sum_k M'(s_k)/(s_k(1+s_k)) e^(-i y_k eps) = sum_j e^(tjW) delta'(eps + jW)

   exactly. All terms on the right are positive: A is an upper bound as it stands. For the lower end, the terms j < 0
   are at most e^(-tW)/(1-e^(-tW)) and those above at most a Chernoff bound. Frequencies left out add at most an
   integral of ``exp(-m^2 y^2/2)/y^2``.
3. Lower end. ``delta'(eps) = E[delta(eps - U)]`` exactly, so point 5 of :mod:`accountants.methods.tilted` applies with
   U in place of Xi: near eps the curve, convex in e^eps, lies below the chords from its own value at eps to delta' on
   either side, elsewhere below delta'.
4. One step's transform is a 16-point Gauss-Legendre rule on each of many panels of ``z``. The integrand
   ``f(z) = phi(z) R(z)^a e^(iyX)``, R = dQ/dP, is analytic where |Im z| * mu < pi/2, mu the largest shift, and on an
   ellipse of parameter r around a panel of half-width h the rule's error is at most 64/15 h max|f| r^-30 / (1 - r^-2)
   (Trefethen 2013, Approximation Theory and Approximation Practice, theorem 19.3). There |phi(x+iv)| = phi(x)
   e^(v^2/2), cos(v mu) R(x) <= |R(x+iv)| <= R(x), |arg R| <= v X'(x) / cos(v mu). Where that is worse, both rule and
   integral are at most the panel's own mass. The round-off of losses, weights and sums is added; the n-th power
   multiplies all of it by n.

The laws are cut as in :mod:`accountants.methods.tilted_edgeworth`: what is cut is added to the upper end, and the lower
end is that of the cut law, which is smaller. The bias is of order ``t (t + 1) m^2`` relative to delta. Where the tilted
law rests on rare large losses the number of frequencies grows and :mod:`accountants.numerics.lattice` serves instead.
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownMemberType=false
from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import special

from accountants.mixtures import Array, Composition, MixtureStep
from accountants.numerics import saddle
from accountants.numerics.lattice import LOSS_ERROR
from accountants.numerics.roots import bracketed_root
from accountants.numerics.sum_transform import ComplexArray, SumTransform
from accountants.numerics.tails import UNIT
from accountants.numerics.window import MARGIN

#: Panels of the quadrature, and nodes of the rule on each.
_FEWEST_PANELS, _MOST_PANELS, _RULE = 125, 500, 16
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(_RULE)
#: Frequencies left out may add this share of delta.
_TAIL = 1e-6
#: More frequencies than these and the lattice is quicker.
_MAX_FREQUENCIES = 4096
#: Below it the lower end's differences of probabilities have few digits.
_SMALLEST_DEVIATION = 1e-8
#: Parameters r of the ellipses of point 4; each gives a bound on the rule's error.
_ELLIPSES = (1.5, 2.0, 4.0, 8.0, 16.0)
#: Frequencies that are computed together: a transform is a product of a coarse and of a fine rotation.
_BLOCK = 32
#: Log of the smallest positive number of float64, about.
_SMALLEST_LOG = -740.0
#: Grid of the lower end, in standard deviations of U.
_GRID = 1 / 8
#: Lower ends are not computed where the grid goes further from epsilon.
_LONGEST_REACH = 50.0


class _Ellipse(NamedTuple):
    """What bounds the rule's error by one family of ellipses, by panel, for any tilt (point 4 of the module).

    There, h is half a panel, r the ellipse's parameter, v its half-height and mu the largest shift.
    """

    at_left: Array  # loss at the ellipse's left end, one for each panel
    at_right: Array  # at its right end
    log_cosine: float  # log cos(v mu) at its top
    log_density: Array  # largest log phi on it
    log_factor: float  # log of 64/15 h r^-30 / (1 - r^-2)
    rate: Array  # by which the error's log grows with the frequency


class StepTransform:
    """One step's law in one direction, cut to a stretch of ``z``, at the nodes of quadrature on many panels.

    Args:
        step: the step.
        low, high: the stretch of ``z``.
        add: the direction.
    """

    def __init__(self, step: MixtureStep, low: float, high: float, *, add: bool) -> None:
        # Half a panel times the largest shift is at most 3/4, so that the third ellipse lies in the strip.
        wanted = math.ceil((high - low) * step.shifts[-1] / 1.5)
        num_panels = min(max(_FEWEST_PANELS, wanted), _MOST_PANELS)
        half = (high - low) / (2 * num_panels)
        centres = low + half * (2 * np.arange(num_panels) + 1)
        self.z = (centres[:, None] + half * _NODES).ravel()
        self.loss = step.loss(self.z)
        # Log of the rule's weight at each node times the normal density there.
        log_rule = np.tile(np.log(half * _WEIGHTS / math.sqrt(2 * math.pi)), num_panels)
        self._log_weight = -(self.z**2) / 2 + log_rule
        self._half, self._centres = half, centres
        self._step, self._add = step, add
        # What the round-off of a loss is relative to.
        self._size = np.maximum(np.maximum(1.0, np.abs(self.loss)), step.shifts[-1] * np.abs(self.z))

    def order(self, tilt: float) -> float:
        """Return the exponent p of the tilted density, which is proportional to dP · (dQ/dP)**p."""
        return -tilt if self._add else 1 + tilt

    def tilted(self, tilt: float) -> tuple[Array, float]:
        """Return the tilted weights, of sum one, and the log of their sum before."""
        logs = self._log_weight + self.order(tilt) * self.loss
        top = float(np.max(logs))
        weight = np.exp(logs - top)
        total = float(np.sum(weight))
        return weight / total, top + math.log(total)

    def values(self, weight: Array, spacing: float, num: int) -> ComplexArray:
        """Return the Fourier transform of the tilted law at frequencies 0, spacing, ... (``num`` of them).

        ``weight`` is that of :meth:`tilted`. Frequency number 32 a + b is turned by number 32 a and by number b.
        """
        loss = -self.loss if self._add else self.loss
        fine = np.exp(1j * spacing * np.arange(_BLOCK)[:, None] * loss)
        num_blocks = math.ceil(num / _BLOCK)
        coarse = np.exp(1j * spacing * _BLOCK * np.arange(num_blocks)[:, None] * loss)
        return cast(Any, (coarse * weight) @ fine.T).ravel()[:num]

    def errors(self, weight: Array, log_total: float, tilt: float, frequencies: Array) -> Array:
        """Return a bound on the error of :meth:`values` at each frequency, with which it grows.

        ``weight`` and ``log_total`` are those of :meth:`tilted`. The error of the quadrature rule is bounded on each
        panel by the best ellipse, or by the panel's mass; that of float64 is added.
        """
        order = self.order(tilt)
        masses = weight.reshape(-1, _RULE).sum(axis=1)
        log_still, rates = self._ellipse_bounds(order, log_total)
        # By mass: the rule and the integral are each at most the panel's mass, which the rule gives up to its own error
        # at frequency 0.
        by_mass = 2 * masses + np.exp(np.min(log_still, axis=0))
        bounds = np.broadcast_to(by_mass, (len(frequencies), len(masses)))
        for still, rate in zip(log_still, rates, strict=True):
            bounds = np.minimum(bounds, np.exp(np.minimum(still + frequencies[:, None] * rate, 700.0)))
        rule = bounds.sum(axis=1)
        # Of float64: the sum over nodes and the exponents of the weights; then the losses, times what multiplies them.
        spread = float(weight @ (self.z**2 / 2 + (1 + abs(order)) * np.abs(self.loss))) + abs(log_total)
        of_sums = UNIT * (len(self.z) + 32 + 4 * spread)
        of_losses = 4 * LOSS_ERROR * (abs(order) + frequencies) * float(weight @ self._size)
        return rule + (of_sums + of_losses)

    def _ellipse_bounds(self, order: float, log_total: float) -> tuple[Array, Array]:
        """Return, by ellipse and panel, the log of the error's bound at frequency 0 and the rate at which it grows.

        An ellipse on which the loss is not analytic gets a bound of e^700, which says nothing.
        """
        shape = len(_ELLIPSES), len(self._centres)
        log_still, rates = np.full(shape, 700.0), np.zeros(shape)
        for row, ellipse in self._ellipses.items():
            # |R|^order is largest where the ellipse's R is largest, or smallest if the order is negative.
            log_ratio = order * (ellipse.at_right if order >= 0 else ellipse.at_left + ellipse.log_cosine)
            log_bound = ellipse.log_density + log_ratio - log_total + ellipse.log_factor
            log_still[row], rates[row] = np.minimum(log_bound, 700.0), ellipse.rate
        return log_still, rates

    @functools.cached_property
    def _ellipses(self) -> dict[int, _Ellipse]:
        """The ellipses of point 4 that lie where the loss is analytic, by place in ``_ELLIPSES``; for every tilt.

        With h half a panel, an ellipse of parameter r reaches h (r + 1/r) / 2 along the real line and
        v = h (r - 1/r) / 2 above it. On it the density is at most exp((v^2 - x^2) / 2) / sqrt(2 pi), x being its point
        nearest to 0.
        """
        ellipses: dict[int, _Ellipse] = {}
        for row, parameter in enumerate(_ELLIPSES):
            reach = self._half * (parameter + 1 / parameter) / 2
            height = self._half * (parameter - 1 / parameter) / 2
            if height * self._step.shifts[-1] >= 1.5:  # close to pi / 2, where the loss is not analytic
                continue
            cosine = math.cos(height * self._step.shifts[-1])
            left, right = self._centres - reach, self._centres + reach
            nearest = np.maximum(np.maximum(left, -right), 0.0)
            # The loss increases, and so does its slope: the slope at the right end, the largest, is bounded by a chord
            # from there to the right. The 1e-9 below is for the chord's round-off.
            at_left, at_right, beyond = np.split(self._step.loss(np.concatenate([left, right, right + 0.01])), 3)
            ellipses[row] = _Ellipse(
                at_left=at_left,
                at_right=at_right,
                log_cosine=math.log(cosine),
                log_density=(height**2 - nearest**2) / 2 - 0.5 * math.log(2 * math.pi),
                log_factor=math.log(64 / 15 * self._half * parameter ** (2 - 2 * _RULE) / (1 - parameter**-2)),
                rate=height * ((beyond - at_right) / 0.01 + 1e-9) / cosine,
            )
        return ellipses


@dataclasses.dataclass(frozen=True)
class SmoothedSum:
    """The function A of the module's text, with what is needed to bound delta from both sides.

    Attributes:
        tilt: t.
        spacing: of the frequencies, 2 pi / W.
        terms: ``A(eps) = exp(log_scale - t (eps - centre)) Re sum_k terms[k] exp(-i k spacing (eps - centre))``.
        error: a bound on the error of that sum.
        centre, log_scale: as in the formula of ``terms``; lower ends are for epsilons from ``centre`` on.
        deviation: m, the standard deviation of U.
        reach: how far U / m is followed in the lower end.
        added: probability cut from the laws, to be added to the upper bound.
        removed: a bound on A - delta' from ``centre`` on.
    """

    tilt: float
    spacing: float
    terms: ComplexArray
    error: float
    centre: float
    log_scale: float
    deviation: float
    reach: float
    added: float
    removed: float

    def upper_delta(self, epsilon: float) -> float:
        """Return a certified upper bound on delta."""
        return min(self._value(epsilon, 1) + self.added, 1.0)

    def upper_epsilon(self, delta: float) -> float | None:
        """Return about the least epsilon at which ``upper_delta`` is at most ``delta``; None if not found."""
        target = delta - self.added
        if target <= 0:
            return None

        # Below the target by what logarithms round.
        log_target = math.log(target) - 8 * UNIT * (2 + abs(math.log(target)))

        def excess(epsilon: float) -> float:
            """Return the log of delta's upper bound less that of the target; not positive is on the safe side."""
            return math.log(max(self._value(epsilon, 1), 1e-305)) - log_target

        # Delta falls by a factor of about e for every 1 / tilt of epsilon.
        step, accuracy = 0.1 / self.tilt, 1e-6 / self.tilt
        # Walk away from the centre by doubling steps, until the root lies between `near` and `far`.
        side = 1 if excess(self.centre) > 0 else -1  # whether the root lies above (1) or below (-1) the centre
        near, far = self.centre, self.centre + side * step
        for _ in range(40):
            if side * excess(far) <= 0:
                break
            step *= 2
            near, far = far, far + side * step
        else:
            return None
        low, high = min(near, far), max(near, far)
        root = bracketed_root(excess, low, high, xtol=accuracy)
        # The root may fall short by its tolerance: return what was itself found to be on the safe side.
        for value in (root, root + accuracy, root + 4 * accuracy):
            if excess(value) <= 0:
                return value
        return high

    def lower_delta(self, epsilon: float) -> float | None:
        """Return a certified lower bound on delta; None below ``centre``, or where U reaches too far.

        By the module's point 3: delta'(eps) = E[delta(eps - U)] is at most known + weight v, where v = delta(eps) is
        wanted. Near eps, within some width, delta lies below the chords from v to delta' at the two ends; elsewhere it
        lies below delta'. Every width gives a bound on v, and the best counts.
        """
        if epsilon < self.centre or self.deviation * self.reach > _LONGEST_REACH:
            return None
        smooth = self._value(epsilon, -1) - self.removed
        if smooth <= 0:
            return 0.0
        grid, values, middle = self._grid, self._on_grid(epsilon), len(self._grid) // 2
        m = self.deviation
        # Of U / m on each stretch of the grid: its probability, and the expectation of e^-U there.
        prob, ratio = np.diff(special.ndtr(grid - m / 2)), np.diff(special.ndtr(grid + m / 2))
        ends = np.exp(-m * grid)
        steps = ends[:-1] - ends[1:]
        # On a stretch delta' lies below its chord in e^-U: the share of U's probability that counts at the chord's left
        # end keeps the mean of e^-U. A smaller share gives more weight to the larger value, as round-off must.
        share = np.clip((ratio - ends[1:] * prob - 16 * UNIT * (1 + ends[:-1])) / steps, 0.0, prob)
        chords = values[1:] * (prob - share) + values[:-1] * share
        outside = 2 * float(special.ndtr(m / 2 - grid[-1]))  # the probability beyond the grid, where delta is at most 1
        cancelled = 64 * UNIT / m  # the error of quotients of such differences
        best = 0.0
        for width in (1.0, 1.5, 2.0, 3.0):
            left, right = middle - round(width / _GRID), middle + round(width / _GRID)
            # Beyond the width delta lies below delta'.
            known, weight = float(chords[:left].sum() + chords[right:].sum()) + outside, cancelled
            # Within it, on either side, below the chord from v (at e^-U = 1) to delta' at its far end.
            for part, end in ((slice(left, middle), left), (slice(middle, right), right)):
                # Of one side: P(U), E[e^-U], and e^-U at the far end of the chord.
                p, mean, far = float(prob[part].sum()), float(ratio[part].sum()), float(ends[end])
                known += float(values[end]) * (p - mean) / (1 - far)
                weight += (mean - far * p) / (1 - far)
            best = max(best, (smooth - known - cancelled * float(values[-1])) / weight)
        return best

    def lower_epsilon(self, delta: float, upper: float) -> float | None:
        """Return an epsilon, as large as found, at which ``lower_delta`` is at least ``delta``.

        Goes down from ``upper`` (an upper end of epsilon) by doubling steps, then bisects; None if none is found.
        """
        # The first step is of the size of what smoothing moves epsilon by.
        step = (self.tilt + 1) * self.deviation**2 / 4
        for _ in range(10):
            if self._reaches(upper - step, delta):
                break
            step *= 2
        else:
            return None
        good, bad = upper - step, upper - step / 2
        for _ in range(2):  # a few: every evaluation goes over the whole grid
            middle = (good + bad) / 2
            good, bad = (middle, bad) if self._reaches(middle, delta) else (good, middle)
        return good

    def _reaches(self, epsilon: float, delta: float) -> bool:
        """Return whether ``lower_delta`` is at least ``delta``; not where it is unknown."""
        lower = self.lower_delta(epsilon)
        return lower is not None and lower >= delta

    @functools.cached_property
    def _frequencies(self) -> Array:
        """The frequencies y_k."""
        return self.spacing * np.arange(len(self.terms))

    @functools.cached_property
    def _size(self) -> float:
        """What the round-off of the sum is relative to."""
        return float(np.sum(np.abs(self.terms)))

    @functools.cached_property
    def _grid(self) -> Array:
        """Values of U / m, symmetric around 0."""
        num_each_side = math.ceil(self.reach / _GRID)
        return np.arange(-num_each_side, num_each_side + 1) * _GRID

    @functools.cached_property
    def _turns(self) -> ComplexArray:
        """[grid, frequencies] factors that move epsilon by minus each of the grid's points."""
        return np.exp(1j * self.deviation * self._grid[:, None] * self._frequencies)

    def _turned(self, shift: float) -> ComplexArray:
        """Return the terms of the sum at ``centre + shift``."""
        return self.terms * np.exp(-1j * shift * self._frequencies)

    def _error_at(self, shift: float) -> float:
        """Return ``error`` and the rounding of the terms' phases at ``centre + shift``."""
        return self.error + 8 * UNIT * (abs(shift) * float(self._frequencies[-1]) + len(self.terms)) * self._size

    def _value(self, epsilon: float, sign: float) -> float:
        """Return an upper (1) or lower (-1) bound on A."""
        shift = epsilon - self.centre
        total = max(float(self._turned(shift).real.sum()) + sign * self._error_at(shift), 0.0)
        return total * math.exp(min(self.log_scale - self.tilt * shift, 700.0))

    def _on_grid(self, epsilon: float) -> Array:
        """Return the upper bounds on delta' at ``epsilon - m * grid``."""
        shift = epsilon - self.centre
        moves = -self.deviation * self._grid
        error = self._error_at(abs(shift) + self.deviation * float(self._grid[-1]))
        totals = np.maximum((self._turns @ self._turned(shift)).real + error, 0.0)
        return np.minimum(totals * np.exp(np.minimum(self.log_scale - self.tilt * (shift + moves), 700.0)), 1.0)


def smoothed_sum(
    composed: Composition,
    *,
    tilt: float,
    window: float,
    centre: float,
    deviation: float,
    scale: float,
    log_delta: float,
    add: bool,
) -> SmoothedSum | None:
    """Return the smoothed sum of one direction; None where a lattice is quicker, or no error can be bounded.

    Args:
        composed: the steps.
        tilt: t.
        window: W.
        centre: close to the epsilons that will be asked for, and below those of lower ends.
        deviation: m, the standard deviation of U.
        scale: about the standard deviation of the tilted sum.
        log_delta: about the log of delta.
        add: the direction.
    """
    m, spacing = deviation, 2 * math.pi / window
    log_mass = log_delta - MARGIN  # of what is cut from the laws
    if m < _SMALLEST_DEVIATION or log_mass < _SMALLEST_LOG:
        return None
    # About the size of A: the tilted sum's density, smeared over 1 / tilt, times the integral of e^(-tx) (1 - e^-x).
    expected = 0.4 / (math.hypot(scale, 1 / tilt) * tilt * (1 + tilt))
    num = _num_frequencies(m, spacing, expected=expected)
    if num > _MAX_FREQUENCIES:
        return None

    low, high = saddle.truncation(composed, log_mass)
    steps = [(StepTransform(step, low, high, add=add), count) for step, count in composed.phases]
    y = spacing * np.arange(num)
    law = _transform(steps, tilt, y)

    # The other factors of a term of A, in point 2; terms at y and -y are conjugate, so all but the first count twice.
    s = tilt + 1j * y
    log_kernel = np.log(np.where(y > 0, 2.0, 1.0) / window) - np.log(s) - np.log1p(s) - m * m * y * y / 2
    turn = y * (m * m / 2 * (1 + 2 * tilt) - centre)
    terms = np.exp(law.log_transform + log_kernel + 1j * turn)

    # The errors of all terms, what the frequencies left out add, and the round-off of exponents that all terms share.
    rounding = 8 * UNIT * (8 + np.abs(law.log_transform) + np.abs(turn))
    with np.errstate(over="ignore"):
        sizes = np.exp(law.log_envelope + log_kernel.real)
        error = float(sizes @ (law.relative_error + rounding)) + _tail(float(y[-1]), m)
    error += 8 * UNIT * (composed.num_steps + abs(law.log_moment) + abs(tilt * centre)) * float(np.sum(np.abs(terms)))
    if not math.isfinite(error):
        return None

    below = math.exp(-tilt * window) / -math.expm1(-tilt * window)  # the terms j < 0 of point 2
    return SmoothedSum(
        tilt=tilt,
        spacing=spacing,
        terms=terms,
        error=error,
        centre=centre,
        log_scale=law.log_moment + tilt * (1 + tilt) * m * m / 2 - tilt * centre,
        deviation=m,
        reach=math.sqrt(2 * (MARGIN - log_delta)) + 2 * m + 1,
        added=2 * math.exp(log_mass),
        removed=below + _folded(steps, tilt, window, centre, m),
    )


def _num_frequencies(m: float, spacing: float, *, expected: float) -> int:
    """Return how many frequencies are needed so that those left out are small beside ``expected``, the size of A."""
    highest = 2.0 / m
    while _tail(highest, m) > _TAIL * expected:
        highest *= 1.05
    return math.ceil(highest / spacing) + 1


def _transform(steps: list[tuple[StepTransform, int]], tilt: float, frequencies: Array) -> SumTransform:
    """Return the transform of a sum of steps, each so often, at equally spaced frequencies from 0 on."""
    num, spacing = len(frequencies), float(frequencies[1])
    # The bound on errors grows with the frequency: the one at a block's last frequency serves the block.
    ends_of_blocks = np.minimum(np.arange(_BLOCK, num + _BLOCK, _BLOCK), num)
    last_of_blocks = frequencies[ends_of_blocks - 1]
    transform = SumTransform(num)
    for step, count in steps:
        weight, log_total = step.tilted(tilt)
        values = step.values(weight, spacing, num)
        errors = np.repeat(step.errors(weight, log_total, tilt, last_of_blocks), _BLOCK)[:num]
        transform.add(values, errors, log_total, count)
    return transform


def _tail(frequency: float, m: float) -> float:
    """Return a bound on the terms beyond ``frequency``, relative to ``exp(log_scale)``."""
    return math.exp(-((m * frequency) ** 2) / 2) / (math.pi * m * m * frequency**3)


def _folded(steps: list[tuple[StepTransform, int]], tilt: float, window: float, centre: float, m: float) -> float:
    """Return a Chernoff bound on ``sum_(j>0) e^(tjW) delta'(eps + jW)`` for every eps from ``centre`` on.

    With any s > t, ``delta'(eps + jW) <= M'(s) e^(-s (eps + jW))``, so the sum is at most
    ``M'(s) e^(-s eps)`` times a geometric series in ``e^(-(s - t) W)``. The best of three ``s`` counts.
    """
    best = math.inf
    for exponent in (24.0, 48.0, 96.0):  # of e^(-(s - t) W)
        order = tilt + exponent / window  # s
        # The last term is for the rest of the series.
        total = order * (1 + order) * m * m / 2 - order * centre - exponent + 1e-6
        for step, count in steps:
            weight, log_total = step.tilted(order)
            total += count * (log_total + float(step.errors(weight, log_total, order, np.zeros(1))[0]))
        best = min(best, total)
    return math.exp(best) if best <= 0 else math.inf
