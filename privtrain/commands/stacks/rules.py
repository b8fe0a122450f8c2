"""Rules that translate one key of a foreign configuration (TRL, axolotl, LLaMA-Factory) into keys of ours.

A key becomes values of our keys, or is left out because nothing here depends on it, or is refused. A rule takes the
key's value and the whole foreign configuration, and returns the outcome. ``to("lora.rank")`` for example returns the
rule that copies a value: ``lora_r: 8`` becomes ``lora.rank: 8``. A key without a rule is refused by name: a setting
that is lost in silence would train another model than was asked for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What becomes of a foreign key. Without values and not refused, the key is left out.

    Attributes:
        values: dotted key of ours → value, e.g. ``{"lora.rank": 8}``.
        reason: why the key is left out or refused; of a translated key at most a remark.
        is_refused: whether the model that was asked for cannot be trained here.
        needs: dotted key of ours that somebody must still decide → what to know for that.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""
    is_refused: bool = False
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)


Rule = Callable[[Any, Mapping[str, Any]], Outcome]


def refused(reason: str) -> Outcome:
    """Return the outcome of a key whose model cannot be trained here."""
    return Outcome(reason=reason, is_refused=True)


def to(*keys: str, note: str = "", change: Callable[[Any], Any] = lambda value: value) -> Rule:
    """Return the rule that gives a key's value, changed by ``change``, to these dotted keys of ours."""
    return lambda value, _: Outcome(dict.fromkeys(keys, change(value)), note)


def left_out(reason: str) -> Rule:
    """Return the rule of a key that nothing depends on here."""
    return lambda *_: Outcome(reason=reason)


def never(reason: str) -> Rule:
    """Return the rule of a switch that cannot be on."""
    return lambda value, _: refused(reason) if value else Outcome(reason="off")


def only(*allowed: Any, otherwise: str) -> Rule:
    """Return the rule of a key that must have one of these values; with another it is refused, for ``otherwise``."""
    return lambda value, _: Outcome(reason="as here") if value in allowed else refused(f"given {value!r}; {otherwise}")


def number(value: Any) -> float:
    """Return a number, also from a text; ``true`` is none.

    Raises:
        ValueError: if it is no finite number.
    """
    result = math.nan if isinstance(value, bool) else float(value)
    if not math.isfinite(result):
        raise ValueError("no finite number")
    return result


def whole(value: Any) -> int:
    """Return a whole number, also from a text.

    Raises:
        ValueError: if it is none.
    """
    result = number(value)
    if not result.is_integer():
        raise ValueError("no whole number")
    return int(result)


def optimizer(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Accept AdamW by any of its names: its state is fp32 here."""
    name = str(value).lower()
    if name.startswith(("adamw", "paged_adamw")):
        return Outcome(reason="AdamW, with its state in fp32")
    return refused(f"given {value!r}; the optimizer is AdamW (training.learning_rate, betas, weight_decay)")


def schedule(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate a learning-rate schedule by its Hugging Face name."""
    names = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}
    if str(value) not in names:
        return refused(f"given {value!r}; training.schedule is constant, linear or cosine")
    return Outcome({"training.schedule": names[str(value)]})


