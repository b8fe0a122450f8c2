"""From a run's signals to its attack results: numpy, scipy and scikit-learn, seconds, the same bytes for the same seed.

Signals are per-token log-probabilities of documents under the attacked model ("target") and under the model that
fine-tuning started from ("base"); see :mod:`attacks.signals`. Users whom a coin let into training are held in, the
others held out; every attack is judged by how well it tells the two sides apart. Documents are of two kinds: "fresh"
ones, which nobody trained on, and "training" ones, which training could use.

Public results go to ``report/attacks.json``; anything about one user stays in ``secret/attack/per_user.parquet``. Both
are sealed under the run's key; the results also name the target that they are of, which anybody can compare.
"""

from __future__ import annotations

import importlib.metadata
import io
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.stats

from attacks import evidence, signals
from attacks.alone import alone
from attacks.analysis import (
    blind,
    curves,
    features,
    registry,
    results,
    shadow_models,
    statistics,
    user_inference,
    verdict,
)
from attacks.analysis.arrays import BoolArray, FloatArray
from attacks.analysis.audit import panel as auditing
from attacks.analysis.features import DocumentTable, Scored
from attacks.analysis.lift import AGGREGATIONS, lift
from attacks.analysis.protocol import DocumentAttack, UnderOtherModels
from attacks.analysis.results import Statistic
from attacks.analysis.sensitive import SensitivePanel
from attacks.coins.check import check_documents
from attacks.errors import AttackInputError
from attacks.reporting.record import Scoring, read_references, read_scoring, write_scoring
from privtrain.files.atomic import write_atomically
from privtrain.files.private import make_public_directory
from privtrain.run.directory import RunDirectory, make_private_directory
from privtrain.run.sealing import write_sealed

ATTACKS_PATH = pathlib.Path("report/attacks.json")
PER_USER_PATH = pathlib.Path("secret/attack/per_user.parquet")
SCHEMA_NAME = "privtrain/attacks/4"

PER_USER_SCHEMA_NAME = "privtrain/per-user/2"

MIN_USERS_PER_SIDE = 2
"""Below this no interval over users exists."""

_SIGNIFICANCE = 0.05


def analyse_run(run: pathlib.Path, *, seed: int = 0, audit_delta: float | None = None) -> dict[str, Any]:
    """Compute every statistic of a scored run; write the per-user and the public results, which are returned.

    Args:
        run: a finished run directory with signals.
        seed: of the bootstrap and the folds; not secret, it protects nobody.
        audit_delta: at which the audit compares its lower bounds with the claim; the claim's own if None. A choice of
            the audit, to be made before its result is seen; the results record it.

    Raises:
        AttackInputError: if the run is not finished, has no signals, or has too few users, or if the signals are of
            another target or other documents.
        DamagedFile: if signals or their record are not as they were sealed.
        PrivtrainError: if the run does not stand by its privacy statement.
        RunBusy: if another attack job is at work on the signals.
        UnsafePath: if ``report/`` is a link, or others may write there.
    """
    with alone(run / signals.SIGNALS_PATH):
        return _analyse(run, seed, audit_delta)


