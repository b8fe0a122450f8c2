"""The privacy-loss-distribution accountant: Google's library, on a grid that is scaled to the answer.

Koskela, Jalko, Honkela 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380) for the pessimistic
discretisation that makes the upper end certified. Both directions. Relations: add-or-remove-one, zero-out, and
replace-one (noise multipliers relative to C, under replace-one too; see :mod:`accountants.methods.rdp` for the other
convention).

The grid. Connecting the dots on a grid of width h adds a variance of at most h^2/6 a step, which moves epsilon by about
(1 + t) n h^2 / 12 at tilt t. The width is chosen to make that 1e-4 of epsilon. But the library's second differences
leave round-off of order 1e-16/h in every bin: finer is not always better, so the width has a floor that grows with the
number of steps. Nor is any delta attainable: n steps leave round-off of order n 1e-16 in delta, on either side (2.5e-14
too low after 522 steps). So the library is asked at a delta that is smaller by more than that. An event whose epsilon
either effect could move by more than about 1e-3 is refused, with the accountant that can do it.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib.metadata
import math

import dp_accounting
import numpy as np
from dp_accounting import pld
from typing_extensions import override

from accountants.answer import Bounds
from accountants.events import poisson_counterpart
from accountants.methods.tilted import TiltedAccountant
from accountants.mixtures import composition
from accountants.numerics import saddle
from accountants.protocol import Accountant, Question, UnsupportedEventError

NeighboringRelation = dp_accounting.NeighboringRelation

#: Below this delta the float64 round-off of the library's convolutions is of the size of delta itself, and its
#: "pessimistic" value can fall below the truth; we refuse rather than print it.
MIN_DELTA = 1e-11

#: Round-off in delta that the library's convolutions leave, a step: at most, and what is set aside for it.
_ROUND_OFF_OF_DELTA, _SET_ASIDE = 2e-16, 4e-16
#: Relative round-off of the library that a certified upper end may stand in for.
_ROUND_OFF = 1e-6

_DEFAULT_GRID = 1e-4
_COARSEST_GRID = 1e-2
#: Standard deviations at which the library cuts the noise: probability e^-50.
_LIBRARY_REACH = 9.7
#: Widest grid whose cells' odds float64 can hold.
_WIDEST_GRID = 500.0
#: Steps after which delta is asked elsewhere: the library's convolutions take seconds here and minutes at ten times
#: as many, and leave round-off of 1e-16 a step.
_MAX_STEPS_FOR_DELTA = 2_000_000
#: Cells of a step that the library tabulates in some three seconds, both directions together.
_MAX_CELLS = 600_000


class PldAccountant(Accountant):
    """Certified upper bounds from privacy loss distributions, on a grid that is scaled to the answer."""

    name = "pld"
    version = f"dp-accounting {importlib.metadata.version('dp-accounting')}"
    min_delta = MIN_DELTA
    covers_replacement = True

    @override
    def bounds(self, question: Question) -> Bounds:
        """Return the library's upper bound on epsilon or delta; for a delta below 1e-11, which is round-off, 1e-11.

        The library bounds its round-off nowhere, so the value is held against the certified interval of ``tilted``.

        Raises:
            ValueError: if the value lies below that interval by more than round-off.
        """
        event, relation, argument = question.event, question.relation, question.argument
        set_aside = _SET_ASIDE * _num_releases(event)
        if question.quantity == "epsilon":
            if set_aside >= argument:
                raise ValueError(f"delta={argument:g} is below pld's float64 round-off, {set_aside:.2g}; use 'tilted'")
            value = float(self._compose(event, relation, argument, None).get_epsilon(argument - set_aside))
        else:
            floor = 0.0 if isinstance(event, dp_accounting.NoOpDpEvent) else MIN_DELTA
            delta = float(self._compose(event, relation, None, argument).get_delta(argument))
            value = min(1.0, max(delta + set_aside, floor))
        upper = _not_refuted(question, value)
        return Bounds(0.0, upper, estimate=upper)

    def _compose(
        self, event: dp_accounting.DpEvent, relation: NeighboringRelation, delta: float | None, epsilon: float | None
    ) -> pld.PLDAccountant:
        """Return the library's accountant after ``event``, on a grid for the one of ``delta`` and ``epsilon`` given."""
        width = _grid_width(event, delta, epsilon)
        accountant = pld.PLDAccountant(relation, value_discretization_interval=width)
        try:
            accountant.compose(event)
        except dp_accounting.UnsupportedEventError as error:
            raise UnsupportedEventError(f"pld under {relation.name}: {error}") from error
        return accountant


