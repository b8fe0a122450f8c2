"""The audit of a scored run: which coins there are, what is claimed for them, and the panel of the report.

A coin decided before training whether a unit went in. There are up to three sources of coins:

* Users of the sealed split: heads with chance 1 - held_out_fraction. Their score is how much likelier fine-tuning made
  the user's own records that training could use (or, where none were scored, the fresh ones). With shadow models it is
  the score that tells best whom those were trained on.
* Canary users, invented and planted, with a fair coin.
* Gradient canaries, looked for in the noised sums (:mod:`attacks.analysis.audit.white_box`).

What a coin moved is one unit with all its records, in or out, while everybody else stays: that is add-or-remove-one.
Under zero-out it is the same move, because a place without a unit contributes nothing in every sampling scheme of the
trainer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attacks import signals
from attacks.analysis import registry, shadow_models, verdict
from attacks.analysis.audit import white_box
from attacks.analysis.audit.evaluate import SIGNIFICANCE, Claim, Finding, audit, epsilon_ceiling
from attacks.analysis.audit.guesses import GUESS_SHARES, TOP_SHARES, Coins
from attacks.analysis.audit.independent import Separation
from attacks.analysis.audit.power import DELTAS, NUM_COINS
from attacks.analysis.features import Scored
from attacks.analysis.lift import lift
from attacks.analysis.protocol import UnderOtherModels
from attacks.analysis.statistics import CurveBound, DpBound
from attacks.errors import AttackInputError
from attacks.reporting.panels import scientific
from attacks.reporting.record import Scoring
from privtrain.run.statement import PrivacyStatement

NATURAL = "users of the sealed split"
CANARIES = "canary users"


def audit_run(
    scoring: Scoring,
    statement: PrivacyStatement,
    scored: Scored,
    models: Mapping[str, UnderOtherModels | None],
    cap: verdict.Cap,
    seed: int,
    confounded_by: str,
    delta: float | None = None,
) -> list[Finding]:
    """Audit every source of coins that the run has.

    Args:
        scoring: the record of the run's signals.
        statement: the run's privacy statement.
        scored: the users of the split and their documents' scores.
        models: kind of document to its scores under shadow models; None without any.
        cap: what the statement allows an attack on the users of the split.
        seed: of the random choices that make coins fair and order ties.
        confounded_by: how the sides of the split differ without any model; empty if they do not. Canaries are alike by
            their making, so it concerns the users alone.
        delta: at which claims are compared; the statement's if None.

    Raises:
        AttackInputError: if the mechanism certifies nothing at that delta.
    """
    possible = [
        natural_coins(scoring.facts["prob_held_in"], scored, models),
        canary_coins(scoring, statement),
        white_box.gradient_coins(scoring.run, statement),
    ]
    sources = [coins for coins in possible if coins is not None]
    findings = []
    for coins in sources:
        is_natural = coins.name == NATURAL
        cap_of_source = cap if is_natural else cap_of(statement, coins)
        claim = claim_of(statement, cap_of_source, coins.unit)
        if delta is not None:
            claim = _at_delta(claim, statement, delta)
        finding = audit(
            coins,
            claim,
            statement.delta if delta is None else delta,
            seed=seed,
            num_sources=len(sources),
            confounded_by=confounded_by if is_natural else "",
        )
        findings.append(finding)
    return findings


def natural_coins(prob_in: float | None, scored: Scored, models: Mapping[str, UnderOtherModels | None]) -> Coins | None:
    """Return the users of the sealed split who were scored; None where they had no coin.

    Whether a user is attacked depends on their number of records, never on the coin. So leaving users out does not
    change the law of the others' coins.

    Args:
        prob_in: chance that a user was held in; None where all or none are, so that nobody had a coin.
        scored: users and their documents' scores.
        models: kind of document to its scores under shadow models; with them the score is chosen that tells best whom
            the shadow models were trained on.
    """
    if prob_in is None:
        return None
    # Both scores are the mean gain per token, log p_target - log p_base: of training documents, else of fresh ones.
    kind, name = signals.TRAINING, "ratio"
    if name not in scored.documents[kind].scores:
        kind, name = signals.FRESH, "token_mean"
    table, of_documents = scored.documents[kind], models[kind]
    gains_of_all = lift(table.scores[name], table.owner, len(scored.users))
    known = ~np.isnan(gains_of_all)  # users with such documents
    if not known.any():
        return None
    gains = gains_of_all[known]
    chosen = shadow_models.Chosen(shadow_models.GAIN, gains)
    if of_documents is not None:
        of_users, _ = shadow_models.by_user(of_documents, table.owner, len(scored.users))
        # The gain is target - base, so target - gain is the base's own log-probability.
        base = of_users.target - gains
        chosen = shadow_models.strongest(of_users, base, registry.reference_attacks())
    is_in = scored.is_held_in[known]
    return Coins(chosen.values, is_in, prob_in=prob_in, unit="user", name=NATURAL, score=str(chosen))


def canary_coins(scoring: Scoring, statement: PrivacyStatement) -> Coins | None:
    """Return the planted canary users, each scored by the gain in log-probability of its texts; None without any.

    Where the guarantee is per example, a canary that owns one record is an example, and only such canaries are read.
    """
    columns = ["user", "side", "user_num_records", "target_logp", "base_logp"]
    rows = scoring.columns(columns, signals.CANARY).to_pylist()
    if not rows:
        return None
    unit = "user"
    of_one_record = [row for row in rows if row["user_num_records"] <= 1]
    if statement.unit == "example" and of_one_record:
        unit, rows = "example", of_one_record
    gains: dict[str, list[float]] = {}  # canary → gain of each of its texts
    side_of: dict[str, str] = {}
    for row in rows:
        gain = np.asarray(row["target_logp"], np.float64) - np.asarray(row["base_logp"], np.float64)
        if gain.size > 1:
            gain = gain[:-1]  # the end mark is no part of the secret, and every record teaches it
        gains.setdefault(row["user"], []).append(float(np.mean(gain)))
        side_of[row["user"]] = row["side"]
    users = sorted(gains)
    return Coins(
        np.array([float(np.mean(gains[user])) for user in users]),
        np.array([side_of[user] == signals.HELD_IN for user in users], dtype=np.bool_),
        prob_in=0.5,
        unit=unit,
        name=CANARIES,
        most_records=max(row["user_num_records"] for row in rows),
        score=shadow_models.GAIN,
    )


def cap_of(statement: PrivacyStatement, coins: Coins) -> verdict.Cap:
    """Return what the run promises for these units.

    A guarantee per record covers a user less, the more records they own: it holds by group privacy over the most that
    any of these units has.
    """
    return verdict.Cap.of(statement, coins.most_records)


def claim_of(statement: PrivacyStatement, cap: verdict.Cap, unit: str) -> Claim:
    """Return what the run promises in the coins' unit.

    Args:
        statement: the run's privacy statement.
        cap: its guarantee converted to users; read only if ``unit`` is the user.
        unit: ``"user"`` or ``"example"``.
    """
    if unit == verdict.ATTACKED_UNIT:
        if cap.bound is None or cap.reason:
            return Claim(pair=None, curve=None, reason=cap.reason, is_made=not cap.claims_nothing)
        # The stated pair is one more point of the curve.
        curve = None if cap.curve is None else CurveBound((*cap.curve.points, cap.bound), cap.curve.source)
        return Claim(pair=cap.bound, curve=curve, reason=cap.conversion)
    if math.isinf(statement.effective_epsilon):
        return Claim(pair=None, curve=None, reason="the run is not private, so it claims nothing", is_made=False)
    pair = DpBound(statement.effective_epsilon, statement.delta)
    if statement.unit == unit:
        return Claim(pair=pair, curve=None, reason="")
    from accountants.units import group_delta_of

    # A guarantee for users, asked for one record: a user with a record more or less is one user out and another one in.
    epsilon, delta = group_delta_of(pair.epsilon, pair.delta, 2)
    converted = DpBound(epsilon, min(delta, 1.0))
    return Claim(pair=converted, curve=None, reason="a user with one record more or less is two steps away")


def _at_delta(claim: Claim, statement: PrivacyStatement, delta: float) -> Claim:
    """Return the claim with its pair taken at the audit's own delta; the curve stays, as it holds at every delta.

    A claim's pair is the (epsilon, delta) promised in the unit of the coins; its curve is further certified points.

    Raises:
        AttackInputError: if nothing certifies an epsilon at that delta.
    """
    if claim.pair is None or math.isinf(claim.pair.epsilon):
        return claim  # no promise to move
    # A smaller delta takes the accountant, which knows the mechanism in the statement's unit only. A pair that was
    # converted to another unit (by group privacy, see claim_of) cannot be recomputed from it.
    is_stated = claim.pair == DpBound(statement.effective_epsilon, statement.delta)
    if delta >= claim.pair.delta:
        epsilon = claim.pair.epsilon  # a guarantee at a smaller delta implies the same epsilon at a larger one
    else:
        epsilon = verdict.epsilon_at(statement, delta) if is_stated else None
    if epsilon is None:
        raise AttackInputError(
            f"--audit-delta {delta:g}: nothing certifies an epsilon at it for this mechanism and unit; expected at "
            f"least the claim's {claim.pair.delta:g}, or leave it out"
        )
    return Claim(DpBound(epsilon, delta), claim.curve, claim.reason)


def panel(findings: Sequence[Finding]) -> dict[str, Any] | None:
    """Return the findings as a panel of the report (:mod:`attacks.reporting.panels`); None without any coins."""
    if not findings:
        return None
    # The gravest verdict; of several the one with the largest bound, then with the largest ceiling.
    decisive = max(findings, key=lambda one: (_ORDER.index(one.verdict), one.epsilon, one.epsilon_ceiling))
    return {
        "title": "Audit: lower bounds on ε",
        "summary": " ".join(_sentence(finding) for finding in findings),
        "verdict": str(decisive.verdict),
        "verdict_reason": decisive.verdict_reason,
        "columns": [
            {"key": "coins", "label": "coins"},
            {"key": "access", "label": "the attacker saw"},
            {"key": "method", "label": "method"},
            {"key": "lower_bound", "label": "ε at least"},
            {"key": "ceiling", "label": "ceiling"},
            {"key": "claimed", "label": "claimed ε"},
            {"key": "delta", "label": "δ"},
            {"key": "counts", "label": "right / guesses / coins"},
            {"key": "decides", "label": "decides"},
            {"key": "verdict", "label": "verdict"},
        ],
        "rows": [row for finding in findings for row in _rows(finding)],
        "notes": _notes(findings),
        "figure": _figure(findings),
    }


# Of several findings the panel shows the verdict that stands last here.
_ORDER = (
    verdict.Verdict.NO_CLAIM,
    verdict.Verdict.UNINFORMATIVE,
    verdict.Verdict.CONSISTENT,
    verdict.Verdict.CONFOUNDED,
    verdict.Verdict.FALSIFIED,
)


def _ceilings(finding: Finding) -> str:
    """Return the note on one finding: the largest bound its coins could have shown, for several deltas."""
    ceilings = {delta: epsilon_ceiling(finding.num_coins, delta, finding.significance) for delta in DELTAS}
    shown = "; ".join(f"{ceiling:.3g} at δ = {scientific(delta)}" for delta, ceiling in ceilings.items())
    return (
        "The δ of the audit decides what it can show, since the theorem pays 2 m δ for m coins. With "
        f"{finding.num_coins} coins of {finding.name} the ceiling is {shown}. This audit compares at δ = "
        f"{scientific(finding.delta)}; the claim's own is the default, and attacks analyse --audit-delta chooses "
        "another, at which the claim is worth another ε."
    )


def _figure(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the ceiling by number of coins, for the audit's delta and for others."""
    first = findings[0]  # the curves are drawn for its delta and its error
    deltas = sorted({first.delta, *DELTAS} - {0.0}, reverse=True)
    return {
        "kind": "line",
        "x_label": "coins",
        "x_scale": "log",
        "y_label": "largest ε that could be shown",
        "caption": "Had every guess been right: the largest lower bound on ε, by number of coins and δ of the audit.",
        "series": [
            {
                "label": f"δ = {scientific(delta)}" + " (this audit)" * (delta == first.delta),
                "x": list(NUM_COINS),
                "y": [epsilon_ceiling(count, delta, first.significance) for count in NUM_COINS],
            }
            for delta in deltas
        ],
    }


