"""What an attack's result says about the run's claim: one rule, stated once, applied to every statistic.

A claim is the privacy guarantee that the run's statement makes. It caps how well any attack can separate held-in users
(trained on) from held-out ones. A result above the cap falsifies the claim.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from attacks.analysis import statistics
from privtrain.privacy.sampling import RELATIONS, Poisson, Scheme, relation_of, scheme_from_statement
from privtrain.privacy.user_level import mixture_event
from privtrain.run.statement import PrivacyStatement

if TYPE_CHECKING:
    import dp_accounting

ATTACKED_UNIT = "user"
"""User inference accuses users; a guarantee in another unit does not answer it."""

_VACUOUS_AUROC = 0.999
"""A cap above this excludes no attack that could be seen."""

# Epsilons at which the privacy curve is tabulated, as shares of the largest; the small ones decide the middle of the
# ROC, and with it the area.
_CURVE_SHARES = (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
# Random allocation: two seconds a point at this grid width, minutes at a finer one; certified at any.
_ALLOCATION_SHARES = (1 / 8, 1 / 4, 1 / 2, 1.0)
_ALLOCATION_GRID = 0.2


class Verdict(enum.StrEnum):
    """What a result says about the claim; :func:`judge` has the rule for each.

    ``FALSIFIED``: more leaked than the claim allows. ``CONSISTENT``: the result could have shown that and did not.
    ``UNINFORMATIVE``: no result on this sample could have shown it. ``CONFOUNDED``: the sides differ even without a
    model. ``NO_CLAIM``: the run is not private.
    """

    FALSIFIED = "falsified"
    CONSISTENT = "consistent"
    UNINFORMATIVE = "uninformative"
    CONFOUNDED = "confounded"
    NO_CLAIM = "no claim"


@dataclasses.dataclass(frozen=True)
class Cap:
    """What the run's guarantee allows an attack on users.

    Attributes:
        bound: the guarantee for a user, (epsilon, delta), or None if the run gives none for users.
        reason: why there is no bound or why the bound is vacuous; empty if it limits what an attack can show.
        curve: the whole trade-off curve of the same mechanism, where it can be had; tighter than one pair.
        conversion: how a guarantee for records became one for users; empty where none was needed.
    """

    bound: statistics.DpBound | None
    reason: str
    curve: statistics.CurveBound | None = None
    conversion: str = ""

    @classmethod
    def of(cls, statement: PrivacyStatement, records_per_user: int = 0) -> Cap:
        """Return the cap that follows from a privacy statement.

        Args:
            statement: of the attacked run.
            records_per_user: the most training records of one user, counted in the data; read only if the guarantee is
                per record; 0 if unknown.
        """
        if math.isinf(statement.effective_epsilon):
            return cls(statistics.DpBound(math.inf, statement.delta), "the run is not private, so it caps nothing")
        bound = statistics.DpBound(statement.effective_epsilon, statement.delta)
        if statement.unit == ATTACKED_UNIT:
            return cls(bound, "", curve=_curve(statement))
        # The guarantee protects a record, so a user's is that of k records. k is the stated limit of records per user
        # (0: none stated) or the number counted in the data, whichever is less.
        stated = statement.contribution_bound
        limit = 0 if stated is None else stated.records_per_user_in_training_set or 0
        is_of_chunks = stated is not None and stated.selection == "random_chunk"
        if is_of_chunks:  # a record may be cut into many chunks: the count of records says nothing of these
            num_records = limit
        elif limit:
            num_records = min(limit, records_per_user)
        else:
            num_records = records_per_user
        return cls._of_records(statement.unit, bound, num_records)

    @classmethod
    def _of_records(cls, unit: str, bound: statistics.DpBound, records_per_user: int) -> Cap:
        """Return the cap by group privacy over the k = ``records_per_user`` records of a user (0: unknown, so no cap).

        It is (k ε, δ (e^kε - 1) / (e^ε - 1)), never (k ε, k δ).
        """
        from accountants.units import group_delta_of

        accused = f"epsilon protects one {unit} and the attack accuses a {ATTACKED_UNIT}: through group privacy over "
        if not records_per_user:
            return cls(None, f"{accused}all records of a user the cap is vacuous")
        epsilon, delta = group_delta_of(bound.epsilon, bound.delta, records_per_user)
        grouped = statistics.DpBound(epsilon, min(delta, 1.0))
        said = f"{accused}up to {records_per_user} records it becomes ε = {epsilon:.4g}, δ = {delta:.2g}"
        if grouped.max_auroc() > _VACUOUS_AUROC:
            return cls(None, f"{said}, and that cap is vacuous", conversion=said)
        return cls(grouped, "", conversion=said)

    @property
    def claims_nothing(self) -> bool:
        """Whether the run is not private."""
        return self.bound is not None and math.isinf(self.bound.epsilon)

    def auroc(self, num_held_out: int) -> float | None:
        """Return the cap on the sample's expected AUROC, the lower of pair and curve; None without a bound."""
        return min((statistics.auroc_cap(bound, num_held_out) for bound in self._bounds), default=None)

    def tpr(self, num_false_positives_allowed: int, num_held_out: int) -> float | None:
        """Return the cap on the sample's expected true positive rate, the lower of pair and curve; None without any.

        Args:
            num_false_positives_allowed: held-out users that may score above the threshold.
            num_held_out: held-out users.
        """
        caps = (statistics.tpr_cap(bound, num_false_positives_allowed, num_held_out) for bound in self._bounds)
        return min(caps, default=None)

    @property
    def _bounds(self) -> list[statistics.Bound]:
        """The pair and the curve, those of them that there are."""
        return [bound for bound in (self.bound, self.curve) if bound is not None]