def _analyse(run: pathlib.Path, seed: int, audit_delta: float | None) -> dict[str, Any]:
    """Do what :func:`analyse_run` says; the caller holds the lock of the signals."""
    # What was scored, checked against the run.
    statement = evidence.verified_statement(run)
    directory = RunDirectory(run)
    scoring = read_scoring(directory)
    evidence.check_target(directory, scoring.facts["target"], scoring.path, scoring.remedy)
    num_left_out = check_documents(scoring)

    # One pass over the signals.
    panel = SensitivePanel()
    attacks = [attack for attack in registry.ATTACKS.values() if isinstance(attack, DocumentAttack)]
    scored = features.collect(scoring.rows(), attacks, panel.watch)
    counts = {side: _counts(scored, side) for side in signals.SIDES}
    for side, count in counts.items():
        if count["num_units"] < MIN_USERS_PER_SIDE:
            raise AttackInputError(
                f"{run / signals.SIGNALS_PATH} has {count['num_units']} {side} users: expected at least "
                f"{MIN_USERS_PER_SIDE} on each side; hold out more users and run next: attacks score {run}"
            )

    # What bounds every attack: the guarantee, and whether the sides differ without any model. The most records of any
    # user of either side: what a user could have put into training must not depend on the coin.
    cap = verdict.Cap.of(statement, int(scored.num_records.max()))
    families = blind.blind_baseline(scored, seed)
    confounded_by = _confounded_by(families)

    # The attacks.
    references = read_references(directory, scoring)
    models = _under_shadows(scored, references)
    not_run = _not_run(scored)
    candidates = _statistics(scored, models, not_run)
    declared, *others = _of_enough_users(candidates, not_run)  # the headline, declared before any run, comes first
    evaluated, multiplicity = _evaluated(declared, others, cap, seed, confounded_by)
    assert declared.name == user_inference.HEADLINE
    headline = evaluated[declared.name]
    users = _user_values(scored)

    # The audit, and the verdict of both.
    findings = auditing.audit_run(scoring, statement, scored, models, cap, seed, confounded_by, audit_delta)
    found_verdict, reason = verdict.combine(
        (verdict.Verdict(headline["verdict"]), headline["verdict_reason"]),
        [(finding.verdict, f"the audit of {finding.name}: {finding.verdict_reason}") for finding in findings],
    )

    num_held_out = counts[signals.HELD_OUT]["num_units"]
    ceiling = statistics.perfect_separation(counts[signals.HELD_IN]["num_units"], num_held_out)
    facts: dict[str, Any] = {
        "schema": SCHEMA_NAME,
        "attack": "user_inference",
        "unit": verdict.ATTACKED_UNIT,
        "seed": seed,
        "software": {name: importlib.metadata.version(name) for name in ("privtrain", "numpy", "scipy")},
        "audit_delta": statement.delta if audit_delta is None else audit_delta,
        "confidence_level": statistics.CONFIDENCE_LEVEL,
        "plan_fingerprint": statement.plan_fingerprint,
        "split_commitment": statement.split_commitment,
        "target": scoring.facts["target"],
        "scoring": {"seal": scoring.seal, "options": scoring.facts["options"], "documents": scoring.facts["documents"]},
        "counts": counts,
        "num_training_records_left_out_by_selection": num_left_out,
        "cap": _cap_facts(cap, num_held_out),
        "ceiling": {"auroc": 1.0, "interval": [ceiling.lower, ceiling.upper]},
        "headline": user_inference.HEADLINE,
        "verdict": str(found_verdict),
        "verdict_reason": reason,
        "achieved": _achieved(headline, findings),
        "results": evaluated,
        "multiplicity": multiplicity,
        "not_run": not_run,
        "shadows": {"num": len(references), "seals": [reference.seal for reference in references]},
        "blind": {name: _blind_facts(result) for name, result in families.items()},
        "user_inference": _user_inference_facts(scored, users, seed),
        "sensitive": panel.facts(),
        "panels": {
            "audit": auditing.panel(findings),
            **{name: compute(run, statement, seed) for name, compute in registry.PANELS.items()},
        },
    }
    make_public_directory((run / ATTACKS_PATH).parent)
    _write_per_user(directory, scoring, scored, users)
    return write_sealed(directory, run / ATTACKS_PATH, facts, mode=0o644)