def _sentence(finding: Finding) -> str:
    """Return the summary of one finding: its bound, and the largest that its coins could have shown."""
    return (
        f"{finding.name[0].upper()}{finding.name[1:]}: ε ≥ {finding.epsilon:.3g} per {finding.unit} "
        f"at δ = {scientific(finding.delta)}; {finding.num_coins} coins could have shown at most "
        f"{finding.epsilon_ceiling:.3g}."
    )


def achieved(findings: Sequence[Finding]) -> list[str]:
    """Return one sentence for each source of coins whose right guesses are more than chance explains."""
    return [
        f"Of {finding.num_coins} {finding.name} {finding.counts} were right; so ε per {finding.unit} is at least "
        f"{finding.epsilon:.3g} at δ = {scientific(finding.delta)}."
        for finding in findings
        if finding.epsilon > 0.0 and finding.verdict is not verdict.Verdict.CONFOUNDED
    ]


def _rows(finding: Finding) -> list[dict[str, Any]]:
    """Return one table row for each method that bounds this source of coins."""
    pair = finding.claim.pair
    common = {
        "coins": finding.name,
        "access": finding.access,
        "unit": finding.unit,
        "claimed": None if pair is None else pair.epsilon,
        "delta": finding.delta,
        "num_coins": finding.num_coins,
    }
    counts = f"{finding.counts.num_correct} / {finding.counts.num_guesses} / {finding.num_coins}"
    rows = [
        {
            **common,
            "method": "one run",
            "lower_bound": finding.epsilon,
            "ceiling": finding.epsilon_ceiling,
            "confidence": 1.0 - finding.significance,
            "counts": counts,
            "decides": True,
            "verdict": str(finding.verdict),
        }
    ]
    if finding.curve_p_value is not None:
        rows.append(
            {
                **common,
                "method": f"one run, the claimed curve: p = {finding.curve_p_value:.2g}",
                "p_value": finding.curve_p_value,
                "smallest_possible_p_value": finding.curve_p_floor,
                "lower_bound": None,
                "ceiling": None,
                "confidence": 1.0 - finding.significance,
                "decides": True,
                "verdict": str(finding.verdict),
            }
        )
    if finding.separation is not None:
        rows.append(_separation_row(finding, finding.separation, common))
    for method, bound, ceiling in (
        ("one run, tied to a Gaussian curve", finding.gaussian_epsilon, finding.gaussian_ceiling),
        ("Clopper-Pearson, scores independent", finding.clopper_epsilon, finding.clopper_ceiling),
    ):
        rows.append(
            {
                **common,
                "method": method,
                # At delta 0 a Gaussian curve has no epsilon.
                "lower_bound": bound if math.isfinite(bound) else None,
                "ceiling": ceiling if math.isfinite(ceiling) else None,
                "confidence": 1.0 - SIGNIFICANCE,
                "decides": False,
            }
        )
    return rows


