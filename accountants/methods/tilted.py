"""The certified, near-exact accountant: tilt first, then invert. Cost independent of the number of steps.

Theorem. Let S be the sum of independent losses of one direction, with ``M(t) = E[e^(tS)]`` finite at some ``t > 0``,
and ``P_t`` the exponentially tilted law, ``dP_t = e^(tS) dP / M(t)``. Then for every such t

    delta(eps) = E[(1 - e^(eps - S))_+] = M(t) e^(-t eps) E_t[g(S - eps)],   g(x) = e^(-tx) (1 - e^(-x))_+.

At the saddle point the prefactor carries almost all of delta, however small, and the expectation is a number of
moderate size under a law centred near eps: it needs few digits. (Wang et al. 2022, arXiv 2206.04236, expand the
untilted law instead, where an error bound on the distribution function is useless as soon as it exceeds delta. Bounding
g by its maximum c_t = t^t/(1+t)^(1+t) is the conversion from Renyi divergence of order 1 + t, Canonne et al. 2020,
arXiv 2004.00010.)

Here the expectation is computed rather than expanded: by :mod:`accountants.numerics.smoothed` where that takes few
frequencies, else (a handful of steps, or rare large losses) on a lattice.

1. Every step's loss is replaced by the dominating lattice law of :mod:`accountants.numerics.lattice`, with spacing h.
2. The tilted law of the sum is the inverse discrete Fourier transform, of length N, of the product of the steps'
   transforms raised to their counts. This is the law of S modulo W = N h, exactly: there is no error of truncating or
   sampling a Fourier integral. Only folding remains: probability outside the window of length W appears inside it.
3. Upper end. Folding only adds to a window's probabilities; what lies above the window adds at most P(S >= top), which
   a Chernoff bound over several tilts bounds; infinite losses add at most their total mass.
4. Lower bound on the lattice delta'. Folded from above, a loss S >= eps + W adds at most
   c_t M e^(-t eps) P_t(S >= eps + W), by Chernoff; below that it lands under eps and adds nothing. Folded from below, S
   becomes S + kW >= eps, and
   M e^(-t eps) E_t[e^(-t(S + kW - eps))] <= e^(-tkW), in all at most e^(-tW)/(1 - e^(-tW)). Both are subtracted, as is
   the mass moved from beyond the lattice.
5. Lower end. D(g) = delta(log g) is convex, D <= D', and D'(g) <= E[D(g e^(-Xi))]
   (:mod:`accountants.numerics.lattice`). If D(g) = v, then between g e^(-c) and g e^c the function D lies below the
   chords from (g, v) to D' at those two points, elsewhere below D'; so D'(g) <= A + v B with known A and B, that is v
   >= (D'(g) - A) / B. The best of several c is taken. The loss is of order n h^2, as for the upper end.
6. Round-off. A sum of N terms through log2 N butterflies has a forward error of at most c u log2(N) * sum of magnitudes
   (c = 8 is used, u = 2^-53); raising to the count n multiplies it by n; the inverse transform adds its own. This
   bound on every probability of the window is added (upper) or subtracted (lower). Errors of masses and losses are
   those allowed for in :mod:`accountants.numerics.lattice`.

Smoothing and spacing are reduced until the ends agree to a relative ``tolerance`` or the transform reaches its largest
length; in every case both ends are certified, assuming double precision arithmetic and scipy's logarithms of normal
tails accurate to 16 units in the last place (:mod:`accountants.numerics.tails`; the tests compare them with 60 digits).

Relations: add-or-remove-one and zero-out of a clipped sum (Gaussian, Poisson-sampled and mixture-of-Gaussians steps,
and any composition of them). Both directions are computed and the worse is reported.

Words of the code. The *ends* are the certified lower and upper bound on epsilon or delta. A *law* is a table of one
direction's loss (:class:`accountants.numerics.saddle.DirectedLoss`), a *saddle* the tilt that suits an epsilon. An
*attempt* is one inversion, a :class:`~.numerics.smoothed.SmoothedSum` or a lattice
:class:`~.numerics.window.Window`, which gives certified ends of its own, or None where it cannot.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
from typing_extensions import override

from accountants.answer import Bounds, Direction
from accountants.methods.rdp import renyi_epsilon
from accountants.mixtures import Composition
from accountants.numerics import closed_form, lattice, saddle
from accountants.numerics.lattice_sum import CHERNOFF, LARGEST_LOG_WEIGHT, LatticePhase, compose
from accountants.numerics.smoothed import SmoothedSum, smoothed_sum
from accountants.numerics.window import MARGIN, Window, largest_jump
from accountants.protocol import NormalFormAccountant

#: Log2 of the shortest and the longest transform; those between are tried as the ends demand.
_SHORTEST, _LONGEST = 13, 20
#: Most cells times shifts where a step has many shifts and its loss is inverted numerically: some seconds' work.
_MAX_NUMERICAL = 1 << 23
#: The part of a window's length that lies below the epsilon looked for.
_BELOW = 1 / 4
#: The first smoothing's standard deviation is so many times the root of the tolerance, relative to the tilted sum's.
_SMOOTHING = 0.4
#: If the ends are this far apart, relative to the upper one, it is compared with the Renyi bound.
_WIDE = 0.05


class TiltedAccountant(NormalFormAccountant):
    """Certified ends of epsilon and delta by the method of this module; any delta.

    Attributes:
        tolerance: the relative gap between the ends of epsilon at which refinement stops.
    """

    name = "tilted"

    def __init__(self, tolerance: float = 1e-3) -> None:
        self.tolerance = tolerance

    @override
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        """Return ends by closed form for one step, else by tilting; if far apart, the upper one capped by Renyi's."""
        if composed.num_steps == 1:
            step, _ = composed.phases[0]
            return _for_both_directions(closed_form.epsilon_bounds(step, delta))
        try:
            ends = _worst_epsilon(composed, delta, self.tolerance)
        except ArithmeticError as error:
            raise _beyond_float64("epsilon", f"delta={delta:g}") from error
        if ends.upper - ends.lower > _WIDE * ends.upper or math.isinf(ends.upper):
            # The branch c_t of the theorem; where rare large losses or the size of epsilon defeat the lattice it can be
            # better.
            ends = dataclasses.replace(ends, upper=min(ends.upper, renyi_epsilon(composed, delta)))
        return _for_both_directions(ends)

    @override
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        """Return ends by closed form for one step, else by tilting."""
        if composed.num_steps == 1:
            step, _ = composed.phases[0]
            return _for_both_directions(closed_form.delta_bounds(step, epsilon))
        try:
            return _for_both_directions(_worst_delta(composed, epsilon, self.tolerance))
        except ArithmeticError as error:
            raise _beyond_float64("delta", f"epsilon={epsilon:g}") from error


