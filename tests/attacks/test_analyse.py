from __future__ import annotations

import json
import math
import stat
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from attacks import signals
from attacks.analysis import analyse, results
from attacks.errors import AttackInputError
from tests.attacks.conftest import put_signals


def numbers(facts):
    """Every number in a JSON value."""
    if isinstance(facts, dict):
        facts = list(facts.values())
    if isinstance(facts, list):
        return [number for item in facts for number in numbers(item)]
    return [facts] if isinstance(facts, int | float) else []


def test_analysis_loads_no_torch():
    code = (
        "import sys, attacks.analysis.analyse, attacks.reporting.report\n"
        "sys.exit(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_results_are_complete_and_finite(make_run):
    run = make_run(40)
    facts = analyse.analyse_run(run)
    written = json.loads((run / analyse.ATTACKS_PATH).read_text())
    assert written == facts
    assert facts["schema"] == "privtrain/attacks/4"
    assert facts["headline"] == "token_mean"
    assert list(facts["results"])[:2] == ["token_mean", "sequence_sum"]
    assert {"token_mean_max", "token_mean_trimmed", "loss", "zlib", "min_k", "wbc"} < set(facts["results"])
    assert {item["attack"] for item in facts["not_run"]} >= {"min_k_plus_plus", "ez_mia", "lowercase", "recall", "lira"}
    assert facts["counts"]["held_in"]["num_units"] == facts["counts"]["held_out"]["num_units"] == 40
    assert facts["counts"]["held_in"]["num_documents"] == 120
    assert all(math.isfinite(number) for number in numbers(facts))
    for result in facts["results"].values():
        for interval in (result["bootstrap"]["interval"], result["delong"]["interval"]):
            assert interval[0] <= result["auroc"] <= interval[1]
        assert [point["target_fpr"] for point in result["tpr_at_fpr"]] == [0.001, 0.01, 0.05, 0.1]
        assert [point["is_resolved"] for point in result["tpr_at_fpr"]] == [False, False, True, True]
    for name in ("token_mean", "sequence_sum"):
        histogram = facts["results"][name]["histogram"]
        assert sum(histogram["held_in"]) == sum(histogram["held_out"]) == 40


def test_seed_decides_the_bytes(make_run):
    run = make_run(30)
    contents = []
    for seed in (0, 0, 1):
        analyse.analyse_run(run, seed=seed)
        contents.append([(run / path).read_bytes() for path in (analyse.ATTACKS_PATH, analyse.PER_USER_PATH)])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]


def test_values_of_users_stay_secret(make_run):
    run = make_run(30)
    analyse.analyse_run(run)
    users = pq.read_table(run / analyse.PER_USER_PATH).to_pydict()
    assert stat.S_IMODE((run / analyse.PER_USER_PATH).stat().st_mode) == 0o600
    assert len(users["user"]) == 60
    public = (run / analyse.ATTACKS_PATH).read_text()
    assert "pseudonym" not in public
    assert not set(users["token_mean"] + users["sequence_sum"]) & set(numbers(json.loads(public)))


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 7.3e4])
def test_histogram_bins_are_round_and_hold_every_user(scale):
    rng = np.random.default_rng(0)
    held_in, held_out = scale * rng.normal(size=300), scale * rng.normal(1.0, 1.0, size=200)
    found = results.histogram(held_in, held_out)
    assert (sum(found["held_in"]), sum(found["held_out"])) == (300, 200)
    assert len(found["held_in"]) == len(found["held_out"]) == len(found["edges"]) - 1
    assert 10 <= len(found["held_in"]) <= 31
    assert found["edges"][0] <= min(held_in.min(), held_out.min())
    assert found["edges"][-1] > max(held_in.max(), held_out.max())
    width = np.diff(found["edges"])[0]
    assert f"{width:.6e}"[:8] in {"1.000000", "2.000000", "5.000000"}


