"""The clipped sum of every supported model equals a float64 loop over units, on every route, in every style."""

from __future__ import annotations

import copy
import functools

import peft
import pytest
import torch
import transformers as hf
from torch.nn import functional as F

from privtrain.models.losses import label_logits, row_losses
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import (
    brute_force_sum,
    clipped_sum,
    invented_users,
    make_clipper,
    relative_error,
)

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,  # at 0.02 a tiny model's own fp32 gradients are off by 1e-5
}
_GPT2 = {"vocab_size": 256, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0}
_NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0}

CAUSAL = {
    "llama": lambda: hf.LlamaConfig(**_SIZES, tie_word_embeddings=True),
    "qwen2": lambda: hf.Qwen2Config(**_SIZES),
    "qwen3": lambda: hf.Qwen3Config(**_SIZES),
    "gemma2": lambda: hf.Gemma2Config(**_SIZES, sliding_window=4),
    "gemma3": lambda: hf.Gemma3TextConfig(**_SIZES, sliding_window=4),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_SIZES),
    "gpt2": lambda: hf.GPT2Config(**_GPT2, embd_pdrop=0.0, attn_pdrop=0.0),
    "mistral": lambda: hf.MistralConfig(**_SIZES, sliding_window=4),
    "phi3": lambda: hf.Phi3Config(**_SIZES),
    "opt": lambda: hf.OPTConfig(**_SIZES, **_OPT),
    "olmo2": lambda: hf.Olmo2Config(**_SIZES),
}
CLASSIFIERS = {
    "roberta": lambda: hf.RobertaConfig(**_SIZES, **_NO_DROPOUT, num_labels=3),
    "bert": lambda: hf.BertConfig(**_SIZES, **_NO_DROPOUT, num_labels=3),
    "llama_classifier": lambda: hf.LlamaConfig(**_SIZES, num_labels=3),
}
#: The batched route refuses these: OPT flattens rows into tokens, and its learned positions are a layer of its own.
ONLY_ONE_UNIT = {"opt"}


@functools.cache
def build(name: str, method: str) -> tuple[torch.nn.Module, Layout]:
    """A tiny random model with its trainable tensors moved off the starting point."""
    torch.manual_seed(0)
    if name in CAUSAL:
        model = hf.AutoModelForCausalLM.from_config(CAUSAL[name]())
    else:
        model = hf.AutoModelForSequenceClassification.from_config(CLASSIFIERS[name]())
    if method == "lora":
        task = "CAUSAL_LM" if name in CAUSAL else "SEQ_CLS"
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules="all-linear", task_type=task, use_rslora=True)
        )
    layout = Layout.of(model)
    with torch.no_grad():
        for parameter in layout.parameters.values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.train(), layout


def losses_of(name: str, model: torch.nn.Module):
    """The job's own losses; for a classifier, the label is a function of the row."""
    if name in CAUSAL:
        return lambda ids, mask: row_losses(model, ids, mask)

    def losses(ids, mask):
        attended = mask.clone()
        attended[:, 0] = True
        return torch.nn.functional.cross_entropy(label_logits(model, ids, attended), ids[:, 0] % 3, reduction="none")

    return losses


def reference_losses_of(name: str, model: torch.nn.Module):
    """The same in the model's own float64, written down once more."""

    def losses(ids, mask):
        logits = model(input_ids=ids).logits
        if name in CAUSAL:
            return F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none").sum()[None]
        return F.cross_entropy(logits, ids[:, 0] % 3, reduction="none")

    return losses


def users_of(unit: str):
    return invented_users(5, most_records=3 if unit == "user" else 1, seed=3)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *[(name, "user") for name in (*CAUSAL, *CLASSIFIERS)],
        *[(name, "example") for name in ("llama", "gemma3", "roberta")],
        *[
            pytest.param(name, "example", marks=pytest.mark.campaign)
            for name in (*CAUSAL, *CLASSIFIERS)
            if name not in ("llama", "gemma3", "roberta")
        ],
    ],
)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_clipped_sum_equals_the_float64_loop(name, method, unit):
    model, layout = build(name, method)
    double = copy.deepcopy(model).double()
    reference_layout = Layout.of(double)
    users = users_of(unit)
    routes = ["one_unit"] if name in ONLY_ONE_UNIT else ["batched", "two_pass", "one_unit"]
    for style in ("flat", "per_layer", "automatic"):
        reference = brute_force_sum(
            double, reference_layout, users, 0.3, style=style, losses=reference_losses_of(name, double)
        )
        for route in routes:
            clipper = make_clipper(model, layout, 0.3, losses_of(name, model), style=style, route=route)
            for microbatch_size, share in ((2, 0.0), (16, 0.3)):
                if route == "two_pass":  # nothing is kept, and some tensors are
                    clipper = make_clipper(
                        model, layout, 0.3, losses_of(name, model), style=style, route=route, kept_share=share
                    )
                error = relative_error(clipped_sum(clipper, users, microbatch_size), reference)
                assert error < 1e-5, (style, route, microbatch_size, error)
            assert clipper.route == route


@pytest.mark.parametrize("name", sorted(ONLY_ONE_UNIT))
@pytest.mark.parametrize("method", ["lora", "full"])
def test_auto_takes_one_unit_at_a_time_where_a_layer_has_no_rule(name, method):
    model, layout = build(name, method)
    clipper = make_clipper(model, layout, 0.3, losses_of(name, model))
    reference = brute_force_sum(model, layout, users_of("user"), 0.3, losses=losses_of(name, model))
    assert relative_error(clipped_sum(clipper, users_of("user"), 3), reference) < 1e-5
    assert clipper.route == "one_unit"
