"""Everything that is said about one statistic: how well its scores separate held-in from held-out units.

Held-in users were trained on, held-out users were not; a higher score is more member-like.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from attacks import signals
from attacks.analysis import statistics, verdict
from attacks.analysis.arrays import FloatArray

TARGET_FPRS = (0.001, 0.01, 0.05, 0.10)

_NUM_SECONDARY_RESAMPLES = 1000
_MAX_BAND_POINTS = 100
_MAX_BINS = 30


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One score per unit (user or record) by one attack.

    Attributes:
        name: unique in the report.
        definition: one line for the report.
        documents: ``"fresh"`` or ``"training"``: which documents' likelihood was read.
        unit: ``"user"`` or ``"record"``.
        held_in: [held-in units] scores.
        held_out: [held-out units] scores.
        owners: user numbers of the held-in and of the held-out records; None where the unit is the user.
        is_detailed: whether it gets a curve and a histogram, and the full number of resamples.
    """

    name: str
    definition: str
    documents: str
    unit: str
    held_in: FloatArray
    held_out: FloatArray
    owners: tuple[np.ndarray, np.ndarray] | None = None
    is_detailed: bool = False

    @property
    def is_constant(self) -> bool:
        """Whether all units have the same value."""
        return bool(np.ptp(np.concatenate([self.held_in, self.held_out])) == 0.0)

    @property
    def num_users(self) -> tuple[int, int]:
        """Users behind each side."""
        if self.owners is None:
            return self.held_in.size, self.held_out.size
        owners_in, owners_out = self.owners
        return np.unique(owners_in).size, np.unique(owners_out).size


def evaluate(
    statistic: Statistic,
    cap: verdict.Cap,
    seed: int,
    confounded_by: str,
    verdict_level: float = statistics.CONFIDENCE_LEVEL,
) -> dict[str, Any]:
    """Return what the report says of one statistic: AUROC, intervals, p-value, operating points and the verdict.

    Args:
        statistic: scores of both sides.
        cap: what the run's guarantee allows.
        seed: of the bootstrap.
        confounded_by: how the sides differ without any model; empty if they do not.
        verdict_level: confidence level of the verdict alone, higher where many statistics are judged. Reported
            intervals keep the usual level.
    """
    held_in, held_out = statistic.held_in, statistic.held_out
    num_resamples = statistics.NUM_RESAMPLES if statistic.is_detailed else _NUM_SECONDARY_RESAMPLES
    bootstrap = statistics.bootstrap_interval(
        held_in, held_out, owners=statistic.owners, seed=seed, num_resamples=num_resamples
    )
    area = statistics.auroc(held_in, held_out)
    # The verdict reads the lower end alone: the bootstrap's, extended to the verdict's level, with that level's floors.
    judged = dataclasses.replace(bootstrap, lower=bootstrap.lower_at(verdict_level, area))
    judged = judged.no_narrower_than(statistics.perfect_separation(*statistic.num_users, verdict_level))
    p_value = statistics.auroc_p_value(held_in, held_out, statistic.owners)
    if p_value > (1.0 - verdict_level) / 2.0:  # the test does not exclude an AUROC of 1/2, so the interval must hold it
        judged = dataclasses.replace(judged, lower=min(judged.lower, 0.5))
    outcome, reason = verdict.judge(
        cap,
        judged,
        *statistic.num_users,
        is_constant=statistic.is_constant,
        confounded_by=confounded_by,
        level=verdict_level,
    )
    facts: dict[str, Any] = {
        "definition": statistic.definition,
        "documents": statistic.documents,
        "unit": statistic.unit,
        "num_held_in": int(held_in.size),
        "num_held_out": int(held_out.size),
        "auroc": area,
        "bootstrap": {
            "interval": [bootstrap.lower, bootstrap.upper],
            "method": "BCa, users resampled within each side",
            "num_resamples": num_resamples,
        },
        "p_value": p_value,
        "warnings": _warnings(bootstrap, is_constant=statistic.is_constant),
        "verdict": str(outcome),
        "verdict_reason": reason,
        "verdict_level": verdict_level,
        "verdict_lower": judged.lower,
        "tpr_at_fpr": operating_points(statistic, cap, seed),
    }
    if statistic.owners is None:
        # DeLong's interval takes the units as independent; records of one user are not.
        delong = statistics.delong_interval(held_in, held_out)
        variance = statistics.delong_variance(held_in, held_out)
        facts["delong"] = {"interval": [delong.lower, delong.upper], "method": "logit", "variance": variance}
    if statistic.is_detailed:
        facts |= {"roc": _roc(held_in, held_out, cap), "histogram": histogram(held_in, held_out)}
    return facts


def compare(statistic: Statistic, headline: Statistic) -> dict[str, Any]:
    """Return the AUROC of one statistic less that of the headline on the same users, by paired DeLong."""
    ours, theirs = (statistic.held_in, statistic.held_out), (headline.held_in, headline.held_out)
    difference = statistics.paired_difference(ours, theirs)
    ends = [difference.interval.lower, difference.interval.upper]
    return {"difference": difference.difference, "interval": ends, "p_value": difference.p_value}


