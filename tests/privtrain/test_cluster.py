"""The predicted step on a cluster: counted work, honest about what it is, and consistent with itself."""

from __future__ import annotations

import dataclasses
import json

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from privtrain.commands import cluster_advice
from privtrain.commands.cluster import GPUS, Cluster, Job, predict
from privtrain.commands.cluster_advice import describe_cluster
from privtrain.commands.plan import PlanOptions, describe_plan
from privtrain.commands.plan_view import print_plan
from privtrain.config import validate
from privtrain.errors import ConfigError
from privtrain.models.memory import LaunchLayout
from privtrain.models.work import Work, count_model
from privtrain.privacy.plan import PrivacyPlan
from tests.conftest import write_config

#: About a 1B model in full, 512 tokens.
WORK = Work(512, 1e12, 1e12, ((2048, 8192),) * 48, 10**9, 200, 0, 1300)
ADAPTER = dataclasses.replace(
    WORK, weight_shapes=((16, 2048), (2048, 16)) * 48, num_trained=6 * 10**6, num_frozen=10**9
)
LAYOUTS = {
    "ddp": LaunchLayout(),
    "zero1": LaunchLayout(shards_optimizer=True),
    "zero2": LaunchLayout(shards_optimizer=True, shards_gradients=True),
    "fsdp2": LaunchLayout(shards_optimizer=True, shards_gradients=True, shards_parameters=True),
}


def job_of(layout: str = "ddp", *, is_full: bool = False, k: int = 1, size: int = 8, checkpoints: bool = False) -> Job:
    work = WORK if is_full else ADAPTER
    return Job(work, LAYOUTS[layout], 1024.0, k, size, is_full, checkpoints, is_full and checkpoints)


@pytest.mark.parametrize("text", ["8", "h100", "0xh100", "8xh99", "8 x h100", "-1xh100", "8xh100x2"])
def test_a_cluster_that_is_none_is_refused_with_what_is_allowed(text):
    with pytest.raises(ConfigError, match="a100, b200, h100, h200"):
        Cluster.parse(text)


def test_work_of_a_llama_is_counted_layer_by_layer():
    shape = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, **heads, use_cache=False))
    work = count_model(model, torch.float32, 10)
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48) + 32 * 96
    attention = 2 * 2 * 10 * 10 * 32 * 2
    assert work.forward_flops == pytest.approx(2 * 10 * matrices + attention, rel=0.05)  # and rotary frequencies
    assert work.weight_flops == 2 * 10 * matrices
    assert work.activation_flops == pytest.approx(2 * 10 * matrices + 2 * attention, rel=0.05)
    assert work.num_trained == matrices + 96 * 32 + 5 * 32
    assert len(work.weight_shapes) == 15


@hypothesis.given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    is_full=st.booleans(),
    k=st.sampled_from([1, 4, 16]),
    checkpoints=st.booleans(),
    gpu=st.sampled_from(sorted(GPUS)),
)
@hypothesis.settings(deadline=None)
def test_no_predicted_part_is_negative_and_privacy_costs(layout, is_full, k, checkpoints, gpu):
    job = job_of(layout, is_full=is_full, k=k, checkpoints=checkpoints)
    for num_ranks in (1, 2, 8, 64):
        found = predict(job, Cluster(num_ranks, GPUS[gpu], gpu))
        assert min(*found.parts.values(), *found.plain_parts.values()) >= 0
        assert found.overhead > 0
        assert 0 < found.efficiency < 1
    one, eight = (predict(job, Cluster(n, GPUS[gpu], gpu)).parts["noise"] for n in (1, 8))
    assert eight == pytest.approx(one / 8), "each coordinate's noise once in the job"


def test_a_rank_more_helps_until_units_exceed_a_microbatch():
    """All ranks on one unit at a time do not grow with the number of ranks."""

    def efficiencies(size: int) -> list[float]:
        job = job_of("fsdp2", is_full=True, k=4, size=size)
        return [predict(job, Cluster(n, GPUS["h100"], "h100")).efficiency for n in (2, 8)]

    whole, cooperative = efficiencies(4), efficiencies(2)
    assert whole[1] > 0.7 * whole[0]
    assert cooperative[1] < 0.6 * cooperative[0]


def test_settings_named_are_faster_and_fit_the_memory(tree):
    config = validate(tree)
    plan = PrivacyPlan.build(config.privacy, config.training)
    found = describe_cluster(config, plan, LaunchLayout(), "2xh100")
    assert found["faster_settings"], "a tiny model waits for launches"
    for other in found["faster_settings"]:
        assert other["predicted_step_seconds"] < found["predicted_step_seconds"]
        assert other["memory_bytes"] <= found["usable_memory_bytes"]


def test_plan_shows_the_prediction_and_says_that_it_is_one(tree, tmp_path, capsys):
    config = write_config(tree, tmp_path / "run.yaml")
    found = describe_plan(config, [], PlanOptions(prices=False, cluster="16xh100"))
    json.dumps(found)
    assert found["cluster"]["cluster"] == "16 x H100"
    assert found["num_ranks"] == 16
    assert "--num_processes 16" in found["launch"]
    print_plan(found)
    shown = " ".join(capsys.readouterr().out.split())
    assert "predicted step on 16 x H100" in shown
    assert "not measured" in shown


def test_number_of_ranks_is_said_once():
    with pytest.raises(ConfigError, match="give it or --cluster"):
        PlanOptions(cluster="16xh100", num_ranks=8)


def test_a_sum_that_is_sent_once_a_step_spares_the_network():
    """And the advice names the key; its memory is counted in the whole sum."""
    cluster = Cluster.parse("64xh100")
    job = dataclasses.replace(job_of("zero2", is_full=True, k=4), num_units=2048.0)
    often, once = (predict(dataclasses.replace(job, reduces_once=flag), cluster) for flag in (False, True))
    waiting = "waiting for weights and gradients"
    assert once.parts[waiting] == 0 < often.parts[waiting]
    reduction = "reduction and update of weights"
    assert once.parts[reduction] - often.parts[reduction] == pytest.approx(cluster.collect(8 * WORK.num_trained))
    assert all(once.parts[part] == often.parts[part] for part in once.parts if part not in (waiting, reduction))
    assert once.plain_parts[waiting] == 0, "plain training may wait as long"
    memory = {"trained weights": 10, "tensor on its way": 3}
    changes = {setting: size for setting, _, size in cluster_advice._changes(job, memory)}
    assert changes["performance.reduce_once: true"] == 10 + 8 * WORK.num_trained
    assert "performance.reduce_once: true" not in {
        setting for setting, *_ in cluster_advice._changes(dataclasses.replace(job, reduces_once=True), memory)
    }
