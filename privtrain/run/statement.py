"""The privacy statement, ``privacy.json``: what the trainer writes, verification makes again, and others read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Annotated, Any, Self

import pydantic

import privtrain
from privtrain.config import Config
from privtrain.config.publishing import TrackingSection
from privtrain.privacy.plan import PrivacyPlan, finite

SCHEMA = "privtrain/privacy/1"

#: SHA-256, or HMAC-SHA-256, in hex.
_Digest = Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(pydantic.BaseModel):
    """A part of the statement; unknown keys are kept, so that later versions may add some."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow", strict=True)


class ContributionBound(_Part):
    """How many records of one unit or user training may use.

    Attributes:
        records_per_unit_per_step: of one unit in one step, at most.
        selection: how they are chosen.
        records_per_user_in_training_set: of one user in all, at most; None without such a bound.
    """

    records_per_unit_per_step: int | None = None
    selection: str | None = None
    records_per_user_in_training_set: int | None = None


class Sampling(_Part):
    """How units enter a step: the sampling scheme's name and a unit's chance, with the scheme's other settings."""

    scheme: str
    sampling_prob: float | None


class AccountantAnswer(_Part):
    """One accountant's epsilon: certified bounds, ``None`` where infinite, and the version that computed them."""

    method: str
    kind: str
    lower: float | None = None
    upper: float | None
    version: str


class Ledger(_Part):
    """The ledger's head (hash of its last record) and its number of finished steps when the statement was written."""

    head: _Digest
    num_commits: int


class Mechanism(_Part):
    """What makes a step private.

    Attributes:
        kind: ``"gaussian"``.
        unit: what is sampled and clipped; None means the unit of the guarantee.
        noise_multiplier: standard deviation of the noise over the clipping norm.
        clipping_norm: largest norm of what a unit adds to a step's sum.
        clipping_style: how gradients are clipped.
        adaptive_clipping: settings, where the norm follows the data; None without.
        noised_metrics: settings, where metrics are released with noise; None without.
        expected_batch_size: units that a step is expected to draw; the sum is divided by it.
        strategy: how the noise of steps is correlated; None where each step has noise of its own.
    """

    kind: str
    unit: str | None = None
    noise_multiplier: float | None
    clipping_norm: float | None
    clipping_style: str | None
    adaptive_clipping: dict[str, Any] | None = None
    noised_metrics: dict[str, Any] | None = None
    expected_batch_size: float | None = None
    strategy: dict[str, Any] | None = None


class PrivacyStatement(_Part):
    """``privacy.json``, its keys in the order of the file.

    Attributes:
        private: whether the run claims its ε at all; if not, ``not_private_reasons`` says why.
        unit: who is protected: ``"user"`` or ``"example"``.
        num_steps: steps of the plan.
        steps_released: steps charged to the budget, abandoned ones included.
        steps_accounted: steps that ε is for: whole epochs, where the sampling scheme has epochs.
        steps_of_the_model: steps that the released model has behind it.
        epsilon: None where it is infinite.
        split_commitment: hiding commitment to who was trained on and who was held out.
        plan: the whole plan, from which verification derives the statement again.
        assumptions: what the guarantee rests on, in words.
        not_covered: what ε does not cover, in words.
    """

    schema_: str = pydantic.Field(alias="schema")
    private: bool
    not_private_reasons: list[str]
    unit: str
    neighboring_relation: str
    contribution_bound: ContributionBound | None
    user_accounting: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    sampling: Sampling
    mechanism: Mechanism
    num_steps: int
    steps_released: int
    steps_accounted: int | None = None
    steps_of_the_model: int | None = None
    epsilon: float | None = pydantic.Field(ge=0.0, allow_inf_nan=False)
    delta: float = pydantic.Field(ge=0.0, le=1.0, allow_inf_nan=False)
    accountants: list[AccountantAnswer]
    ledger: Ledger | None
    split_commitment: _Digest
    plan: dict[str, Any] | None = None
    plan_fingerprint: _Digest
    assumptions: list[str]
    not_covered: list[str]
    software: dict[str, Any] | None = None

    @pydantic.model_validator(mode="after")
    def _private_needs_epsilon(self) -> Self:
        if self.private and self.epsilon is None:
            raise ValueError("private is true and epsilon is null")
        return self

    @property
    def sampled_records_per_unit(self) -> int | None:
        """Records that are sampled one by one and together make a unit of the guarantee; 1 if the unit is sampled.

        None if the statement bounds them nowhere: then nothing can be said of the mechanism from the unit's view.
        """
        if self.mechanism.unit in (None, self.unit):
            return 1
        bound = self.contribution_bound
        return None if bound is None else bound.records_per_user_in_training_set

    @property
    def effective_epsilon(self) -> float:
        """The epsilon that the run stands by: infinity unless it claims to be private."""
        return self.epsilon if self.private and self.epsilon is not None else math.inf


