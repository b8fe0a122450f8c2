"""What the attack job reads of a finished run: its privacy statement and the metrics that it released."""

from __future__ import annotations

import pathlib

import pydantic

from attacks.errors import AttackInputError
from privtrain.files import reading
from privtrain.run.statement import SCHEMA, PrivacyStatement

PERPLEXITY_KEY = "eval/held_out_perplexity"
STEP_SECONDS_KEY = "perf/step_seconds"

_MAX_STATEMENT_BYTES = 16 << 20


def read_statement(run: pathlib.Path) -> PrivacyStatement:
    """Return the privacy statement of a finished run.

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
    content = reading.read_json(path, remedy="restore it", max_bytes=_MAX_STATEMENT_BYTES)
    try:
        statement = PrivacyStatement.model_validate(content)
    except pydantic.ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'statement'}: {fault['msg']}" for fault in error.errors()
        )
        raise AttackInputError(f"{path} is not a privacy statement ({faults}); expected {SCHEMA!r}") from error
    if statement.schema_ != SCHEMA:
        raise AttackInputError(f"{path} has schema {statement.schema_!r}; expected {SCHEMA!r}")
    # A resumed run that could not replay its last steps went on with a new secret. It releases fewer steps than planned
    # and is finished all the same: then whole epochs are accounted.
    if max(statement.steps_released, statement.steps_accounted or 0) < statement.num_steps:
        raise AttackInputError(
            f"{run} released {statement.steps_released} of {statement.num_steps} steps: expected a finished run; "
            "run next: the privtrain train command that began it"
        )
    return statement


def held_out_perplexity(run: pathlib.Path) -> tuple[float, float] | None:
    """Return the held-out perplexity before and after training, if the run released it.

    Returns:
        (first, last) value in ``metrics.jsonl``, or None if fewer than two rows carry one.

    Raises:
        DamagedFile: if a line is not JSON, or holds something else than a number.
    """
    values = released_values(run, PERPLEXITY_KEY)
    return (values[0], values[-1]) if len(values) >= 2 else None


def training_seconds(run: pathlib.Path) -> float | None:
    """Return the released seconds of all logged steps, or None if none was logged."""
    values = released_values(run, STEP_SECONDS_KEY)
    return sum(values) if values else None


def released_values(run: pathlib.Path, name: str) -> list[float]:
    """Return a metric as the run released it, in the order of ``metrics.jsonl``; lines without it are skipped.

    Raises:
        DamagedFile: naming the line, if one is not JSON, or holds something else than a finite number.
    """
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    rows = reading.read_json_lines(path, remedy="restore it")
    values = [reading.finite_number(row, name, path, line=line) for line, row in rows]
    return [value for value in values if value is not None]
