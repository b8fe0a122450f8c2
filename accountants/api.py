"""One call per question: epsilon, delta, or a certified number alone."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dp_accounting

from accountants.answer import Direction, NotCertifiedError, PrivacyAnswer
from accountants.registry import DEFAULT, get_accountant

NeighboringRelation = dp_accounting.NeighboringRelation


def epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    accountant: str = DEFAULT,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> PrivacyAnswer:
    """Epsilon of an event at ``delta``, by one accountant.

    Args:
        event: what was released.
        delta: in (0, 1); each accountant refuses what it cannot resolve.
        accountant: a name of :data:`accountants.registry.ACCOUNTANTS`.
        relation: the neighbouring relation.

    Returns:
        An interval with the kind of its ends.

    Raises:
        ValueError: if the accountant does not exist, or an argument is outside its range.
        UnsupportedEventError: if the accountant has no analysis of the event under the relation.
    """
    return get_accountant(accountant).epsilon(event, delta, relation)


def delta(
    event: dp_accounting.DpEvent,
    epsilon: float,
    *,
    accountant: str = DEFAULT,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> PrivacyAnswer:
    """Delta of an event at ``epsilon``: the counterpart of :func:`epsilon`."""
    return get_accountant(accountant).delta(event, epsilon, relation)


def certified_upper(answer: PrivacyAnswer) -> float:
    """The number that a guarantee may be built on.

    Raises:
        NotCertifiedError: if the answer is no certified upper bound, or covers one direction only.
    """
    value = answer.certified_upper()
    if answer.direction is not Direction.BOTH:
        raise NotCertifiedError(f"{answer.method} covers the {answer.direction.value} direction only")
    return value
