"""What fails a pipeline, and what goes to Weights & Biases."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from attacks import analyse, policy, report, tracking
from attacks.cli import app
from attacks.errors import AttackInputError


@pytest.fixture
def broken(make_run):
    """A run whose users are recognised although epsilon is 1."""
    run = make_run(60, shift=0.5, epsilon=1.0)
    analyse.analyse_run(run)
    return run


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
    ],
)
def test_the_policy_decides_the_exit_code(broken, tmp_path, text, code, said):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    found = CliRunner().invoke(app, ["report", str(broken), "--policy", str(path)])
    if code == 2:
        assert isinstance(found.exception, AttackInputError)
        assert said in str(found.exception)
        return
    assert found.exit_code == code, found.output
    assert said in found.stderr
    assert (broken / report.INDEX_PATH).is_file()


def test_without_a_policy_nothing_fails(broken):
    assert CliRunner().invoke(app, ["report", str(broken)]).exit_code == 0
    assert policy.Policy().violations(json.loads((broken / analyse.ATTACKS_PATH).read_text())) == [
        "token_mean: verdict falsified"
    ]


def test_a_missing_policy_is_the_users_mistake(tmp_path):
    with pytest.raises(AttackInputError, match="cannot read the policy"):
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
    logs = list((broken / "wandb").glob("offline-run-*/*.wandb"))
    assert len(logs) == 1
    content = logs[0].read_bytes()
    for name in (b"index.html", b"report.json", b"report.md", b"attacks.json", b"attacks/verdict", b"attack-report"):
        assert name in content
    assert b"pseudonym" not in content
    assert b"per_user" not in content
    assert list((broken / "wandb").glob("offline-run-*/files/media/table/attacks/results*.json"))
