"""Train, score, analyse: what the attack finds is what the training did. Seeds fixed, a tiny model."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from attacks.analysis import statistics
from attacks.analysis.analyse import analyse_run
from attacks.analysis.statistics import DpBound
from attacks.scoring.score import score_run
from attacks.scoring.shadows import commands, write_recipes
from attacks.signals import REFERENCES_PATH
from privtrain.job.train import train
from tests.conftest import write_config


def write_distinct_users(path: pathlib.Path, num_users: int, seed: int = 0) -> pathlib.Path:
    """Users who own two words each and write nothing else: as distinct as users can be."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    with path.open("w", encoding="utf-8") as file:
        for user in range(num_users):
            words = ["".join(rng.choice(letters, 4)) for _ in range(2)]
            for _ in range(8):
                row = {"user": f"user-{user:04d}", "text": " ".join(rng.choice(words, 4))}
                file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def run_of(tree, tmp_path, no_self_test):
    """Trains and scores a run on distinct users; keyword arguments replace keys of ``privacy`` and ``training``."""

    def make(num_users: int, num_steps: int, *, learning_rate: float = 0.02, **privacy: object) -> pathlib.Path:
        source = write_distinct_users(tmp_path / "distinct.jsonl", num_users)
        tree["lora"] = {"rank": 16, "alpha": 32, "target_modules": "all-linear"}
        tree["data"] |= {"source": {"kind": "files", "paths": [str(source)]}, "attack_fraction": 0.25}
        tree["data"]["held_out_fraction"] = 0.5
        tree["privacy"] |= {
            "records_per_user": 6,
            "sampling_prob": 1.0,
            "expected_batch_size": num_users / 2,
            "noise_multiplier": 0.0,
            "clipping_norm": 10.0,
            "num_steps": num_steps,
            **privacy,
        }
        if "target_epsilon" in privacy:
            del tree["privacy"]["noise_multiplier"]
        tree["training"] |= {"learning_rate": learning_rate, "schedule": "linear"}
        tree["performance"] |= {"microbatch_size": 64, "checkpoint_interval_steps": 1000}
        train(write_config(tree, tmp_path / "c.yaml"))
        run = tmp_path / "runs" / "tiny"
        score_run(run)
        return run

    return make


def test_a_model_that_did_not_move_gives_one_half(run_of):
    facts = analyse_run(run_of(30, 1, learning_rate=1e-30))
    assert facts["results"]["token_mean"]["auroc"] == 0.5
    assert facts["verdict"] == "no claim"
    assert "scored against itself" in facts["results"]["token_mean"]["warnings"][0]


@pytest.mark.slow
def test_overfitted_users_are_found(run_of):
    facts = analyse_run(run_of(40, 150))
    assert facts["results"]["token_mean"]["auroc"] >= 0.9
    assert facts["results"]["ratio_records"]["auroc"] >= 0.9
    assert facts["cap"]["reason"] == "the run is not private, so it caps nothing"


def under_the_cap(facts) -> bool:
    """Whether the measured AUROC and the lower end of its interval keep the cap of epsilon 1, in the sample's form."""
    headline = facts["results"]["token_mean"]
    cap = statistics.auroc_cap(DpBound(1.0, 1e-3), facts["counts"]["held_out"]["num_units"])
    assert DpBound(1.0, 0.0).max_auroc() == pytest.approx(0.7311, abs=1e-4)
    return headline["auroc"] < 0.7311 and headline["bootstrap"]["interval"][0] < cap


@pytest.mark.slow
def test_users_protected_at_epsilon_one_stay_under_the_cap(run_of):
    """The same users, who are found outright without noise. The fixed seed voids the claim, so the cap is set here."""
    facts = analyse_run(run_of(40, 20, target_epsilon=1.0, clipping_norm=1.0))
    assert under_the_cap(facts)


@pytest.mark.campaign
def test_two_hundred_overfitted_users(run_of):
    facts = analyse_run(run_of(400, 300))
    headline = facts["results"]["token_mean"]
    print(f"{facts['counts']}: AUROC {headline['auroc']:.4f}, interval {headline['bootstrap']['interval']}")
    assert headline["auroc"] >= 0.9
    assert facts["user_inference"]["users_accused"]["num_unadjusted"] > 150


@pytest.mark.campaign
def test_two_hundred_protected_users(run_of):
    facts = analyse_run(run_of(400, 300, target_epsilon=1.0, clipping_norm=1.0))
    headline = facts["results"]["token_mean"]
    print(f"{facts['counts']}: AUROC {headline['auroc']:.4f}, interval {headline['bootstrap']['interval']}")
    assert under_the_cap(facts)


@pytest.mark.campaign
def test_shadows_by_the_recipe_make_lira_and_rmia_run(run_of):
    """Sixteen shadows through the ordinary trainer: few enough to run, enough for two of each kind for most users."""
    run = run_of(40, 150)
    for recipe in write_recipes(run, 16):
        train(recipe)
        shadow = recipe.parent / "runs" / f"tiny-{recipe.stem}"
        score_run(shadow, documents_of=run)
    assert len(list((run / REFERENCES_PATH).glob("*.parquet"))) == 16
    facts = analyse_run(run)
    for name in ("lira", "rmia", "calibrated", "lira_training", "rmia_records"):
        assert facts["results"][name]["auroc"] >= 0.9, name


def test_a_shadow_recipe_trains_on_no_document_of_the_attacker(run_of):
    run = run_of(12, 1, learning_rate=0.01)
    manifest = json.loads((run / "secret" / "manifest.json").read_text())
    recipes = write_recipes(run, 2)
    lines = [json.loads(line) for line in (recipes[0].parent / "records.jsonl").read_text().splitlines()]
    num_fresh = sum(map(len, manifest["attacker"].values()))
    assert len(lines) == 12 * 8 - num_fresh
    shadow = recipes[0].parent / "runs" / "tiny-shadow-0"
    expected = f"privtrain train {recipes[0]} && attacks score {shadow} --documents-of {run} --training-records 2"
    assert commands(run, recipes)[0] == expected, "as many documents as the run's own signals have"
    train(recipes[0])
    assert json.loads((shadow / "secret" / "manifest.json").read_text())["attacker"] == {}
    score_run(shadow, documents_of=run)
    assert {path.name for path in (run / REFERENCES_PATH).iterdir() if path.suffix != ".lock"} == {
        "shadow-tiny-shadow-0.parquet",
        "shadow-tiny-shadow-0.json",
    }
    facts = analyse_run(run)
    assert facts["shadows"]["num"] == len(facts["shadows"]["seals"]) == 1