def _beyond_float64(quantity: str, given: str) -> ValueError:
    """Return the error for losses that overflow; ``given`` is the argument of the question, as ``delta=1e-05``."""
    return ValueError(f"tilted's {quantity} at {given} leaves float64's range; use 'tilted-edgeworth' or 'rdp'")


def _for_both_directions(ends: Bounds) -> Bounds:
    """Return the bounds of the worse direction, which hold for both."""
    return dataclasses.replace(ends, direction=Direction.BOTH)


def _worst_epsilon(composed: Composition, delta: float, tolerance: float) -> Bounds:
    """Return ends of the larger of both directions' epsilons.

    Refines whichever direction has the larger upper end, until its own ends agree or no attempt is left.
    """
    remove = _EpsilonSearch(composed, delta, tolerance, add=False)
    add = _EpsilonSearch(composed, delta, tolerance, add=True)
    # Remove first, since its epsilon is the larger one as a rule.
    remove.refine()
    # Before any attempt, add's upper end is its largest possible loss. If that exceeds remove's, one attempt is made at
    # add. As a rule it puts add's upper end below remove's: then add cannot decide the answer, and `worse_than` saves
    # the time for its lower end. If it does not, the loop goes on with add.
    if add.upper > remove.upper:
        add.refine(worse_than=remove.upper)
    searches = (remove, add)
    while True:
        worst = max(searches, key=lambda search: search.upper)
        do_ends_agree = math.isfinite(worst.upper) and worst.upper - worst.lower <= tolerance * max(worst.upper, 1e-12)
        if do_ends_agree or not worst.refine():
            lower = max(search.lower for search in searches)
            assert lower <= worst.upper * (1 + 1e-9), (composed, delta, lower, worst.upper)
            return Bounds(min(lower, worst.upper), worst.upper, Direction.ADD if worst.add else Direction.REMOVE)


