"""The certified, near-exact accountant: tilt first, then invert on a lattice. Cost independent of the number of steps.

Theorem. Let S be the sum of independent losses of one direction, with ``M(t) = E[e^(tS)]`` finite at some ``t > 0``,
and ``P_t`` the exponentially tilted law, ``dP_t = e^(tS) dP / M(t)``. Then for every such t

    delta(eps) = E[(1 - e^(eps - S))_+] = M(t) e^(-t eps) E_t[g(S - eps)],   g(x) = e^(-tx) (1 - e^(-x))_+.

At the saddle point the prefactor carries almost all of delta, however small, and the expectation is a number of
moderate size under a law centred near eps: it needs few digits. (Wang et al. 2022, arXiv 2206.04236, expand the
untilted law instead, where an error bound on the distribution function is useless as soon as it exceeds delta. Bounding
g by its maximum c_t = t^t/(1+t)^(1+t) is the conversion from Renyi divergence of order 1 + t, Canonne et al. 2020,
arXiv 2004.00010.)

Here the expectation is computed rather than expanded.

1. Every step's loss is replaced by the dominating lattice law of :mod:`accountants.lattice`, with spacing h.
2. The tilted law of the sum is the inverse discrete Fourier transform, of length N, of the product of the steps'
   transforms raised to their counts. This is the law of S modulo W = N h, exactly: there is no error of truncating or
   sampling a Fourier integral. Only folding remains: probability outside the window of length W appears inside it.
3. Upper end. Folding only adds to a window's probabilities; what lies above the window adds at most P(S >= top), which
   a
   Chernoff bound over several tilts bounds; infinite losses add at most their total mass.
4. Lower bound on the lattice delta'. Folded from above, a loss S >= eps + W adds at most c_t M e^(-t eps) P_t(S >= eps
   + W),
   by Chernoff; below that it lands under eps and adds nothing. Folded from below, S becomes S + kW >= eps, and
   M e^(-t eps) E_t[e^(-t(S + kW - eps))] <= e^(-tkW), in all at most e^(-tW)/(1 - e^(-tW)). Both are subtracted, as is
   the mass moved from beyond the lattice.
5. Lower end. D(g) = delta(log g) is convex, D <= D', and D'(g) <= E[D(g e^(-Xi))] (:mod:`accountants.lattice`). If D(g)
   = v, then
   between g e^(-c) and g e^c the function D lies below the chords from (g, v) to D' at those two points, elsewhere
   below D'; so D'(g) <= A + v B with known A and B, that is v >= (D'(g) - A) / B. The best of several c is taken. The
   loss is of order n h^2, as for the upper end.
6. Round-off. A sum of N terms through log2 N butterflies has a forward error of at most c u log2(N) * sum of magnitudes
   (c = 8 is used, u = 2^-53); raising to the count n multiplies it by n; the inverse transform adds its own. This
   bound on every probability of the window is added (upper) or subtracted (lower). Errors of masses and losses are
   those allowed for in :mod:`accountants.lattice`.

The spacing is reduced until the ends agree to a relative ``tolerance`` or the transform reaches its largest length; in
every case both ends are certified, assuming double precision arithmetic and scipy's normal distribution function
accurate to 1e-14.

Relations: add-or-remove-one and zero-out of a clipped sum (Gaussian, Poisson-sampled and mixture-of-Gaussians steps,
and any composition of them). Both directions are computed and the worse is reported.
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import dataclasses
import math
from typing import Any, cast

import dp_accounting
import numpy as np
from scipy import signal, special

from accountants import closed_form, lattice, saddle
from accountants.answer import OWN_VERSION, BoundKind, Direction, Interval, PrivacyAnswer
from accountants.mixtures import Array, Composition, composition
from accountants.protocol import check_delta, check_epsilon, check_plain_relation
from accountants.rdp import renyi_epsilon

_UNIT = 2.0**-53
_LOG2_LENGTHS = (14, 16, 18, 20)
_MAX_CELLS = 1 << 20
#: Errors that are added on purpose are kept below exp(-_MARGIN) times delta.
_MARGIN = 16.0
#: Where in the window the answer is looked for: the part of its length that lies below it.
_BELOW = 1 / 4
#: Relative gap from which on the upper end is compared with the Renyi bound.
_WIDE = 0.05
#: Changes of tilt tried in Chernoff bounds, in units of one over the window's length.
_CHERNOFF = (24.0, 48.0, 96.0)


@dataclasses.dataclass(frozen=True)
class Window:
    """Bounds on the lattice delta' at lattice points; between two of them delta' is linear in e^epsilon.

    Attributes:
        points: increasing epsilons.
        upper_values, lower_values: the bounds at each, decreasing, to be multiplied by ``exp(log_scale)``.
        log_scale: see the values.
        margin: relative error of all values.
        shift: absolute error of every loss.
        added: to be added to the upper bound.
        removed: to be subtracted from the lower bound, valid from ``reliable_from`` on.
        reliable_from: see ``removed``.
        num_steps: the number of lattice laws composed, for the distribution of Xi.
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
        """A certified upper bound on delta; None outside the window."""
        value = self._at(self.upper_values, epsilon - self.shift)
        return None if value is None else min(self._scaled(value, self.margin) + self.added, 1.0)

    def upper_epsilon(self, delta: float) -> float | None:
        """The smallest epsilon of the window at which ``upper_delta`` is at most ``delta``; None outside."""
        if delta <= self.added:
            return None
        log_target = math.log(delta - self.added) - self.log_scale - self.margin
        if log_target > 600:
            return None
        target = math.exp(log_target)
        after = int(np.searchsorted(-self.upper_values, -target, side="left"))
        if after == 0 or after == len(self.points):
            return None
        left, right = self.points[after - 1], self.points[after]
        high, low = self.upper_values[after - 1], self.upper_values[after]
        part = float((high - target) / (high - low))
        return float(left) + math.log1p(part * math.expm1(right - left)) + self.shift

    def lower_delta(self, epsilon: float) -> float | None:
        """A certified lower bound on delta (point 5 of the module's text); None outside the window."""
        epsilon += self.shift
        spacing = float(self.points[1] - self.points[0])
        at = self._at(self.lower_values, epsilon)
        reference = self._at(self.upper_values, epsilon)
        if at is None or not reference or epsilon < self.reliable_from:
            return None
        lattice_delta = self._scaled(at, -self.margin) - self.removed
        if lattice_delta <= 0:
            return 0.0
        steps = self.num_steps
        # Hoeffding around the mean of Xi / h, which is n tanh(h / 4).
        deviation = math.ceil(math.sqrt(steps * (_MARGIN - math.log(lattice_delta))))
        reach = min(steps, deviation + math.ceil(steps * math.tanh(spacing / 4)))
        jumps = np.arange(-reach, reach + 1)
        epsilons = epsilon - spacing * jumps
        if spacing * reach > 50 or epsilons[0] >= self.points[-2] or epsilons[-1] <= self.points[0]:
            return None
        law = np.exp(_log_binomial(2 * steps, jumps + steps, 1 / (1 + math.exp(-spacing / 2))))
        # The delta at each jump left out is at most 1.
        outside = 0.0 if reach == steps else 2 * math.exp(-deviation * deviation / steps)
        values = self._many(self.upper_values, epsilons)
        best = 0.0
        ratio = np.exp(epsilons - epsilon)
        for factor in (1.0, 1.5, 2.0, 3.0):
            width = max(1, round(factor * math.sqrt(steps / 2)))
            if width > reach:
                width = reach
            left, right = ratio[reach + width], ratio[reach - width]
            part: Array = np.where(jumps > 0, (1 - ratio) / (1 - left), (ratio - 1) / (right - 1))
            end: Array = np.where(jumps > 0, values[reach + width], values[reach - width])
            inside = np.abs(jumps) <= width
            known = float(law @ np.where(inside, part * end, values))
            weight = float(law @ np.where(inside, 1 - part, 0.0))
            rest = self._scaled(known, self.margin) + self.added + outside
            if weight > 0:
                best = max(best, (lattice_delta - rest) / weight)
        return best

    def lower_epsilon(self, delta: float, upper: float) -> float | None:
        """An epsilon of the window, as large as found, at which ``lower_delta`` is at least ``delta``."""
        spacing = float(self.points[1] - self.points[0])
        good, step = None, spacing / 8
        while (value := self.lower_delta(upper - step)) is not None:
            if value >= delta:
                good = upper - step
                break
            step *= 2
        if good is None:
            return None
        bad = upper - step / 2
        for _ in range(6):
            middle = (good + bad) / 2
            value = self.lower_delta(middle)
            good, bad = (middle, bad) if value is not None and value >= delta else (good, middle)
        return good

    def _scaled(self, value: float, margin: float) -> float:
        return math.exp(min(math.log(value) + self.log_scale + margin, 0.0)) if value > 0 else 0.0

    def _at(self, values: Array, epsilon: float) -> float | None:
        if not self.points[0] <= epsilon < self.points[-1]:
            return None
        return float(self._many(values, np.array([epsilon]))[0])

    def _many(self, values: Array, epsilons: Array) -> Array:
        spacing = self.points[1] - self.points[0]
        before = np.clip(((epsilons - self.points[0]) / spacing).astype(np.int64), 0, len(self.points) - 2)
        part = np.expm1(epsilons - self.points[before]) / math.expm1(spacing)
        return values[before] * (1 - part) + values[before + 1] * part


