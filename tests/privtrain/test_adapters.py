"""Every training method and adapter kind that the config names: exact, trained, released and loaded again."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn

from privtrain.config import validate
from privtrain.config.model import ModelSection
from privtrain.errors import ConfigError
from privtrain.inputs import check_inputs
from privtrain.job.train import train
from privtrain.models.load import load_base
from privtrain.models.trainable import make_trainable
from privtrain.privacy.layout import Layout
from tests.conftest import write_config
from tests.privtrain.models_for_tests import brute_force_sum, clipped_sum, invented_users, make_clipper, relative_error
from tests.privtrain.test_parity import CAUSAL

USERS = invented_users(5, most_records=3, seed=4)
#: name → (base, lora section, training method, the route that auto ends on)
KINDS = {
    "rslora": ("llama", {"use_rslora": True}, "lora", "auto"),
    "dora": ("llama", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, "lora", "one_unit"),
    "modules_to_save": (
        "qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
        "lora",
        "auto",
    ),
    "tied head to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lora", "auto"),
    "embedding to save": ("qwen2", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, "lora", "auto"),
    "lora on embeddings": ("qwen2", {"target_modules": ["q_proj", "embed_tokens"]}, "lora", "one_unit"),
    "bias": ("gpt_neox", {}, "bias", "auto"),
    "prompt tuning": ("llama", {}, "prompt_tuning", "one_unit"),
    "prefix tuning": ("llama", {}, "prefix_tuning", "one_unit"),
}


def trainable(base: nn.Module, tree, lora, method) -> tuple[nn.Module, Layout]:
    tree["lora"] = {"rank": 2, **lora}
    tree["training"]["method"] = method
    tree["prompt"] = {"num_virtual_tokens": 3}
    model = make_trainable(base.requires_grad_(False), validate(tree), init_seed=0)
    layout = Layout.of(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layout.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.train(), layout


def base_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CAUSAL[name]())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_exact(tree, kind):
    name, lora, method, route = KINDS[kind]
    model, layout = trainable(base_of(name), tree, lora, method)
    assert all(p.dtype == torch.float32 for p in layout.parameters.values())
    for style in ("flat", "per_layer", "automatic"):
        reference = brute_force_sum(model, layout, USERS, 0.3, style=style)
        clipper = make_clipper(model, layout, 0.3, style=style)
        for microbatch_size in (2, 16):
            assert relative_error(clipped_sum(clipper, USERS, microbatch_size), reference) < 1e-5, (
                style,
                microbatch_size,
            )
        assert clipper.route == route


class Int8Linear(nn.Linear):
    """A frozen base layer held in 8 bits, as quantised checkpoints hold it."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        scale = plain.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight.to(input.dtype) * self.scale.to(input.dtype))


@pytest.mark.parametrize("route", ["batched", "one_unit"])
def test_lora_over_a_quantised_frozen_base_is_exact(tree, route):
    base = base_of("llama")
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, Int8Linear(module))
    model, layout = trainable(base, tree, {"target_modules": ["q_proj", "down_proj"]}, "lora")
    assert any(p.dtype == torch.int8 for p in model.parameters())
    reference = brute_force_sum(model, layout, USERS, 0.3)
    clipper = make_clipper(model, layout, 0.3, route=route)
    assert relative_error(clipped_sum(clipper, USERS, 3), reference) < 1e-5


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_lora_over_a_base_that_bitsandbytes_holds_trains_exactly(tree, tiny_llama, quantization):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional: pip install 'privtrain[quantized]'")
    base = load_base(ModelSection(name_or_path=str(tiny_llama), quantization=quantization))
    model, layout = trainable(base, tree, {"target_modules": ["q_proj", "down_proj"]}, "lora")
    assert any(p.dtype in (torch.uint8, torch.int8) for p in model.parameters())
    reference = brute_force_sum(model, layout, USERS, 0.3)
    for route in ("batched", "one_unit"):
        found = clipped_sum(make_clipper(model, layout, 0.3, route=route), USERS, 3)
        assert relative_error(found, reference) < 1e-5


def test_evaluation_leaves_4_bit_weights_as_loaded(tiny_llama, monkeypatch):
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes is optional")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)  # as on the CPUs that pack them anew
    base = load_base(ModelSection(name_or_path=str(tiny_llama), quantization="nf4")).eval()
    before = {name: value.clone() for name, value in base.named_parameters()}
    with torch.no_grad():
        base(torch.tensor([[1, 2, 3]]))
    after = dict(base.named_parameters())
    assert any(value.dtype == torch.uint8 for value in after.values())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_trainable_copies_are_fp32_over_a_bf16_base(tree):
    _, layout = trainable(base_of("qwen2").bfloat16(), tree, {"modules_to_save": ["lm_head"]}, "lora")
    assert any("lm_head" in name for name in layout.parameters)
    assert all(p.dtype == torch.float32 for p in layout.parameters.values())


def test_quantised_base_without_library_is_refused_early(tree, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tree["model"]["quantization"] = "nf4"
    with pytest.raises(ConfigError, match=r"model\.quantization: nf4 needs bitsandbytes.*pip install"):
        check_inputs(validate(tree))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model": {"quantization": "int8"}, "training": {"method": "full"}}, "freezes"),
        ({"data": {"format": "classification", "labels": [0, 1]}, "training": {"method": "prompt_tuning"}}, "head"),
    ],
)
def test_combinations_that_cannot_train_are_refused(tree, changes, problem):
    for section, values in changes.items():
        tree[section] |= values
    with pytest.raises(ConfigError, match=problem):
        validate(tree)


def test_a_model_without_biases_is_refused(tree):
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no bias"):
        trainable(base_of("llama"), tree, {}, "bias")


JOBS = {
    "dora": {"lora": {"use_dora": True, "use_rslora": True}},
    "saved": {"lora": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
    "embeddings": {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    "prompt": {"training": {"method": "prompt_tuning"}, "prompt": {"num_virtual_tokens": 3}},
    "prefix": {"training": {"method": "prefix_tuning"}, "prompt": {"num_virtual_tokens": 3}},
}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_trains_releases_and_loads_every_kind(tree, tmp_path, tiny_llama, name):
    for section, values in copy.deepcopy(JOBS[name]).items():
        tree.setdefault(section, {}).update(values)
    tree["privacy"]["num_steps"] = 2
    train(write_config(tree, tmp_path / "c.yaml"))
    adapter = tmp_path / "runs" / "tiny" / "adapter"
    assert json.loads((adapter / "privacy.json").read_text())["steps_released"] == 2
    model = peft.PeftModel.from_pretrained(hf.AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        tuned = model(input_ids=ids).logits[:, -8:]
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    assert not torch.allclose(tuned, plain)
    assert load_file(adapter / "adapter_model.safetensors")


def test_a_job_that_trains_biases_changes_nothing_else(tree, tmp_path):
    directory = tmp_path / "neox"
    hf.AutoTokenizer.from_pretrained(tree["model"]["name_or_path"]).save_pretrained(directory)
    hf.AutoModelForCausalLM.from_config(
        hf.GPTNeoXConfig(**{**CAUSAL["gpt_neox"]().to_dict(), "vocab_size": 260})
    ).save_pretrained(directory)
    tree["model"]["name_or_path"] = str(directory)
    tree["training"]["method"] = "bias"
    tree["privacy"]["num_steps"] = 2
    train(write_config(tree, tmp_path / "c.yaml"))
    before = hf.AutoModelForCausalLM.from_pretrained(directory).state_dict()
    after = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "tiny" / "model").state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if name.endswith("bias")
    }
