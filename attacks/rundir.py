"""What the attack job reads of a finished run: its privacy statement and the metrics that it released."""

from __future__ import annotations

import math
import pathlib
from typing import Self

import pydantic

from attacks.errors import AttackInputError
from privtrain.files import reading

STATEMENT_SCHEMA = "privtrain/privacy/1"
PERPLEXITY_KEY = "eval/held_out_perplexity"
STEP_SECONDS_KEY = "perf/step_seconds"

_MAX_STATEMENT_BYTES = 16 << 20


class _Part(pydantic.BaseModel):
    """Statements may gain keys; those named here must be there."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow", strict=True)


class ContributionBound(_Part):
    """How much of one user a step may hold."""

    records_per_unit_per_step: int | None = None
    selection: str | None = None
    records_per_user_in_training_set: int | None = None


class Sampling(_Part):
    """How units enter a step."""

    scheme: str
    sampling_prob: float | None


class AccountantAnswer(_Part):
    """One accountant's epsilon."""

    method: str
    kind: str
    upper: float | None
    version: str


class Ledger(_Part):
    """Where the contribution ledger stood when the statement was written."""

    head: str
    num_commits: int


class Mechanism(_Part):
    """What makes a step private; ``unit`` is what is sampled and clipped, the guarantee's own where it is not given."""

    kind: str
    unit: str | None = None
    noise_multiplier: float | None
    clipping_norm: float | None
    clipping_style: str | None
    expected_batch_size: float | None = None


class PrivacyStatement(_Part):
    """``privacy.json``, written by the trainer. ``epsilon`` is None where it is infinite."""

    schema_: str = pydantic.Field(alias="schema")
    private: bool
    not_private_reasons: list[str]
    unit: str
    neighboring_relation: str
    contribution_bound: ContributionBound | None
    sampling: Sampling
    mechanism: Mechanism
    num_steps: int
    steps_released: int
    steps_accounted: int | None = None
    epsilon: float | None = pydantic.Field(ge=0.0, allow_inf_nan=False)
    delta: float = pydantic.Field(ge=0.0, le=1.0, allow_inf_nan=False)
    accountants: list[AccountantAnswer]
    ledger: Ledger | None
    split_commitment: str = pydantic.Field(min_length=1)
    plan_fingerprint: str
    assumptions: list[str]
    not_covered: list[str]

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


def read_statement(run: pathlib.Path) -> PrivacyStatement:
    """Reads the privacy statement of a finished run.

    Args:
        run: the run directory.

    Returns:
        The statement.

    Raises:
        AttackInputError: if there is no such run, it has not finished, or the statement is of another form.
    """
    if not run.is_dir():
        raise AttackInputError(f"no run at {run}: expected a run directory; list yours with: ls {run.parent}")
    path = run / "privacy.json"
    if not path.exists() and not path.is_symlink():
        raise AttackInputError(
            f"{run} has no privacy.json: expected a finished training run; "
            "run next: the privtrain train command that began it"
        )
    found = reading.read_json(path, remedy="restore it", max_bytes=_MAX_STATEMENT_BYTES)
    try:
        statement = PrivacyStatement.model_validate(found)
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'statement'}: {fault['msg']}" for fault in error.errors()
        )
        raise AttackInputError(
            f"{path} is not a privacy statement ({faults}); expected {STATEMENT_SCHEMA!r}"
        ) from error
    if statement.schema_ != STATEMENT_SCHEMA:
        raise AttackInputError(f"{path} has schema {statement.schema_!r}; expected {STATEMENT_SCHEMA!r}")
    # After a new generation within an epoch fewer steps are released than planned; whole epochs are accounted.
    if max(statement.steps_released, statement.steps_accounted or 0) < statement.num_steps:
        raise AttackInputError(
            f"{run} released {statement.steps_released} of {statement.num_steps} steps: expected a finished run; "
            "run next: the privtrain train command that began it"
        )
    return statement


def held_out_perplexity(run: pathlib.Path) -> tuple[float, float] | None:
    """The held-out perplexity before and after training, if the run released it.

    Args:
        run: the run directory.

    Returns:
        The first and the last finite value in ``metrics.jsonl``, or None if fewer than two rows carry one.

    Raises:
        DamagedFile: if a line is not JSON, or holds something else than a number.
    """
    values = released_values(run, PERPLEXITY_KEY)
    return (values[0], values[-1]) if len(values) >= 2 else None


def training_seconds(run: pathlib.Path) -> float | None:
    """The time that the steps took, as the run released it.

    Args:
        run: the run directory.

    Returns:
        Seconds over all logged steps, or None if none was logged.
    """
    values = released_values(run, STEP_SECONDS_KEY)
    return sum(values) if values else None


def released_values(run: pathlib.Path, name: str) -> list[float]:
    """A metric as the run released it, in the order of ``metrics.jsonl``; lines without it are passed over.

    Raises:
        DamagedFile: naming the line, if one is not JSON, or holds something else than a finite number.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = reading.read_json_lines(path, remedy="restore it")
    values = [reading.finite_number(row, name, path, line=line) for line, row in rows]
    return [value for value in values if value is not None]