def _evaluated(
    declared: Statistic, others: list[Statistic], cap: verdict.Cap, seed: int, confounded_by: str
) -> tuple[dict[str, dict[str, Any]], str]:
    """Evaluate all statistics, corrected for their number.

    Args:
        declared: the headline, which needs no correction: it was declared before any run.
        others: all other statistics.
        cap: what the run's guarantee allows.
        seed: of the bootstrap.
        confounded_by: how the sides differ without any model; empty if they do not.

    Returns:
        Name → results, the headline first; and the sentence of the report about the correction.
    """
    # Bonferroni: among all statistics but the declared one, a false accusation is as rare as in one.
    strict = 1.0 - (1.0 - statistics.CONFIDENCE_LEVEL) / max(len(others), 1)
    evaluated = {declared.name: results.evaluate(declared, cap, seed, confounded_by, statistics.CONFIDENCE_LEVEL)}
    for statistic in others:
        evaluated[statistic.name] = results.evaluate(statistic, cap, seed, confounded_by, strict)
        has_users_of_headline = statistic.unit == "user" and statistic.documents == signals.FRESH
        if has_users_of_headline:
            evaluated[statistic.name]["less_headline"] = results.compare(statistic, declared)
    num_p_values = results.correct_for_multiplicity(evaluated, declared.name)
    multiplicity = (
        f"Holm over all {num_p_values} p-values, paired differences included, but the headline's, which was declared "
        f"before any run; the other {len(others)} are judged at confidence level {strict:.5g}"
    )
    return evaluated, multiplicity


def _achieved(headline: dict[str, Any], findings: list[auditing.Finding]) -> list[str]:
    """Return one sentence for each thing that the attack found out and chance does not explain, whatever was claimed.

    Only the tests that were declared beforehand count: the headline's interval (wrong with probability .025) and the
    audit (.05).

    Args:
        headline: the evaluated headline statistic; ``bootstrap.interval`` is that of its AUROC.
        findings: the audit's, one for each source of coins.
    """
    sentences = auditing.achieved(findings)
    lower = headline["bootstrap"]["interval"][0]
    if lower > 0.5 and headline["verdict"] != verdict.Verdict.CONFOUNDED:
        sentences.insert(
            0, f"Fresh documents tell who was trained on: the AUROC is at least {lower:.3f}, where guessing has 0.5."
        )
    return sentences


def _counts(scored: Scored, side: str) -> dict[str, int]:
    """Return how many users, fresh documents and tokens of one side (held in or held out) the headline rests on."""
    table = scored.documents[signals.FRESH]
    chosen = scored.is_held_in[table.owner] == (side == signals.HELD_IN)
    return {
        "num_units": int(np.unique(table.owner[chosen]).size),
        "num_documents": int(chosen.sum()),
        "num_tokens": int(table.num_tokens[chosen].sum()),
    }


def _under_shadows(scored: Scored, references: list[Scoring]) -> Mapping[str, UnderOtherModels | None]:
    """Return, for each kind of document, its scores under the attacked model and under the shadow models.

    Args:
        scored: the run's own documents.
        references: the signals of the same documents under each shadow model.

    Returns:
        Kind to scores; None for a kind without documents, and for all kinds without shadow models.

    Raises:
        AttackInputError: if a shadow model was not scored on a document of the run.
    """
    try:
        return {
            kind: features.under_other_models(table, scored, references) for kind, table in scored.documents.items()
        }
    except KeyError:
        raise AttackInputError(
            f"{references[0].path.parent} holds other documents than the run's signals; score the shadows again"
        ) from None


def _statistics(
    scored: Scored, models: Mapping[str, UnderOtherModels | None], not_run: list[dict[str, str]]
) -> Iterator[Statistic]:
    """Yield every statistic, the headline first.

    Args:
        scored: users and documents.
        models: kind of document to its scores under shadow models.
        not_run: gets an entry for each attack that lacks shadow models.
    """
    fresh, training = scored.documents[signals.FRESH], scored.documents[signals.TRAINING]
    for name, definition in user_inference.DEFINITIONS.items():
        yield _of_users(scored, fresh, name, definition, fresh.scores[name], is_detailed=True)
    headline = fresh.scores[user_inference.HEADLINE]
    for aggregation in list(AGGREGATIONS)[1:]:  # the first is the mean, which is the headline itself
        definition = f"{aggregation} over a user's documents of their mean log p_target - log p_base per token"
        yield _of_users(scored, fresh, f"token_mean_{aggregation}", definition, headline, aggregation=aggregation)
    for attack in registry.ATTACKS.values():
        if isinstance(attack, DocumentAttack):
            # The ratio of fresh documents, averaged over a user, is the headline itself.
            if attack.name in fresh.scores and attack.name != "ratio":
                yield _of_users(scored, fresh, attack.name, attack.definition, fresh.scores[attack.name])
            if attack.name in training.scores:
                yield from _of_training(scored, training, attack.name, attack.definition, training.scores[attack.name])
    for kind, table in ((signals.FRESH, fresh), (signals.TRAINING, training)):
        yield from _of_shadows(scored, table, kind, models[kind], not_run)


