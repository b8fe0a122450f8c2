"""What a run publishes beside the privacy statement: the adapter or the model, written and read back, and its card."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from privtrain.config import Config
from privtrain.config.data import HubSource
from privtrain.files import strict_yaml
from privtrain.files.atomic import write_atomically
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.license import license_metadata
from privtrain.run.statement import unit_text

#: How a card calls a data set that has no name on the hub.
_LOCAL = {"name": "data.evaluation", "type": "custom"}

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def write_adapter(directory: pathlib.Path, model: Any, tokenizer: Any, card: str) -> None:
    """Save adapter, tokenizer and card into a directory; the saved tensors are read back and compared.

    Raises:
        RuntimeError: if a saved tensor is not what is in memory; nothing is released then.
    """
    # PEFT saves embedding layers all the same where they were trained (modules_to_save).
    model.save_pretrained(str(directory), save_embedding_layers=False)
    tokenizer.save_pretrained(str(directory))
    write_atomically(directory / "README.md", card)
    _check_tensors(directory / "adapter_model.safetensors", model)


def write_model(
    directory: pathlib.Path,
    model: Any,
    tokenizer: Any,
    card: str,
    state: dict[str, Any],
    saving: Callable[[Any], contextlib.AbstractContextManager[None]],
) -> None:
    """Save the whole model where all weights were trained; it is loaded again and compared.

    Args:
        directory: where to.
        model: the model, whose weights may be sharded over ranks; only its ``save_pretrained`` is used for those.
        tokenizer: saved beside it.
        card: its model card.
        state: name → whole tensor, of everything that was trained; tensors that were not are whole in ``model``.
        saving: context manager in which the model's config is as it was when it was loaded.

    Raises:
        RuntimeError: if what was saved is not what is in memory; nothing is released then.
    """
    import torch
    import transformers

    whole = {name: p.detach().cpu() for name, p in model.named_parameters() if name not in state} | state
    with saving(model):
        model.save_pretrained(str(directory), state_dict=dict(whole))
    tokenizer.save_pretrained(str(directory))
    write_atomically(directory / "README.md", card)
    (architecture,) = transformers.AutoConfig.from_pretrained(str(directory)).architectures or []
    loaded = getattr(transformers, architecture).from_pretrained(str(directory), dtype=torch.float32)
    saved = dict(loaded.named_parameters())
    for name, value in whole.items():
        if name not in saved or not torch.equal(saved[name].detach(), value):
            raise RuntimeError(f"{directory}: tensor {name} was not saved as it is in memory")


def _check_tensors(path: pathlib.Path, model: Any) -> None:
    """Raise RuntimeError if a saved adapter lacks a tensor, has an empty one, or differs from the one in memory."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(path)
    for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if value.numel() == 0 or name not in saved or not torch.equal(saved[name], value.detach().cpu()):
            raise RuntimeError(f"{path}: tensor {name} was not saved as it is in memory")


def model_card(
    config: Config, plan: PrivacyPlan, statement: dict[str, Any], evaluation: Mapping[str, float] | None = None
) -> str:
    """Return Markdown with the statement in words (Ponomareva et al. 2023, "How to DP-fy ML", section 5.3).

    Args:
        config: of the run.
        plan: that was carried out.
        statement: of the release.
        evaluation: what was measured on ``data.evaluation`` at the end; public.
    """
    base = config.model.public_name
    library = "transformers" if config.training.releases_model else "peft"
    what = {
        "full": f"All weights of {base}",
        "bias": f"{base}, its biases",
        "lora": f"A LoRA adapter (rank {config.lora.rank}) for {base}",
        "prompt_tuning": f"A prompt of {config.prompt.num_virtual_tokens} virtual tokens for {base}",
        "prefix_tuning": f"A prefix of {config.prompt.num_virtual_tokens} virtual tokens for {base}",
    }[config.training.method]
    return (
        f"---\nlibrary_name: {library}\ntags: [differential-privacy, {config.training.method}, privtrain]\n"
        f"{_hub_metadata(config, evaluation or {})}---\n\n"
        f"# {config.run.name}\n\n{banner(statement)}"
        f"{what}, fine-tuned with {plan.unit}-level DP-SGD by privtrain.\n\n{card_section(plan, statement)}"
    )


