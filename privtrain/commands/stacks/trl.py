"""TRL: how each key of the configuration of ``trl sft --config FILE`` is translated.

Functions of (value, whole foreign configuration) are rules: see :mod:`privtrain.commands.stacks.rules`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from privtrain.commands.stacks import rules
from privtrain.commands.stacks.rules import Outcome, Rule, left_out, never, only, refused, to

DEFAULTS = {"learning_rate": 2e-5, "lr_scheduler_type": "linear", "max_length": 1024, "per_device_train_batch_size": 8}
LORA_DEFAULTS = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}

_NEEDS_FORMAT = {
    "data.format": "TRL reads the format off the data: text, prompt_completion or chat, each with its column keys."
}


def defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that TRL takes for keys that its configuration does not give."""
    return {**DEFAULTS, **(LORA_DEFAULTS if tree.get("use_peft") else {}), "use_peft": False}


def _dataset(value: Any, tree: Mapping[str, Any]) -> Outcome:
    """Translate ``dataset_name``, a file or a name on the hub, into ``data.source``."""
    path = pathlib.Path(str(value))
    format_keys = ("dataset_text_field", "assistant_only_loss", "completion_only_loss")  # each tells data.format
    needs = {} if any(tree.get(key) for key in format_keys) else _NEEDS_FORMAT
    if path.suffix in (".jsonl", ".csv", ".parquet"):
        return Outcome({"data.source": {"kind": "files", "paths": [str(path)]}}, needs=needs)
    source = {"kind": "hub", "name": str(value), "split": tree.get("dataset_train_split") or "train"}
    if tree.get("dataset_config"):
        source["subset"] = tree["dataset_config"]
    return Outcome({"data.source": source}, needs=needs)


def _peft(value: Any, _: Mapping[str, Any]) -> Outcome:
    return Outcome({"training.method": "lora" if value else "full"})


def _loss(value: Any, _: Mapping[str, Any]) -> Outcome:
    return Outcome(reason="as here") if value == "nll" else refused(f"given {value!r}; the loss is the likelihood")


RULES: dict[str, Rule] = {
    **rules.TRAINING_ARGUMENTS,
    "model_name_or_path": to("model.name_or_path"),
    "model_revision": to("model.revision"),
    "dtype": left_out("weights that are trained are fp32; the base follows performance.precision"),
    "torch_dtype": left_out("weights that are trained are fp32; the base follows performance.precision"),
    "attn_implementation": rules.KERNELS,
    "dataset_name": _dataset,
    "dataset_config": left_out("in data.source"),
    "dataset_train_split": left_out("in data.source"),
    "dataset_test_split": rules.EVALUATION,
    "dataset_streaming": rules.LOADING,
    "dataset_num_proc": rules.LOADING,
    "dataset_text_field": to("data.text_column"),
    "assistant_only_loss": rules.switch("data.format", "chat"),
    "completion_only_loss": rules.switch("data.format", "prompt_completion"),
    "chat_template_path": to("data.chat_template_file"),
    "max_length": to("data.max_length"),
    "max_seq_length": to("data.max_length"),
    "packing": rules.PACKING,
    "packing_strategy": rules.PACKING,
    "eval_packing": rules.PACKING,
    "padding_free": rules.PACKING,
    "eos_token": never("the tokenizer's own end mark is used; set it in its files"),
    "pad_token": left_out("padding is never read"),
    "pad_to_multiple_of": rules.NOTHING,
    "loss_type": _loss,
    "activation_offloading": never("activations stay on the device; use gradient_checkpointing"),
    "use_peft": _peft,
    "lora_r": to("lora.rank"),
    "lora_alpha": to("lora.alpha", change=rules.number),
    "lora_dropout": to("lora.dropout", change=rules.number),
    "lora_target_modules": rules.target_modules,
    "lora_modules_to_save": rules.names_list("lora.modules_to_save"),
    "lora_task_type": only("CAUSAL_LM", otherwise="a classifier is data.format: classification"),
    "use_rslora": to("lora.use_rslora"),
    "use_dora": to("lora.use_dora"),
    "load_in_4bit": rules.switch("model.quantization", "nf4"),
    "load_in_8bit": rules.switch("model.quantization", "int8"),
    "bnb_4bit_quant_type": only("nf4", otherwise="4 bits are nf4 here"),
    "use_bnb_nested_quant": left_out("quantisation constants stay whole"),
    "env": rules.LAUNCH,
    "num_processes": rules.LAUNCH,
    "accelerate_config": rules.LAUNCH,
}