class _EpsilonSearch:
    """One direction's ends of epsilon at a delta, tightened by one attempt (an inversion) at a time.

    Attempts become finer: smoothed sums first, then lattice windows of growing length. Every attempt's ends are
    certified, so the best of all that were made count.

    Args:
        composed: all steps.
        delta: the target.
        tolerance: as of the accountant.
        add: the direction: add, or else remove.

    Attributes:
        lower: the certified lower end so far; 0 before the first attempt.
        upper: the certified upper end so far.
    """

    def __init__(self, composed: Composition, delta: float, tolerance: float, *, add: bool) -> None:
        self.composed, self.delta, self.add, self.tolerance = composed, delta, add, tolerance
        self.lower = 0.0
        # Known without any attempt: where no loss exceeds epsilon, delta is 0. Losses of remove have no upper limit.
        self.upper = _largest_loss(composed) if add else math.inf
        self._law = saddle.directed_loss(composed, add=add, log_mass=math.log(delta) - MARGIN)
        self._start = saddle.saddle_for_delta(self._law, delta)
        self._attempts = self._make_attempts()

    def refine(self, worse_than: float = 0.0) -> bool:
        """Tighten the ends by the next attempt.

        Args:
            worse_than: the other direction's upper end. The lower end is computed only if the upper one is larger: the
                other direction decides the answer otherwise.

        Returns:
            Whether an attempt was made; false, with the ends as they were, if none was left.
        """
        attempt = _next(self._attempts, math.isfinite(self.upper))
        if attempt is None:
            return False
        at_zero = attempt.upper_delta(0.0)  # delta falls in epsilon: if it is small enough at 0, epsilon is 0
        upper = 0.0 if at_zero is not None and at_zero <= self.delta else attempt.upper_epsilon(self.delta)
        if upper is not None:  # None: the attempt found no epsilon with so small a delta
            upper = max(upper, 0.0)
            self.upper = min(self.upper, upper)
            if upper > worse_than:
                self.lower = max(self.lower, attempt.lower_epsilon(self.delta, upper) or 0.0)
            # The next attempt is centred at the least epsilon known: the saddle-point formula errs high where rare
            # large losses matter, and a coarse lattice everywhere.
            if upper < self._start.epsilon:
                self._start = saddle.saddle_for_epsilon(self._law, upper)
        return True

    def _make_attempts(self) -> Iterator[SmoothedSum | Window]:
        """Yield ever tighter bounds: smoothed sums first, then lattices on ever longer windows."""
        log_delta = math.log(self.delta)
        yield from _smoothed_sums(
            self.composed, self._law, lambda: self._start, log_delta=log_delta, tolerance=self.tolerance, add=self.add
        )
        longest = _longest(self.composed)
        log2_length = min(_SHORTEST, longest)
        while log2_length <= longest:
            yield _window(self.composed, self._law, self._start, log_delta, 1 << log2_length, self.add)
            log2_length = self._next_length(log2_length, longest)

    def _next_length(self, log2_length: int, longest: int) -> int:
        """Return log2 of the next window's length; beyond ``longest`` if there is none.

        The gap between the ends falls with the square of the length, so it tells where the tolerance should be reached.
        """
        if log2_length == longest:
            return longest + 1
        doublings = 2  # where the ends tell nothing yet
        if 0 < self.lower < self.upper < math.inf:
            excess = 1.1 * (self.upper - self.lower) / (self.tolerance * self.upper)
            doublings = min(max(math.ceil(0.5 * math.log2(excess)), 1), 3)
        return min(log2_length + doublings, longest)


def _next(attempts: Iterator[SmoothedSum | Window], has_ends: bool) -> SmoothedSum | Window | None:
    """Return the next attempt, or None if there is none left.

    An attempt whose numbers leave float64 counts as the last one if ends were found before (``has_ends``).

    Raises:
        ArithmeticError: of that attempt, if no ends were found.
    """
    try:
        return next(attempts, None)
    except ArithmeticError:
        if not has_ends:
            raise
        return None


