"""axolotl: how each key of the configuration of ``axolotl train FILE`` is translated.

Functions of (value, whole foreign configuration) are rules: see :mod:`privtrain.commands.stacks.rules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privtrain.commands.stacks import rules
from privtrain.commands.stacks.rules import Outcome, Rule, left_out, never, only, refused, to

_FILE_KINDS = ("json", "csv", "parquet")
_SUFFIXES = (".jsonl", ".csv", ".parquet")
#: Keys of an entry of ``datasets`` that say nothing about what is learned.
_PLAIN_DATASET_KEYS = {"path", "type", "ds_type", "name", "split", "data_files", "field", "field_messages"}
_PLAIN_DATASET_KEYS |= {"message_property_mappings", "chat_template", "roles_to_train", "train_on_eos", "roles"}


def defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that axolotl takes for keys that its configuration does not give."""
    values: dict[str, Any] = {"adapter": None, "lr_scheduler": "cosine", "sequence_len": 512, "micro_batch_size": 1}
    if tree.get("adapter"):
        values |= {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    return values


def _adapter(value: Any, tree: Mapping[str, Any]) -> Outcome:
    """Translate ``adapter``: none means that all weights are trained."""
    if not value:
        return Outcome({"training.method": "full"})
    if value not in ("lora", "qlora"):
        return refused(f"given {value!r}; training.method is lora, full, bias, prompt_tuning or prefix_tuning")
    values = {"training.method": "lora"}
    has_bits = tree.get("load_in_4bit") or tree.get("load_in_8bit")  # these keys have rules of their own
    if value == "qlora" and not has_bits:
        values["model.quantization"] = "nf4"
    return Outcome(values)


def _datasets(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate a list of data sets into one ``data.source``; several must be files of one format and columns."""
    entries = value if isinstance(value, list) else [value]
    if not entries:
        return refused("given an empty list; name one file with user ids")
    outcomes = [_dataset(entry) for entry in entries]
    for outcome in outcomes:
        if outcome.is_refused:
            return outcome
    first, *rest = [dict(outcome.values) for outcome in outcomes]
    if rest:
        sources = [values.pop("data.source") for values in (first, *rest)]
        have_same_format = all(values == first for values in rest)
        are_files = all(source["kind"] == "files" for source in sources)
        if not have_same_format or not are_files:
            return refused("several data sets of different kinds; put them into files of one format, with user ids")
        first["data.source"] = {"kind": "files", "paths": [path for source in sources for path in source["paths"]]}
    return Outcome(first)


def _dataset(entry: Mapping[str, Any]) -> Outcome:
    """Translate one entry of ``datasets``: its format, its columns and where its rows are."""
    unknown = sorted(set(entry) - _PLAIN_DATASET_KEYS)
    if unknown:
        return refused(f"datasets: {', '.join(unknown)} has no counterpart")
    kind = entry.get("type")
    if kind == "completion":
        values: dict[str, Any] = {"data.format": "text", "data.text_column": entry.get("field") or "text"}
    elif kind == "chat_template":
        mappings = entry.get("message_property_mappings") or {}
        if any(mappings.get(name, name) != name for name in ("role", "content")):
            return refused("turns are {role, content} here; rename them in the file (message_property_mappings)")
        if set(entry.get("roles_to_train") or ["assistant"]) != {"assistant"}:
            return refused("roles_to_train: the assistant's turns are predicted, and no others")
        values = {"data.format": "chat", "data.messages_column": entry.get("field_messages") or "messages"}
    else:
        return refused(
            f"datasets: type {kind!r} has no counterpart; write prompt and completion, or a list of turns, into "
            "columns (data.format: prompt_completion or chat)"
        )
    path = str(entry.get("path") or "")  # a file, a name on the hub, or a kind of files beside data_files
    files = entry.get("data_files")
    if not path and not files:
        return refused("datasets: an entry has no path")
    if (not path or path in _FILE_KINDS) and files:
        paths = [files] if isinstance(files, str) else list(files)
    elif path.endswith(_SUFFIXES) or path.startswith((".", "/")):
        paths = [path]
    else:
        source = {"kind": "hub", "name": path, "split": entry.get("split") or "train"}
        if entry.get("name"):
            source["subset"] = entry["name"]
        return Outcome({"data.source": source, **values})
    return Outcome({"data.source": {"kind": "files", "paths": paths}, **values})


def _chat_template(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Keep the tokenizer's template; axolotl's other templates are names that nothing here knows, so ask for a file."""
    if value == "tokenizer_default":
        return Outcome(reason="the tokenizer's own, as here")
    key = "data.chat_template_file"
    return Outcome(needs={key: f"axolotl's template {value}, if the tokenizer's own is another."}, reason="a name")


def _linear(value: Any, tree: Mapping[str, Any]) -> Outcome:
    """Translate ``lora_target_linear``: adapters on all linear layers."""
    if not value:
        return Outcome(reason="off")
    if tree.get("lora_target_modules"):
        return refused("given beside lora_target_modules; lora.target_modules is all-linear or a list")
    return Outcome({"lora.target_modules": "all-linear"})


def _special_tokens(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Refuse special tokens (name → text) other than the tokenizer's own, apart from the padding's."""
    changed = sorted(set(value) - {"pad_token"})
    if changed:
        return refused(f"{', '.join(changed)}: the tokenizer's own marks are used; set them in its files")
    return Outcome(reason="padding is never read")


RULES: dict[str, Rule] = {
    **{key: rule for key, rule in rules.TRAINING_ARGUMENTS.items() if key not in ("report_to", "run_name", "optim")},
    "base_model": to("model.name_or_path"),
    "base_model_config": rules.NOTHING,
    "model_type": rules.NOTHING,
    "tokenizer_type": rules.NOTHING,
    "tokenizer_config": never("the base model's own tokenizer is used"),
    "revision_of_model": to("model.revision"),
    "is_llama_derived_model": rules.NOTHING,
    "is_mistral_derived_model": rules.NOTHING,
    "is_falcon_derived_model": rules.NOTHING,
    "strict": rules.NOTHING,
    "load_in_8bit": rules.switch("model.quantization", "int8"),
    "load_in_4bit": rules.switch("model.quantization", "nf4"),
    "gptq": never("quantised bases are nf4 or int8 of a whole base"),
    "datasets": _datasets,
    "test_datasets": rules.EVALUATION,
    "pretraining_dataset": never("rows are read whole, with their users; give files"),
    "dataset_prepared_path": rules.LOADING,
    "dataset_processes": rules.LOADING,
    "dataset_num_proc": rules.LOADING,
    "shuffle_merged_datasets": rules.LOADING,
    "push_dataset_to_hub": rules.HUB,
    "chat_template": _chat_template,
    "chat_template_jinja": never("write the template into a file and give data.chat_template_file"),
    "eot_tokens": left_out("the chat template's own end of a turn is predicted"),
    "train_on_inputs": never("the answers are predicted; for whole texts use data.format: text"),
    "val_set_size": rules.share_held_out,
    "sequence_len": to("data.max_length"),
    "sample_packing": rules.PACKING,
    "eval_sample_packing": rules.PACKING,
    "sample_packing_eff_est": rules.PACKING,
    "total_num_tokens": rules.PACKING,
    "pad_to_sequence_len": left_out("rows are as long as their record needs"),
    "max_packed_sequence_len": rules.PACKING,
    "adapter": _adapter,
    "lora_model_dir": never("training starts from the base model; merge the adapter into it first"),
    "lora_r": to("lora.rank"),
    "lora_alpha": to("lora.alpha", change=rules.number),
    "lora_dropout": to("lora.dropout", change=rules.number),
    "lora_target_linear": _linear,
    "lora_target_modules": rules.target_modules,
    "lora_modules_to_save": rules.names_list("lora.modules_to_save"),
    "lora_fan_in_fan_out": rules.NOTHING,
    "lora_mlp_kernel": rules.KERNELS,
    "lora_qkv_kernel": rules.KERNELS,
    "lora_o_kernel": rules.KERNELS,
    "peft_use_dora": to("lora.use_dora"),
    "peft_use_rslora": to("lora.use_rslora"),
    "loraplus_lr_ratio": never("one learning rate for all; the noise is the same on every coordinate"),
    "unfrozen_parameters": never("training.method is lora, full, bias, prompt_tuning or prefix_tuning"),
    "relora_steps": never("adapters are not merged during training"),
    "rl": never("preferences and rewards compare answers and are no likelihood of one user's texts"),
    "micro_batch_size": to("performance.microbatch_size"),
    "eval_batch_size": rules.EVALUATION,
    "num_epochs": rules.EPOCHS,
    "optimizer": rules.optimizer,
    "optim_args": never("AdamW takes training.betas and training.weight_decay"),
    "lr_scheduler": rules.schedule,
    "cosine_min_lr_ratio": never("the schedule decays to zero"),
    "bfloat16": rules.bf16,
    "float16": rules.fp16,
    "early_stopping_patience": never("stopping by what is seen of private rows would need ε of its own"),
    "local_rank": rules.LAUNCH,
    "flash_attention": rules.KERNELS,
    "flash_attn_cross_entropy": never("its fused loss has no gradient per user"),
    "flash_attn_rms_norm": rules.KERNELS,
    "flash_attn_fuse_qkv": never("fused weights are read without their module"),
    "flash_attn_fuse_mlp": never("fused weights are read without their module"),
    "xformers_attention": rules.KERNELS,
    "sdp_attention": rules.KERNELS,
    "flex_attention": rules.KERNELS,
    "s2_attention": never("rows must be independent and causal"),
    "plugins": never("code of plugins is not run"),
    "liger_rope": rules.KERNELS,
    "evals_per_epoch": rules.EVALUATION,
    "saves_per_epoch": rules.SAVING,
    "debug": rules.NOTHING,
    "special_tokens": _special_tokens,
    "tokens": never("no token is added: the base has no embedding of it"),
    "added_tokens_overrides": never("no token is added: the base has no embedding of it"),
    "rope_scaling": never("positions beyond the trained context are refused"),
    "use_tensorboard": to("tracking.tensorboard"),
    "mlflow_experiment_name": rules.LOGGING,
    "sequence_parallel_degree": only(1, otherwise="a user is computed whole on one rank"),
    "context_parallel_size": only(1, otherwise="a user is computed whole on one rank"),
    "tensor_parallel_size": only(1, otherwise="weights are whole or sharded by FSDP2 or ZeRO"),
    "reward_model": never("preferences and rewards are no likelihood of one user's texts"),
}
