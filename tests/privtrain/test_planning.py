"""``privtrain plan``: without data, weights or a process group; its memory is counted, its prices are certified."""

from __future__ import annotations

import json
import pathlib
import re
import shlex

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from privtrain.commands.plan import PlanOptions, describe_plan, price_list
from privtrain.commands.plan_view import print_plan
from privtrain.config import validate
from privtrain.config.dotted import assigned
from privtrain.data.corpus import load_corpus
from privtrain.errors import ConfigError
from privtrain.job.advice import attack_warnings
from privtrain.models.memory import LaunchLayout, model_size
from privtrain.models.trainable import add_lora
from privtrain.privacy.plan import PrivacyPlan
from tests.conftest import write_config

ZERO3 = pathlib.Path(__file__).parents[2] / "launch" / "accelerate" / "zero3.yaml"


def test_activations_are_what_a_real_forward_pass_saves(tree, tiny_llama):
    tree["data"]["max_length"] = 40
    tree["lora"]["target_modules"] = "all-linear"
    config = validate(tree)
    model = add_lora(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32), config.lora, 0, "tiny")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights and tensor.shape[-2:] != (40, 40):
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(input_ids=torch.ones(4, 40, dtype=torch.long))
    real = sum(t.untyped_storage().nbytes() for t in saved.values())
    parts = model_size(config, LaunchLayout()).memory_bytes
    assert parts["activations"] == pytest.approx(real, rel=0.15)
    assert parts["trained weights"] == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parts["frozen base"] == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)


def test_lines_take_a_lines_memory_and_logits_of_a_chunk(tree):
    tree["data"]["max_length"], tree["performance"]["microbatch_size"] = 1024, 8
    rows = model_size(validate(tree), LaunchLayout()).memory_bytes
    tree["performance"]["packing"] = "lines"
    lines = model_size(validate(tree), LaunchLayout()).memory_bytes
    assert lines["logits"] == rows["logits"] / (8 * 1024) * 512
    assert lines["activations"] < rows["activations"] / 3


def test_the_model_is_built_once(tree, tmp_path, monkeypatch):
    built = []
    real = AutoModelForCausalLM.from_config.__func__
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_config", classmethod(lambda cls, *a, **k: built.append(a) or real(cls, *a, **k))
    )
    found = describe_plan(write_config(tree, tmp_path / "c.yaml"), [], PlanOptions(num_users=100, prices=False))
    assert found["num_trained_parameters"] > 0
    assert len(built) == 1


def test_the_command_is_the_one_to_type(tree, tmp_path):
    """As a shell takes it apart, with what the command line of the plan changed."""
    path = write_config(tree, tmp_path / "c.yaml")
    options = PlanOptions(num_users=100, prices=False, accelerate=ZERO3, num_ranks=32)
    words = shlex.split(describe_plan(path, ["privacy.noised_metrics={release: [loss]}"], options)["launch"])
    launcher = ["accelerate", "launch", "--config_file", str(ZERO3), "--num_processes", "32"]
    assert words == [*launcher, "-m", "privtrain", "train", str(path), "privacy.noised_metrics={release: [loss]}"]


def test_what_the_launch_divides_among_ranks(tree, tmp_path):
    tree["training"]["method"] = "full"
    config = validate(tree)
    alone = model_size(config, LaunchLayout()).memory_bytes
    path = tmp_path / "zero3.yaml"
    content = {"distributed_type": "DEEPSPEED", "num_processes": 4, "deepspeed_config": {"zero_stage": 3}}
    path.write_text(yaml.safe_dump(content))
    divided = model_size(config, LaunchLayout.from_accelerate(path)).memory_bytes
    for part in ("trained weights", "optimizer state", "clipped sum and noise", "gradients of units"):
        assert divided[part] == alone[part] // 4
    assert divided["activations"] == alone["activations"]
    assert divided["tensor on its way"] == 8 * 257 * 32  # the embedding, integers
    assert "tensor on its way" not in alone
    tree["performance"]["clipping_route"] = "two_pass"
    assert model_size(validate(tree), LaunchLayout.from_accelerate(path)).memory_bytes["gradients of units"] == 0
    content["deepspeed_config"] = {"zero_stage": 1, "offload_optimizer_device": "cpu"}
    path.write_text(yaml.safe_dump(content))
    first = model_size(config, LaunchLayout.from_accelerate(path)).memory_bytes
    assert first["trained weights"] == alone["trained weights"]
    assert first["optimizer state"] == 0


