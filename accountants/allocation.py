"""Random allocation (balls-and-bins): certified ends from Feldman and Shenfeld's library.

Feldman and Shenfeld 2025 (arXiv 2502.08202), 2026 (arXiv 2602.17284); the ``PLD_accounting`` package (optional: ``pip
install PLD_accounting``). For add-or-remove-one and zero-out; both directions. Takes seconds to minutes.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import dp_accounting

from accountants.answer import BoundKind, PrivacyAnswer
from accountants.events import RandomAllocationDpEvent
from accountants.protocol import UnsupportedEventError, check_delta, check_epsilon, check_plain_relation

NeighboringRelation = dp_accounting.NeighboringRelation

#: Below this delta float64 round-off in the library's convolutions is not negligible.
MIN_DELTA = 1e-11


class AllocationAccountant:
    """The accountant for :class:`accountants.events.RandomAllocationDpEvent`, and for nothing else."""

    name = "allocation"

    def epsilon(
        self,
        event: dp_accounting.DpEvent,
        delta: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; delta in [1e-11, 1)."""
        check_delta(delta, MIN_DELTA, self.name)
        check_plain_relation(self.name, relation)
        upper, lower = _library().gaussian_allocation_epsilon_range(delta=delta, **_arguments(event))
        return _answer("epsilon", float(lower), float(upper), relation)

    def delta(
        self,
        event: dp_accounting.DpEvent,
        epsilon: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """See :class:`accountants.protocol.Accountant`; the upper end is never below 1e-11."""
        check_epsilon(epsilon)
        check_plain_relation(self.name, relation)
        upper, lower = _library().gaussian_allocation_delta_range(epsilon=epsilon, **_arguments(event))
        return _answer("delta", float(lower), min(max(float(upper), MIN_DELTA), 1.0), relation)


def _library() -> Any:
    try:
        return importlib.import_module("PLD_accounting")
    except ModuleNotFoundError as error:
        raise UnsupportedEventError("random allocation needs the optional package PLD_accounting") from error


def _arguments(event: dp_accounting.DpEvent) -> dict[str, Any]:
    if not isinstance(event, RandomAllocationDpEvent) or event.noise_multiplier <= 0:
        raise UnsupportedEventError(f"allocation covers RandomAllocationDpEvent with noise only, not {event}")
    return {
        "sigma": event.noise_multiplier,
        "num_steps": event.num_steps,
        "num_selected": event.num_selected,
        "num_epochs": event.num_epochs,
    }


def _answer(quantity: str, lower: float, upper: float, relation: NeighboringRelation) -> PrivacyAnswer:
    version = f"PLD_accounting {importlib.metadata.version('PLD_accounting')}"
    lower = min(max(lower, 0.0), upper)
    middle = (lower + upper) / 2
    kind = BoundKind.CERTIFIED_UPPER
    return PrivacyAnswer(quantity, lower, middle, upper, kind, "allocation", version, relation=relation.name)
