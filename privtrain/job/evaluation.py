"""Measure the model on records that are not trained on: before, during and after training.

``data.evaluation`` is public, and the weights of every step are released under ε: what is measured there is
post-processing, and so is what is decided by it (``release.if_worse``). Held-out users' records are private: what is
measured on them decides nothing, and leaves ``secret/`` only if the configuration says so.

The losses on ``data.evaluation`` before the first step are kept in ``secret/``, since the job that takes the last step
and compares with them may be a resumed one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence

import numpy as np

from privtrain.backends import Backend
from privtrain.config import Config
from privtrain.data.split import Split
from privtrain.errors import ConfigError, Fault, PlanMismatch, WorseThanBase
from privtrain.files import reading
from privtrain.files.atomic import write_json
from privtrain.inputs import Inputs
from privtrain.job.stop import StopRequest
from privtrain.process.console import say
from privtrain.run.directory import RunDirectory
from privtrain.training.evaluate import Scores, difference, evaluate, perplexity
from privtrain.training.network import Network
from privtrain.training.trainer import Trainer

_SCHEMA = "privtrain/evaluation-before/1"


def is_due(config: Config, step: int) -> bool:
    """Return whether the model is measured on public rows after this many steps; at the end it always is."""
    return step % config.tracking.evaluation_interval_steps == 0


def on_public(
    inputs: Inputs, trainer: Trainer, network: Network, step: int, stop: StopRequest, *, is_last: bool = False
) -> None:
    """Measure the model on data.evaluation and log it. Every rank calls it.

    Args:
        inputs: with the records of ``data.evaluation``; without any, nothing happens.
        trainer: with the model's backend and tracker.
        network: the model and its tokenizer.
        step: steps taken. At 0 the result is kept, to compare with at the end.
        stop: asked between batches.
        is_last: compare with the result before the first step.

    Raises:
        WorseThanBase: at the end, if the model is significantly worse and ``release.if_worse`` is ``refuse``.
    """
    if not inputs.evaluation:
        return
    scores = _scores(inputs.evaluation, trainer, network, step, stop)
    assert scores is not None, "check_possible has seen that some record predicts a token"
    with trainer.backend.main_alone():
        if trainer.backend.is_main:
            values = _metrics_of(inputs.config, scores, "eval/")
            if step == 0:
                _keep_before(inputs, scores)
            if is_last:
                values |= _compare(inputs, _read_before(inputs), scores)
            if values:
                trainer.tracker.log(step, values)


def last_on_public(run: RunDirectory) -> dict[str, float]:
    """Return what ``metrics.jsonl`` last says of data.evaluation, e.g. ``{"loss": 2.1, "perplexity": 8.2}``; or ``{}``.

    The names are those that model cards use.
    """
    # metrics.jsonl is empty where a resumed job had no step left to take.
    has_rows = run.metrics.is_file() and run.metrics.stat().st_size > 0
    rows = [row for _, row in reading.read_json_lines(run.metrics)] if has_rows else []
    measured = [row for row in rows if "eval/loss" in row]
    if not measured:
        return {}
    last = measured[-1]
    return {name: last[f"eval/{name}"] for name in ("loss", "perplexity", "accuracy") if f"eval/{name}" in last}


def on_held_out(
    inputs: Inputs, trainer: Trainer, network: Network, split: Split, step: int, stop: StopRequest
) -> float | None:
    """Measure the model on records of held-out users, and log it as private; return the mean loss per token or label.

    ``None`` if no record has a token or label to predict.
    """
    records = [inputs.corpus.records[user][index] for user, index in split.evaluation]
    scores = _scores(records, trainer, network, step, stop)
    if scores is None:
        return None
    if values := _metrics_of(inputs.config, scores, "eval/held_out_"):
        trainer.tracker.log(step, values)
    return scores.loss


def warn_if_worse(backend: Backend, before: float | None, after: float | None) -> None:
    """Say on the console, which is private, that the loss on held-out users rose."""
    # "not <=" rather than ">": a loss that became NaN is worse too.
    if backend.is_main and before is not None and after is not None and not after <= before:
        say(
            f"[yellow]warning[/]: the loss on held-out users rose from {before:.4f} to {after:.4f} (private). Try a "
            "smaller training.learning_rate, or a larger batch. data.evaluation would measure it on public rows"
        )


def check_possible(inputs: Inputs, network: Network, start_step: int) -> None:
    """Raise unless data.evaluation can be measured, and compared at the end with before the first step. Rank 0 only.

    Args:
        inputs: with the records of ``data.evaluation``; without any, nothing is checked.
        network: whose tokenizer encodes them.
        start_step: steps that the run has taken; if any, the measurement before the first one must be on disk.

    Raises:
        ConfigError: if no record has a token to predict.
        DamagedFile: if the measurement before the first step is missing or damaged.
        PlanMismatch: if it was made on other records.
    """
    if not inputs.evaluation:
        return
    if not any(record.num_targets for record in network.encoder.encode(inputs.evaluation).records):
        raise ConfigError([Fault("data.evaluation", "no row of it predicts a token")])
    if start_step:
        _read_before(inputs)


def _scores(records: Sequence[str], trainer: Trainer, network: Network, step: int, stop: StopRequest) -> Scores | None:
    """Return losses and correct predictions record by record, on every rank; ``None`` if nothing is to be predicted."""
    encoded = network.encoder.encode(records)
    return evaluate(
        network.model,
        encoded.records,
        trainer.backend,
        objective=network.objective,
        packer=network.packer,
        autocast=network.autocast,
        between_batches=lambda: stop.leave_if_agreed(trainer.backend, f"evaluating after step {step}"),
    )


def _metrics_of(config: Config, scores: Scores, prefix: str) -> dict[str, float]:
    """Return metric → value, e.g. ``eval/loss`` → 2.1 for the prefix ``eval/``; empty if the loss is not finite."""
    if not math.isfinite(perplexity(scores.loss)):
        return {}
    if config.data.is_classification:
        return {f"{prefix}loss": scores.loss, f"{prefix}accuracy": scores.accuracy}
    return {f"{prefix}loss": scores.loss, f"{prefix}perplexity": perplexity(scores.loss)}


def _keep_before(inputs: Inputs, scores: Scores) -> None:
    """Write the measurement before the first step to ``secret/``; JSON has no NaN, so such a loss is ``null``."""
    body = {
        "schema": _SCHEMA,
        "records_sha256": _digest(inputs.evaluation),
        "losses": [value if math.isfinite(value) else None for value in scores.losses.tolist()],
        "num_targets": scores.num_targets.tolist(),
        "num_correct": scores.num_correct,
    }
    write_json(inputs.run.evaluation_before, body, mode=0o600)


def _read_before(inputs: Inputs) -> Scores:
    """Return the measurement before the first step, as :func:`_keep_before` wrote it.

    Raises:
        DamagedFile: if it is missing or damaged.
        PlanMismatch: if it was made on other records than ``data.evaluation`` holds now.
    """
    content = reading.read_json(inputs.run.evaluation_before, schema=_SCHEMA, remedy="restore it from a backup")
    if content["records_sha256"] != _digest(inputs.evaluation):
        raise PlanMismatch(f"{inputs.run.root} was begun with other records in data.evaluation; restore them")
    losses = [math.nan if value is None else value for value in content["losses"]]
    return Scores(np.asarray(losses), np.asarray(content["num_targets"]), content["num_correct"])


def _compare(inputs: Inputs, before: Scores, after: Scores) -> dict[str, float]:
    """Say how training changed the loss, and return the change with its 95 % interval, as metrics to log.

    Raises:
        WorseThanBase: if the model is significantly worse and ``release.if_worse`` is ``refuse``.
    """
    config = inputs.config
    rise, low, high = difference(before, after)
    name = "label" if config.data.is_classification else "token"
    shown = f"loss per {name} on data.evaluation: {before.loss:.4f} before, {after.loss:.4f} after training"
    say(f"{shown} ({rise:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})")
    if low > 0 or not math.isfinite(after.loss):  # low > 0: the whole interval lies above "no change"
        _handle_worse(inputs, f"the model is worse than its base: {shown}")
    numbers = {"eval/loss_difference": rise, "eval/loss_difference_low": low, "eval/loss_difference_high": high}
    return {key: value for key, value in numbers.items() if math.isfinite(value)}


def _handle_worse(inputs: Inputs, problem: str) -> None:
    """Raise :class:`WorseThanBase` or warn, as ``release.if_worse`` says."""
    if inputs.config.release.if_worse == "refuse":
        raise WorseThanBase(
            f"{problem}. Nothing is released, and ε is spent anyway. To release it as it is, set "
            "release.if_worse: warn and start the same command again"
        )
    say(f"[yellow]warning[/]: {problem}. Try a smaller training.learning_rate, or a larger batch")


def _digest(records: tuple[str, ...]) -> str:
    content = json.dumps(records, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()
