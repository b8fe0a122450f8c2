"""Random allocation (balls-and-bins): certified bounds from Feldman and Shenfeld's library.

Feldman and Shenfeld 2025 (arXiv 2502.08202), 2026 (arXiv 2602.17284); the ``PLD_accounting`` package (optional: ``pip
install PLD_accounting``). For add-or-remove-one and zero-out; both directions. Takes seconds to minutes. The
lower end is 0 unless a unit joins one step of an epoch or all of them.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import dp_accounting
from typing_extensions import override

from accountants.answer import Bounds
from accountants.events import RandomAllocationDpEvent, poisson_counterpart
from accountants.methods.tilted import TiltedAccountant
from accountants.protocol import Accountant, Question, UnsupportedEventError

#: Limits of the grid width: beyond them the bounds say little, or take hours.
_FINEST, _COARSEST = 1e-3, 0.3


class AllocationAccountant(Accountant):
    """The accountant for :class:`accountants.events.RandomAllocationDpEvent`, and for nothing else.

    Attributes:
        accuracy: grid width of the losses relative to epsilon. The ends are certified at every width; half of it costs
            four times the time and moves them together by about half.
        with_lower: whether to compute the lower end, which takes as long as the upper one; it is 0
            in any case unless a unit joins one step of an epoch or all of them.
    """

    name = "allocation"
    #: Below this delta float64 round-off in the library's convolutions is not negligible.
    min_delta = 1e-11

    def __init__(self, accuracy: float = 0.03, *, with_lower: bool = True) -> None:
        self.accuracy, self.with_lower = accuracy, with_lower

    @property
    def version(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Library and version."""
        return f"PLD_accounting {importlib.metadata.version('PLD_accounting')}"

    @override
    def bounds(self, question: Question) -> Bounds:
        """Return the library's bounds; an upper end of delta is never below 1e-11, where round-off begins."""
        event = question.event
        if isinstance(event, dp_accounting.NoOpDpEvent):
            return Bounds(0.0, 0.0)
        if isinstance(event, dp_accounting.NonPrivateDpEvent):
            return Bounds(question.largest, question.largest)
        if not isinstance(event, RandomAllocationDpEvent):
            raise UnsupportedEventError(f"allocation covers RandomAllocationDpEvent only, not {type(event).__name__}")
        upper = self._bound(question, event, "DOMINATES")
        if question.quantity == "delta":
            upper = min(max(upper, self.min_delta), 1.0)
        # For other numbers of steps the library's lower end lies above simulated values: it is no bound.
        has_lower = self.with_lower and event.num_selected in (1, event.num_steps)
        lower = self._bound(question, event, "IS_DOMINATED") if has_lower else 0.0
        return Bounds(min(max(lower, 0.0), upper), upper, estimate=None if has_lower else upper)

    def _bound(self, question: Question, event: RandomAllocationDpEvent, kind: str) -> float:
        """Return the library's upper (``kind`` ``DOMINATES``) or lower (``IS_DOMINATED``) bound on the quantity."""
        library = _library()
        # `rough_epsilon` sizes the grid of losses; so much probability may be cut off its ends: `tail_mass`.
        if question.quantity == "epsilon":
            given = {"delta": question.argument}
            rough_epsilon, tail_mass = _poisson_epsilon(event, question.argument), question.argument / 100
        else:
            given = {"epsilon": max(question.argument, 1e-12)}  # the library wants it positive
            rough_epsilon, tail_mass = question.argument, 1e-12
        config = library.AllocationSchemeConfig(
            loss_discretization=min(max(self.accuracy * rough_epsilon, _FINEST), _COARSEST),
            tail_truncation=tail_mass,
        )
        params = library.PrivacyParams(
            sigma=event.noise_multiplier,
            num_steps=event.num_steps,
            num_selected=event.num_selected,
            num_epochs=event.num_epochs,
            **given,
        )
        ask = getattr(library, f"gaussian_allocation_{question.quantity}_configurable")
        return float(ask(params=params, config=config, bound_type=library.BoundType[kind]))


def _poisson_epsilon(event: RandomAllocationDpEvent, delta: float) -> float:
    """Return the epsilon of Poisson sampling at the same rate: a guess at the size of the answer."""
    poisson = poisson_counterpart(event)
    return TiltedAccountant(tolerance=5e-2).epsilon(poisson, delta).upper


def _library() -> Any:
    """Import PLD_accounting when it is first needed."""
    try:
        return importlib.import_module("PLD_accounting")
    except ModuleNotFoundError as error:
        raise UnsupportedEventError(
            "random allocation needs the optional package PLD_accounting: pip install 'privtrain[allocation]'"
        ) from error
