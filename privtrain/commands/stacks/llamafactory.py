"""LLaMA-Factory: how each key of the configuration of ``llamafactory-cli train FILE`` is translated.

Functions of (value, whole foreign configuration) are rules: see :mod:`privtrain.commands.stacks.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privtrain.commands.stacks import rules
from privtrain.commands.stacks.rules import Outcome, Rule, left_out, never, only, refused, to

_METHODS = {"lora": "lora", "full": "full"}
_BITS = {4: "nf4", 8: "int8"}


def defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that LLaMA-Factory takes for keys that its configuration does not give."""
    values = {
        "stage": "sft",
        "finetuning_type": "lora",
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "cutoff_len": 2048,
        "per_device_train_batch_size": 8,
    }
    if tree.get("finetuning_type", "lora") == "lora":
        rank = tree.get("lora_rank") or 8
        values |= {"lora_rank": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "lora_target": "all"}
    return values


def _dataset(value: Any, tree: Mapping[str, Any]) -> Outcome:
    """Ask for ``data.source``: the value is names (a list, or joined by commas) whose files another file lists."""
    names = str(value).split(",") if isinstance(value, str) else list(value)
    where = f"{tree.get('dataset_dir', 'data')}/dataset_info.json"
    listed = ", ".join(str(name).strip() for name in names)
    needs = {"data.source": f"{listed}: {where} says which files these are, and their columns."}
    return Outcome(reason="names of dataset_info.json", needs=needs)


def _stage(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate the kind of training: supervised (sft) or further pretraining (pt)."""
    if value == "sft":
        return Outcome({"data.format": "chat"}, "or prompt_completion, as the files are")
    if value == "pt":
        return Outcome({"data.format": "text"})
    return refused(
        f"given {value!r}; preferences and rewards compare answers and are no likelihood of one user's texts"
    )


def _method(value: Any, _: Mapping[str, Any]) -> Outcome:
    if value not in _METHODS:
        return refused(f"given {value!r}; training.method is lora, full, bias, prompt_tuning or prefix_tuning")
    return Outcome({"training.method": _METHODS[value]})


def _bits(value: Any, _: Mapping[str, Any]) -> Outcome:
    if value not in _BITS:
        return refused(f"given {value!r}; model.quantization is nf4 (4 bits) or int8 (8 bits)")
    return Outcome({"model.quantization": _BITS[value]})


RULES: dict[str, Rule] = {
    **rules.TRAINING_ARGUMENTS,
    "model_name_or_path": to("model.name_or_path"),
    "model_revision": to("model.revision"),
    "adapter_name_or_path": never("training starts from the base model; merge the adapter into it first"),
    "quantization_bit": _bits,
    "quantization_method": only("bnb", "bitsandbytes", otherwise="bits are bitsandbytes' here"),
    "double_quantization": left_out("quantisation constants stay whole"),
    "flash_attn": rules.KERNELS,
    "enable_liger_kernel": never("its fused loss has no gradient per user"),
    "use_unsloth": never("its fused kernels have no gradient per user"),
    "rope_scaling": never("positions beyond the trained context are refused"),
    "shift_attn": never("rows must be independent and causal"),
    "upcast_layernorm": left_out("what is trained is fp32"),
    "stage": _stage,
    "finetuning_type": _method,
    "lora_rank": to("lora.rank"),
    "lora_alpha": to("lora.alpha", change=rules.number),
    "lora_dropout": to("lora.dropout", change=rules.number),
    "lora_target": rules.target_modules,
    "additional_target": rules.names_list("lora.modules_to_save"),
    "use_rslora": to("lora.use_rslora"),
    "use_dora": to("lora.use_dora"),
    "loraplus_lr_ratio": never("one learning rate for all; the noise is the same on every coordinate"),
    "pissa_init": never("adapters start at zero; PiSSA would change the base from its own weights"),
    "use_galore": never("the optimizer is AdamW"),
    "use_badam": never("the optimizer is AdamW over everything that is trained"),
    "use_apollo": never("the optimizer is AdamW"),
    "use_adam_mini": never("the optimizer is AdamW"),
    "use_muon": never("the optimizer is AdamW"),
    "use_llama_pro": never("layers are not added"),
    "mixture_of_depths": never("routers mix rows"),
    "pref_beta": never("preferences are no likelihood of one user's texts"),
    "pref_loss": never("preferences are no likelihood of one user's texts"),
    "freeze_trainable_layers": never("training.method is lora, full, bias, prompt_tuning or prefix_tuning"),
    "freeze_vision_tower": never("models that read images are not trained"),
    "freeze_multi_modal_projector": never("models that read images are not trained"),
    "image_max_pixels": never("models that read images are not trained"),
    "video_max_pixels": never("models that read images are not trained"),
    "dataset": _dataset,
    "eval_dataset": rules.EVALUATION,
    "dataset_dir": left_out("see data.source"),
    "media_dir": never("models that read images are not trained"),
    "template": left_out("the tokenizer's own chat template is used; for another give data.chat_template_file"),
    "default_system": never("put system turns into the conversations"),
    "cutoff_len": to("data.max_length"),
    "train_on_prompt": never("the answers are predicted; for whole texts use data.format: text"),
    "mask_history": never("every assistant turn is predicted"),
    "enable_thinking": left_out("the chat template decides"),
    "packing": rules.PACKING,
    "neat_packing": rules.PACKING,
    "streaming": rules.LOADING,
    "tokenized_path": rules.LOADING,
    "overwrite_cache": rules.LOADING,
    "preprocessing_num_workers": rules.LOADING,
    "preprocessing_batch_size": rules.LOADING,
    "max_samples": never("a cut of the rows would depend on their order; give fewer users' files"),
    "mix_strategy": never("users are sampled, not data sets"),
    "interleave_probs": never("users are sampled, not data sets"),
    "val_size": rules.share_held_out,
    "plot_loss": rules.LOGGING,
    "compute_accuracy": rules.EVALUATION,
    "predict_with_generate": rules.EVALUATION,
    "ray_run_name": rules.LAUNCH,
    "ray_num_workers": rules.LAUNCH,
    "resources_per_worker": rules.LAUNCH,
    "placement_strategy": rules.LAUNCH,
    "use_swanlab": rules.LOGGING,
    "disable_gradient_checkpointing": lambda value, _: Outcome({"performance.gradient_checkpointing": not value}),
    "pure_bf16": never("what is trained is fp32; use bf16: true"),
}