ASSUMPTIONS = (
    "The keys in secret/ stay secret: whoever has them can redraw the sample and subtract the noise.",
    "The noise is exactly a Gaussian rounded to a public grid, over sums that are exact on a grid, so the last bits of "
    "what is released tell nothing (Mironov 2012). Its digits are ChaCha20's, keyed by HMAC-SHA-256 of a key from the "
    "operating system and the sum; both are assumed to look random. With dropout, so are "
    "torch's generators, which a key seeds.",
    "The plan (sampling probability, expected batch size, clipping norm, steps, delta) and the rest of the "
    "configuration were chosen without looking at the private records, or by what may be public of them: privtrain "
    "init and configure read the rounded number of users, a bound on lengths and the names of labels.",
)

_NO_TUNING = "Hyper-parameter search over this data, if there was any, is not included."


_RELATION_ASSUMPTION = {
    "add_or_remove_one": "Neighbouring data sets differ by all the records of one privacy unit, added or removed.",
    "zero_out": "Neighbouring data sets differ by all the records of one privacy unit, replaced by nothing: its place "
    "stays, and the number of places is public (zero-out).",
}


_UNIT_ASSUMPTION = {
    "user": ("The owner of a record is the value of the user column; a person with two ids counts as two users.",),
    "example": (
        "The unit is one record: a user with n records is protected only as far as group privacy over n reaches.",
    ),
}


def privacy_statement(
    config: Config, plan: PrivacyPlan, *, watched: Collection[str] = (), **facts: Any
) -> dict[str, Any]:
    """Return the statement of what is guaranteed, for ``privacy.json``.

    Args:
        config: says what is published.
        plan: the plan that was carried out.
        watched: mirrors (``"wandb"``, ``"tensorboard"``) that were shown rows while the run trained.
        facts: of the run, for :func:`statement_of`.
    """
    return statement_of(plan, not_covered=not_covered(config.tracking, watched), **facts)


