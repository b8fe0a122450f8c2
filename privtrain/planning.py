"""``privtrain plan``: what a run will guarantee and cost, before any weight is loaded."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from privtrain.advice import expected_units, warnings
from privtrain.config import load_config
from privtrain.data.corpus import load_corpus
from privtrain.inputs import check_inputs
from privtrain.plan import PrivacyPlan, finite

#: Points of the run at which the spent budget is shown.
_MILESTONES = (0.1, 0.25, 0.5, 0.75, 1.0)


def describe_plan(config_path: pathlib.Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The plan with what can be said about it from config and data alone.

    Raises:
        ConfigError: with every fault of the config and its inputs.
    """
    config = load_config(config_path, overrides)
    check_inputs(config)
    corpus = load_corpus(config.data)
    plan = PrivacyPlan.build(config.privacy)
    steps = sorted({max(1, round(share * plan.num_steps)) for share in _MILESTONES})
    return {
        "run": str(config.run.directory),
        "unit": plan.unit,
        "num_users": len(corpus.records),
        "num_records": corpus.num_records,
        "rows_without_user": corpus.counts.num_without_user,
        "rows_empty": corpus.counts.num_empty,
        "expected_training_units": round(expected_units(config, corpus)),
        "records_per_unit": plan.records_per_unit,
        "neighboring_relation": plan.neighboring_relation,
        "sampling": plan.sampling,
        "sampling_prob": plan.sampling_prob,
        "expected_batch_size": plan.expected_batch_size,
        "num_steps": plan.num_steps,
        "expected_steps_per_unit": round(plan.num_steps * plan.sampling_prob, 2),
        "clipping_norm": plan.clipping_norm,
        "clipping_style": plan.clipping_style,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev_of_mean": plan.noise_stddev / plan.expected_batch_size,
        "accountant": plan.accountant,
        "epsilon": finite(plan.epsilon),
        "delta": plan.delta,
        "epsilon_after_steps": {str(n): finite(plan.epsilon_after(n)) for n in steps},
        "not_private_reasons": list(plan.not_private_reasons),
        "warnings": warnings(config, plan, corpus),
        "launch": f"accelerate launch --config_file launch/accelerate/cpu.yaml -m privtrain train {config_path}"
        + "".join(f" {override}" for override in overrides),
    }


def print_plan(description: dict[str, Any]) -> None:
    """The description as a table with a small picture of ε over the run."""
    console = Console(highlight=False)
    epsilon = description["epsilon"]
    table = Table("privacy plan", description["run"], title=None)
    rows = [
        ("unit, relation", f"{description['unit']}, {description['neighboring_relation'].replace('_', ' ')}"),
        ("users, records", f"{description['num_users']:,}, {description['num_records']:,}"),
        ("rows dropped", f"{description['rows_without_user']} without user, {description['rows_empty']} empty"),
        ("units trained on (expected)", f"{description['expected_training_units']:,}"),
        ("records of a unit in a step", f"at most {description['records_per_unit']}"),
        (
            "sampling probability",
            f"{description['sampling_prob']:g} ({description['sampling'].replace('_', ' ')}), "
            f"batch {description['expected_batch_size']:g}",
        ),
        ("steps", f"{description['num_steps']}; a unit joins about {description['expected_steps_per_unit']:g}"),
        (
            "clipping norm",
            f"{description['clipping_norm']:g} ({description['clipping_style']}, joint over a unit's records)",
        ),
        ("noise multiplier", f"{description['noise_multiplier']:g}"),
        ("noise on a coordinate of the mean", f"{description['noise_stddev_of_mean']:.3g}"),
        (f"ε ({description['accountant']}, certified upper bound)", "∞" if epsilon is None else f"{epsilon:.4f}"),
        ("δ", f"{description['delta']:g}"),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for step, value in description["epsilon_after_steps"].items():
        if value is not None and epsilon:
            console.print(f"  after step {step:>6}  ε {value:7.3f}  {'█' * max(1, round(40 * value / epsilon))}")
    for reason in description["not_private_reasons"]:
        console.print(f"[bold red]NOT PRIVATE[/]: {reason}")
    for warning in description["warnings"]:
        console.print(f"[yellow]warning[/]: {warning}")
    console.print(f"launch with: {description['launch']}", soft_wrap=True)
