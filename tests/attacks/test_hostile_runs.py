"""Scored runs as an examiner would forge them: whom signals lack, ties, no claim, numbers at the end of the range."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks.analysis import analyse, curves
from attacks.analysis.audit.evaluate import Claim, audit
from attacks.analysis.audit.guesses import Coins
from attacks.analysis.membership import rmia
from attacks.analysis.protocol import UnderOtherModels
from attacks.analysis.statistics import DpBound
from attacks.analysis.verdict import Verdict
from attacks.errors import AttackInputError
from attacks.reporting import figures
from attacks.reporting.report import write_report
from attacks.signals import HELD_OUT, TRAINING
from tests.attacks.conftest import STATEMENT, build_rows, put_signals
from tests.attacks.test_curves_and_exposure import scored_users


def reported(run, rows):
    put_signals(run, rows)
    facts = analyse.analyse_run(run)
    write_report(run)
    return facts


@pytest.mark.parametrize("num_left", [0, 1])
def test_training_records_of_one_side_alone_are_not_run(make_run, num_left):
    rows = [
        row
        for row in build_rows(8, shift=0.0, rich=True)
        if (row.side, row.kind) != (HELD_OUT, TRAINING) or int(row.user[-4:]) < num_left
    ]
    facts = reported(make_run(0), rows)
    assert not any(result["documents"] == TRAINING for result in facts["results"].values())
    reasons = {item["attack"]: item["reason"] for item in facts["not_run"]}
    assert reasons["loss_records"].startswith(f"8 held-in and {num_left} held-out users have such documents")


def test_tied_users_have_one_rank_and_share_the_top(make_run):
    """The base against itself: whoever sorts first is not the most exposed."""
    run = make_run(0)
    rows = [dataclasses.replace(row, target_logp=row.base_logp) for row in build_rows(12, shift=0.0)]
    exposed = reported(run, rows)["user_inference"]["most_exposed"]
    assert exposed["num_held_in"] == exposed["num_held_in_by_chance"] == 0.5
    assert set(pq.read_table(run / analyse.PER_USER_PATH)["token_mean_rank"].to_pylist()) == {24}


_scored = functools.cache(scored_users)


@given(st.lists(st.integers(0, 2), min_size=80, max_size=80), st.sampled_from([0.01, 0.1, 0.5]))
def test_most_exposed_do_not_depend_on_the_order_of_names(values, share):
    scored, statistic = _scored(), np.array(values, dtype=float)
    order = np.random.default_rng(0).permutation(80)
    renamed = dataclasses.replace(scored, is_held_in=scored.is_held_in[order], num_records=scored.num_records[order])
    one, other = curves.most_exposed(scored, statistic, share), curves.most_exposed(renamed, statistic[order], share)
    assert one["num_held_in"] == pytest.approx(other["num_held_in"])
    assert one["median_num_records"] == other["median_num_records"]


def test_score_that_is_no_number_names_its_document(make_run):
    rows = [
        dataclasses.replace(row, variants={"recall": -1.0, "recall_plain": -1e-320})
        for row in build_rows(3, shift=0.0, rich=True)
    ]
    run = make_run(0)
    put_signals(run, rows)
    with pytest.raises(AttackInputError, match=r"document 'doc-0'.*no finite score by recall"):
        analyse.analyse_run(run)


@pytest.mark.parametrize("num_shadows", [1, 6])
def test_rmia_is_the_same_where_probabilities_underflow(num_shadows):
    rng = np.random.default_rng(0)
    is_in = np.arange(num_shadows) % 2 == np.arange(20)[:, None] % 2
    is_in = is_in if num_shadows > 1 else np.zeros((20, 1), dtype=bool)
    target, shadows = rng.normal(-2, 1, 20), rng.normal(-2, 1, (20, num_shadows))
    near, far = (rmia.score(UnderOtherModels(target - down, shadows - down, is_in)) for down in (0.0, 1e4))
    assert np.isfinite(far).all()
    if num_shadows > 1:
        np.testing.assert_array_equal(near, far)


@pytest.mark.parametrize("delta", [0.0, 1e-4])
def test_run_without_a_claim_shows_what_was_achieved(make_run, delta):
    run = make_run(
        0,
        private=False,
        epsilon=None,
        delta=delta,
        not_private_reasons=["noise_multiplier is 0"],
        mechanism=STATEMENT["mechanism"] | {"noise_multiplier": 0.0},
    )
    facts = reported(run, build_rows(20, shift=2.0))
    assert facts["verdict"] == facts["panels"]["audit"]["verdict"] == "no claim"
    assert len(facts["achieved"]) == 2


@pytest.mark.parametrize("is_in", [True, False])
@pytest.mark.parametrize("num", [0, 1])
def test_one_coin_is_called_too_few(num, is_in):
    coins = Coins(np.zeros(num), np.full(num, is_in), 0.5, "user", "canary users", are_independent=True)
    finding = audit(coins, Claim(DpBound(1.0, 1e-5), None, ""), 1e-5, seed=0)
    assert (finding.verdict, finding.epsilon) == (Verdict.UNINFORMATIVE, 0.0)
    assert finding.verdict_reason == f"too few coins ({num}) to tell anything: see attacks audit-plan"


def test_bar_that_was_not_measured_says_so():
    """One canary: there is no held-out exposure, which is not an exposure of 0 bits."""
    series = [{"label": "held-out", "x": ["1×", "4×"], "y": [None, 0.0]}]
    assert figures.panel_figure({"kind": "bar", "series": series}, "canaries").count("<!-- none -->") == 1
    cell = {"tokens": "other", "split": "train", "nll": None}
    assert (
        figures.sensitive_figure([cell | {"model": model} for model in ("base", "tuned")]).count("<!-- none -->") == 2
    )
