"""What an accountant is: one question in, one labelled answer out, and the checks that all of them share.

A method derives from :class:`Accountant` and answers :meth:`Accountant.bounds`; one that works on the normal form of an
event (:mod:`accountants.mixtures`) derives from :class:`NormalFormAccountant` and never sees the trivial cases.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import abc
import dataclasses
import math
from typing import Literal

import dp_accounting
from typing_extensions import override

from accountants.answer import OWN_VERSION, Bounds, Direction, PrivacyAnswer, UnsupportedEventError
from accountants.events import resolve
from accountants.mixtures import Composition, composition
from accountants.validation import check_event

__all__ = ["Accountant", "NormalFormAccountant", "UnsupportedEventError", "check_delta", "check_epsilon"]

NeighboringRelation = dp_accounting.NeighboringRelation


@dataclasses.dataclass(frozen=True)
class Question:
    """What an accountant is asked.

    Attributes:
        quantity: what is wanted.
        event: what was released. An accountant's ``bounds`` gets it resolved (:func:`accountants.events.resolve`):
            without empty parts, and with shuffled batches replaced by one Gaussian release an epoch.
        argument: the delta at which epsilon is wanted, or the epsilon at which delta is.
        relation: the neighbouring relation.
    """

    quantity: Literal["epsilon", "delta"]
    event: dp_accounting.DpEvent
    argument: float
    relation: NeighboringRelation

    @property
    def largest(self) -> float:
        """The largest value of the quantity, which means no privacy at all."""
        return math.inf if self.quantity == "epsilon" else 1.0


class Accountant(abc.ABC):
    """A method of accounting. Instances hold numerical settings only; every call stands alone.

    Attributes:
        name: the name in the registry and in every answer's ``method``.
        version: library and version that computes.
        min_delta: the smallest delta that the method resolves.
        covers_replacement: whether ``REPLACE_ONE`` is covered beside add-or-remove-one and zero-out.
    """

    name: str
    version: str = OWN_VERSION
    min_delta: float = 0.0
    covers_replacement: bool = False

    def epsilon(
        self,
        event: dp_accounting.DpEvent,
        delta: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """Return the privacy parameter of ``event`` at ``delta``, for adaptive composition of its parts.

        Args:
            event: what was released.
            delta: in (0, 1), and at least ``min_delta``.
            relation: which data sets count as neighbours; the noise multipliers of all events are relative to the
                clipping norm C whatever the relation (under ``REPLACE_ONE`` the sum then moves by up to 2C).

        Returns:
            An answer about epsilon; infinite for a non-private event.

        Raises:
            ValueError: if ``delta`` is outside the range of the method, or the event is malformed.
            UnsupportedEventError: if the method has no analysis of the event under the relation.
        """
        check_delta(delta, self.min_delta, self.name)
        return self._answer(Question("epsilon", event, delta, relation))

    def delta(
        self,
        event: dp_accounting.DpEvent,
        epsilon: float,
        relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    ) -> PrivacyAnswer:
        """Return the counterpart of :meth:`epsilon`: delta at a given ``epsilon`` >= 0."""
        check_epsilon(epsilon)
        return self._answer(Question("delta", event, epsilon, relation))

    @abc.abstractmethod
    def bounds(self, question: Question) -> Bounds:
        """Compute the method's bounds; the question's event is already resolved for its neighbouring relation."""

    def _answer(self, question: Question) -> PrivacyAnswer:
        """Check the question, ask :meth:`bounds`, and label the result with method, version and relation."""
        if question.relation is NeighboringRelation.REPLACE_ONE and not self.covers_replacement:
            raise UnsupportedEventError(f"{self.name} does not cover REPLACE_ONE; use 'pld' or 'rdp'")
        check_event(question.event)
        bounds = self.bounds(dataclasses.replace(question, event=resolve(question.event, question.relation)))
        return PrivacyAnswer(
            quantity=question.quantity,
            lower=bounds.lower,
            estimate=bounds.best,
            upper=bounds.upper,
            kind=bounds.kind,
            method=self.name,
            version=self.version,
            direction=bounds.direction,
            relation=question.relation.name,
            note=bounds.note,
        )


class NormalFormAccountant(Accountant):
    """An accountant of compositions of Gaussian noise on sampled sums.

    A subclass sees the event's normal form: how often each kind of step was done (:mod:`accountants.mixtures`).
    """

    @override
    def bounds(self, question: Question) -> Bounds:
        """Answer trivial events exactly; pass all others to ``epsilon_bounds`` or ``delta_bounds``."""
        composed = composition(question.event)
        if composed.non_private or not composed.phases:
            return self.trivial_bounds(question.largest if composed.non_private else 0.0)
        if question.quantity == "epsilon":
            return self.epsilon_bounds(composed, question.argument)
        return self.delta_bounds(composed, question.argument)

    def trivial_bounds(self, value: float) -> Bounds:
        """Return exact bounds, for events that release nothing or add no noise."""
        return Bounds(value, value, Direction.BOTH, value)

    @abc.abstractmethod
    def epsilon_bounds(self, composed: Composition, delta: float) -> Bounds:
        """Bound epsilon at ``delta`` for at least one step, all of them with noise."""

    @abc.abstractmethod
    def delta_bounds(self, composed: Composition, epsilon: float) -> Bounds:
        """Bound delta at ``epsilon`` for at least one step, all of them with noise."""


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