def correct_for_multiplicity(results: dict[str, dict[str, Any]], headline: str) -> int:
    """Add ``p_holm`` beside every p-value but the headline's, declared beforehand; return the number of p-values.

    Paired differences from the headline are tests too.
    """
    family = [result for name, result in results.items() if name != headline]
    family += [result["less_headline"] for result in family if "less_headline" in result]
    for facts, value in zip(family, statistics.holm([facts["p_value"] for facts in family]), strict=True):
        facts["p_holm"] = float(value)
    return len(family)


def _warnings(bootstrap: statistics.Interval, *, is_constant: bool) -> list[str]:
    """Return sentences that a reader must know before the AUROC."""
    warnings = []
    if is_constant:
        warnings.append("All users have the same value: was the base model scored against itself?")
    if bootstrap.upper < 0.5:
        warnings.append(
            "The whole interval lies below 1/2. That is not privacy: the two sides differ. "
            "Look for exchanged labels or for documents processed differently on the two sides."
        )
    return warnings


def operating_points(statistic: Statistic, cap: verdict.Cap, seed: int) -> list[dict[str, object]]:
    """Return the true positive rate at each false positive rate of ``TARGET_FPRS``, with interval and cap.

    Records of one user rise and fall together, so of records only one of each user counts, drawn at random.
    """
    held_in, held_out = statistic.held_in, statistic.held_out
    if statistic.owners is not None:
        rng = np.random.default_rng(seed)
        owners_in, owners_out = statistic.owners
        held_in = _one_of_each(held_in, owners_in, rng)
        held_out = _one_of_each(held_out, owners_out, rng)
    points: list[dict[str, object]] = []
    for target in TARGET_FPRS:
        point = statistics.tpr_at_fpr(held_in, held_out, target)
        allowed = point.num_false_positives_allowed
        points.append(
            {
                "target_fpr": point.target_fpr,
                "is_resolved": point.is_resolved,
                "num_false_positives": point.num_false_positives,
                "num_held_out": point.num_held_out,
                "achieved_fpr": point.achieved_fpr,
                "num_true_positives": point.num_true_positives,
                "num_held_in": point.num_held_in,
                "tpr": point.tpr,
                "tpr_interval": [point.tpr_interval.lower, point.tpr_interval.upper],
                "tpr_cap": cap.tpr(allowed, point.num_held_out),
            }
        )
    return points


def _one_of_each(scores: FloatArray, owners: np.ndarray, rng: np.random.Generator) -> FloatArray:
    """Return one score of each owner, drawn at random from the owner's scores."""
    order = rng.permutation(scores.size)
    _, first_of_owner = np.unique(owners[order], return_index=True)
    return scores[order[first_of_owner]]


def _roc(held_in: FloatArray, held_out: FloatArray, cap: verdict.Cap) -> dict[str, object]:
    """Return the corners of the ROC, and on a thinned grid of false positive counts its confidence band and the cap."""
    # Counts 0, 1, 2, … up to all, evenly spaced in logarithms: small false positive rates matter most.
    exponents = np.linspace(0.0, 1.0, _MAX_BAND_POINTS)
    num_allowed = np.unique(np.concatenate([[0], np.round(held_out.size**exponents)])).astype(int)
    allowed = num_allowed[num_allowed < held_out.size].tolist()
    band = [statistics.rate_interval(held_in, held_out, count) for count in allowed]
    thresholds = np.sort(held_out)[::-1]
    fpr_corners, tpr_corners = statistics.roc_points(held_in, held_out)
    return {
        "corners": {"fpr": fpr_corners.tolist(), "tpr": tpr_corners.tolist()},
        "num_false_positives_allowed": allowed,
        "tpr": [float((held_in > thresholds[count]).mean()) for count in allowed],
        "band_lower": [ends.lower for ends in band],
        "band_upper": [ends.upper for ends in band],
        "band_method": "pointwise, exact in the luck of both sides",
        "tpr_cap": None if cap.bound is None else [cap.tpr(count, held_out.size) for count in allowed],
    }


def histogram(held_in: FloatArray, held_out: FloatArray) -> dict[str, object]:
    """Return counts of users by value, the two sides on common bins."""
    values = np.concatenate([held_in, held_out])
    # A width of 1, 2 or 5 times a power of ten, and edges at its multiples: otherwise the outer edges would be the
    # exact values of two users.
    least_width = max(float(np.ptp(values)) / _MAX_BINS, 1e-9)
    power = 10.0 ** math.floor(math.log10(least_width))
    wide_enough = [step * power for step in (1.0, 2.0, 5.0, 10.0) if step * power >= least_width * (1.0 - 1e-9)]
    width = wide_enough[0]
    first, last = math.floor(values.min() / width), math.floor(values.max() / width) + 1
    edges = np.arange(first, last + 1) * width
    counts_in, _ = np.histogram(held_in, edges)
    counts_out, _ = np.histogram(held_out, edges)
    return {"edges": edges.tolist(), signals.HELD_IN: counts_in.tolist(), signals.HELD_OUT: counts_out.tolist()}
