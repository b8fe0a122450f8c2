"""What leaves the run: the adapter, its model card, and the privacy statement they both carry."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import privtrain
from privtrain.config import Config
from privtrain.privacy.plan import PrivacyPlan, finite
from privtrain.run.directory import write_atomically

SCHEMA = "privtrain/privacy/1"

ASSUMPTIONS = (
    "The keys in secret/ stay secret: whoever has them can redraw the sample and subtract the noise.",
    "The noise is exactly a Gaussian rounded to a public grid, over sums that are exact on a grid, so the last bits of "
    "what is released tell nothing (Mironov 2012). Its digits are ChaCha20's, keyed by HMAC-SHA-256 of a key from the "
    "operating system and the sum; both are assumed to look random.",
    "The plan (sampling probability, expected batch size, clipping norm, steps, delta) was chosen without looking at "
    "the private records.",
    "Hyper-parameter search over this data, if there was any, is not included.",
)

_RELATION_ASSUMPTION = {
    "add_or_remove_one": "Neighbouring data sets differ by all the records of one privacy unit, added or removed.",
    "zero_out": "Neighbouring data sets differ by all the records of one privacy unit, replaced by nothing: its place "
    "stays, and the number of places is public (zero-out).",
}

_UNIT_ASSUMPTION = {
    "user": ("The owner of a record is the value of the user column; a person with two ids counts as two users.",),
    "example": (
        "The unit is one record: a user with n records is protected only as far as group privacy over n reaches.",
    ),
}

_USER_ACCOUNTING_ASSUMPTION = {
    "group": "ε for a user is black-box group privacy over {k} records of the guarantee for one record: (k ε, "
    "δ (e^kε - 1) / (e^ε - 1)) at its best point.",
    "mixture": "ε for a user is that of a mixture of Gaussians: of {k} records each joins a step by a coin of its own "
    "(Charles et al. 2024, arXiv 2407.07737).",
}


def privacy_statement(config: Config, plan: PrivacyPlan, **facts: Any) -> dict[str, Any]:
    """The statement of what is guaranteed, for ``privacy.json``; see :func:`statement_of` for the ``facts``."""
    return statement_of(plan, not_covered=_not_covered(config), **facts)


def statement_of(
    plan: PrivacyPlan,
    *,
    not_covered: list[str],
    num_model_steps: int,
    num_charged: int,
    num_accounted: int,
    num_commits: int,
    ledger_head: str,
    split_commitment: str,
) -> dict[str, Any]:
    """The statement that follows from a plan and what happened; ``verify`` builds it again and compares.

    Args:
        plan: the plan that was carried out.
        not_covered: what ε does not cover, in words.
        num_model_steps: steps that the released model has behind it.
        num_charged: steps charged to the budget, abandoned ones included.
        num_accounted: the same, with every epoch of the sampling scheme that was begun counted whole; ε is for these.
        num_commits: steps that the ledger shows as finished.
        ledger_head: head of the ledger before its release record, which holds this statement's digest.
        split_commitment: to the coins, as the ledger has it; keyed, so it tells nothing of them.
    """
    epsilon, answer = plan.epsilon_after(num_accounted), plan.answer_after(num_accounted)
    return {
        "schema": SCHEMA,
        "private": not plan.not_private_reasons,
        "not_private_reasons": list(plan.not_private_reasons),
        "unit": plan.guaranteed_unit,
        "neighboring_relation": plan.neighboring_relation,
        "contribution_bound": {
            "records_per_unit_per_step": plan.records_per_unit,
            "selection": plan.selection,
            "records_per_user_in_training_set": plan.records_per_user,
        },
        "user_accounting": _user_accounting(plan, num_accounted),
        "sampling": plan.scheme.parameters(),
        "mechanism": {
            "kind": "gaussian",
            "unit": plan.unit,
            "noise_multiplier": plan.noise_multiplier,
            "clipping_norm": plan.clipping_norm,
            "clipping_style": plan.clipping_style,
            "adaptive_clipping": _adaptive(plan),
            "noised_metrics": _noised_metrics(plan),
            "expected_batch_size": plan.expected_batch_size,
        },
        "num_steps": plan.num_steps,
        "steps_released": num_charged,
        "steps_accounted": num_accounted,
        "steps_of_the_model": num_model_steps,
        "epsilon": finite(epsilon),
        "delta": plan.delta,
        "accountants": [
            {
                "method": plan.accountant,
                "kind": answer.kind.value,
                "lower": finite(answer.lower),
                "upper": finite(epsilon),
                "version": answer.version,
            }
        ],
        "ledger": {"head": ledger_head, "num_commits": num_commits},
        "split_commitment": split_commitment,
        "plan": plan.body(),
        "plan_fingerprint": plan.fingerprint(),
        "assumptions": [
            _RELATION_ASSUMPTION[plan.neighboring_relation],
            *_UNIT_ASSUMPTION[plan.guaranteed_unit],
            *_bound_assumptions(plan),
            *ASSUMPTIONS,
            plan.scheme.assumption,
        ],
        "not_covered": not_covered,
        "software": {"privtrain": privtrain.__version__},
    }


def _user_accounting(plan: PrivacyPlan, num_accounted: int) -> dict[str, Any] | None:
    """How a guarantee for users follows from records that are sampled and clipped; ``None`` where it need not."""
    if plan.user_accounting == "none":
        return None
    record_epsilon = plan.unit_epsilon_after(num_accounted)
    return {
        "method": plan.user_accounting,
        "records_per_user": plan.records_per_user,
        "sampled_unit": plan.unit,
        "epsilon_of_one_record": finite(record_epsilon),
    }


def _bound_assumptions(plan: PrivacyPlan) -> list[str]:
    """What a bound on a user's records in the training set says, and what it is used for."""
    found = []
    if plan.records_per_user is not None:
        found.append(
            f"No user has more than {plan.records_per_user} records in the training set; they are chosen by a function "
            f"of that user's records and of public things alone ({plan.selection.replace('_', ' ')})."
        )
    if plan.user_accounting != "none":
        found.append(_USER_ACCOUNTING_ASSUMPTION[plan.user_accounting].format(k=plan.records_per_user))
        found.append("Records are sampled and clipped one by one; the noise is relative to one record's norm.")
    return found


