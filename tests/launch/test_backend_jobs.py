"""Whole jobs with the shipped launch files: the same model on each backend, released, resumed under another."""

from __future__ import annotations

import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from privtrain.job.train import train
from privtrain.ledger.log import verify
from privtrain.ledger.view import verify_run
from tests import jobs
from tests.conftest import save_tiny_llama, write_config
from tests.privtrain.ledgers import drop_records

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_llama(tmp_path_factory.mktemp("shallow-llama"), num_layers=1)


def tensors(run: pathlib.Path) -> dict[str, np.ndarray]:
    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    return {name: value for file in files for name, value in load_file(file).items()}


@pytest.mark.parametrize(
    ("backend", "method"),
    [("zero3", "full"), ("fsdp2", "full"), pytest.param("zero3", "lora", marks=pytest.mark.campaign)],
)
def test_a_sharded_job_releases_the_model_of_one_process(tree, tmp_path, backend, method):
    tree["training"]["method"] = method
    tree["privacy"]["noise_multiplier"] = 0  # noise is another one as soon as two sums differ in the last bit
    tree["privacy"]["selection"] = "lowest_perplexity"  # every rank scores its share under the model before training
    tree["performance"]["count_flops"] = True
    for name in ("alone", "sharded"):
        tree["run"]["name"] = name
        write_config(tree, tmp_path / f"{name}.yaml")
    train(tmp_path / "alone.yaml")
    done = jobs.run("privtrain", "train", tmp_path / "sharded.yaml", launch_file=backend)
    assert done.returncode == 0, done.output[-3000:]
    alone, sharded = tensors(tmp_path / "runs" / "alone"), tensors(tmp_path / "runs" / "sharded")
    assert alone.keys() == sharded.keys()
    for name, value in alone.items():
        # Adam divides by the gradient's size, so rounding of a coordinate near zero can show.
        assert np.linalg.norm(value - sharded[name]) < 1e-4 * np.linalg.norm(value), name
    assert "4 steps charged" in verify_run(tmp_path / "runs" / "sharded")


def test_sharded_steps_replay_bitwise_then_another_backend_runs(tree, tmp_path, no_self_test):
    """From a checkpoint of parts: replayed for free under the same layout, a new generation under another."""
    tree["training"]["method"] = "full"
    path = write_config(tree, tmp_path / "moved.yaml")
    run = tmp_path / "runs" / "tiny"
    done = jobs.run("privtrain", "train", path, launch_file="fsdp2")
    assert done.returncode == 0, done.output[-3000:]
    before = tensors(run)
    _rewind(run)
    done = jobs.run("privtrain", "train", path, launch_file="fsdp2")
    assert done.returncode == 0, done.output[-3000:]
    assert verify(run / "secret" / "ledger.jsonl").generation == 0
    assert all(np.array_equal(before[name], value) for name, value in tensors(run).items())
    _rewind(run)
    done = jobs.run("privtrain", "train", path, launch_file="zero2")
    assert done.returncode == 0, done.output[-3000:]
    state = verify(run / "secret" / "ledger.jsonl")
    assert state.generation == 1
    assert state.num_charged == 4, "abandoned steps stay charged, so none is left"
    assert tensors(run)


def _rewind(run: pathlib.Path) -> None:
    """As if the job had been killed after its last step and before its last checkpoint."""
    for released in ("privacy.json", "metrics.jsonl"):
        (run / released).unlink()
    shutil.rmtree(run / "model")
    drop_records(run / "secret" / "ledger.jsonl", "release")
    shutil.rmtree(sorted((run / "checkpoints").iterdir())[-1])
