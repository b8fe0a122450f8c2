"""The mean of the weights after the last steps: what it is of, and that it survives a kill."""

from __future__ import annotations

import pathlib

import pytest
import torch
from safetensors.torch import load_file

from privtrain.backends.local import LocalBackend
from privtrain.config import validate
from privtrain.errors import ConfigError
from privtrain.job.train import train
from privtrain.training import average
from tests.conftest import write_config
from tests.privtrain.interrupted import train_until_killed


@pytest.mark.parametrize(("num_averaged", "num_taken"), [(0, 5), (1, 5), (3, 5), (5, 5), (3, 3), (2, 3)])
def test_average_is_the_mean_of_the_last_weights(num_averaged, num_taken):
    """Also of a run that ended early, of which it takes what there is of the tail."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.randn(7))
    optimizer, seen = torch.optim.AdamW([weights], lr=0.1), []
    for step in range(num_taken):
        weights.grad = torch.randn(7)
        optimizer.step()
        average.include(optimizer, step, num_steps=5, num_averaged=num_averaged)
        seen.append(weights.detach().clone())
    tail = seen[5 - num_averaged :]
    assert average.install(optimizer, LocalBackend(torch.device("cpu"))) == bool(tail)
    torch.testing.assert_close(weights.detach(), torch.stack(tail or seen[-1:]).mean(0))


@pytest.fixture
def config(tree, tmp_path):
    tree["privacy"]["num_steps"] = 5
    tree["performance"] = {**tree.get("performance", {}), "checkpoint_interval_steps": 1, "num_checkpoints_kept": 9}

    def write(name: str, num_averaged: int) -> pathlib.Path:
        changes = {"run": {**tree["run"], "name": name}, "training": {**tree["training"]}}
        changes["training"]["num_averaged_steps"] = num_averaged
        return write_config({**tree, **changes}, tmp_path / f"{name}.yaml")

    return write


def test_killed_job_releases_the_average_of_every_tail_step(config, tree, no_self_test):
    """Killed within the tail, whose first step no session after it takes."""
    broken = config("broken", 3)
    train_until_killed(broken, 4)
    train(broken)
    train(config("whole", 3))
    runs = pathlib.Path(tree["run"]["output_dir"])
    released = {name: load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("broken", "whole")}
    checkpoints = [runs / "whole" / "checkpoints" / f"step-{step:08d}" / "state.pt" for step in (3, 4, 5)]
    states = [torch.load(path, weights_only=True)["tensors"] for path in checkpoints]
    for name, value in released["whole"].items():
        assert torch.equal(value, released["broken"][name])
        tail = [state[name.replace(".weight", ".default.weight")] for state in states]
        torch.testing.assert_close(value, torch.stack(tail).mean(0))
        assert not torch.equal(value, tail[-1]), "the mutant that releases the last weights"


def test_more_averaged_steps_than_there_are_is_a_fault(tree):
    tree["training"] = {**tree["training"], "num_averaged_steps": tree["privacy"]["num_steps"] + 1}
    with pytest.raises(ConfigError, match=r"training\.num_averaged_steps"):
        validate(tree)