def bf16(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate the switch ``bf16`` into ``performance.precision``."""
    precision = {True: "bf16", False: "fp32", "true": "bf16", "full": "bf16", "auto": "auto"}.get(value)
    if precision is None:
        return refused(f"given {value!r}; expected true or auto")
    return Outcome({"performance.precision": precision})


def fp16(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Refuse fp16: loss scaling would skip steps because of the data."""
    if value in (False, "auto"):
        return Outcome(reason="off")
    return refused("fp16 needs loss scaling, which skips steps because of the data; use bf16")


def steps(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate a number of optimizer steps; -1 means none is given."""
    num_steps = whole(value)
    return Outcome({"privacy.num_steps": num_steps}) if num_steps > 0 else Outcome(reason="not set")


def target_modules(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate names of the modules that get LoRA, as a list or joined by commas."""
    if value in ("all", "all-linear"):
        return Outcome({"lora.target_modules": "all-linear"})
    names = _names(value)
    if any(set("*^$\\|") & set(name) for name in names):
        return refused(f"given {value!r}; lora.target_modules takes names, not patterns")
    return Outcome({"lora.target_modules": names})


def names_list(key: str) -> Rule:
    """Return the rule that gives a list of names, also joined by commas, to a key of ours."""
    return lambda value, _: Outcome({key: _names(value)})


def _names(value: Any) -> list[str]:
    """Return the names of a list, or of one string such as `a, b`."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("no list of names")
    return [name.strip() for name in names]


def switch(key: str, setting: str) -> Rule:
    """Return the rule of a switch: where it is on, a key of ours gets this setting."""
    return lambda value, _: Outcome({key: setting}) if value else Outcome(reason="off")


def share_held_out(value: Any, _: Mapping[str, Any]) -> Outcome:
    """Translate a share of rows kept for evaluation: here of users, since rows of one user are no independent test."""
    share = number(value)
    if not 0 <= share < 1:  # Hugging Face reads such a value as a number of rows
        return Outcome(reason="a number of rows; here a share of the users is held out (data.held_out_fraction)")
    return Outcome({"data.held_out_fraction": share}, "of users, not of rows")


# Outcomes that the tables of several stacks share.
EPOCHS = left_out("units are sampled: privacy.num_steps x privacy.sampling_prob is how often a user takes part")
ACCUMULATION = left_out("a step is one draw of users (privacy.expected_batch_size); microbatches follow from it")
GRADIENT_NORM = left_out("the mean gradient is not clipped; each user's is (privacy.clipping_norm)")
LAUNCH = left_out("how the job is launched: accelerate launch --config_file launch/accelerate/...")
LOGGING = left_out("what is logged is released values alone (tracking)")
SAVING = left_out("checkpoints are kept for resuming (performance.checkpoint_interval_steps); the end is released")
LOADING = left_out("how rows are read changes nothing that is learned")
KERNELS = left_out("attention and kernels are chosen by the model library; the start-up self-test checks them")
SEED = left_out("secrets come from the operating system; a seed would void the guarantee")
PACKING = left_out("a row holds one record; packed rows would mix users, who could not be clipped apart")
HUB = left_out("nothing is uploaded; privtrain export makes a directory to upload")
EVALUATION = left_out("see data.evaluation and tracking.evaluation_interval_steps")
NOTHING = left_out("has no effect on training here")

#: Arguments of the Hugging Face trainer, on which all three stacks build. The undotted targets (warmup_ratio, beta1,
#: beta2) are put together to keys of ours when all outcomes are there: see ``_settle`` of :mod:`.translate`.
TRAINING_ARGUMENTS: dict[str, Rule] = {
    "learning_rate": to("training.learning_rate", change=number),
    "lr_scheduler_type": schedule,
    "warmup_steps": to("training.num_warmup_steps"),
    "warmup_ratio": to("warmup_ratio", change=number),
    "weight_decay": to("training.weight_decay", change=number),
    "adam_beta1": to("beta1", change=number),
    "adam_beta2": to("beta2", change=number),
    "adam_epsilon": only(1e-8, otherwise="AdamW's epsilon is 1e-8 here"),
    "optim": optimizer,
    "max_grad_norm": GRADIENT_NORM,
    "num_train_epochs": EPOCHS,
    "max_steps": steps,
    "per_device_train_batch_size": to("performance.microbatch_size"),
    "gradient_accumulation_steps": ACCUMULATION,
    "auto_find_batch_size": ACCUMULATION,
    "gradient_checkpointing": to("performance.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": left_out("checkpointing is non-reentrant here"),
    "bf16": bf16,
    "fp16": fp16,
    "tf32": left_out("fp32 products are fp32 here"),
    "neftune_noise_alpha": never("noise on embeddings couples a user's gradient to random numbers of the batch"),
    "label_smoothing_factor": never("the loss is the plain likelihood"),
    "use_liger_kernel": never("its fused loss has no gradient per user"),
    "torch_compile": left_out("clipping's hooks run uncompiled"),
    "group_by_length": left_out("lengths decide nothing about who shares a microbatch but their own width"),
    "load_best_model_at_end": never(
        "choosing the best of many checkpoints would need ε of its own; the last is released"
    ),
    "metric_for_best_model": NOTHING,
    "greater_is_better": NOTHING,
    "seed": SEED,
    "data_seed": SEED,
    "run_name": LOGGING,
    "output_dir": to("run.output_dir", change=str),
    "overwrite_output_dir": left_out("a run directory is never overwritten; choose another run.name"),
    "resume_from_checkpoint": left_out("the same command resumes"),
    "remove_unused_columns": LOADING,
    "do_train": NOTHING,
    "do_eval": EVALUATION,
    "do_predict": EVALUATION,
    "deepspeed": LAUNCH,
    "ddp_timeout": to("performance.collective_timeout_seconds", change=lambda value: min(whole(value), 86400)),
    "push_to_hub": HUB,
    "report_to": LOGGING,
    "torch_empty_cache_steps": NOTHING,
    "include_num_input_tokens_seen": NOTHING,
    "average_tokens_across_devices": left_out("a user's loss has its own normaliser"),
    "trust_remote_code": never("code from a hub is not run; the model must be one of transformers' own"),
}
#: Rules of keys that have none of their own, by how the key begins.
PREFIXES: dict[str, Rule] = {
    "logging_": LOGGING,
    "log_": LOGGING,
    "save_": SAVING,
    "eval_": EVALUATION,
    "per_device_eval_": EVALUATION,
    "dataloader_": LOADING,
    "fsdp": LAUNCH,
    "ddp_": LAUNCH,
    "hub_": HUB,
    "wandb_": LOGGING,
}