def _smoothed_sums(
    composed: Composition,
    law: saddle.DirectedLoss,
    start: Callable[[], saddle.Saddle],
    *,
    log_delta: float,
    tolerance: float,
    add: bool,
) -> Iterator[SmoothedSum]:
    """Yield a smoothed sum, and one of half the smoothing with a quarter of the gap; stop where that takes too long.

    ``start`` gives the present saddle, which the first sum may have improved when the second one is asked for.
    """
    largest = min(_SMOOTHING * math.sqrt(tolerance), 0.1)
    for smoothing in (largest, largest / 2):
        smooth = _smoothed(composed, law, start(), log_delta, smoothing, add)
        if smooth is None:
            return
        yield smooth


def _longest(composed: Composition) -> int:
    """Return log2 of the longest transform and of a step's most cells: fewer if its loss is inverted numerically."""
    slow_shifts = sum(len(step.shifts) for step, _ in composed.phases if len(step.shifts) > 2)
    return min(_LONGEST, int(math.log2(_MAX_NUMERICAL / max(slow_shifts, 1))))


def _largest_loss(composed: Composition) -> float:
    """Return an upper bound on the total loss of the add direction: minus all steps' infima, with their round-off."""
    steps = ((count, step.infimum) for step, count in composed.phases)
    return math.fsum(-count * infimum for count, infimum in steps) * (1 + 1e-12)


def _worst_delta(composed: Composition, epsilon: float, tolerance: float) -> Bounds:
    """Return ends of the larger of both directions' deltas."""
    remove = _directed_delta(composed, epsilon, tolerance, add=False)
    worst, lower = remove, remove.lower
    if epsilon < _largest_loss(composed):  # else add's delta is 0, and its saddle at infinity
        add = _directed_delta(composed, epsilon, tolerance, add=True, needed=remove.lower)
        worst = add if add.upper > remove.upper else remove
        lower = max(lower, add.lower)
    assert lower <= worst.upper * (1 + 1e-9), (composed, epsilon, lower, worst.upper)
    # Where float64 rounds the upper end to 0, the least positive number is returned: some delta is left.
    return Bounds(min(lower, worst.upper), max(worst.upper, math.ulp(0.0)), worst.direction)


def _directed_delta(
    composed: Composition, epsilon: float, tolerance: float, *, add: bool, needed: float = 0.0
) -> Bounds:
    """Return one direction's ends of delta: the best of attempts that become finer until the ends agree.

    Args:
        composed: all steps.
        epsilon: where delta is wanted.
        tolerance: as of the accountant.
        add: the direction: add, or else remove.
        needed: the other direction's lower end; an upper end below it decides nothing, and no further attempt is made.
    """
    lower, upper = 0.0, 1.0
    attempts = _delta_attempts(composed, epsilon, tolerance, add)
    while True:
        attempt = _next(attempts, upper < 1.0)
        if attempt is None:
            break
        found_upper = attempt.upper_delta(epsilon)
        if found_upper is not None:  # None: epsilon lies outside the attempt's window
            upper = min(upper, found_upper)
        lower = max(lower, attempt.lower_delta(epsilon) or 0.0)
        # Delta falls like e^(-t epsilon): relative to itself it moves about t epsilon times as much as epsilon, so its
        # tolerance is wider.
        if upper - lower <= 10 * tolerance * upper or upper <= needed:
            break
    return Bounds(lower, upper, Direction.ADD if add else Direction.REMOVE)


def _delta_attempts(
    composed: Composition, epsilon: float, tolerance: float, add: bool
) -> Iterator[SmoothedSum | Window]:
    """Yield ever tighter bounds at one epsilon: smoothed sums first, then lattices four times as long each."""
    law = saddle.directed_loss(composed, add=add, log_mass=-60.0)
    start = saddle.saddle_for_epsilon(law, epsilon)
    # A second table, now that delta's size is known: what is cut off the law must be far below it.
    log_delta = min(max(start.log_delta, -700.0), -0.1)
    law = saddle.directed_loss(composed, add=add, log_mass=log_delta - MARGIN)
    start = saddle.saddle_for_epsilon(law, epsilon)
    yield from _smoothed_sums(composed, law, lambda: start, log_delta=log_delta, tolerance=tolerance, add=add)
    longest = _longest(composed)
    for log2_length in range(min(14, longest), longest + 1, 2):
        yield _window(composed, law, start, log_delta, 1 << log2_length, add)


