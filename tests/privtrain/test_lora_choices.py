"""Choices about LoRA that cost no ε: A left as it starts, and a learning rate of its own for B."""

from __future__ import annotations

import pathlib

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from privtrain.config import validate
from privtrain.errors import ConfigError
from privtrain.job.train import train
from privtrain.models.trainable import add_lora
from tests.conftest import write_config


@pytest.fixture
def released(tree, tmp_path):
    """Train the fixture's configuration with some changes; return the adapter's tensors."""
    tree["privacy"]["num_steps"] = 1

    def run(name, **changes) -> dict[str, torch.Tensor]:
        changed = {**tree, "run": {**tree["run"], "name": name}}
        for section, values in changes.items():
            changed[section] = {**changed.get(section, {}), **values}
        train(write_config(changed, tmp_path / f"{name}.yaml"))
        return load_file(pathlib.Path(tree["run"]["output_dir"]) / name / "adapter" / "adapter_model.safetensors")

    return run


def test_a_stays_and_b_takes_its_own_rate(released, tree, tiny_llama):
    """The first step of AdamW is as long as the learning rate, whatever the gradient."""
    fresh = add_lora(AutoModelForCausalLM.from_pretrained(tiny_llama), validate(tree).lora, 0, "tiny")
    initial = {name.replace(".default", ""): p.detach() for name, p in fresh.named_parameters() if "lora_" in name}
    plain = released("plain")
    faster = released("faster", training={"lora_b_rate_ratio": 4.0})
    frozen = released("frozen", lora={"freeze_a": True})
    assert plain.keys() == faster.keys() == frozen.keys() == initial.keys()
    for name, value in plain.items():
        if "lora_B" in name:
            torch.testing.assert_close(faster[name], 4 * value)
            assert frozen[name].abs().max() > 0
        else:
            assert torch.equal(faster[name], value)
            assert torch.equal(frozen[name], initial[name])
            assert not torch.equal(value, initial[name])  # the mutant that freezes always


def test_freezing_a_halves_what_is_trained(tree, tiny_llama):
    tree["lora"]["freeze_a"] = True
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_llama), validate(tree).lora, 0, "tiny")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_B." in name for name in trained)


def test_freezing_a_does_not_go_with_dora(tree):
    tree["lora"] |= {"freeze_a": True, "use_dora": True}
    with pytest.raises(ConfigError, match=r"lora\.freeze_a"):
        validate(tree)
