"""Train, score, analyse with an honest mechanism and with broken ones: the audit names what is broken. Seeds fixed."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from attacks.analysis import statistics
from attacks.analysis.analyse import analyse_run
from attacks.analysis.statistics import DpBound
from attacks.scoring.score import ScoreOptions, score_run
from tests import jobs
from tests.attacks import mutants
from tests.conftest import write_config

NUM_USERS = 100
NUM_RECORDS = 32


def configuration(
    directory: pathlib.Path, num_users: int, num_records: int = NUM_RECORDS, **privacy: object
) -> dict[str, Any]:
    """Full fine-tuning by steps so small that the model stays near where it began: there what one user did adds up."""
    model = mutants.save_word_llama(directory / "model", num_users)
    users = mutants.write_words_of_their_own(directory / "users.jsonl", num_users, num_records)
    return {
        "run": {"name": "audited", "output_dir": str(directory / "runs")},
        "model": {"name_or_path": str(model)},
        "data": {
            "source": {"kind": "files", "paths": [str(users)]},
            "max_length": 8,
            "held_out_fraction": 0.5,
            "attack_fraction": 0.1,
            "attack_min_records": 4,
            "num_evaluation_records": 4,
        },
        "privacy": {
            "records_per_user": 2,
            "sampling_prob": 1.0,
            "expected_batch_size": num_users / 2,
            "target_epsilon": 1.0,
            "target_delta": 1e-5,
            "clipping_norm": 0.1,
            "num_steps": 10,
            **privacy,
        },
        "training": {"method": "full", "learning_rate": 1e-4, "schedule": "constant"},
        "performance": {
            "microbatch_size": 512,
            "precision": "fp32",
            "num_threads": 1,
            "checkpoint_interval_steps": 1000,
        },
        "tracking": {"wandb": False},
    }


def analysed(run: pathlib.Path) -> dict[str, Any]:
    score_run(run, ScoreOptions(batch_tokens=8192))
    facts = analyse_run(run)
    audit, headline = facts["panels"]["audit"], facts["results"]["token_mean"]
    print(
        f"AUROC {headline['auroc']:.3f}, verdict {facts['verdict']}, audit {audit['verdict']}: {audit['summary']} "
        f"{audit['rows'][0]['counts']}; {audit['rows'][1]['method']}"
    )
    return facts


def audited(
    directory: pathlib.Path,
    mutant: mutants.Mutant | None,
    num_users: int = NUM_USERS,
    num_records: int = NUM_RECORDS,
) -> dict[str, Any]:
    """Trains at a claimed epsilon of 1, scores and analyses."""
    tree = configuration(directory, num_users, num_records)
    mutants.train_broken(write_config(tree, directory / "c.yaml"), mutant)
    run = directory / "runs" / "audited"
    statement = json.loads((run / "privacy.json").read_text())
    assert statement["private"]
    assert statement["epsilon"] == pytest.approx(1.0, abs=1e-3)
    return analysed(run)


def bound_of(facts: dict[str, Any]) -> tuple[float, float]:
    """The deciding bound and its ceiling."""
    row = facts["panels"]["audit"]["rows"][0]
    assert row["method"] == "one run"
    assert row["decides"]
    return row["lower_bound"], row["ceiling"]


def check_honest(facts: dict[str, Any]) -> None:
    headline = facts["results"]["token_mean"]
    assert facts["verdict"] == facts["panels"]["audit"]["verdict"] == "consistent"
    assert bound_of(facts)[0] <= 1.0
    assert headline["auroc"] < DpBound(1.0, 0.0).max_auroc() < 0.7311
    cap = statistics.auroc_cap(DpBound(1.0, 1e-5), facts["counts"]["held_out"]["num_units"])
    assert headline["bootstrap"]["interval"][0] < cap


def check_falsified(facts: dict[str, Any]) -> None:
    lower, ceiling = bound_of(facts)
    assert facts["panels"]["audit"]["verdict"] == facts["verdict"] == "falsified"
    assert 1.0 < lower <= ceiling


@pytest.mark.slow
def test_honest_run_at_epsilon_one_is_consistent_under_the_cap(tmp_path):
    check_honest(audited(tmp_path, None))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_records"), [("no noise", NUM_RECORDS), ("k ignored", NUM_RECORDS // 2)])
def test_the_audit_names_a_broken_mechanism(tmp_path, name, num_records):
    check_falsified(audited(tmp_path, mutants.MUTANTS[name], num_records=num_records))


@pytest.mark.slow
def test_a_shifted_split_is_confounded_although_the_model_leaks(tmp_path):
    facts = audited(tmp_path, mutants.shifted_split, num_users=60)
    assert facts["verdict"] == facts["panels"]["audit"]["verdict"] == "confounded"
    assert facts["blind"]["bag_of_words"]["separates"]


def test_the_base_as_target_shows_nothing(tmp_path):
    tree = configuration(tmp_path, 40, target_epsilon=None, noise_multiplier=1.0, num_steps=1)
    del tree["privacy"]["target_epsilon"]
    tree["training"]["learning_rate"] = 1e-30
    mutants.train_broken(write_config(tree, tmp_path / "c.yaml"), None)
    facts = analysed(tmp_path / "runs" / "audited")
    assert facts["results"]["token_mean"]["auroc"] == 0.5
    assert bound_of(facts)[0] == 0.0
    assert facts["panels"]["audit"]["verdict"] == "uninformative"


@pytest.mark.parametrize("name", ["no noise", "noise on one rank", "clip skipped"])
def test_self_test_refuses_at_the_start_what_the_audit_finds(tmp_path, name):
    from privtrain.errors import SelfTestFailed

    tree = configuration(tmp_path, 20, num_steps=1)
    with pytest.raises(SelfTestFailed):
        mutants.train_broken(write_config(tree, tmp_path / "c.yaml"), mutants.MUTANTS[name], self_test=True)


def test_the_ledger_refuses_what_the_plan_does_not_allow(tmp_path, monkeypatch):
    """More than k records a step do not get past it; the mutant above is planted behind it."""
    from privtrain.errors import GuaranteeLost
    from privtrain.privacy.sampling import DrawnUnit, UnitSampler

    honest = UnitSampler.draw
    monkeypatch.setattr(
        UnitSampler, "draw", lambda self, step: [DrawnUnit(d.unit, (0, 1, 2)) for d in honest(self, step)]
    )
    tree = configuration(tmp_path, 20, num_steps=1)
    with pytest.raises(GuaranteeLost, match="more than 2 records"):
        mutants.train_broken(write_config(tree, tmp_path / "c.yaml"), mutants.no_noise)


@pytest.mark.campaign
@pytest.mark.parametrize("name", list(mutants.MUTANTS))
def test_four_mutants_on_four_hundred_users(tmp_path, name):
    check_falsified(audited(tmp_path, mutants.MUTANTS[name], num_users=400))


@pytest.mark.campaign
@pytest.mark.dist
def test_noise_on_one_of_two_real_ranks(tmp_path):
    config = write_config(configuration(tmp_path, 400), tmp_path / "c.yaml")
    done = jobs.run("privtrain", "train", config, launch_file="zero2", before=mutants.forget_noise_of_one_rank)
    assert done.returncode == 0, done.output[-3000:]
    check_falsified(analysed(tmp_path / "runs" / "audited"))


@pytest.mark.campaign
def test_an_honest_run_on_four_hundred_users(tmp_path):
    check_honest(audited(tmp_path, None, num_users=400))


@pytest.mark.campaign
def test_two_hundred_overfitted_users_reach_the_ceiling(tmp_path):
    """Without privacy, and saying so: nothing is claimed, and the audit shows how much could be told."""
    tree = configuration(tmp_path, 400, noise_multiplier=0.0, num_steps=30)
    del tree["privacy"]["target_epsilon"]
    tree["training"]["learning_rate"] = 2e-3
    mutants.train_broken(write_config(tree, tmp_path / "c.yaml"), None)
    facts = analysed(tmp_path / "runs" / "audited")
    lower, ceiling = bound_of(facts)
    assert facts["results"]["token_mean"]["auroc"] >= 0.9
    assert lower >= 0.9 * ceiling > 3.0
    assert facts["verdict"] == "no claim"
    assert len(facts["achieved"]) == 2