def _of_enough_users(candidates: Iterable[Statistic], not_run: list[dict[str, str]]) -> Iterator[Statistic]:
    """Yield the statistics with enough users on both sides; add the others to ``not_run``, with the reason.

    Not every user has documents of every kind.
    """
    for statistic in candidates:
        num_in, num_out = statistic.num_users
        if min(num_in, num_out) >= MIN_USERS_PER_SIDE:
            yield statistic
        else:
            reason = (
                f"{num_in} held-in and {num_out} held-out users have such documents; expected at least "
                f"{MIN_USERS_PER_SIDE} on each side"
            )
            not_run.append({"attack": statistic.name, "documents": statistic.documents, "reason": reason})


def _of_shadows(
    scored: Scored,
    table: DocumentTable,
    kind: str,
    models: UnderOtherModels | None,
    not_run: list[dict[str, str]],
) -> Iterator[Statistic]:
    """Yield the attacks that compare the attacked model with its shadow models, on documents of one kind.

    Args:
        scored: the users.
        table: the documents of that kind.
        kind: ``"fresh"`` or ``"training"``.
        models: the documents under the shadow models; None without any.
        not_run: gets an entry for each attack that has too few shadow models.
    """
    suffix = "" if kind == signals.FRESH else "_training"
    for attack in registry.reference_attacks():
        name = f"{attack.name}{suffix}"
        lacking = shadow_models.lacking(attack, models)
        if lacking:
            not_run.append({"attack": name, "documents": kind, "reason": lacking})
            continue
        assert models is not None, "without models every attack lacks them"
        of_users, has_documents = shadow_models.by_user(models, table.owner, len(scored.users))
        values = np.full(len(scored.users), np.nan)  # NaN: no document, so no score
        values[has_documents] = attack.score(of_users)
        yield _split(scored, name, attack.definition, kind, values)
        if kind == signals.TRAINING:
            yield _records(scored, table, f"{attack.name}_records", attack.definition, attack.score(models))


def _of_training(
    scored: Scored, table: DocumentTable, name: str, definition: str, scores: FloatArray
) -> Iterator[Statistic]:
    """Yield an attack on training documents twice: a score a user, and a score a record."""
    yield _of_users(scored, table, f"{name}_training", definition, scores, kind=signals.TRAINING)
    yield _records(scored, table, f"{name}_records", definition, scores)


def _of_users(
    scored: Scored,
    table: DocumentTable,
    name: str,
    definition: str,
    scores: FloatArray,
    *,
    aggregation: str = "mean",
    kind: str = signals.FRESH,
    is_detailed: bool = False,
) -> Statistic:
    """Return the statistic with one value a user: the aggregate of the scores of the user's documents.

    Args:
        scored: the users.
        table: the documents that were scored.
        name: of the statistic in the report.
        definition: one line for the report.
        scores: [documents].
        aggregation: a key of ``AGGREGATIONS``.
        kind: of the documents, ``"fresh"`` or ``"training"``.
        is_detailed: whether the report shows its curve and histogram.
    """
    values = lift(scores, table.owner, len(scored.users), aggregation)
    return _split(scored, name, definition, kind, values, is_detailed=is_detailed)


def _split(
    scored: Scored, name: str, definition: str, kind: str, values: FloatArray, *, is_detailed: bool = False
) -> Statistic:
    """Return the statistic of users from their values, [users]; users without a value (NaN) are left out."""
    known = ~np.isnan(values)
    sides = (values[known & scored.is_held_in], values[known & ~scored.is_held_in])
    return Statistic(name, definition, kind, "user", *sides, is_detailed=is_detailed)


