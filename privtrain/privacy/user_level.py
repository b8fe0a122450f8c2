"""User-level guarantees where records are sampled and clipped one by one: ``privacy.user_accounting``.

No user has more than k records in the training set (:mod:`privtrain.data.selection`), so adding or removing a user adds
or removes at most k records. Two ways to say what that costs:

* :class:`Mixture`: each of the k records joins a step by a coin of its own, so a user moves the sum by a Binomial(k, q)
  number of clipped vectors; the worst case is a mixture of Gaussians (Charles et al. 2024, arXiv 2407.07737, theorem
  2), composed exactly. Needs the coins to be independent: Poisson sampling of records.
* :class:`Group`: the guarantee (ε₁, δ₁) for one record is (k ε₁, δ₁ (e^(k ε₁) - 1)/(e^ε₁ - 1)) for k (Vadhan 2017,
  lemma 2.2), with ε₁ chosen best. Knows nothing of the mechanism, and never gives less than the mixture.

Both are for a user added or removed with all records, under either neighbouring relation that Poisson sampling has.
:class:`Direct` is the plain case: ε protects what is sampled.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any, ClassVar

from typing_extensions import override

import accountants
from accountants.units import group_answer, group_epsilon, group_event, record_delta_of
from privtrain.config.schemes import USER_ACCOUNTING_RULES, UserAccountingName
from privtrain.privacy.sampling import Poisson, Scheme, relation_of

#: Improvements of a group ε that holds already; each takes one evaluation, and a handful settles four digits.
_NUM_REFINEMENTS = 6


@dataclasses.dataclass(frozen=True)
class Terms:
    """The δ, accountant and neighbouring relation under which an ε is certified."""

    delta: float
    accountant: str
    relation: str

    def epsilon(self, event: Any) -> accountants.PrivacyAnswer:
        """Return the accountant's answer for an event."""
        return accountants.epsilon(event, self.delta, accountant=self.accountant, relation=relation_of(self.relation))

    def certified(self, answer: accountants.PrivacyAnswer) -> float:
        """Return the upper bound that an answer certifies under these terms."""
        return accountants.certified_upper(answer, relation_of(self.relation))


@dataclasses.dataclass(frozen=True)
class UserAccounting(abc.ABC):
    """A method that derives a plan's ε from what is sampled and clipped.

    Attributes:
        records_per_user: k, the most records of a user in the whole training set; ``None`` for any number.
        name: as in ``privacy.user_accounting``.
        how: how a user's guarantee follows from one record's, in words; empty where ε is for the sampled unit itself.
        assumption: the sentence of the privacy statement about that, with a ``{k}`` for the number of records.
        epsilon_tolerance: relative difference that two computations of one ε may have.
        follows_from_event: whether ε is an accountant's answer for :meth:`event`, so that any accountant may be asked.
    """

    records_per_user: int | None

    name: ClassVar[UserAccountingName]
    how: ClassVar[str]
    assumption: ClassVar[str]
    epsilon_tolerance: ClassVar[float] = 1e-6  # between machines the last digits of an answer differ
    follows_from_event: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def num_sampled(self) -> int:
        """Number of sampled units that one protected unit may own."""

    @abc.abstractmethod
    def guaranteed_unit(self, sampled_unit: str) -> str:
        """Return the unit that ε protects, given the sampled unit."""

    def accountants_for(self, scheme: Scheme) -> tuple[str, ...]:
        """Return the names of the accountants that can certify ε under a scheme, the default one first."""
        rules = USER_ACCOUNTING_RULES[self.name]
        return scheme.accountants if rules is None else rules.accountants

    @abc.abstractmethod
    def event(self, scheme: Scheme, noise_multiplier: float, num_steps: int) -> Any:
        """Return the exact DP event of ``num_steps`` steps for one protected unit."""

    def noise_for(self, scheme: Scheme, num_steps: int, epsilon: float, terms: Terms) -> float:
        """Return the smallest noise multiplier with which ``epsilon`` is certified.

        Raises:
            CalibrationError: if there is none.
        """
        return accountants.calibrate_noise(
            lambda noise: self.event(scheme, noise, num_steps),
            target_epsilon=epsilon,
            target_delta=terms.delta,
            accountant=terms.accountant,
            relation=relation_of(terms.relation),
        )

    def answer(
        self, scheme: Scheme, noise_multiplier: float, num_steps: int, terms: Terms, *, known: float = math.inf
    ) -> accountants.PrivacyAnswer:
        """Return the ε of one protected unit after ``num_steps`` steps.

        Args:
            scheme: how records (or users) are sampled.
            noise_multiplier: noise standard deviation over the norm of one sampled unit.
            num_steps: steps to account for.
            terms: δ, accountant and relation.
            known: an ε that is known to hold, where that helps to find a better one.
        """
        del known
        return terms.epsilon(self.event(scheme, noise_multiplier, num_steps))

    def certifies(self, scheme: Scheme, noise_multiplier: float, num_steps: int, epsilon: float, terms: Terms) -> bool:
        """Return whether ``epsilon`` holds, however it was found.

        Only asked for an ε that is within ``epsilon_tolerance`` of :meth:`answer`'s; so true where that is round-off.
        """
        del scheme, noise_multiplier, num_steps, epsilon, terms
        return True


@dataclasses.dataclass(frozen=True)
class Direct(UserAccounting):
    """ε protects the sampled and clipped unit; a bound on records per user implies no further guarantee here."""

    records_per_user: int | None = None

    name = "none"
    how = ""
    assumption = ""

    @property
    @override
    def num_sampled(self) -> int:
        return 1

    @override
    def guaranteed_unit(self, sampled_unit: str) -> str:
        return sampled_unit

    @override
    def event(self, scheme: Scheme, noise_multiplier: float, num_steps: int) -> Any:
        return scheme.event_of_steps(noise_multiplier, num_steps)