def statement_of(
    plan: PrivacyPlan,
    *,
    not_covered: list[str],
    num_model_steps: int,
    num_charged: int,
    num_accounted: int,
    num_commits: int,
    ledger_head: str,
    split_commitment: str,
) -> dict[str, Any]:
    """Return the statement that follows from a plan and what happened; ``verify`` builds it again and compares.

    Args:
        plan: the plan that was carried out.
        not_covered: what ε does not cover, in words.
        num_model_steps: steps that the released model has behind it.
        num_charged: steps charged to the budget, abandoned ones included.
        num_accounted: the same, with every epoch of the sampling scheme that was begun counted whole; ε is for these.
        num_commits: steps that the ledger shows as finished.
        ledger_head: head of the ledger before its release record, which holds this statement's digest.
        split_commitment: hiding commitment to the split, as in the ledger.
    """
    epsilon, answer = plan.epsilon_after(num_accounted), plan.answer_after(num_accounted)
    statement = PrivacyStatement(
        schema=SCHEMA,
        private=not plan.not_private_reasons,
        not_private_reasons=list(plan.not_private_reasons),
        unit=plan.guaranteed_unit,
        neighboring_relation=plan.neighboring_relation,
        contribution_bound=ContributionBound(
            records_per_unit_per_step=plan.records_per_unit,
            selection=plan.selection,
            records_per_user_in_training_set=plan.records_per_user,
        ),
        user_accounting=_user_accounting(plan, num_accounted),
        tuning=None if plan.tuning is None else dataclasses.asdict(plan.tuning),
        sampling=Sampling(**plan.scheme.parameters()),
        mechanism=Mechanism(
            kind="gaussian",
            unit=plan.unit,
            noise_multiplier=plan.noise_multiplier,
            clipping_norm=plan.clipping_norm,
            clipping_style=plan.clipping_style,
            adaptive_clipping=_adaptive(plan),
            noised_metrics=_noised_metrics(plan),
            expected_batch_size=plan.expected_batch_size,
            strategy=_strategy(plan),
        ),
        num_steps=plan.num_steps,
        steps_released=num_charged,
        steps_accounted=num_accounted,
        steps_of_the_model=num_model_steps,
        epsilon=finite(epsilon),
        delta=plan.delta,
        accountants=[
            AccountantAnswer(
                method=plan.accountant,
                kind=answer.kind.value,
                lower=finite(answer.lower),
                upper=finite(epsilon),
                version=answer.version,
            )
        ],
        ledger=Ledger(head=ledger_head, num_commits=num_commits),
        split_commitment=split_commitment,
        plan=plan.body(),
        plan_fingerprint=plan.fingerprint(),
        assumptions=[
            _RELATION_ASSUMPTION[plan.neighboring_relation],
            *_UNIT_ASSUMPTION[plan.guaranteed_unit],
            *_bound_assumptions(plan),
            *ASSUMPTIONS,
            _tuning_assumption(plan),
            plan.scheme.assumption,
            *_strategy_assumption(plan),
        ],
        not_covered=not_covered,
        software={"privtrain": privtrain.__version__},
    )
    return statement.model_dump(by_alias=True)


def _user_accounting(plan: PrivacyPlan, num_accounted: int) -> dict[str, Any] | None:
    """Return how a guarantee for users follows from one for records; ``None`` where users are sampled themselves."""
    if not plan.user_accounting.how:
        return None
    record_epsilon = plan.unit_epsilon_after(num_accounted)
    return {
        "method": plan.user_accounting.name,
        "records_per_user": plan.records_per_user,
        "sampled_unit": plan.unit,
        "epsilon_of_one_record": finite(record_epsilon),
    }


def _bound_assumptions(plan: PrivacyPlan) -> list[str]:
    """Return sentences on the limit of records per user, if there is one, and on what follows from it."""
    sentences = []
    if plan.records_per_user is not None:
        sentences.append(
            f"No user has more than {plan.records_per_user} records in the training set; they are chosen by a function "
            f"of that user's records and of public things alone ({plan.selection.replace('_', ' ')})."
        )
    if plan.user_accounting.assumption:
        sentences.append(plan.user_accounting.assumption.format(k=plan.records_per_user))
        sentences.append("Records are sampled and clipped one by one; the noise is relative to one record's norm.")
    return sentences


def unit_text(plan: PrivacyPlan) -> str:
    """Return whom ε protects, in words."""
    how = plan.user_accounting.how
    if not how:
        return plan.unit
    return f"user, with at most {plan.records_per_user} records in the training set, by {how} over sampled records"


def _adaptive(plan: PrivacyPlan) -> dict[str, Any] | None:
    """Return the settings of adaptive clipping and what its privacy rests on; ``None`` without it.

    Every step releases two noised sums: the gradient, and the count of units within the clipping norm. The noise
    multiplier of the mechanism is that of both together; each by itself has more noise.
    """
    if plan.adaptive_clipping is None:
        return None
    return {
        **dataclasses.asdict(plan.adaptive_clipping),
        "count_sensitivity": 0.5,  # a unit adds between -1/2 (norm above the clipping norm) and 1/2 (within)
        "gradient_noise_multiplier": plan.gradient_noise_multiplier,  # the count's noise is among the settings
    }


