"""From a run's signals to its attack results: numpy and scipy alone, seconds, the same bytes for the same seed.

Public results go to ``report/attacks.json``; anything about one user stays in ``secret/attack/per_user.parquet``.
"""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from attacks import rundir, signals, statistics, user_inference, verdict
from attacks.errors import AttackInputError
from privtrain.rundir import write_atomically, write_json

ATTACKS_PATH = pathlib.Path("report/attacks.json")
PER_USER_PATH = pathlib.Path("secret/attack/per_user.parquet")
SCHEMA_NAME = "privtrain/attacks/1"

TARGET_FPRS = (0.001, 0.01, 0.05, 0.10)
MIN_USERS_PER_SIDE = 2
"""Below this no interval over users exists."""

_NUM_BAND_RESAMPLES = 1000
_MAX_BAND_POINTS = 100
_MAX_BINS = 30

FloatArray = npt.NDArray[np.float64]


def analyse_run(run: pathlib.Path, *, seed: int = 0) -> dict[str, object]:
    """Computes every statistic of a scored run and writes the public and the per-user results.

    Args:
        run: a finished run directory with signals.
        seed: of the bootstrap; not secret, it protects nobody.

    Returns:
        What was written to ``report/attacks.json``.

    Raises:
        AttackInputError: if the run is not finished, has no signals, or has too few users.
    """
    statement = rundir.read_statement(run)
    if not (run / signals.SIGNALS_PATH).is_file():
        raise AttackInputError(
            f"{run} has no {signals.SIGNALS_PATH}: expected a scored run; run next: attacks score {run}"
        )
    users = user_inference.user_statistics(signals.read_signals(run / signals.SIGNALS_PATH))
    counts = {side: _counts([user for user in users if user.side == side]) for side in signals.SIDES}
    for side, count in counts.items():
        if count["num_units"] < MIN_USERS_PER_SIDE:
            raise AttackInputError(
                f"{run / signals.SIGNALS_PATH} has {count['num_units']} {side} users: expected at least "
                f"{MIN_USERS_PER_SIDE} on each side; hold out more users and run next: attacks score {run}"
            )
    cap = verdict.Cap.of(statement)
    results = {name: _result(users, name, cap, seed) for name in user_inference.DEFINITIONS}
    headline = results[user_inference.HEADLINE]
    ceiling = statistics.perfect_separation(counts[signals.HELD_IN]["num_units"], counts[signals.HELD_OUT]["num_units"])
    facts: dict[str, object] = {
        "schema": SCHEMA_NAME,
        "attack": "user_inference",
        "unit": verdict.ATTACKED_UNIT,
        "seed": seed,
        "confidence_level": statistics.CONFIDENCE_LEVEL,
        "plan_fingerprint": statement.plan_fingerprint,
        "counts": counts,
        "cap": _cap_facts(cap, counts[signals.HELD_OUT]["num_units"]),
        "ceiling": {"auroc": 1.0, "interval": [ceiling.lower, ceiling.upper]},
        "headline": user_inference.HEADLINE,
        "verdict": headline["verdict"],
        "verdict_reason": headline["verdict_reason"],
        "results": results,
    }
    (run / ATTACKS_PATH).parent.mkdir(exist_ok=True)
    _write_per_user(run / PER_USER_PATH, users)
    write_json(run / ATTACKS_PATH, facts)
    return facts


def _counts(users: Sequence[user_inference.UserStatistics]) -> dict[str, int]:
    """What stands behind one side."""
    return {
        "num_units": len(users),
        "num_documents": sum(user.num_documents for user in users),
        "num_tokens": sum(user.num_tokens for user in users),
    }


def _cap_facts(cap: verdict.Cap, num_held_out: int) -> dict[str, object]:
    """The cap for the whole population, for this many held-out users, and as a curve."""
    if cap.bound is None:
        return {"auroc": None, "auroc_of_sample": None, "reason": cap.reason}
    return {"auroc": cap.bound.max_auroc(), "auroc_of_sample": cap.auroc(num_held_out), "reason": cap.reason}


def _result(
    users: Sequence[user_inference.UserStatistics], name: str, cap: verdict.Cap, seed: int
) -> dict[str, object]:
    """Everything that is said about one statistic."""
    held_in, held_out = (np.array([user.values[name] for user in users if user.side == side]) for side in signals.SIDES)
    bootstrap = statistics.bootstrap_interval(held_in, held_out, seed=seed)
    delong = statistics.delong_interval(held_in, held_out)
    is_constant = bool(np.ptp(np.concatenate([held_in, held_out])) == 0.0)
    found, reason = verdict.judge(cap, bootstrap, held_in.size, held_out.size, is_constant=is_constant)
    return {
        "definition": user_inference.DEFINITIONS[name],
        "auroc": statistics.auroc(held_in, held_out),
        "bootstrap": {
            "interval": [bootstrap.lower, bootstrap.upper],
            "method": "BCa, users resampled within each side",
            "num_resamples": statistics.NUM_RESAMPLES,
        },
        "delong": {
            "interval": [delong.lower, delong.upper],
            "method": "logit",
            "variance": statistics.delong_variance(held_in, held_out),
        },
        "warnings": _warnings(bootstrap, is_constant=is_constant),
        "verdict": str(found),
        "verdict_reason": reason,
        "tpr_at_fpr": [_operating_point(held_in, held_out, target, cap) for target in TARGET_FPRS],
        "roc": _roc(held_in, held_out, cap, seed),
        "histogram": _histogram(held_in, held_out),
    }