def _hub_metadata(config: Config, evaluation: Mapping[str, float]) -> str:
    """Return lines of a card's front matter that hub pages read: task, base, license, data and results, if known."""
    task = "text-classification" if config.data.is_classification else "text-generation"
    metadata: dict[str, Any] = {"pipeline_tag": task}
    base, source = config.model.name_or_path or "", config.data.source
    if _HUB_NAME.fullmatch(base) and not pathlib.Path(base).exists():
        metadata["base_model"] = base
        metadata["base_model_relation"] = "finetune" if config.training.releases_model else "adapter"
    metadata |= license_metadata(config)
    if isinstance(source, HubSource):
        metadata["datasets"] = [source.name]
    if evaluation:
        measured_on = config.data.evaluation
        names = _LOCAL
        if isinstance(measured_on, HubSource):
            names = {"name": measured_on.name, "type": measured_on.name}
        metrics = [{"type": name, "value": round(value, 6)} for name, value in sorted(evaluation.items())]
        result = {"task": {"type": task}, "dataset": names, "metrics": metrics}
        metadata["model-index"] = [{"name": config.run.name, "results": [result]}]
    return strict_yaml.dump(metadata)


def banner(statement: dict[str, Any]) -> str:
    """Return the warning at the top of a card, a line for each reason why the run is not private; else empty."""
    lines = [f"> **NOT PRIVATE**: {reason}.\n" for reason in statement["not_private_reasons"]]
    return "".join([*lines, "\n"]) if lines else ""


def card_section(plan: PrivacyPlan, statement: dict[str, Any]) -> str:
    """Return the card's section on privacy, as Markdown.

    It depends on plan and statement alone, so that ``verify`` can make it again and compare.
    """
    epsilon = "∞" if statement["epsilon"] is None else f"{statement['epsilon']:.4g}"
    bound = statement["contribution_bound"]
    rows = [
        ("ε", epsilon),
        ("δ", f"{plan.delta:g}"),
        ("Privacy unit", unit_text(plan)),
        ("Neighbouring relation", plan.neighboring_relation.replace("_", " ")),
        (
            f"Records of {'an' if plan.unit == 'example' else 'a'} {plan.unit} in a step",
            f"at most {bound['records_per_unit_per_step']} ({bound['selection'].replace('_', ' ')})",
        ),
        ("Sampling", f"{plan.sampling.replace('_', ' ')}, probability {plan.sampling_prob:g} a step"),
        ("Steps charged", str(statement["steps_released"])),
        ("Clipping", f"{plan.clipping_style}, {_clipped_text(plan)}, norm {_norm_text(plan)}"),
        ("Noise multiplier", f"{plan.noise_multiplier:g}{_correlation_text(plan)}"),
        *_metric_rows(plan),
        *_tuning_row(plan),
        ("Accountant", f"{plan.accountant} (certified upper bound)"),
        ("Ledger head", f"`{statement['ledger']['head']}`"),
        ("Plan fingerprint", f"`{statement['plan_fingerprint']}`"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    return (
        f"## Privacy statement\n\n| | |\n|---|---|\n{table}\n\n"
        f"### Assumptions\n\n{_bullets(statement['assumptions'])}\n\n"
        f"### What ε does not cover\n\n{_bullets(statement['not_covered'])}\n"
    )


def _correlation_text(plan: PrivacyPlan) -> str:
    """Return what the row of the noise multiplier adds where the noise of steps is correlated; else empty."""
    if plan.strategy is None:
        return ""
    bands = f"noise correlated over {plan.strategy.num_bands} steps"
    return f", of {bands}, relative to a column norm of {plan.column_norm:.6g}"


def _tuning_row(plan: PrivacyPlan) -> list[tuple[str, str]]:
    """Return the row on hyper-parameter search; none if there was no private one."""
    if plan.tuning is None:
        return []
    trials = f"the best of a secret number of trials ({plan.tuning.distribution}, {plan.tuning.mean_trials:g} expected)"
    return [("Chosen", f"{trials}; ε is for all of them together")]


def _clipped_text(plan: PrivacyPlan) -> str:
    return "of a step's mean alone" if plan.clipping_style == "batch" else "joint over a unit's records"


def _norm_text(plan: PrivacyPlan) -> str:
    """Return the clipping norm, and how it changes from step to step where clipping is adaptive."""
    if plan.adaptive_clipping is None:
        return f"{plan.clipping_norm:g}"
    adaptive = plan.adaptive_clipping
    return (
        f"{plan.clipping_norm:g} at first, then following quantile {adaptive.target_quantile:g} by a count released in "
        f"every step with noise {adaptive.count_noise:g}; gradient and count together have the noise multiplier below"
    )


def _metric_rows(plan: PrivacyPlan) -> list[tuple[str, str]]:
    """Return the row on metrics that were released with noise, and with how much; none if there are none."""
    if plan.noised_metrics is None:
        return []
    shown = ", ".join(f"{name} (± {stddev:.2g})" for name, stddev in plan.metric_stddevs.items())
    multiplier = f"gradient alone {plan.gradient_noise_multiplier:g}; all together the noise multiplier above"
    return [("Metrics released with noise in every step", f"{shown}; {multiplier}")]


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