def _separation_row(finding: Finding, separation: Separation, common: dict[str, Any]) -> dict[str, Any]:
    """Return the row of the AUROC test of independent scores; ``common`` holds the fields that all rows share."""
    allowed = "" if separation.auroc_cap is None else f", claim allows {separation.auroc_cap:.4f}"
    return {
        **common,
        "method": f"independent scores: AUROC at least {separation.auroc_lower:.4f}{allowed}",
        "auroc_lower": separation.auroc_lower,
        "auroc_cap": separation.auroc_cap,
        "lower_bound": separation.epsilon if math.isfinite(separation.epsilon) else None,
        "ceiling": separation.epsilon_ceiling if math.isfinite(separation.epsilon_ceiling) else None,
        "confidence": 1.0 - finding.significance,
        "decides": True,
        "verdict": str(finding.verdict),
    }


def _notes(findings: Sequence[Finding]) -> list[str]:
    """Return the sentences below the table: what each method assumes, then what is particular to each source."""
    both, top = (", ".join(f"{share:g}" for share in shares) for shares in (GUESS_SHARES, TOP_SHARES))
    notes = [
        f"The deciding tests hold together at {1.0 - SIGNIFICANCE:.0%} confidence: the error is shared equally between "
        f"sources of coins, the two tests, and the declared guesses ({both} of the coins on both sides; {top} of them, "
        "those with the highest scores, as in and none as out). A bound of 0 says that this attack showed nothing; the "
        "ceiling is what these coins had shown if every guess were right.",
        "One run: Steinke, Nasr and Jagielski 2023. A coin moved one unit in or out of training with everything that "
        "belongs to it, while the others stayed: add-or-remove-one and zero-out. Scores may depend on each other.",
        "Tied to a Gaussian curve (Mahloujifar, Melis and Chaudhuri 2024): it contradicts this Gaussian and is no "
        "assumption-free ε. Clopper-Pearson takes units as scored independently, which one training run does not "
        "promise. Neither decides.",
    ]
    if any(finding.separation is not None for finding in findings):
        notes.append(
            "Independent scores (Andrew et al. 2023, arXiv 2302.03098, section 3): directions of canaries are drawn "
            "independently in a dimension much larger than their number, so their inner products with the noised sums "
            "are independent. That alone decides, by the AUROC that the claimed curve allows. The ε in that row is "
            "tied to a Gaussian curve. These canaries were looked for in the noised sums that the owner kept; whoever "
            "has the released model alone sees less."
        )
    for finding in findings:
        if finding.score:
            notes.append(f"The score of {finding.name}: {finding.score}.")
        notes.append(_ceilings(finding))
        if finding.num_coins < finding.num_flipped:
            notes.append(
                f"Of {finding.num_flipped} {finding.name} {finding.num_coins} remain after some of the commoner side "
                "were dropped at random: the theorem needs fair coins."
            )
        if finding.claim.pair is not None and finding.claim.reason:
            notes.append(f"{finding.claim.reason[0].upper()}{finding.claim.reason[1:]}.")
    return notes
