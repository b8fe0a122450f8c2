"""Whole jobs that train all weights: release, resume and the routes agree."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from privtrain.job.train import train
from privtrain.ledger.view import verify_run
from tests.conftest import write_config


def released(tree, tmp_path, name, **sections):
    tree = copy.deepcopy(tree)
    tree["run"]["name"] = name
    tree["training"]["method"] = "full"
    for section, values in sections.items():
        tree[section].update(values)
    train(write_config(tree, tmp_path / f"{name}.yaml"))
    return tmp_path / "runs" / name


def weights(run):
    return dict(AutoModelForCausalLM.from_pretrained(run / "model").named_parameters())


@pytest.mark.slow
def test_a_job_that_trains_all_weights_releases_the_model(tree, tmp_path, tiny_llama):
    run = released(tree, tmp_path, "whole", privacy={"clipping_style": "automatic"})
    statement = json.loads((run / "privacy.json").read_text())
    assert statement["mechanism"]["clipping_style"] == "automatic"
    assert json.loads((run / "model" / "privacy.json").read_text()) == statement
    assert "All weights of" in (run / "model" / "README.md").read_text()
    assert not (run / "adapter").exists()
    assert "4 steps charged" in verify_run(run)
    base = dict(AutoModelForCausalLM.from_pretrained(tiny_llama).named_parameters())
    moved = weights(run)
    assert all(float((moved[name] - base[name]).abs().max()) > 0 for name in base)
    before = {name: value.clone() for name, value in moved.items()}
    train(tmp_path / "whole.yaml")
    assert all(torch.equal(before[name], value) for name, value in weights(run).items()), "a finished run is left alone"


@pytest.mark.slow
def test_routes_and_checkpointing_give_the_same_model(tree, tmp_path):
    runs = [
        weights(released(tree, tmp_path, name, performance=performance, privacy={"noise_multiplier": 0}))
        for name, performance in {
            "batched": {"clipping_route": "batched", "gradient_checkpointing": True},
            "one": {"clipping_route": "one_unit", "microbatch_size": 3},
        }.items()
    ]
    for name, value in runs[0].items():
        # Adam divides by the gradient's size, so rounding of a coordinate near zero can show.
        assert float((value - runs[1][name]).norm() / value.norm()) < 1e-4
