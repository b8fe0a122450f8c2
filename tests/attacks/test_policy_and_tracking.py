"""What fails a pipeline, and what goes to Weights & Biases."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.stats
import wandb
from typer.testing import CliRunner

from attacks.analysis import analyse, statistics
from attacks.cli import app
from attacks.reporting import policy, report, tracking
from privtrain.errors import DamagedFile, PrivtrainError


@pytest.fixture
def broken(analysed):
    """A run whose users are recognised although epsilon is 1."""
    return analysed(60, shift=0.5, epsilon=1.0)


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("fail_on_verdicts: [falsified]", 3, "token_mean: verdict falsified"),
        ("fail_on_verdicts: []\nmax_auroc_lower: 0.6", 3, "above the allowed 0.6"),
        ("fail_on_verdicts: []\nmax_auroc_lower: 1.0", 0, ""),
        ("fail_on_verdicts: [confounded]", 0, ""),
        ("statistics: all", 3, "sequence_sum: verdict falsified"),
        ("fail_on_verdict: [falsified]", 2, "fail_on_verdict"),
        ("max_auroc_lower: 2", 2, "max_auroc_lower"),
        ("[", 2, "not YAML"),
        ("- 1", 2, "mapping"),
        ("max_auroc_lower: .nan", 2, "max_auroc_lower"),
        ('max_auroc_lower: !!int ""', 2, "not YAML"),
        ("!!bool x: 1", 2, "not YAML"),
    ],
)
def test_the_policy_decides_the_exit_code(broken, tmp_path, text, code, said):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    found = CliRunner().invoke(app, ["report", str(broken), "--policy", str(path)])
    if code == 2:
        assert isinstance(found.exception, PrivtrainError)
        assert said in str(found.exception)
        return
    assert found.exit_code == code, found.output
    assert said in found.stderr
    assert (broken / report.INDEX_PATH).is_file()


def test_without_a_policy_nothing_fails(broken):
    assert CliRunner().invoke(app, ["report", str(broken)]).exit_code == 0
    assert policy.Policy().violations(json.loads((broken / analyse.ATTACKS_PATH).read_text())) == [
        "token_mean: verdict falsified",
        "audit: verdict falsified",
    ]


def test_a_missing_policy_is_the_users_mistake(tmp_path):
    with pytest.raises(DamagedFile, match="is missing"):
        policy.read_policy(tmp_path / "none.yaml")


def test_the_table_has_a_row_for_every_statistic(broken):
    facts = json.loads((broken / analyse.ATTACKS_PATH).read_text())
    rows = tracking.table_rows(facts)
    assert [row[0] for row in rows] == list(facts["results"])
    assert {len(row) for row in rows} == {len(tracking.TABLE_COLUMNS)}


def test_offline_wandb_gets_the_public_files_and_no_more(broken, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    report.write_report(broken)
    tracking.log_report(broken, report.read_results(broken), project="privtrain-tests")
    wandb.teardown()  # waits until the file is written
    logs = list((broken / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 1
    content = logs[0].read_bytes()
    for name in (b"index.html", b"report.json", b"report.md", b"attacks.json", b"attacks/verdict", b"attack-report"):
        assert name in content
    assert b"pseudonym" not in content
    assert b"per_user" not in content
    assert list((broken / "wandb").glob("offline-run-*/files/media/table/attacks/results*.json"))


def test_secondary_statistics_are_judged_together(make_run):
    """Each of m beside the headline at 1 - 0.05/m; all p-values but the headline's are in one family."""
    run = make_run(60, shift=0.05, epsilon=1.0, rich=True)
    facts = analyse.analyse_run(run)
    found, headline = facts["results"], facts["headline"]
    strict = 1 - 0.05 / (len(found) - 1)
    assert found[headline]["verdict_level"] == 0.95
    assert found[headline]["verdict_lower"] == found[headline]["bootstrap"]["interval"][0]
    others = [result for name, result in found.items() if name != headline]
    assert {result["unit"] for result in others} == {"user", "record"}
    for result in others:
        assert result["verdict_level"] == pytest.approx(strict)
        assert result["verdict_lower"] < result["bootstrap"]["interval"][0]
    family = others + [result["less_headline"] for result in others if "less_headline" in result]
    adjusted = statistics.holm([part["p_value"] for part in family])
    assert [part["p_holm"] for part in family] == pytest.approx(adjusted.tolist())
    assert f"Holm over all {len(family)} p-values" in facts["multiplicity"]
    largest = max(result["verdict_lower"] for result in others)
    rules = policy.Policy(fail_on_verdicts=[], max_auroc_lower=largest, statistics="all")
    assert not [said for said in rules.violations(facts) if not said.startswith(f"{headline}:")]


def test_a_family_of_null_statistics_seldom_fails_the_policy():
    """Forty statistics without any effect: some lower end passes 1/2 in 1/40 of the samples, not in most."""
    rng, level = np.random.default_rng(4), 1 - 0.05 / 40
    raw = corrected = 0
    for _ in range(40):
        passes = []
        for _ in range(40):
            sides = rng.normal(size=(2, 60))
            area = statistics.auroc(*sides)
            interval = statistics.delong_interval(*sides)
            passes.append((interval.lower > 0.5, interval.lower_at(level, area) > 0.5))
            assert interval.lower_at(level, area) == pytest.approx(statistics.delong_interval(*sides, level).lower)
        raw, corrected = raw + any(a for a, _ in passes), corrected + any(b for _, b in passes)
    assert raw > 15
    assert corrected <= 4


def test_the_p_value_of_records_counts_users():
    rng, small = np.random.default_rng(5), {True: 0, False: 0}
    for _ in range(300):
        owners = np.repeat(np.arange(40), 4)
        sides = [np.repeat(rng.normal(size=40), 4) + 0.1 * rng.normal(size=160) for _ in range(2)]
        small[True] += statistics.auroc_p_value(*sides, (owners, owners)) <= 0.05
        small[False] += statistics.auroc_p_value(*sides) <= 0.05
    assert small[True] <= scipy.stats.binom.ppf(0.999, 300, 0.05)
    assert small[False] > 0.13 * 300
    apart = np.arange(3.0)
    assert statistics.auroc_p_value(apart + 5, apart, (np.arange(3), np.arange(3))) == 1 / 20