def test_a_file_that_is_no_accelerate_config_is_refused(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1")
    with pytest.raises(ConfigError, match="not an accelerate config"):
        LaunchLayout.from_accelerate(tmp_path / "x.yaml")


def test_prices_are_certified_plans_of_their_own(tree):
    privacy = validate(tree).privacy
    plan = PrivacyPlan.build(privacy)
    prices = {price.change: price for price in price_list(privacy, plan)}
    assert prices["ε ÷ 2"].noise_multiplier > plan.noise_multiplier > prices["ε × 2"].noise_multiplier
    assert prices["batch × 2, same ε"].relative_noise < 1 < prices["batch ÷ 2, same ε"].relative_noise
    assert "batch × 4, same ε" not in prices  # a sampling probability of 1.6
    for change, price in prices.items():
        if "same ε" in change:
            assert 0.97 * plan.epsilon < price.epsilon <= plan.epsilon
    half = privacy.model_copy(update={"noise_multiplier": prices["steps ÷ 2, same ε"].noise_multiplier, "num_steps": 2})
    assert PrivacyPlan.build(half).epsilon == pytest.approx(prices["steps ÷ 2, same ε"].epsilon, rel=1e-3)


def test_equal_compute_larger_batches_means_less_noise(tree):
    """At the published setting: 950 of 190,000 users, 1,500 steps, ε 4, δ 1e-6."""
    tree["privacy"] |= {"target_epsilon": 4.0, "target_delta": 1e-6, "num_steps": 1500, "noise_multiplier": None}
    tree["privacy"] |= {"sampling_prob": 950 / 190_000, "expected_batch_size": 950, "accountant": "tilted"}
    privacy = validate(tree).privacy
    prices = {price.change: price for price in price_list(privacy, PrivacyPlan.build(privacy))}
    four = prices["batch × 4, steps ÷ 4, same ε and compute"]
    sixteen = prices["batch × 16, steps ÷ 16, same ε and compute"]
    assert four.relative_noise_of_run == pytest.approx(0.643, abs=2e-3)
    assert sixteen.relative_noise_of_run == pytest.approx(0.476, abs=2e-3)
    assert max(four.epsilon, sixteen.epsilon) <= 4


def test_no_prices_without_a_guarantee(tree):
    tree["privacy"]["noise_multiplier"] = 0
    privacy = validate(tree).privacy
    assert price_list(privacy, PrivacyPlan.build(privacy)) == []


def test_plan_shows_bound_and_delta_against_users(tree, tmp_path, capsys):
    description = describe_plan(write_config(tree, tmp_path / "c.yaml"), [], PlanOptions(prices=False))
    sizes = [1 + user % 9 for user in range(24)]
    assert description["num_records"] == sum(sizes)
    assert description["records_within_bound"] == sum(min(size, 3) for size in sizes)
    assert description["users_above_bound"] == sum(size > 3 for size in sizes)
    print_plan(description)
    shown = capsys.readouterr().out
    assert f"{sum(max(size - 3, 0) for size in sizes)} more, resampled in each step" in shown
    assert "1 / users is 0.059" in shown  # 17 of them


def test_remote_data_and_model_are_not_read_by_plan(tree, tmp_path, capsys):
    tree["data"]["source"] = {"kind": "files", "paths": [str(tmp_path / "on-the-cluster.parquet")]}
    tree["model"] = {"name_or_path": str(tmp_path / "not-here")}
    options = PlanOptions(num_users=1000, tokens_per_second=1000.0, prices=False)
    description = describe_plan(write_config(tree, tmp_path / "c.yaml"), [], options)
    json.dumps(description, allow_nan=False)
    assert description["num_users"] == 1000
    assert description["expected_training_units"] == 700
    assert description["memory_bytes_per_rank"] == {}
    assert "not-here" in description["memory_unknown_because"]
    # 4 steps of 6 users with 3 records of 24 tokens.
    assert description["most_training_seconds"] == pytest.approx(4 * 6 * 3 * 24 / 1000)
    print_plan(description)
    assert "not estimated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("num_records", "changes", "words"),
    [
        (3, {}, "0 users have data.attack_min_records=5 records or more: .* set data.attack_min_records=3 before"),
        (1, {}, "since users have too few records"),
        (5, {}, None),
        (3, {"data.attack_min_records": 2}, None),
        (3, {"data.attack_fraction": 0.0}, None),
        (3, {"privacy.unit": "example", "privacy.records_per_user": None}, None),
    ],
)
def test_a_run_that_no_attack_could_score_is_warned_of(tree, tmp_path, num_records, changes, words):
    """Otherwise the attack job refuses the run after its ε is spent."""
    rows = [{"user": f"u{user}", "text": f"{user} {n}"} for user in range(24) for n in range(num_records)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"] |= {"source": {"kind": "files", "paths": [str(tmp_path / "rows.jsonl")]}}
    tree["data"].pop("attack_min_records", None)
    config = validate(assigned(tree, changes))
    warned = attack_warnings(config, load_corpus(config.data))
    assert re.search(words, " ".join(warned)) if words else not warned