def test_p_values_are_ranks_among_the_held_out(make_run):
    run = make_run(30, shift=5.0)
    analyse.analyse_run(run)
    users = pq.read_table(run / analyse.PER_USER_PATH).to_pydict()
    for side, p_value in zip(users["side"], users["token_mean_p_value"], strict=True):
        assert p_value == (pytest.approx(1 / 31) if side == signals.HELD_IN else None)


@pytest.mark.parametrize(
    ("num_units", "shift", "epsilon", "scheme", "expected"),
    [
        (100, 0.0, 1.0, "poisson", "consistent"),
        (100, 0.5, 1.0, "poisson", "falsified"),
        (100, 0.5, 7.99, "unheard_of", "uninformative"),
        (100, 0.5, 7.99, "poisson", "falsified"),
        (4, 0.5, 1.0, "poisson", "uninformative"),
    ],
)
def test_verdicts(make_run, num_units, shift, epsilon, scheme, expected):
    """At epsilon 8 one pair allows everything to 100 users; the whole curve of the mechanism does not.

    A number that stands in other tests: its curve is computed once.
    """
    sampling = {"scheme": scheme, "sampling_prob": 0.05}
    facts = analyse.analyse_run(make_run(num_units, shift=shift, epsilon=epsilon, sampling=sampling))
    assert facts["verdict"] == facts["results"]["token_mean"]["verdict"] == expected
    assert facts["verdict_reason"]


def test_the_cap_is_read_off_the_statement(make_run):
    facts = analyse.analyse_run(make_run(50, epsilon=1.0, delta=0.0))
    assert facts["cap"]["auroc"] == pytest.approx(math.e / (1 + math.e))
    assert facts["cap"]["auroc_of_sample"] > facts["cap"]["auroc"]
    assert facts["cap"]["reason"] == ""
    assert facts["ceiling"]["interval"] == [pytest.approx(0.025 ** (1 / 50)), 1.0]
    zero_false_positives = facts["results"]["token_mean"]["tpr_at_fpr"][0]
    assert zero_false_positives["tpr_cap"] == pytest.approx(math.e / 51)


def test_example_guarantee_does_not_cap_user_attack(make_run):
    facts = analyse.analyse_run(make_run(100, shift=0.5, unit="example", epsilon=0.5))
    assert facts["cap"]["auroc"] is None
    assert facts["cap"]["auroc_of_sample"] is None
    assert "vacuous" in facts["cap"]["reason"]
    assert facts["results"]["token_mean"]["tpr_at_fpr"][0]["tpr_cap"] is None
    assert facts["verdict"] == "uninformative"


@pytest.mark.parametrize("changes", [{"epsilon": None}, {"epsilon": 1.0}])
def test_a_run_that_is_not_private_caps_nothing(make_run, changes):
    facts = analyse.analyse_run(make_run(100, shift=0.5, private=False, not_private_reasons=["fixed seed"], **changes))
    assert facts["cap"]["auroc"] == 1.0
    assert "not private" in facts["cap"]["reason"]
    assert facts["verdict"] == "no claim"


def test_a_base_model_scored_against_itself_is_said_so(make_run, make_rows):
    run = make_run(0, epsilon=1.0)
    rows = [
        signals.DocumentSignals(row.user, row.document, row.side, row.base_logp, row.base_logp)
        for row in make_rows(100, shift=0.0)
    ]
    put_signals(run, rows)
    facts = analyse.analyse_run(run)
    assert facts["results"]["token_mean"]["auroc"] == 0.5
    assert facts["verdict"] == "uninformative"
    assert "scored against itself" in facts["results"]["token_mean"]["warnings"][0]


def test_an_auroc_below_one_half_is_warned_of_not_celebrated(make_run):
    result = analyse.analyse_run(make_run(60, shift=-0.3))["results"]["token_mean"]
    assert result["auroc"] < 0.5
    assert "not privacy" in result["warnings"][0]


def test_too_few_users_are_refused(make_run):
    with pytest.raises(AttackInputError, match="has 1 held_in users: expected at least 2"):
        analyse.analyse_run(make_run(1))