def _noised_metrics(plan: PrivacyPlan) -> dict[str, Any] | None:
    """Return the metrics that were released with noise in every step, and their noise; ``None`` without any."""
    if plan.noised_metrics is None:
        return None
    return {
        **dataclasses.asdict(plan.noised_metrics),
        "sum_sensitivity": 0.5,  # a unit adds between -1/2 and 1/2 to each sum
        "gradient_noise_multiplier": plan.gradient_noise_multiplier,
        "noise_stddev": plan.metric_stddevs,
    }


def _strategy(plan: PrivacyPlan) -> dict[str, Any] | None:
    """Return how the noise of steps is correlated; ``None`` where each step has noise of its own."""
    if plan.strategy is None:
        return None
    return {
        "kind": "banded_toeplitz",
        "num_bands": plan.strategy.num_bands,
        "coefficients": list(plan.strategy.coefficients),
        "column_norm": plan.column_norm,
        "fresh_noise_multiplier": plan.fresh_noise_multiplier,
    }


def _tuning_assumption(plan: PrivacyPlan) -> str:
    """Return what the guarantee says of hyper-parameter search."""
    if plan.tuning is None:
        return _NO_TUNING
    return (
        "Hyper-parameter search by privtrain tune is included, and any other is not: a secret number of trials "
        f"({plan.tuning.distribution}, {plan.tuning.mean_trials:g} expected) with settings drawn at random, of which "
        "the best on public rows is released (Papernot and Steinke 2022, arXiv 2110.03620). How many there were stays "
        "secret, and so must how long they took; the others are never published."
    )


def _strategy_assumption(plan: PrivacyPlan) -> list[str]:
    """Return the sentence on noise that is correlated between steps; none where each step has noise of its own."""
    if plan.strategy is None:
        return []
    return [
        f"The noise of steps is correlated by a banded matrix with {plan.strategy.num_bands} bands. The noise "
        f"multiplier is relative to its column norm, {plan.column_norm:.6g}, times the clipping norm: what a unit "
        "moves in one round of the groups. Each round is one Gaussian release (Choquette-Choo et al. 2023, arXiv "
        "2306.08153, for zero-out; with coins of each unit's own, add-or-remove one is the same)."
    ]


NOT_COVERED: tuple[str, ...] = (
    "The attack report: aggregate results measured on private records, published without noise.",
    "What the base model knew before.",
    "Facts about a person that other people's records contain.",
)
"""What ε covers in no run, in words."""


def not_covered(tracking: TrackingSection, watched: Collection[str] = ()) -> list[str]:
    """Return what ε does not cover, in words.

    Args:
        tracking: says what is published.
        watched: as for :func:`privacy_statement`.
    """
    items = list(NOT_COVERED)
    if tracking.release_held_out_metrics:
        items.append("Perplexity on held-out users: published without noise (tracking.release_held_out_metrics).")
    items += _times_not_covered(tracking, watched)
    if tracking.system_metrics:
        items.append("Load of the machines, which varies with the sample drawn (tracking.system_metrics).")
    if tracking.private_metrics:
        items.append("Raw training loss, norms, clip fraction and batch sizes: published (tracking.private_metrics).")
    return items


def _times_not_covered(tracking: TrackingSection, watched: Collection[str]) -> list[str]:
    """Return the sentence on published times, if any: how long a step took depends on the records drawn for it."""
    if tracking.release_measurements:
        return [
            "Seconds, throughput and memory of every step, which vary with the sample drawn: published "
            "(tracking.release_measurements)."
        ]
    if watched:
        block = f"each block of {tracking.mirror_block_steps} steps"
        return [f"When training began, ended and was done with {block} (tracking.mirror_block_steps)."]
    return []