def epsilon_at(statement: PrivacyStatement, delta: float) -> float | None:
    """Return the epsilon that the stated mechanism certifies for users at another delta; None where none can be.

    Args:
        statement: of the run.
        delta: below the stated one.
    """
    stated = _mechanism(statement) if statement.unit == ATTACKED_UNIT else None
    if stated is None:
        return None
    relation = statement.neighboring_relation
    event = _event(stated.scheme, relation, stated.noise_multiplier, stated.num_steps, stated.num_records)
    if event is None:
        return None
    import accountants

    asked = relation_of(relation)
    for name in _accountants(stated.scheme, stated.num_records):  # the first that can resolve the event answers
        try:
            answer = accountants.epsilon(event, delta, accountant=name, relation=asked)
            return accountants.certified_upper(answer, asked)
        except (ValueError, ImportError):
            continue
    return None


def _curve(statement: PrivacyStatement) -> statistics.CurveBound | None:
    """Return the privacy curve of the stated mechanism, or None where none can be certified from the statement."""
    stated = _mechanism(statement)
    if stated is None:
        return None
    return _tabulate(
        scheme=stated.scheme,
        relation=statement.neighboring_relation,
        noise_multiplier=stated.noise_multiplier,
        num_steps=stated.num_steps,
        largest_epsilon=max(1.0, statement.effective_epsilon),
        num_records=stated.num_records,
    )


class _Mechanism(NamedTuple):
    """A stated mechanism as the accountants need it."""

    scheme: Scheme  # how units are sampled for a step
    noise_multiplier: float
    num_steps: int  # that are charged
    num_records: int  # of a unit, that are sampled apart; 1 if the unit itself is sampled


def _mechanism(statement: PrivacyStatement) -> _Mechanism | None:
    """Return the stated mechanism; None if the statement lacks a part of it, or it is not the Gaussian one."""
    noise_multiplier, num_steps = statement.mechanism.noise_multiplier, _charged_steps(statement)
    num_records = statement.sampled_records_per_unit
    if statement.tuning is not None:
        return None  # the best of several runs is no single mechanism: the stated pair stands alone
    if statement.mechanism.kind != "gaussian" or not noise_multiplier or not num_steps or not num_records:
        return None
    scheme = scheme_from_statement(statement.sampling.model_dump())
    if statement.neighboring_relation not in RELATIONS or scheme is None:
        return None
    return _Mechanism(scheme, noise_multiplier, num_steps, num_records)


def _charged_steps(statement: PrivacyStatement) -> int:
    """Return the steps that epsilon is for: rounded up to whole epochs, where the scheme has epochs."""
    return statement.steps_accounted or statement.steps_released


@functools.cache
def _tabulate(
    scheme: Scheme, relation: str, noise_multiplier: float, num_steps: int, largest_epsilon: float, num_records: int = 1
) -> statistics.CurveBound | None:
    """Return certified points of the mechanism's privacy curve; None where no accountant can resolve the event.

    Args:
        scheme: how units are sampled for a step.
        relation: the neighbouring relation, as the statement spells it.
        noise_multiplier: noise over the clipping norm.
        num_steps: steps that are charged.
        largest_epsilon: up to which epsilon the curve is tabulated.
        num_records: records of a unit that are sampled apart.
    """
    event = _event(scheme, relation, noise_multiplier, num_steps, num_records)
    if event is None:
        return None
    for name in _accountants(scheme, num_records):
        try:
            shares = _ALLOCATION_SHARES if name == "allocation" else _CURVE_SHARES
            points = [_point(event, share * largest_epsilon, name, relation) for share in shares]
        except (ValueError, ImportError):
            # The stated pair stands alone in the end; a cap is never made of what is not certified.
            continue
        return statistics.CurveBound(tuple(points), name)
    return None


