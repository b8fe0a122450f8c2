"""What an accountant is, and the checks that all of them share."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from accountants.answer import PrivacyAnswer

if TYPE_CHECKING:
    import dp_accounting


class UnsupportedEventError(ValueError):
    """An accountant was given an event, or a neighbouring relation, that it cannot bound."""


class Accountant(Protocol):
    """A method of accounting. Instances hold numerical settings only; every call stands alone.

    Attributes:
        name: the name in the registry and in every answer's ``method``.
    """

    @property
    def name(self) -> str:
        """The name in the registry and in every answer's ``method``."""
        ...

    def epsilon(
        self, event: dp_accounting.DpEvent, delta: float, relation: dp_accounting.NeighboringRelation = ...
    ) -> PrivacyAnswer:
        """The privacy parameter of ``event`` at ``delta``, for adaptive composition of its parts.

        Args:
            event: what was released.
            delta: in (0, 1).
            relation: which data sets count as neighbours; the noise multipliers of all events are relative to the
                clipping
                norm C whatever the relation (under ``REPLACE_ONE`` the sum then moves by up to 2C).

        Returns:
            An answer about epsilon; infinite for a non-private event.

        Raises:
            ValueError: if ``delta`` is outside the range of the method.
            UnsupportedEventError: if the method has no analysis of the event under the relation.
        """
        ...

    def delta(
        self, event: dp_accounting.DpEvent, epsilon: float, relation: dp_accounting.NeighboringRelation = ...
    ) -> PrivacyAnswer:
        """The counterpart of :meth:`epsilon`: delta at a given ``epsilon`` >= 0."""
        ...


def check_delta(delta: float, smallest: float = 0.0, method: str = "") -> None:
    """Refuse a delta outside (0, 1), or below what a method can resolve.

    Raises:
        ValueError: with the range.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta={delta} must lie in (0, 1)")
    if delta < smallest:
        raise ValueError(
            f"delta={delta} is below {smallest:g}, where round-off makes {method} unsound; use 'tilted' or 'rdp'"
        )


def check_epsilon(epsilon: float) -> None:
    """Refuse an epsilon that is negative or not a number.

    Raises:
        ValueError: with the range.
    """
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon={epsilon} must be finite and not negative")


def check_plain_relation(method: str, relation: dp_accounting.NeighboringRelation) -> None:
    """Refuse ``REPLACE_ONE`` for a method that covers add-or-remove-one and zero-out only.

    Raises:
        UnsupportedEventError: if the relation is ``REPLACE_ONE``.
    """
    if relation.name == "REPLACE_ONE":
        raise UnsupportedEventError(f"{method} does not cover REPLACE_ONE; use 'pld' or 'rdp'")