def _log_binomial(count: int, successes: np.typing.NDArray[np.int64], prob: float) -> Array:
    failures = count - successes
    logs = special.gammaln(count + 1) - special.gammaln(successes + 1) - special.gammaln(failures + 1)
    return logs + successes * math.log(prob) + failures * math.log1p(-prob)


class _Phase:
    """One phase's lattice law with its count."""

    def __init__(self, law: lattice.LatticeLaw, spacing: float, count: int) -> None:
        self.law, self.spacing, self.count = law, spacing, count
        with np.errstate(divide="ignore"):
            self.log_mass = np.log(law.mass)
        self.losses = law.origin + spacing * law.index

    def tilt(self, tilt: float) -> tuple[Array, float]:
        """The tilted law and the log of its normaliser."""
        logs = self.log_mass + tilt * self.losses
        top = float(np.max(logs))
        weight = np.exp(logs - top)
        total = float(np.sum(weight))
        return weight / total, top + math.log(total)

    def transform(self, tilt: float, length: int) -> tuple[np.typing.NDArray[np.complex128], float]:
        """The discrete Fourier transform of the tilted law folded to ``length``, and its log normaliser."""
        law, log_moment = self.tilt(tilt)
        return np.fft.rfft(np.bincount(self.law.index % length, weights=law, minlength=length)), log_moment