def _shape(law: saddle.DirectedLoss, start: saddle.Saddle, log_delta: float) -> tuple[float, float]:
    """Return a window's length in units of loss, and the tilt for it.

    Of a few tilts, from the saddle point's down, the one whose window is shortest: any positive tilt is valid.
    """
    spread = math.sqrt(law.cumulants(start.tilt).variance)
    largest = max(start.tilt, 1.5 / spread)  # tilts far below one over the spread need long windows
    tilts = [largest * factor for factor in (0.35, 0.5, 0.75, 1.0)]
    lengths_with_tilts = [(_window_length(law, tilt, start.epsilon, log_delta), tilt) for tilt in tilts]
    return min(lengths_with_tilts)


def _smoothed(
    composed: Composition, law: saddle.DirectedLoss, start: saddle.Saddle, log_delta: float, smoothing: float, add: bool
) -> SmoothedSum | None:
    """Return :func:`smoothed_sum` around a saddle; ``smoothing`` is its deviation over that of the tilted sum."""
    width, tilt = _shape(law, start, log_delta)
    scale = math.sqrt(law.cumulants(tilt).variance)
    return smoothed_sum(
        composed,
        tilt=tilt,
        window=width,
        centre=start.epsilon - min(2 / tilt, _BELOW * width / 2),
        deviation=smoothing * scale,
        scale=scale,
        log_delta=log_delta,
        add=add,
    )


def _window(
    composed: Composition, law: saddle.DirectedLoss, start: saddle.Saddle, log_delta: float, length: int, add: bool
) -> Window:
    """Return bounds on delta on a window of ``length`` lattice points around a saddle.

    The window's width is that of :func:`_shape`, or more where a step would have too many cells.
    """
    z_low, z_high = saddle.truncation(composed, log_delta - MARGIN)
    ranges: list[tuple[float, float]] = []  # by step, the least and the largest loss that is followed
    for step, _ in composed.phases:
        at_low, at_high = (float(loss) for loss in step.loss(np.array([z_low, z_high])))
        ranges.append((max(at_low, step.infimum), at_high))

    width, tilt = _shape(law, start, log_delta)
    widest_range = max(high - low for low, high in ranges)
    spacing = max(width / length, widest_range / (1 << _longest(composed)))
    width = spacing * length
    # Where cells wider than asked for make the window wider, the tilt must leave the lower end its jumps.
    jumps = min(largest_jump(composed.num_steps, spacing), _BELOW * length)
    tilt = min(tilt, LARGEST_LOG_WEIGHT / (spacing * jumps))
    # Lower ends are wanted from a little below the epsilon looked for, which the window's start is well below.
    reliable_from = start.epsilon - min(2 / tilt, _BELOW * width / 2)

    phases: list[LatticePhase] = []
    with np.errstate(over="ignore", invalid="raise"):  # an infinite value may be negligible, NaN is an error
        for (step, count), (low, high) in zip(composed.phases, ranges, strict=True):
            cells = lattice.build_cells(step, low, spacing, math.ceil((high - low) / spacing))
            phases.append(LatticePhase(lattice.dominating_law(cells, add=add), spacing, count))
        return compose(phases, tilt, length, start.epsilon - _BELOW * width, reliable_from)


def _window_length(law: saddle.DirectedLoss, tilt: float, epsilon: float, log_delta: float) -> float:
    """Return a window's length at which folding and cutting should cost less than exp(-MARGIN) of delta.

    A guess from the tabulated law, by the Chernoff bounds of the module's points 3 and 4; what they really cost is
    bounded when the window is made.
    """
    log_moment = law.cumulants(tilt).log_normaliser
    lowest = epsilon - 2 / tilt  # of the epsilons at which lower ends are wanted
    width = (MARGIN - log_delta) / tilt
    for _ in range(12):  # growing to 14 times the first guess at most
        top, fold = epsilon + (1 - _BELOW) * width, lowest + width
        costs: list[float] = []  # of each change of tilt, log of the larger cost
        for exponent in CHERNOFF:
            change = exponent / width
            moment = law.cumulants(tilt + change).log_normaliser - log_moment
            above = moment - change * top + log_moment - tilt * top  # of cutting what lies above the window
            folded = moment - change * fold + log_moment - tilt * lowest
            costs.append(max(above, folded))
        if min(costs) <= log_delta - MARGIN:
            break
        width *= 1.25
    return width