def _records(scored: Scored, table: DocumentTable, name: str, definition: str, scores: FloatArray) -> Statistic:
    """Return the statistic with one value a record: ``scores`` of the training documents in ``table``."""
    is_in = scored.is_held_in[table.owner]
    owners = (table.owner[is_in], table.owner[~is_in])
    return Statistic(name, definition, signals.TRAINING, "record", scores[is_in], scores[~is_in], owners)


def _not_run(scored: Scored) -> list[dict[str, str]]:
    """Return the attacks whose signals are not there, each with the reason and the option that would write them."""
    reasons = []
    for kind, table in scored.documents.items():
        for name, need in sorted(table.missing.items()):
            how = ""
            _, _, variant = need.partition(".")  # "lowercase" of "variants.lowercase"; empty for other signals
            if variant.startswith("neighbour_"):
                how = "; score with --variants neighbours:N"
            elif variant:
                option, _, _ = variant.partition("_")  # "recall" of "recall_plain"
                how = f"; score with --variants {option}"
            reasons.append({"attack": name, "documents": kind, "reason": f"the signals lack {need}{how}"})
        if not table.keys:
            reasons.append({"attack": "all", "documents": kind, "reason": "no such documents were scored"})
    return reasons


def _cap_facts(cap: verdict.Cap, num_held_out: int) -> dict[str, object]:
    """Return what the report says of the cap: the largest AUROC that the run's guarantee allows an attack.

    ``auroc`` is the cap over a whole population; ``auroc_of_sample`` is a little higher, since the threshold comes from
    ``num_held_out`` users; ``curve`` holds both for the whole privacy curve; ``auroc_used`` is the least one.
    """
    curve = None
    if cap.curve is not None:
        sample = statistics.auroc_cap(cap.curve, num_held_out)
        curve = {"auroc": cap.curve.max_auroc(), "auroc_of_sample": sample, "accountant": cap.curve.source}
    return {
        "auroc": None if cap.bound is None else cap.bound.max_auroc(),
        "auroc_of_sample": None if cap.bound is None else statistics.auroc_cap(cap.bound, num_held_out),
        "auroc_used": cap.auroc(num_held_out),
        "curve": curve,
        "conversion": cap.conversion,
        "reason": cap.reason,
    }


def _confounded_by(families: dict[str, blind.BlindResult]) -> str:
    """Return why no verdict can be trusted: the sides differ even without a model. Empty if they do not."""
    guilty = [f"{name} (AUROC {result.auroc:.3f})" for name, result in families.items() if result.separates]
    if not guilty:
        return ""
    return f"without any model the two sides can be told apart by {' and '.join(guilty)}: the split is not a fair one"


def _blind_facts(result: blind.BlindResult) -> dict[str, Any]:
    """Return one family of the blind baseline as the report shows it."""
    return {
        "auroc": result.auroc,
        "interval": [result.interval.lower, result.interval.upper],
        "num_features": result.num_features,
        "separates": result.separates,
    }


def _user_values(scored: Scored) -> dict[str, FloatArray]:
    """Return each user-inference statistic by name, [users]; NaN for users without fresh documents."""
    fresh = scored.documents[signals.FRESH]
    return {name: lift(fresh.scores[name], fresh.owner, len(scored.users)) for name in user_inference.DEFINITIONS}


def _user_inference_facts(scored: Scored, users: dict[str, FloatArray], seed: int) -> dict[str, Any]:
    """Return how the headline's AUROC varies with what users have, and how many users it accuses."""
    fresh, values = scored.documents[signals.FRESH], users[user_inference.HEADLINE]
    known = ~np.isnan(values)
    held_in, held_out = values[known & scored.is_held_in], values[known & ~scored.is_held_in]
    return {
        "by_num_documents": curves.by_num_documents(scored, fresh, fresh.scores[user_inference.HEADLINE], seed),
        "by_num_records": curves.by_bucket(scored.num_records.astype(np.float64), values, scored.is_held_in),
        "by_share": curves.by_bucket(curves.shares(scored), values, scored.is_held_in),
        "by_distinctness": curves.by_bucket(curves.distinctness(scored), values, scored.is_held_in),
        "most_exposed": curves.most_exposed(scored, values),
        "users_accused": _users_accused(statistics.rank_p_values(held_in, held_out), num_held_out=held_out.size),
    }