def _accountants(scheme: Scheme, num_records: int) -> list[str]:
    """Return the scheme's accountants in the order to ask them.

    For users of several records ``tilted`` comes first: ``pld`` takes many seconds where ``tilted`` takes none.
    """
    names = list(scheme.accountants)
    if num_records > 1 and "tilted" in names:
        names.remove("tilted")
        names.insert(0, "tilted")
    return names


def _event(
    scheme: Scheme, relation: str, noise_multiplier: float, num_steps: int, num_records: int
) -> dp_accounting.DpEvent | None:
    """Return the mechanism as an event for accountants, as it treats a unit of ``num_records`` records.

    None for several records where no accounting of them is known.

    Args:
        scheme: how units are sampled for a step.
        relation: the neighbouring relation, as the statement spells it.
        noise_multiplier: noise over the clipping norm.
        num_steps: steps that are charged.
        num_records: records of a unit that are sampled apart; 1 if the unit itself is sampled.
    """
    if num_records == 1:
        return scheme.event_of_steps(noise_multiplier, num_steps)
    if isinstance(scheme, Poisson) and relation == "add_or_remove_one":
        # A user whose records are sampled apart: a mixture of Gaussians, known for Poisson sampling alone.
        return mixture_event(scheme, noise_multiplier, num_steps, num_records)
    return None


def _point(event: dp_accounting.DpEvent, epsilon: float, accountant: str, relation: str) -> statistics.DpBound:
    """Return the point (epsilon, certified delta) of an event's privacy curve, by one accountant."""
    import accountants
    from accountants.methods.allocation import AllocationAccountant

    asked = relation_of(relation)
    if accountant == "allocation":
        exact = AllocationAccountant(_ALLOCATION_GRID / epsilon, with_lower=False)
        answer = exact.delta(event, epsilon, relation=asked)
    else:
        answer = accountants.delta(event, epsilon, accountant=accountant, relation=asked)
    return statistics.DpBound(epsilon, min(1.0, accountants.certified_upper(answer, asked)))


def judge(
    cap: Cap,
    auroc_interval: statistics.Interval,
    num_held_in: int,
    num_held_out: int,
    *,
    is_constant: bool,
    confounded_by: str = "",
    level: float = statistics.CONFIDENCE_LEVEL,
) -> tuple[Verdict, str]:
    """Return the verdict on one statistic and the sentence that explains it.

    ``confounded`` if a blind baseline tells the sides apart: nothing that the model shows can then be told from what
    the split shows. ``falsified`` if the interval's lower end exceeds the cap. ``uninformative`` if that could not have
    happened: no cap, a statistic without any spread, or a ceiling whose own lower end does not exceed the cap.
    ``no claim`` if the run is not private: nothing is claimed that the result could speak of, whatever was achieved.
    ``consistent`` otherwise: the sample could have contradicted the claim and did not.
    """
    if confounded_by:
        return Verdict.CONFOUNDED, confounded_by
    if cap.claims_nothing:
        return Verdict.NO_CLAIM, cap.reason
    allowed = cap.auroc(num_held_out)
    if allowed is None or cap.reason:
        return Verdict.UNINFORMATIVE, cap.reason
    if is_constant:
        return Verdict.UNINFORMATIVE, "all users have the same value: was the base model scored against itself?"
    ceiling = statistics.perfect_separation(num_held_in, num_held_out, level)
    if auroc_interval.lower > allowed:
        return Verdict.FALSIFIED, (
            f"the interval's lower end {auroc_interval.lower:.4f} exceeds the {allowed:.4f} that the claim allows: "
            "look for a broken split or a broken mechanism before anything is released"
        )
    if ceiling.lower <= allowed:
        return Verdict.UNINFORMATIVE, (
            f"with {num_held_in} + {num_held_out} users even perfect separation would prove no more than an AUROC of "
            f"{ceiling.lower:.4f}, and the claim allows {allowed:.4f}: this sample could not have contradicted it"
        )
    return Verdict.CONSISTENT, (
        f"this sample could have shown an AUROC above the {allowed:.4f} that the claim allows and did not; "
        "that does not prove the claim"
    )


def combine(headline: tuple[Verdict, str], audits: Sequence[tuple[Verdict, str]]) -> tuple[Verdict, str]:
    """Return the run's verdict with its reason: the headline's, unless an audit falsifies the claim.

    Where the split is confounded, the audit of the split's users says so itself; that of canaries is not concerned.
    A true claim is called falsified with probability at most .025 by the headline and .05 by all audits together.
    """
    of_headline, _ = headline
    if of_headline is Verdict.FALSIFIED:
        return headline
    for of_audit, reason in audits:
        if of_audit is Verdict.FALSIFIED:
            return of_audit, reason
    return headline
