"""The panel of planted canaries: exposure by number of repetitions, beside that of held-out canaries, and the AUROC.

A canary is an invented user whose records hold a random secret, or a real user whose records were changed: a phrase of
one of them was inserted into all. A coin decided whether training used it: held in, or held out as the control.
Exposure says how far the model prefers the secret to other secrets drawn alike ("references"), in bits; see
:mod:`attacks.analysis.memorisation.exposure`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from attacks.analysis import statistics
from attacks.analysis.arrays import FloatArray
from attacks.analysis.memorisation.exposure import FIT_SIGNIFICANCE, Exposure, exposure, null_mean, null_means
from attacks.reporting.record import read_scoring
from attacks.scoring.canaries import POOL
from attacks.scoring.documents import attack_pseudonym, read_manifest, read_used
from attacks.signals import CANARY, CANARY_REFERENCE, DocumentSignals
from privtrain.data.canaries import SHARED_SUBSTRING, Canary, canaries_of
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import PrivacyStatement

MODELS = ("tuned", "base")


@dataclasses.dataclass
class Scored:
    """A canary with what the models make of it.

    Attributes:
        canary: which one.
        is_held_in: whether its coin put it into training.
        num_drawn: how often its records entered a step; None where training did not say.
        gains: mean log p_tuned - log p_base of each of its documents.
        exposures: model (``"tuned"`` or ``"base"``) to exposure; empty for changed users, who have no references.
        pool: where all canaries share their references: log-likelihoods under the tuned model of those references, and
            of the canary itself as the last entry; else None.
    """

    canary: Canary
    is_held_in: bool
    num_drawn: int | None
    gains: list[float]
    exposures: dict[str, Exposure]
    pool: FloatArray | None = None

    @property
    def gain(self) -> float:
        """The mean of ``gains``."""
        return float(np.mean(self.gains))


def panel(run: pathlib.Path, statement: PrivacyStatement, seed: int) -> dict[str, Any] | None:  # noqa: ARG001
    """Return exposure and membership of the planted canaries; None if there are none.

    Args:
        run: a scored run.
        statement: its privacy statement.
        seed: unused; nothing is drawn.
    """
    scored = read_canaries(run)
    if not scored:
        return None
    rows = [_row(tier, group) for tier, group in _by_tier(scored).items()]
    exposed = [item for item in scored if item.exposures]
    return {
        "title": "Planted canaries",
        "summary": _summary(rows, scored),
        "columns": [
            {"key": "tier", "label": "records with the secret"},
            {"key": "num_held_in", "label": "held-in"},
            {"key": "num_held_out", "label": "held-out"},
            {"key": "drawn", "label": "records drawn, median"},
            {"key": "exposure", "label": "exposure held-in, bits"},
            {"key": "exposure_interval", "label": "95 % interval of it"},
            {"key": "exposure_base", "label": "same under the base"},
            {"key": "exposure_held_out", "label": "exposure held-out"},
            {"key": "exposure_expected", "label": "expected if not trained on"},
            {"key": "top_rank", "label": "held-in at rank 1"},
            {"key": "extrapolated", "label": "extrapolated, bits"},
            {"key": "auroc", "label": "AUROC of the gain"},
            {"key": "auroc_interval", "label": "95 % interval"},
        ],
        "rows": rows,
        "notes": _notes(scored, exposed),
        "control": _control(exposed),
        **({"figure": _figure(rows)} if exposed else {}),
    }


def read_canaries(run: pathlib.Path) -> list[Scored]:
    """Return the scored canaries of a run, in the order of its split manifest; those without scores are left out."""
    directory = RunDirectory(run)
    if not directory.manifest.is_file():
        return []
    manifest = read_manifest(directory)
    canaries = canaries_of(manifest)
    if not canaries:
        return []
    key = directory.load_key("pseudonym")
    used = read_used(directory)["canaries"]
    rows: dict[tuple[str, str], list[DocumentSignals]] = collections.defaultdict(list)
    for row in read_scoring(directory).rows():
        if row.kind in (CANARY, CANARY_REFERENCE):
            rows[row.kind, row.user].append(row)
    held_in = set(manifest["held_in"])
    scored = []
    for canary in canaries:
        own = rows[CANARY, attack_pseudonym(key, canary.user)]
        if not own:  # a changed user may have no fresh records
            continue
        owner = POOL if canary.has_shared_references else canary.user
        references = rows[CANARY_REFERENCE, attack_pseudonym(key, owner)]
        exposures: dict[str, Exposure] = {}
        pool: FloatArray | None = None
        if references:  # then the canary has one text
            exposures = _exposures(canary, own[0], references)
            if canary.has_shared_references:
                pool = _logps([*references, own[0]], "target_logp")  # the canary last, as ``Scored.pool`` says
        scored.append(
            Scored(
                canary=canary,
                is_held_in=canary.user in held_in,
                num_drawn=used.get(canary.user, {}).get("num_drawn"),
                gains=[float((row.target_logp - row.base_logp).mean(dtype=np.float64)) for row in own],
                exposures=exposures,
                pool=pool,
            )
        )
    return scored


def _exposures(canary: Canary, own: DocumentSignals, references: Sequence[DocumentSignals]) -> dict[str, Exposure]:
    """Return exposures under the target and under the base, by the log-likelihood of the whole text.

    Args:
        canary: whose secret has ten to the power of its digits alternatives.
        own: its signals.
        references: signals of secrets that were not planted.
    """
    digits = sum(letter.isdigit() for letter in canary.secret)
    # References are a sample, unless all other digits were scored; only from a sample is there anything to extrapolate.
    is_sample = canary.has_shared_references or len(references) + 1 < 10**digits
    by_model = {}
    for model in MODELS:
        name = "target_logp" if model == "tuned" else "base_logp"
        by_model[model] = exposure(float(_logps([own], name)[0]), _logps(references, name), extrapolate=is_sample)
    return by_model


def _logps(rows: Sequence[DocumentSignals], name: str) -> FloatArray:
    """Return the log-likelihood of each whole text, from the per-token column ``name``."""
    return np.array([getattr(row, name).sum(dtype=np.float64) for row in rows])


def _by_tier(scored: Sequence[Scored]) -> dict[int | str, list[Scored]]:
    """Return canaries by the number of records that hold their secret; changed users, who differ in it, under "all"."""
    groups: dict[int | str, list[Scored]] = collections.defaultdict(list)
    for item in scored:
        groups["all" if item.canary.kind == SHARED_SUBSTRING else item.canary.repetitions].append(item)
    # Padded with zeros numbers sort as numbers, and "all" comes last.
    return dict(sorted(groups.items(), key=lambda group: str(group[0]).zfill(9)))


def _row(tier: int | str, group: Sequence[Scored]) -> dict[str, Any]:
    """Return the table's row for the canaries of one tier, that is one number of records with the secret."""
    inside = [item for item in group if item.is_held_in]
    outside = [item for item in group if not item.is_held_in]
    drawn = [item.num_drawn for item in inside if item.num_drawn is not None]
    # Exposures, in bits, of the canaries that have references.
    exposed_inside = [item for item in inside if item.exposures]
    tuned = [item.exposures["tuned"] for item in exposed_inside]
    base = [item.exposures["base"] for item in exposed_inside]
    tuned_outside = [item.exposures["tuned"] for item in outside if item.exposures]
    of_all = [item.exposures["tuned"] for item in group if item.exposures]
    row: dict[str, Any] = {
        "tier": tier,
        "num_held_in": len(inside),
        "num_held_out": len(outside),
        "drawn": float(np.median(drawn)) if drawn else None,
        "exposure": _mean([one.bits for one in tuned]),
        "exposure_base": _mean([one.bits for one in base]),
        "exposure_held_out": _mean([one.bits for one in tuned_outside]),
        "exposure_expected": _mean([null_mean(one.num_secrets) for one in of_all]),
        "extrapolated": _mean([one.extrapolated_bits for one in tuned if one.extrapolated_bits is not None]),
    }
    if tuned:
        ends = _interval_of_exposure(exposed_inside)
        row["exposure_interval"] = f"{ends.lower:.2f} to {ends.upper:.2f}"
        top = sum(one.bits == math.log2(one.num_secrets) for one in tuned)  # the exposure of rank one
        interval = _interval_of_top_ranks(exposed_inside, top)
        row["top_rank"] = f"{top} of {len(tuned)} ({interval.lower:.0%} to {interval.upper:.0%})"
    if min(len(inside), len(outside)) >= 2:
        gains_inside = np.array([item.gain for item in inside])
        gains_outside = np.array([item.gain for item in outside])
        interval = statistics.delong_interval(gains_inside, gains_outside)
        row["auroc"] = statistics.auroc(gains_inside, gains_outside)
        row["auroc_interval"] = f"{interval.lower:.3f} to {interval.upper:.3f}"
    return row