def unit_text(plan: PrivacyPlan) -> str:
    """Whom ε protects, in words."""
    if plan.user_accounting == "none":
        return plan.unit
    how = {"group": "group privacy", "mixture": "a mixture of Gaussians"}[plan.user_accounting]
    return f"user, with at most {plan.records_per_user} records in the training set, by {how} over sampled records"


def _adaptive(plan: PrivacyPlan) -> dict[str, Any] | None:
    """What adaptive clipping released beside the gradient; ``clipping_norm`` is then the first step's."""
    if plan.adaptive_clipping is None:
        return None
    return {
        **dataclasses.asdict(plan.adaptive_clipping),
        "count_sensitivity": 0.5,
        "gradient_noise_multiplier": plan.gradient_noise_multiplier,
    }


def _noised_metrics(plan: PrivacyPlan) -> dict[str, Any] | None:
    """Metrics that were released through the mechanism, in every step beside the gradient."""
    if plan.noised_metrics is None:
        return None
    return {
        **dataclasses.asdict(plan.noised_metrics),
        "sum_sensitivity": 0.5,
        "gradient_noise_multiplier": plan.gradient_noise_multiplier,
        "noise_stddev": plan.metric_stddevs,
    }


def write_adapter(directory: pathlib.Path, model: Any, tokenizer: Any, card: str) -> None:
    """``save_pretrained`` into a directory, with the card; what was saved is opened again and compared."""
    model.save_pretrained(str(directory), save_embedding_layers=False)  # unless modules_to_save names them
    tokenizer.save_pretrained(str(directory))
    write_atomically(directory / "README.md", card)
    _check_tensors(directory / "adapter_model.safetensors", model)


