"""One call per question: epsilon, delta, or a certified number alone."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dp_accounting

from accountants.answer import PrivacyAnswer
from accountants.registry import fitting, get_accountant

NeighboringRelation = dp_accounting.NeighboringRelation


def epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    *,
    accountant: str | None = None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> PrivacyAnswer:
    """Return epsilon of an event at ``delta``, by one accountant.

    Args:
        event: what was released.
        delta: in (0, 1); each accountant refuses what it cannot resolve.
        accountant: a name of :data:`accountants.registry.ACCOUNTANTS`; by default the one that fits the event's
            sampler and the relation (:func:`accountants.registry.fitting`). The answer says which it was.
        relation: the neighbouring relation.

    Returns:
        An interval with the kind of its ends.

    Raises:
        ValueError: if the accountant does not exist, or an argument is outside its range.
        UnsupportedEventError: if the accountant has no analysis of the event under the relation.
    """
    return get_accountant(accountant or fitting(event, relation.name)[0]).epsilon(event, delta, relation)


def delta(
    event: dp_accounting.DpEvent,
    epsilon: float,
    *,
    accountant: str | None = None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> PrivacyAnswer:
    """Return delta of an event at ``epsilon`` >= 0.

    The other arguments, the answer and the errors are those of :func:`epsilon`.
    """
    return get_accountant(accountant or fitting(event, relation.name)[0]).delta(event, epsilon, relation)


def certified_upper(
    answer: PrivacyAnswer, relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE
) -> float:
    """Return the number that a guarantee under ``relation`` may be built on; see :meth:`PrivacyAnswer.certified_upper`.

    Raises:
        NotCertifiedError: if the answer is no certified upper bound, covers one direction only, or is about another
            relation.
    """
    return answer.certified_upper(relation.name)