def _compose(phases: list[_Phase], tilt: float, length: int, low: float, reliable_from: float) -> Window:
    """Bounds for the sum of all phases on ``length`` lattice points that start at or just above ``low``."""
    spacing = phases[0].spacing
    log_transform = np.zeros(length // 2 + 1, dtype=np.complex128)
    log_envelope = np.zeros(length // 2 + 1)
    per_step = np.zeros(length // 2 + 1)
    log_moment = 0.0
    error = 8 * _UNIT * (math.log2(length) + 2)
    for phase in phases:
        values, log_single = phase.transform(tilt, length)
        magnitude = np.abs(values)
        log_transform += phase.count * np.log(np.where(magnitude > 0, values, 1e-300))
        log_envelope += phase.count * np.log(np.minimum(magnitude + error, 1 + error))
        per_step += phase.count * (error / (magnitude + error) + 4 * _UNIT)
        log_moment += phase.count * log_single
    probability = np.fft.irfft(np.exp(log_transform), length)
    roundoff = 2 / length * float(np.exp(log_envelope) @ (per_step + error))

    origin = math.fsum(phase.count * phase.law.origin for phase in phases)
    start = math.ceil((low - origin) / spacing)
    points = origin + spacing * (start + np.arange(length))
    probability = np.roll(probability, -(start % length))
    num_steps = sum(phase.count for phase in phases)
    centre = reliable_from
    largest = max(float(np.max(np.abs(phase.losses[[0, -1]]))) for phase in phases)
    top, window = float(points[-1]), length * spacing
    log_prefactor = log_moment - tilt * reliable_from
    log_peak = tilt * math.log(tilt) - (1 + tilt) * math.log1p(tilt)
    added = _exp(_log_above(phases, tilt, log_moment, top, window) + log_moment - tilt * top)
    folded = _exp(_log_above(phases, tilt, log_moment, reliable_from + window, window) + log_peak + log_prefactor)
    folded += math.exp(-tilt * window) / -math.expm1(-tilt * window)
    return Window(
        points=points,
        upper_values=_hockey_sticks(np.maximum(probability + roundoff, 0.0), points, tilt, centre),
        lower_values=_hockey_sticks(np.maximum(probability - roundoff, 0.0), points, tilt, centre),
        log_scale=log_moment - tilt * centre,
        margin=num_steps * lattice.MASS_ERROR + 8 * length * _UNIT,
        shift=num_steps * lattice.LOSS_ERROR * max(1.0, largest),
        added=added + math.fsum(phase.count * phase.law.infinite_mass for phase in phases),
        removed=folded + math.fsum(phase.count * phase.law.moved_mass for phase in phases),
        reliable_from=reliable_from,
        num_steps=num_steps,
    )


def _hockey_sticks(probability: Array, points: Array, tilt: float, centre: float) -> Array:
    """E[(1 - e^(eps - S))_+] at every lattice point eps, relative to ``exp(log_scale)``.

    By the recursion ``V(s_r) = e^-h V(s_(r+1)) + (1 - e^-h) P(S >= s_(r+1))``: positive terms only, where the usual
    difference of two sums would cancel.
    """
    spacing = points[1] - points[0]
    weight = probability * np.exp(np.minimum(tilt * (centre - points), 600.0))
    exceed = np.cumsum(weight[::-1])[::-1]
    ratio = math.exp(-spacing)
    tail: Array = cast(Any, signal).lfilter([-math.expm1(-spacing)], [1.0, -ratio], exceed[::-1])[::-1]
    return np.append(tail[1:], 0.0)


def _exp(value: float) -> float:
    return math.exp(min(value, 0.0))


def _log_above(phases: list[_Phase], tilt: float, log_moment: float, edge: float, window: float) -> float:
    """Log of a Chernoff bound on the tilted probability of exceeding ``edge``."""
    best = 0.0
    for exponent in _CHERNOFF:
        change = exponent / window
        moment = math.fsum(phase.count * phase.tilt(tilt + change)[1] for phase in phases)
        best = min(best, moment - log_moment - change * edge)
    return best


class TiltedAccountant:
    """Certified ends of epsilon and delta by the method of this module.

    Attributes:
        tolerance: the relative gap between the ends of epsilon at which refinement stops.
    """

    name = "tilted"

    def __init__(self, tolerance: float = 1e-3) -> None:
        self.tolerance = tolerance

    def epsilon(
        self,
        event: dp_accounting.DpEvent,
        delta: float,
        relation: dp_accounting.NeighboringRelation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """Certified ends of epsilon at ``delta``; see :class:`accountants.protocol.Accountant`."""
        check_delta(delta)
        check_plain_relation(self.name, relation)
        composed = composition(event)
        if composed.non_private:
            return _answer("epsilon", Interval(math.inf, math.inf, Direction.BOTH), relation)
        if not composed.phases:
            return _answer("epsilon", Interval(0.0, 0.0, Direction.BOTH), relation)
        if composed.num_steps == 1:
            return _answer("epsilon", closed_form.epsilon_ends(composed.phases[0][0], delta), relation)
        ends = _worst_epsilon(composed, delta, self.tolerance)
        if ends.upper - ends.lower > _WIDE * ends.upper or math.isinf(ends.upper):
            # The branch c_t of the theorem; where rare large losses or the size of epsilon defeat the lattice it can be
            # better.
            ends = dataclasses.replace(ends, upper=min(ends.upper, renyi_epsilon(composed, delta)))
        return _answer("epsilon", ends, relation)

    def delta(
        self,
        event: dp_accounting.DpEvent,
        epsilon: float,
        relation: dp_accounting.NeighboringRelation = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """Certified ends of delta at ``epsilon``; see :class:`accountants.protocol.Accountant`."""
        check_epsilon(epsilon)
        check_plain_relation(self.name, relation)
        composed = composition(event)
        if composed.non_private:
            return _answer("delta", Interval(1.0, 1.0, Direction.BOTH), relation)
        if not composed.phases:
            return _answer("delta", Interval(0.0, 0.0, Direction.BOTH), relation)
        if composed.num_steps == 1:
            return _answer("delta", closed_form.delta_ends(composed.phases[0][0], epsilon), relation)
        return _answer("delta", _worst_delta(composed, epsilon, self.tolerance), relation)


def _answer(quantity: str, ends: Interval, relation: dp_accounting.NeighboringRelation) -> PrivacyAnswer:
    middle = ends.upper if math.isinf(ends.upper) else (ends.lower + ends.upper) / 2
    return PrivacyAnswer(
        quantity,
        ends.lower,
        middle,
        ends.upper,
        BoundKind.CERTIFIED_UPPER,
        "tilted",
        OWN_VERSION,
        Direction.BOTH,
        relation.name,
    )


def _worst_epsilon(composed: Composition, delta: float, tolerance: float) -> Interval:
    """Refine the direction with the larger upper end until its own ends agree."""
    searches = [_EpsilonSearch(composed, delta, add) for add in (False, True)]
    for search in searches:
        search.refine()
    while True:
        worst = max(searches, key=lambda search: search.upper)
        if worst.upper - worst.lower <= tolerance * max(worst.upper, 1e-12) or not worst.refine():
            lower = max(search.lower for search in searches)
            return Interval(lower, worst.upper, Direction.ADD if worst.add else Direction.REMOVE)


class _EpsilonSearch:
    """One direction's ends, tightened by one transform length at a time."""

    def __init__(self, composed: Composition, delta: float, add: bool) -> None:
        self.composed, self.delta, self.add = composed, delta, add
        self.lower, self.upper = 0.0, math.inf
        self._law = saddle.directed_loss(composed, add=add, log_mass=math.log(delta) - _MARGIN)
        self._start = saddle.saddle_for_delta(self._law, delta)
        self._lengths = iter(_LOG2_LENGTHS)

    def refine(self) -> bool:
        """Try the next transform length; False if there is none."""
        log2_length = next(self._lengths, None)
        if log2_length is None:
            return False
        window = _window(self.composed, self._law, self._start, math.log(self.delta), 1 << log2_length, self.add)
        at_zero = window.upper_delta(0.0)
        upper = 0.0 if at_zero is not None and at_zero <= self.delta else window.upper_epsilon(self.delta)
        if upper is not None:
            upper = max(upper, 0.0)
            self.upper = min(self.upper, upper)
            if upper > 0:
                self.lower = max(self.lower, window.lower_epsilon(self.delta, upper) or 0.0)
            # The saddle-point formula errs high where rare large losses matter; a coarse lattice errs high everywhere.
            if upper < self._start.epsilon:
                self._start = saddle.saddle_for_epsilon(self._law, upper)
        return True


def _worst_delta(composed: Composition, epsilon: float, tolerance: float) -> Interval:
    lower, upper, direction = 0.0, 0.0, Direction.REMOVE
    for add in (False, True):
        law = saddle.directed_loss(composed, add=add, log_mass=-60.0)
        start = saddle.saddle_for_epsilon(law, epsilon)
        # A second table, now that the size of delta is known: its cut must be far below it.
        log_delta = min(max(start.log_delta, -700.0), -0.1)
        law = saddle.directed_loss(composed, add=add, log_mass=log_delta - _MARGIN)
        start = saddle.saddle_for_epsilon(law, epsilon)
        best_lower, best_upper = 0.0, 1.0
        for log2_length in _LOG2_LENGTHS:
            window = _window(composed, law, start, log_delta, 1 << log2_length, add)
            best_upper = min(best_upper, value if (value := window.upper_delta(epsilon)) is not None else 1.0)
            best_lower = max(best_lower, window.lower_delta(epsilon) or 0.0)
            if best_upper - best_lower <= 10 * tolerance * best_upper or best_upper <= lower:
                break
        lower = max(lower, best_lower)
        if best_upper > upper:
            upper, direction = best_upper, Direction.ADD if add else Direction.REMOVE
    return Interval(min(lower, upper), upper, direction)


def _window(
    composed: Composition, law: saddle.DirectedLoss, start: saddle.Saddle, log_delta: float, length: int, add: bool
) -> Window:
    """Compose the lattice laws on a window around a saddle."""
    spread = math.sqrt(law.cumulants(start.tilt)[2])
    largest = max(start.tilt, 1.5 / spread)
    width, tilt = min(
        (_window_length(law, largest * factor, start.epsilon, log_delta), largest * factor)
        for factor in (0.35, 0.5, 0.75, 1.0)
    )
    z_low, z_high = saddle.truncation(composed, log_delta - _MARGIN)
    ranges: list[tuple[float, float]] = []
    for step, _ in composed.phases:
        ends = step.loss(np.array([z_low, z_high]))
        ranges.append((max(float(ends[0]), step.infimum), float(ends[1])))
    spacing = max(width / length, max(high - low for low, high in ranges) / _MAX_CELLS)
    phases: list[_Phase] = []
    for (step, count), (low, high) in zip(composed.phases, ranges, strict=True):
        cells = lattice.build_cells(step, low, spacing, math.ceil((high - low) / spacing))
        phases.append(_Phase(lattice.dominating_law(cells, add=add), spacing, count))
    width = spacing * length
    reliable_from = start.epsilon - min(2 / tilt, _BELOW * width / 2)
    return _compose(phases, tilt, length, start.epsilon - _BELOW * width, reliable_from)


def _window_length(law: saddle.DirectedLoss, tilt: float, epsilon: float, log_delta: float) -> float:
    """A window long enough that folding and cutting should cost less than exp(-_MARGIN) delta; later bounded."""
    base = law.cumulants(tilt)[0]
    width = (_MARGIN - log_delta) / tilt
    for _ in range(12):
        gaps: list[float] = []
        for exponent in _CHERNOFF:
            change = exponent / width
            moment = law.cumulants(tilt + change)[0] - base
            top, fold = epsilon + (1 - _BELOW) * width, epsilon - 2 / tilt + width
            above = moment - change * top + base - tilt * top
            folded = moment - change * fold + base - tilt * (epsilon - 2 / tilt)
            gaps.append(max(above, folded))
        if min(gaps) <= log_delta - _MARGIN:
            break
        width *= 1.25
    return width