def _warnings(bootstrap: statistics.Interval, *, is_constant: bool) -> list[str]:
    """What a reader must know before the number."""
    found = []
    if is_constant:
        found.append("All users have the same value: was the base model scored against itself?")
    if bootstrap.upper < 0.5:
        found.append(
            "The whole interval lies below 1/2. That is not privacy: the two sides differ. "
            "Look for exchanged labels or for documents processed differently on the two sides."
        )
    return found


def _operating_point(
    held_in: FloatArray, held_out: FloatArray, target_fpr: float, cap: verdict.Cap
) -> dict[str, object]:
    """One row of the table of true positive rates."""
    point = statistics.tpr_at_fpr(held_in, held_out, target_fpr)
    allowed = point.num_false_positives_allowed
    return {
        "target_fpr": point.target_fpr,
        "is_resolved": point.is_resolved,
        "num_false_positives": point.num_false_positives,
        "num_held_out": point.num_held_out,
        "achieved_fpr": point.achieved_fpr,
        "num_true_positives": point.num_true_positives,
        "num_held_in": point.num_held_in,
        "tpr": point.tpr,
        "tpr_interval": [point.tpr_interval.lower, point.tpr_interval.upper],
        "tpr_cap": None if cap.bound is None else statistics.tpr_cap(cap.bound, allowed, point.num_held_out),
    }


def _roc(held_in: FloatArray, held_out: FloatArray, cap: verdict.Cap, seed: int) -> dict[str, object]:
    """The corners of the curve, and on a thinned grid of false positive counts its band and the cap."""
    exponents = np.linspace(0.0, 1.0, _MAX_BAND_POINTS)
    num_allowed = np.unique(np.concatenate([[0], np.round(held_out.size**exponents)])).astype(int)
    num_allowed = num_allowed[num_allowed < held_out.size]
    tpr, lower, upper = statistics.roc_band(
        held_in, held_out, num_allowed, num_resamples=_NUM_BAND_RESAMPLES, seed=seed
    )
    fpr_corners, tpr_corners = statistics.roc_points(held_in, held_out)
    bound, allowed = cap.bound, num_allowed.tolist()
    return {
        "corners": {"fpr": fpr_corners.tolist(), "tpr": tpr_corners.tolist()},
        "num_false_positives_allowed": allowed,
        "tpr": tpr.tolist(),
        "band_lower": lower.tolist(),
        "band_upper": upper.tolist(),
        "band_method": f"pointwise percentile, {_NUM_BAND_RESAMPLES} resamples of users within each side",
        "tpr_cap": None
        if bound is None
        else [statistics.tpr_cap(bound, k, held_out.size) for k in num_allowed.tolist()],
    }


def _histogram(held_in: FloatArray, held_out: FloatArray) -> dict[str, object]:
    """Counts of users by value, the two sides on common bins."""
    values = np.concatenate([held_in, held_out])
    # Round edges: the outer ones would otherwise be the exact values of two users.
    coarse = max(float(np.ptp(values)) / _MAX_BINS, 1e-9)
    power = 10.0 ** math.floor(math.log10(coarse))
    width = power * next(step for step in (1.0, 2.0, 5.0, 10.0) if step * power >= coarse * (1.0 - 1e-9))
    first, last = math.floor(values.min() / width), math.floor(values.max() / width) + 1
    edges = np.arange(first, last + 1) * width
    return {
        "edges": edges.tolist(),
        signals.HELD_IN: np.histogram(held_in, edges)[0].tolist(),
        signals.HELD_OUT: np.histogram(held_out, edges)[0].tolist(),
    }


def _write_per_user(path: pathlib.Path, users: Sequence[user_inference.UserStatistics]) -> None:
    """Writes each user's values and, for held-in users, the p-value against the held-out users."""
    columns: dict[str, list[object]] = {
        "user": [user.user for user in users],
        "side": [user.side for user in users],
        "num_documents": [user.num_documents for user in users],
        "num_tokens": [user.num_tokens for user in users],
    }
    for name in user_inference.DEFINITIONS:
        held_out = np.array([user.values[name] for user in users if user.side == signals.HELD_OUT])
        columns[name] = [user.values[name] for user in users]
        # Valid for a split drawn at random: under no membership a user's rank among the held-out ones is uniform.
        columns[f"{name}_p_value"] = [
            (1 + int(np.count_nonzero(held_out >= user.values[name]))) / (held_out.size + 1)
            if user.side == signals.HELD_IN
            else None
            for user in users
        ]
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, compression="zstd")
    write_atomically(path, buffer.getvalue(), mode=0o600)