def _interval_of_exposure(group: Sequence[Scored]) -> statistics.Interval:
    """Return the confidence interval of the mean exposure of a group of canaries.

    Where the canaries share their references, the references' luck is in the interval as well.
    """
    pools = [item.pool for item in group if item.pool is not None]
    if pools:  # the last entry of a pool is its canary
        outranked = np.array([pool[:-1] >= pool[-1] for pool in pools])
        return statistics.mean_exposure_interval(outranked)
    bits = [item.exposures["tuned"].bits for item in group]
    most = max(math.log2(item.exposures["tuned"].num_secrets) for item in group)
    return statistics.bounded_mean_interval(np.array(bits), 0.0, most)


def _interval_of_top_ranks(group: Sequence[Scored], top: int) -> statistics.Interval:
    """Return the confidence interval of the share of canaries at rank one, of which there are ``top``.

    Where canaries share their references, rank one is a threshold estimated from those, whose luck counts as well.
    """
    pools = [item.pool for item in group if item.pool is not None]
    if pools:
        references = pools[0][:-1]  # the same in every pool, whose last entry is its canary
        return statistics.rate_interval(np.array([pool[-1] for pool in pools]), references, num_allowed=0)
    return statistics.clopper_pearson(top, len(group))


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean, or None of none."""
    return float(np.mean(values)) if values else None


def _control(exposed: Sequence[Scored]) -> dict[str, Any] | None:
    """Return the mean exposure of held-out canaries, its known expectation, and a two-sided p-value of the difference.

    None without held-out canaries. A small p-value says that canaries and references were not drawn alike.
    """
    outside = [item for item in exposed if not item.is_held_in]
    if not outside:
        return None
    values = [item.exposures["tuned"] for item in outside]
    nums = tuple(one.num_secrets for one in values)
    expected = float(np.mean([null_mean(num) for num in nums]))
    observed = float(np.mean([one.tied_bits for one in values]))
    # Means that chance gives: the p-value is twice the share at least as far on the nearer side.
    drawn = null_means(nums, is_shared=any(item.canary.has_shared_references for item in outside))
    num_above, num_below = np.count_nonzero(drawn >= observed - 1e-9), np.count_nonzero(drawn <= observed + 1e-9)
    p_value = min(1.0, 2.0 * (1 + min(num_above, num_below)) / (1 + drawn.size))
    return {"num": len(values), "mean_bits": observed, "expected_bits": expected, "p_value": p_value}


def _summary(rows: Sequence[dict[str, Any]], scored: Sequence[Scored]) -> str:
    """Return how many canaries there are, and the tier with the highest exposure."""
    num_in = sum(item.is_held_in for item in scored)
    start = f"{len(scored)} canary users, of whom coins let {num_in} into training."
    exposed = [row for row in rows if row["exposure"] is not None]
    if not exposed:
        return start
    best = max(exposed, key=lambda row: row["exposure"])
    return (
        f"{start} Secrets in {best['tier']} record{'s' * (best['tier'] != 1)} have a mean exposure of "
        f"{best['exposure']:.2f} bits, where {best['exposure_expected']:.2f} is what untrained secrets have."
    )


def _notes(scored: Sequence[Scored], exposed: Sequence[Scored]) -> list[str]:
    """Return the sentences below the table; ``exposed`` are the canaries that have references, so an exposure."""
    notes = ["These are results for planted users, who are more distinct than people; they speak for nobody else."]
    drawn = [item.num_drawn for item in scored if item.is_held_in and item.num_drawn is not None]
    if 0 in drawn:
        notes.append(f"{drawn.count(0)} held-in canaries were never drawn by the sampling; they count as held in.")
    if not exposed:
        return notes
    sizes = sorted({item.exposures["tuned"].num_secrets for item in exposed})
    counts = " to ".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
    notes.append(
        f"Exposure is log2 N - log2 rank by the log-likelihood of the text, N = {counts} secrets, "
        f"so at most {math.log2(sizes[-1]):.1f} bits; on a tie the other secret ranks first."
    )
    control = _control(exposed)
    if control is not None:
        notes.append(
            f"Control: the mean over {control['num']} held-out canaries, ties averaged, is {control['mean_bits']:.2f} "
            f"bits where {control['expected_bits']:.2f} is expected (p = {control['p_value']:.2g})."
        )
    p_values = [item.exposures["tuned"].fit_p_value for item in exposed]
    fits = [p_value for p_value in p_values if p_value is not None]  # None: too few references for a fit
    if fits:
        num_refused = sum(p_value < FIT_SIGNIFICANCE for p_value in fits)
        notes.append(
            f"Extrapolation by a skew-normal law fitted to half of the references: a Kolmogorov-Smirnov test on the "
            f"other half refused {num_refused} of {len(fits)} fits at 5 % (smallest p = {min(fits):.2g}); refused ones "
            "are left out."
        )
    return notes


def _figure(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the bar chart of mean exposure by tier."""
    names = [f"{row['tier']}×" for row in rows]
    series = {"exposure": "held-in", "exposure_base": "held-in, base model", "exposure_held_out": "held-out"}
    return {
        "kind": "bar",
        "x_label": "records with the secret",
        "y_label": "mean exposure, bits",
        "caption": "Mean exposure of planted secrets by the number of records that hold them.",
        "series": [{"label": label, "x": names, "y": [row[key] for row in rows]} for key, label in series.items()],
    }