def _num_releases(event: dp_accounting.DpEvent) -> int:
    """Return how many distributions the library convolves for a resolved event: one a step."""
    match event:
        case dp_accounting.NoOpDpEvent() | dp_accounting.NonPrivateDpEvent():
            return 0
        case dp_accounting.SelfComposedDpEvent():
            return event.count * _num_releases(event.event)
        case dp_accounting.ComposedDpEvent():
            return sum(map(_num_releases, event.events))
        case _:
            return 1


def _not_refuted(question: Question, value: float) -> float:
    """Return the library's ``value``, compared with the certified interval of the tilted accountant.

    Nothing bounds the round-off of the library. Without sampling the interval is tight to eleven digits, and the value
    may lie below its upper, or even its lower end, by round-off in the last digits: then the upper end is returned.

    Raises:
        ValueError: if the value is below the interval by more than round-off.
    """
    ask = getattr(TiltedAccountant(), question.quantity)
    try:
        known = ask(question.event, question.argument, question.relation)
    except UnsupportedEventError:
        return value
    is_tight = known.upper <= (1 + _ROUND_OFF) * known.lower
    # Within a wide interval the value is the better bound, and nothing contradicts it.
    if value >= (known.upper if is_tight else known.lower):
        return value
    if value < (1 - _ROUND_OFF) * known.lower:
        argument = "delta" if question.quantity == "epsilon" else "epsilon"
        raise ValueError(
            f"pld's {question.quantity} {value:.6g} at {argument}={question.argument:g} is below the certified lower "
            f"bound {known.lower:.6g}: its float64 round-off shows; use 'tilted'"
        )
    return float(known.upper)


def _grid_width(event: dp_accounting.DpEvent, delta: float | None, epsilon: float | None) -> float:
    """Return the width of the library's loss grid: fine enough for the answer, and coarse enough for float64 and time.

    Args:
        event: in the library's form.
        delta: at which epsilon is asked for, or None.
        epsilon: at which delta is asked for, or None.

    Raises:
        ValueError: if no width is both.
    """
    try:
        # Plain Poisson sampling spends less than truncated: a grid for it is fine enough for both.
        event = poisson_counterpart(event)
        composed = composition(event)
    except UnsupportedEventError:
        return _DEFAULT_GRID
    if composed.non_private or not composed.phases:
        return _DEFAULT_GRID
    steps = composed.num_steps
    if delta is None and steps > _MAX_STEPS_FOR_DELTA:
        raise ValueError(f"pld gives no delta of {steps:,} steps in a useful time; use 'tilted'")

    # `size` is the epsilon that the grid must resolve, and `start` the saddle there.
    log_mass = (math.log(delta) if delta is not None else -40.0) - 16
    law = saddle.directed_loss(composed, add=False, log_mass=log_mass)
    if delta is None:
        size = epsilon or 0.0
        start = saddle.saddle_for_epsilon(law, size)
    else:
        # A certified value: the saddle-point formula is poor for few steps.
        size = TiltedAccountant(tolerance=5e-3).epsilon(event, delta).upper
        start = saddle.saddle_for_delta(law, delta)
    if size == 0:
        return _DEFAULT_GRID

    # The width h at which n steps move epsilon by 1e-4 of itself: see the module.
    wanted = min(math.sqrt(12e-4 * size / ((1 + start.tilt) * steps)), size / 200)
    largest = max(float(np.max(loss)) for loss in law.losses)
    # Not so fine that round-off shows, and at most 100,000 cells.
    floor = max(math.sqrt(1e-14 * steps), size / 1e5, largest / 1e5)

    # Round-off of delta that moves epsilon by more than 1e-3 of itself: delta falls by tilt times delta per epsilon.
    noisy = delta is not None and _ROUND_OFF_OF_DELTA * steps > 1e-3 * size * start.tilt * delta
    if delta is not None and (wanted < floor / 2 or noisy):
        raise ValueError(
            f"epsilon near {size:.2g} after {steps} steps at delta={delta:g} is beyond pld's float64 grid; use 'tilted'"
        )
    width = max(min(wanted, _COARSEST_GRID), floor)
    if width > _WIDEST_GRID:
        raise ValueError(f"a step's largest loss {largest:.3g} is beyond pld's float64 grid; use 'tilted'")

    # The library tabulates a step up to where the noise has probability e^-50, a cell at a time.
    farthest = max(float(step.loss(np.array([step.shifts[-1] + _LIBRARY_REACH]))[0]) for step, _ in composed.phases)
    if farthest > _MAX_CELLS * width:
        raise ValueError(
            f"pld would tabulate {farthest / width:,.0f} losses of a step, which takes many seconds: epsilon near "
            f"{size:.2g} is small beside a step's largest loss {farthest:.2g}; use 'tilted'"
        )
    return width