def _users_accused(p_values: FloatArray, num_held_out: int) -> dict[str, Any]:
    """Return how many held-in users score significantly above the held-out ones.

    Many users are tested at once, so a false discovery rate is kept, and a single small p-value may not be enough: no
    user is accused unless ``num_needed_above_all`` held-in users at least score above all held-out users (None: even
    all held-in users would be too few).

    Args:
        p_values: one for each held-in user: the rank of their score among the held-out users' scores.
        num_held_out: held-out users with a score; it limits how small a p-value can be.
    """
    return {
        "significance": _SIGNIFICANCE,
        "num_held_in": int(p_values.size),
        "num_unadjusted": int((p_values <= _SIGNIFICANCE).sum()),
        "num_by_chance": _SIGNIFICANCE * p_values.size,
        "num_at_false_discovery_rate": int((statistics.false_discovery_rate(p_values) <= _SIGNIFICANCE).sum()),
        "num_needed_above_all": statistics.fewest_discoveries(p_values.size, num_held_out, _SIGNIFICANCE),
        "smallest_possible_p_value": 1.0 / (1.0 + num_held_out),
    }


def _write_per_user(run: RunDirectory, scoring: Scoring, scored: Scored, users: dict[str, FloatArray]) -> None:
    """Write a row per user that the attack scored: each statistic with its rank, and the p-values of held-in users.

    Args:
        run: whose ``secret/attack/per_user.parquet`` is written.
        scoring: the record of the signals; its seal goes into the file's own record.
        scored: the users, and their documents that nobody trained on.
        users: statistic -> [users] value, NaN where the attacker holds no document of the user.
    """
    path = run.root / PER_USER_PATH
    fresh = scored.documents[signals.FRESH]
    has_value = ~np.isnan(users[user_inference.HEADLINE])
    is_in = scored.is_held_in[has_value]
    num_tokens = np.bincount(fresh.owner, fresh.num_tokens, minlength=has_value.size)
    columns: dict[str, Any] = {
        "user": list(itertools.compress(scored.users, has_value)),
        "side": [signals.HELD_IN if held_in else signals.HELD_OUT for held_in in is_in],
        "num_documents": np.bincount(fresh.owner, minlength=has_value.size)[has_value],
        "num_tokens": num_tokens[has_value].astype(np.int64),
        "num_records": scored.num_records[has_value],
        "share": curves.shares(scored)[has_value],  # of the training text
        "distinctness": curves.distinctness(scored)[has_value],  # of the user's tokens from everybody else's, nats
    }
    for name, values in users.items():
        known = values[has_value]
        columns[name] = known
        columns[f"{name}_rank"] = scipy.stats.rankdata(-known, "max").astype(np.int64)  # 1: the most member-like user
        p_values = statistics.rank_p_values(known[is_in], known[~is_in])
        columns[f"{name}_p_value"] = _column_of_held_in(p_values, is_in)
        columns[f"{name}_p_fdr"] = _column_of_held_in(statistics.false_discovery_rate(p_values), is_in)
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    make_private_directory(path.parent)
    write_atomically(path, buffer.getvalue(), mode=0o600)
    write_scoring(run, path, {"scoring": scoring.seal}, schema=PER_USER_SCHEMA_NAME)


def _column_of_held_in(values: FloatArray, is_in: BoolArray) -> Any:
    """Return a column of users with the ``values`` of those held in, in order, and null for those held out."""
    column = np.full(is_in.size, np.nan)
    column[is_in] = values
    return pa.array(column, mask=~is_in)
