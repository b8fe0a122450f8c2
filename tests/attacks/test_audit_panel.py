"""From a scored run to the audit's panel: which coins, which claim, and what the run's verdict makes of it."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

from attacks import rundir, signals
from attacks.analysis import analyse, verdict
from attacks.analysis.audit import panel
from attacks.analysis.audit.evaluate import Claim, audit
from attacks.analysis.audit.guesses import Coins
from attacks.analysis.statistics import DpBound
from attacks.analysis.verdict import Verdict
from attacks.errors import AttackInputError
from attacks.reporting import report
from attacks.reporting.record import read_scoring
from privtrain.run.directory import RunDirectory
from tests.attacks.conftest import STATEMENT, build_rows, put_signals


def facts_of(run):
    found = analyse.analyse_run(run)
    return found, found["panels"]["audit"]


def test_a_leaking_run_is_falsified_with_its_ceiling_beside(make_run):
    run = make_run(60, shift=0.5, epsilon=1.0, delta=1e-5)
    facts, audit = facts_of(run)
    assert audit["verdict"] == facts["verdict"] == "falsified"
    first = audit["rows"][0]
    assert first["method"] == "one run"
    assert 1.0 < first["lower_bound"] <= first["ceiling"]
    assert [row["decides"] for row in audit["rows"]] == [True, True, False, False]
    assert "tied to a Gaussian" in audit["rows"][2]["method"]
    report.write_report(run)
    for path in (report.INDEX_PATH, report.MARKDOWN_PATH):
        text = (run / path).read_text()
        assert "lower bounds on ε" in text
        assert "no assumption-free ε" in text


def test_a_quiet_run_is_consistent_or_could_not_tell(make_run):
    assert facts_of(make_run(60, shift=0.0, epsilon=1.0, name="a"))[1]["verdict"] == "consistent"
    assert facts_of(make_run(60, shift=0.0, epsilon=7.99, name="b"))[1]["verdict"] in ("consistent", "uninformative")
    assert facts_of(make_run(4, shift=0.5, epsilon=1.0, name="c"))[1]["verdict"] == "uninformative"


def test_source_that_could_have_shown_most_gives_the_reason():
    claim, found = Claim(DpBound(9.0, 1e-5), None, ""), []
    for num in (12, 64):
        coins = Coins(np.zeros(num) + np.arange(num) % 2, np.arange(num) % 4 < 2, 0.5, "user", f"{num} users")
        found.append(audit(coins, claim, 1e-5, seed=0, num_sources=2))
    shown = panel.panel(found)
    assert shown["verdict"] == "uninformative"
    assert "with 64 coins" in shown["verdict_reason"]
    assert "at δ = 1e-5;" in shown["summary"]


def test_a_confounded_split_is_not_audited_into_a_verdict(make_run):
    facts, audit = facts_of(make_run(60, rich=True, shifted=True, shift=0.5, epsilon=1.0))
    assert audit["verdict"] == facts["verdict"] == "confounded"


def test_without_the_coins_probability_there_is_no_audit(make_run):
    run = make_run(10, prob_held_in=None)
    assert facts_of(run)[1] is None
    report.write_report(run)


def test_training_records_are_read_where_they_were_scored(make_run):
    run = make_run(20, rich=True)
    found, _ = facts_of(run)
    right, guesses, coins = (int(part) for part in found["panels"]["audit"]["rows"][0]["counts"].split(" / "))
    assert right <= guesses <= coins == 40


def canary_rows(num, gain, num_records=1):
    rows = []
    for number in range(num):
        side = signals.HELD_IN if number % 2 else signals.HELD_OUT
        base = np.full(5, -3.0)
        target = base + gain * (side == signals.HELD_IN) + 0.001 * number
        row = signals.DocumentSignals(f"canary-{number}", "0", side, target, base, kind="canary")
        rows.append(dataclasses.replace(row, user_num_records=num_records))
    return rows


def test_canary_users_are_a_source_of_their_own(make_run):
    run = make_run(40, shift=0.0, epsilon=1.0)
    put_signals(run, [*build_rows(40, shift=0.0), *canary_rows(80, 1.0)])
    facts, audit = facts_of(run)
    names = [row["coins"] for row in audit["rows"] if row["method"] == "one run"]
    assert names == [panel.NATURAL, panel.CANARIES]
    assert facts["results"]["token_mean"]["verdict"] == "consistent"
    assert audit["verdict"] == facts["verdict"] == "falsified"
    assert "canary users" in facts["verdict_reason"]


def test_canary_of_k_records_meets_claim_for_k():
    """A guarantee of ε = 0.5 a record allows 8 to a canary of 16 records."""
    statement = rundir.PrivacyStatement.model_validate_json(json.dumps(STATEMENT | {"epsilon": 0.5, "unit": "example"}))
    coins = Coins(np.zeros(4), np.array([True, False, True, False]), 0.5, "user", "canaries", most_records=4)
    claim = panel.claim_of(statement, panel.cap_of(statement, coins), coins.unit)
    assert claim.pair.epsilon == pytest.approx(2.0)


def test_chunks_of_a_record_count_as_the_bound_says():
    """One long record may be cut into as many units as the bound allows."""
    bound = {"records_per_unit_per_step": 1, "selection": "random_chunk", "records_per_user_in_training_set": 5}
    stated = STATEMENT | {"epsilon": 0.5, "unit": "example", "contribution_bound": bound}
    cap = verdict.Cap.of(rundir.PrivacyStatement.model_validate_json(json.dumps(stated)), 1)
    assert cap.bound.epsilon == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("unit", "num_records", "expected", "claimed"),
    [("example", 1, "example", 2.0), ("example", 3, "user", None), ("user", 3, "user", 2.0)],
)
def test_a_canary_with_one_record_is_an_example(make_run, unit, num_records, expected, claimed):
    run = make_run(5, unit=unit, epsilon=2.0)
    put_signals(run, [*build_rows(5, shift=0.0), *canary_rows(10, 1.0, num_records)])
    statement = rundir.read_statement(run)
    coins = panel.canary_coins(read_scoring(RunDirectory(run)), statement)
    assert (coins.unit, coins.num_coins, coins.prob_in) == (expected, 10, 0.5)
    claim = panel.claim_of(statement, verdict.Cap.of(statement, 500), coins.unit)
    assert (None if claim.pair is None else claim.pair.epsilon) == claimed
    if claim.pair is None:
        assert "vacuous" in claim.reason


def test_a_claim_for_users_covers_a_record_at_twice_its_price():
    statement = rundir.PrivacyStatement.model_validate_json(json.dumps(STATEMENT | {"epsilon": 0.5}))
    claim = panel.claim_of(statement, verdict.Cap.of(statement), "example")
    assert claim.pair.epsilon == 1.0
    assert claim.pair.delta == pytest.approx(1e-4 * (1 + math.exp(0.5)))


def test_the_headline_stands_unless_an_audit_falsifies():
    headline = Verdict.CONSISTENT, "headline"
    broken, quiet = (Verdict.FALSIFIED, "audit"), (Verdict.UNINFORMATIVE, "audit")
    assert verdict.combine(headline, [quiet]) == headline
    assert verdict.combine(headline, [quiet, broken]) == broken
    assert verdict.combine((Verdict.CONFOUNDED, "words"), [quiet]) == (Verdict.CONFOUNDED, "words")
    assert verdict.combine((Verdict.CONFOUNDED, "words"), [broken]) == broken, (
        "canaries: the split's audit is confounded"
    )
    assert verdict.combine((Verdict.FALSIFIED, "headline"), [broken]) == (Verdict.FALSIFIED, "headline")


@pytest.mark.parametrize(
    ("scheme", "source"),
    [
        ({"scheme": "truncated_poisson", "max_batch_size": 60, "max_num_units": 700}, "pld"),
        ({"scheme": "shuffle", "steps_per_epoch": 20, "max_num_units": 700}, "pld"),
        ({"scheme": "random_allocation", "steps_per_epoch": 20, "steps_per_unit": 1}, "allocation"),
        ({"scheme": "poisson"}, "pld"),
    ],
)
def test_every_sampling_scheme_has_a_certified_curve(scheme, source):
    sampling = {"sampling_prob": 0.05, **scheme}
    statement = rundir.PrivacyStatement.model_validate_json(
        json.dumps(STATEMENT | {"neighboring_relation": "zero_out", "sampling": sampling, "epsilon": 7.99})
    )
    curve = verdict.Cap.of(statement).curve
    assert curve is not None
    assert curve.source == source
    deltas = [point.delta for point in curve.points]
    assert deltas == sorted(deltas, reverse=True)
    assert 0.5 < curve.max_auroc() < 0.95
    lacking = json.dumps(STATEMENT | {"sampling": {"scheme": scheme["scheme"], "sampling_prob": None}})
    assert verdict.Cap.of(rundir.PrivacyStatement.model_validate_json(lacking)).curve is None


def test_record_statement_is_no_claim_for_users():
    """Also between the record's own delta and the larger one that group privacy makes of it."""
    statement = rundir.PrivacyStatement.model_validate_json(json.dumps(STATEMENT | {"unit": "example"}))
    assert verdict.epsilon_at(statement, 10 * statement.delta) is None


def test_delta_is_a_choice_of_the_audit(make_run):
    """At a smaller delta the claim is worth more, by the mechanism's own accountant, and so is the ceiling."""
    run = make_run(60, shift=0.0, epsilon=2.0, delta=1e-3)
    own, chosen = (analyse.analyse_run(run, audit_delta=delta) for delta in (None, 1e-6))
    assert (own["audit_delta"], chosen["audit_delta"]) == (1e-3, 1e-6)
    first, second = (facts["panels"]["audit"]["rows"][0] for facts in (own, chosen))
    assert first["claimed"] == 2.0
    assert second["claimed"] > 2.0
    assert second["ceiling"] > first["ceiling"]
    assert "--audit-delta" in " ".join(own["panels"]["audit"]["notes"])
    with pytest.raises(AttackInputError, match="audit-delta"):
        analyse.analyse_run(
            make_run(20, name="b", sampling={"scheme": "unheard of", "sampling_prob": None}), audit_delta=1e-9
        )