def write_model(directory: pathlib.Path, model: Any, tokenizer: Any, card: str, state: dict[str, Any]) -> None:
    """The same where all weights were trained: the whole model is loaded again and compared.

    Args:
        directory: where to.
        model: the model, whose weights may be sharded; it says how to save.
        tokenizer: saved beside it.
        card: its model card.
        state: name → whole tensor, of everything that was trained; what was not is whole in ``model``.

    Raises:
        RuntimeError: if what was saved is not what is in memory; nothing is released then.
    """
    import torch
    import transformers

    whole = {name: p.detach().cpu() for name, p in model.named_parameters() if name not in state} | state
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
    """Re-open what was saved: an adapter that is empty or differs is never released."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(path)
    for name, value in get_peft_model_state_dict(model, save_embedding_layers=False).items():
        if value.numel() == 0 or name not in saved or not torch.equal(saved[name], value.detach().cpu()):
            raise RuntimeError(f"{path}: tensor {name} was not saved as it is in memory")


def model_card(config: Config, plan: PrivacyPlan, statement: dict[str, Any]) -> str:
    """Markdown with the statement in words (Ponomareva et al. 2023, "How to DP-fy ML", section 5.3)."""
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
        f"---\nlibrary_name: {library}\ntags: [differential-privacy, {config.training.method}, privtrain]\n---\n\n"
        f"# {config.run.name}\n\n{banner(statement)}"
        f"{what}, fine-tuned with {plan.unit}-level DP-SGD by privtrain.\n\n{card_section(plan, statement)}"
    )


def banner(statement: dict[str, Any]) -> str:
    """What the card of a run that is not private begins with."""
    reasons = statement["not_private_reasons"]
    return "".join(f"> **NOT PRIVATE**: {reason}.\n" for reason in reasons) + ("\n" if reasons else "")


def card_section(plan: PrivacyPlan, statement: dict[str, Any]) -> str:
    """The privacy statement in the card: a function of plan and statement, which ``verify`` makes again."""
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
        ("Noise multiplier", f"{plan.noise_multiplier:g}"),
        *_metric_rows(plan),
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


def _not_covered(config: Config) -> list[str]:
    items = [
        "The attack report: aggregate results measured on private records, published without noise.",
        "What the base model knew before.",
        "Facts about a person that other people's records contain.",
    ]
    if config.tracking.release_held_out_metrics:
        items.append("Perplexity on held-out users: published without noise (tracking.release_held_out_metrics).")
    items += _times_not_covered(config)
    if config.tracking.system_metrics:
        items.append("Load of the machines, which varies with the sample drawn (tracking.system_metrics).")
    if config.tracking.private_metrics:
        items.append("Raw training loss, norms, clip fraction and batch sizes: published (tracking.private_metrics).")
    return items


def _times_not_covered(config: Config) -> list[str]:
    """Time is measured, not computed: whoever sees how long a step took learns who may have been in it."""
    tracking = config.tracking
    if tracking.release_measurements:
        return [
            "Seconds, throughput and memory of every step, which vary with the sample drawn: published "
            "(tracking.release_measurements)."
        ]
    if tracking.wandb or tracking.tensorboard:
        return [
            f"When each block of {tracking.mirror_block_steps} steps was done, and when the run began and ended, for "
            "whoever watches rows arrive in W&B or TensorBoard (tracking.mirror_block_steps)."
        ]
    return []


def _clipped_text(plan: PrivacyPlan) -> str:
    return "of a step's mean alone" if plan.clipping_style == "batch" else "joint over a unit's records"


def _norm_text(plan: PrivacyPlan) -> str:
    if plan.adaptive_clipping is None:
        return f"{plan.clipping_norm:g}"
    adaptive = plan.adaptive_clipping
    return (
        f"{plan.clipping_norm:g} at first, then following quantile {adaptive.target_quantile:g} by a count released in "
        f"every step with noise {adaptive.count_noise:g}; gradient and count together have the noise multiplier below"
    )


def _metric_rows(plan: PrivacyPlan) -> list[tuple[str, str]]:
    if plan.noised_metrics is None:
        return []
    shown = ", ".join(f"{name} (± {stddev:.2g})" for name, stddev in plan.metric_stddevs.items())
    multiplier = f"gradient alone {plan.gradient_noise_multiplier:g}; all together the noise multiplier above"
    return [("Metrics released with noise in every step", f"{shown}; {multiplier}")]


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