@dataclasses.dataclass(frozen=True)
class Mixture(UserAccounting):
    """ε protects a user with at most k records, by the mixture of Gaussians that these records make of each step."""

    records_per_user: int

    def __post_init__(self) -> None:
        if type(self.records_per_user) is not int or self.records_per_user < 1:
            raise ValueError(f"records_per_user is {self.records_per_user!r}; must be a whole number, at least 1")

    name = "mixture"
    how = "a mixture of Gaussians"
    assumption = (
        "ε for a user is that of a mixture of Gaussians: of {k} records each joins a step by a coin of its own "
        "(Charles et al. 2024, arXiv 2407.07737)."
    )

    @property
    @override
    def num_sampled(self) -> int:
        return self.records_per_user

    @override
    def guaranteed_unit(self, sampled_unit: str) -> str:
        return "user"

    @override
    def event(self, scheme: Scheme, noise_multiplier: float, num_steps: int) -> Any:
        return mixture_event(scheme, noise_multiplier, num_steps, self.records_per_user)


@dataclasses.dataclass(frozen=True)
class Group(Mixture):
    """ε protects a user with at most k records, by black-box group privacy over the guarantee of one record.

    The event of a user is still the mixture's: it is what the mechanism does, whatever ε is claimed for it.
    """

    name = "group"
    how = "group privacy"
    assumption = (
        "ε for a user is black-box group privacy over {k} records of the guarantee for one record: (k ε, "
        "δ (e^kε - 1) / (e^ε - 1)) at its best point."
    )
    epsilon_tolerance = 0.02  # two paths to the best point end within this of one another
    follows_from_event = False

    @override
    def noise_for(self, scheme: Scheme, num_steps: int, epsilon: float, terms: Terms) -> float:
        """Return the noise with which one record has ε / k, at the δ with which k records have ``terms.delta``."""
        k = self.records_per_user
        record_delta = record_delta_of(epsilon / k, terms.delta, k)
        if record_delta == 0:
            raise accountants.CalibrationError(
                f"target_epsilon={epsilon:g} for {k} records needs a delta for one record that underflows; lower "
                "it, lower privacy.records_per_user, or use user_accounting: mixture"
            )
        of_record = dataclasses.replace(terms, delta=record_delta)
        return Direct().noise_for(scheme, num_steps, epsilon / k, of_record)

    @override
    def answer(
        self, scheme: Scheme, noise_multiplier: float, num_steps: int, terms: Terms, *, known: float = math.inf
    ) -> accountants.PrivacyAnswer:
        """Return k times a record's ε at the largest δ per record that the user's δ allows.

        The allowed δ per record, :func:`~accountants.units.record_delta_of`, is larger for a smaller ε. So an ε that
        holds is improved: take the record's δ for it, and k times the record's ε at that δ; then the same again.
        """
        event, k = scheme.event_of_steps(noise_multiplier, num_steps), self.records_per_user
        of_record = terms.epsilon(event)
        epsilon = known
        if math.isinf(of_record.upper):
            epsilon = math.inf  # one record has no bound, so k have none
        elif math.isinf(known):
            # The first ε is that of the group's conversion of a record's whole curve.
            judge = accountants.get_accountant(terms.accountant)
            of_group = group_epsilon(event, terms.delta, k, judge, relation=relation_of(terms.relation))
            epsilon = terms.certified(of_group)
        for _ in range(_NUM_REFINEMENTS):
            if math.isinf(epsilon):
                break
            record_delta = record_delta_of(epsilon / k, terms.delta, k)
            if record_delta == 0:  # too small for float64
                break
            # If ε holds then so does k times the record's ε at this δ: a smaller ε needs less of the user's δ.
            epsilon = min(epsilon, k * _record_epsilon(event, record_delta, terms))
        note, relation = f"group of {k}", relation_of(terms.relation)
        return group_answer(epsilon, terms.accountant, note, relation, of_record.version)

    @override
    def certifies(self, scheme: Scheme, noise_multiplier: float, num_steps: int, epsilon: float, terms: Terms) -> bool:
        """Return whether one record has at most ε / k, at the δ per record that the user's δ allows with this ε."""
        if math.isinf(epsilon):
            return True
        k = self.records_per_user
        record_delta = record_delta_of(epsilon / k, terms.delta, k)
        if record_delta == 0:
            return False
        event = scheme.event_of_steps(noise_multiplier, num_steps)
        # Round-off between machines moves the last digits of an answer.
        return k * _record_epsilon(event, record_delta, terms) <= epsilon * (1 + 1e-6)


def _record_epsilon(event: Any, record_delta: float, terms: Terms) -> float:
    """Return the certified ε of one record at a δ of its own."""
    return terms.certified(dataclasses.replace(terms, delta=record_delta).epsilon(event))


#: Every method by its name in ``privacy.user_accounting``.
USER_ACCOUNTING: dict[str, type[UserAccounting]] = {cls.name: cls for cls in (Direct, Mixture, Group)}


def mixture_event(scheme: Scheme, noise_multiplier: float, num_steps: int, num_records: int) -> Any:
    """Return the DP event of ``num_steps`` steps for a user with ``num_records`` records.

    Raises:
        ValueError: if the scheme is not Poisson sampling, whose coins are independent.
    """
    if not isinstance(scheme, Poisson):
        raise ValueError(f"a user's mixture is known for poisson sampling, not for {scheme.name}")
    if num_records == 1:
        return scheme.event_of_steps(noise_multiplier, num_steps)
    return group_event(
        noise_multiplier=noise_multiplier,
        sampling_prob=scheme.sampling_prob,
        num_steps=num_steps,
        num_records=num_records,
    )
