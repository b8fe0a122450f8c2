"""The privacy-loss-distribution accountant: Google's library behind our answer type.

Koskela, Jälkö, Honkela 2020 (arXiv 1906.03049); Doroshenko et al. 2022 (arXiv 2207.04380) for the pessimistic
discretisation that makes the upper end certified.
"""

from __future__ import annotations

import importlib.metadata
import math

import dp_accounting
from dp_accounting import pld

from accountants.answer import BoundKind, PrivacyAnswer

#: Below this δ the float64 round-off of the library's convolutions is of the size of δ itself, and its "pessimistic"
#: value can fall below the truth; we refuse rather than print it.
MIN_DELTA = 1e-11

_VERSION = f"dp-accounting {importlib.metadata.version('dp-accounting')}"


def _compose(event: dp_accounting.DpEvent, discretization: float) -> pld.PLDAccountant:
    accountant = pld.PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=discretization
    )
    accountant.compose(event)
    return accountant


def _answer(quantity: str, value: float) -> PrivacyAnswer:
    return PrivacyAnswer(quantity, 0.0, value, value, BoundKind.CERTIFIED_UPPER, "pld", _VERSION)


def pld_epsilon(event: dp_accounting.DpEvent, delta: float, *, discretization: float = 1e-4) -> PrivacyAnswer:
    """ε of an event at ``delta`` under add-or-remove-one, both directions, as a certified upper bound.

    Args:
        event: what was released.
        delta: in [1e-11, 1).
        discretization: grid width of the privacy loss; a finer grid is tighter and slower.

    Returns:
        An answer of kind ``CERTIFIED_UPPER``; infinite for a non-private event.

    Raises:
        ValueError: if ``delta`` is outside its range.
        dp_accounting.UnsupportedEventError: if the library cannot account for the event.
    """
    if not MIN_DELTA <= delta < 1:
        raise ValueError(f"delta={delta} must lie in [{MIN_DELTA}, 1) for the PLD accountant")
    if isinstance(event, dp_accounting.NoOpDpEvent):
        return _answer("epsilon", 0.0)
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return _answer("epsilon", math.inf)
    return _answer("epsilon", float(_compose(event, discretization).get_epsilon(delta)))


def pld_delta(event: dp_accounting.DpEvent, epsilon: float, *, discretization: float = 1e-4) -> PrivacyAnswer:
    """δ of an event at ``epsilon``: the counterpart of :func:`pld_epsilon`, never reported below the float floor."""
    if epsilon < 0:
        raise ValueError(f"epsilon={epsilon} must not be negative")
    if isinstance(event, dp_accounting.NoOpDpEvent):
        return _answer("delta", 0.0)
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return _answer("delta", 1.0)
    value = float(_compose(event, discretization).get_delta(epsilon))
    return _answer("delta", min(1.0, max(value, MIN_DELTA)))
