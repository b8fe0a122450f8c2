"""The privacy-loss-distribution accountant: Google's library, on a grid that is scaled to the answer.

Koskela, Jalko, Honkela 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380) for the pessimistic
discretisation that makes the upper end certified. Both directions. Relations: add-or-remove-one, zero-out, and
replace-one (noise multipliers relative to C, under replace-one too; see :mod:`accountants.rdp` for the other
convention).

The grid. Connecting the dots on a grid of width h adds a variance of at most h^2/6 a step, which moves epsilon by about
(1 + t) n h^2 / 12 at tilt t. The width is chosen to make that 1e-4 of epsilon. But the library's second differences
leave round-off of order 1e-16/h in every bin: finer is not always better, so the width has a floor that grows with the
number of steps. Nor is any delta attainable: n steps leave round-off of order n 1e-16 in delta. An event whose epsilon
either effect could move by more than about 1e-3 is refused, with the accountant that can do it.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib.metadata
import math

import dp_accounting
import numpy as np
from dp_accounting import pld

from accountants import saddle
from accountants.answer import BoundKind, PrivacyAnswer
from accountants.events import resolve
from accountants.mixtures import composition
from accountants.protocol import UnsupportedEventError, check_delta, check_epsilon
from accountants.tilted import TiltedAccountant

NeighboringRelation = dp_accounting.NeighboringRelation

#: Below this delta the float64 round-off of the library's convolutions is of the size of delta itself, and its
#: "pessimistic" value can fall below the truth; we refuse rather than print it.
MIN_DELTA = 1e-11

_VERSION = f"dp-accounting {importlib.metadata.version('dp-accounting')}"
_DEFAULT_GRID = 1e-4
_COARSEST_GRID = 1e-2


class PldAccountant:
    """Certified upper bounds from privacy loss distributions.

    Attributes:
        discretization: the grid width; None scales it to the answer.
    """

    name = "pld"

    def __init__(self, discretization: float | None = None) -> None:
        self.discretization = discretization

    def epsilon(
        self,
        event: dp_accounting.DpEvent,
        delta: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; delta in [1e-11, 1)."""
        check_delta(delta, MIN_DELTA, self.name)
        composed = self._compose(event, relation, delta, None)
        return _answer("epsilon", float(composed.get_epsilon(delta)), relation)

    def delta(
        self,
        event: dp_accounting.DpEvent,
        epsilon: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; never reported below 1e-11, where round-off rules."""
        check_epsilon(epsilon)
        value = float(self._compose(event, relation, None, epsilon).get_delta(epsilon))
        floor = 0.0 if isinstance(event, dp_accounting.NoOpDpEvent) else MIN_DELTA
        return _answer("delta", min(1.0, max(value, floor)), relation)

    def _compose(
        self, event: dp_accounting.DpEvent, relation: NeighboringRelation, delta: float | None, epsilon: float | None
    ) -> pld.PLDAccountant:
        event = resolve(event, relation)
        width = self.discretization or _grid_width(event, delta, epsilon)
        accountant = pld.PLDAccountant(relation, value_discretization_interval=width)
        try:
            accountant.compose(event)
        except dp_accounting.UnsupportedEventError as error:
            raise UnsupportedEventError(f"pld under {relation.name}: {error}") from error
        return accountant


def _answer(quantity: str, value: float, relation: NeighboringRelation) -> PrivacyAnswer:
    return PrivacyAnswer(
        quantity, 0.0, value, value, BoundKind.CERTIFIED_UPPER, "pld", _VERSION, relation=relation.name
    )


def _grid_width(event: dp_accounting.DpEvent, delta: float | None, epsilon: float | None) -> float:
    try:
        composed = composition(event)
    except UnsupportedEventError:
        return _DEFAULT_GRID
    if composed.non_private or not composed.phases:
        return _DEFAULT_GRID
    log_mass = (math.log(delta) if delta is not None else -40.0) - 16
    law = saddle.directed_loss(composed, add=False, log_mass=log_mass)
    start = saddle.saddle_for_delta(law, delta) if delta is not None else saddle.saddle_for_epsilon(law, epsilon or 0.0)
    # A certified value sizes the grid: the saddle-point formula is poor for few steps.
    size = epsilon or 0.0 if delta is None else TiltedAccountant(tolerance=5e-3).epsilon(event, delta).upper
    if size == 0:
        return _DEFAULT_GRID
    steps = composed.num_steps
    wanted = min(math.sqrt(12e-4 * size / ((1 + start.tilt) * steps)), size / 100)
    largest = max(float(np.max(loss)) for loss in law.losses)
    floor = max(math.sqrt(1e-14 * steps), size / 1e5, largest / 1e5)
    noisy = delta is not None and 2e-16 * steps > 1e-3 * size * start.tilt * delta
    if delta is not None and (wanted < floor / 2 or noisy):
        raise ValueError(
            f"epsilon near {size:.2g} after {steps} steps at delta={delta:g} is beyond pld's float64 grid; use 'tilted'"
        )
    return max(min(wanted, _COARSEST_GRID), floor)
