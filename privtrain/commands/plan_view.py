"""Print for people what ``privtrain plan`` found out.

``d`` and ``description`` are the dictionary that :func:`privtrain.commands.plan.describe_plan` returns, also with
``--json``. An infinite ε is None in it.
"""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from privtrain.commands.cluster_advice import print_cluster
from privtrain.privacy.user_level import USER_ACCOUNTING

_GIB = 2**30


def print_plan(description: dict[str, Any]) -> None:
    """Print the description as tables with a small picture of ε over the run."""
    console = Console(highlight=False)
    console.print(_plan_table(description))
    _print_spending(console, description)
    if description["accountants"]:
        console.print(_accountant_table(description["accountants"]))
    if description["prices"]:
        console.print(_price_table(description["prices"]))
    if description["optimum"] is not None:
        _print_optimum(console, description["optimum"])
    _print_memory(console, description)
    if description["cluster"] is not None:
        print_cluster(console, description["cluster"])
    for reason in description["not_private_reasons"]:
        console.print(f"[bold red]NOT PRIVATE[/]: {reason}")
    for warning in description["warnings"]:
        console.print(f"[yellow]warning[/]: {warning}")
    console.print(f"launch with: {description['launch']}", soft_wrap=True)


def _plan_table(d: dict[str, Any]) -> Table:
    """Return the table of the plan itself, one row for each choice or promise."""
    table = Table("privacy plan", d["run"])
    records = "not read" if d["num_records"] is None else f"{d['num_records']:,}"
    table.add_row("unit, relation", f"{_unit_text(d)}, {d['neighboring_relation'].replace('_', ' ')}")
    table.add_row("users, records", f"{d['num_users']:,}, {records}")
    if "rows_empty" in d:  # the data were read
        table.add_row("rows dropped", f"{d['rows_without_user']} without user, {d['rows_empty']} empty")
        table.add_row("records of a user", f"median {d['records_of_median_user']}, most {d['records_of_largest_user']}")
    table.add_row("units trained on (expected)", f"{d['expected_training_units']:,}")
    # The bound is k, the most records of a user that count: in a step, or in the whole training set.
    above = f"; {d['users_above_bound']:,} users have more" if "users_above_bound" in d else ""
    if "records_within_bound" in d:
        beyond_bound = d["num_records"] - d["records_within_bound"]
        is_resampled = d["sampled_unit"] == "user" and d["selection"].startswith("random")
        fate = "more, resampled in each step" if is_resampled else "dropped"
        table.add_row("records within the bound", f"{d['records_within_bound']:,}; {beyond_bound:,} {fate}")
    if d["sampled_unit"] == "user":
        table.add_row("records of a unit in a step", f"at most {d['records_per_unit']}{above}; {_selection_text(d)}")
    elif d["records_per_user_in_training_set"] is not None:
        bound = f"at most {d['records_per_user_in_training_set']}{above}; {_selection_text(d)}"
        table.add_row("records of a user in the training set", bound)
    table.add_row(
        "sampling", f"{d['sampling']}, probability {d['sampling_prob']:g}, batch {d['expected_batch_size']:g}"
    )
    table.add_row("steps", f"{d['num_steps']}; a unit joins about {d['expected_steps_per_unit']:g}")
    if d["tuning"]:
        trials = (
            f"{d['tuning']['distribution']}, {d['tuning']['mean_trials']:g} expected; ε is for all of them together"
        )
        table.add_row("trials to choose from", trials)
    table.add_row("clipping norm", f"{d['clipping_norm']:g} ({d['clipping_style']}, joint over a unit's records)")
    table.add_row("noise multiplier", f"{d['noise_multiplier']:g}{_bands_text(d)}")
    if d["noised_metrics"]:
        shown = ", ".join(f"{name} ± {stddev:.2g}" for name, stddev in d["noised_metrics"].items())
        table.add_row("released with noise in each step", f"{shown}; gradient's own {d['gradient_noise_multiplier']:g}")
    table.add_row("noise on a coordinate of the mean", f"{d['noise_stddev_of_mean']:.3g}")
    if d["largest_signal_to_noise"] is not None:
        signal = f"{d['largest_signal_to_noise']:.3g}, if all units agreed ({d['num_trained_parameters']:,} parameters)"
        table.add_row("largest signal / noise of a step", signal)
    epsilon = "∞" if d["epsilon"] is None else f"{d['epsilon']:.4f}"
    table.add_row(f"ε ({d['accountant']}, certified upper bound)", epsilon)
    num_protected = d["expected_training_users" if d["unit"] == "user" else "expected_training_units"]
    table.add_row("δ", f"{d['delta']:g}; 1 / {d['unit']}s is {1 / max(num_protected, 1):.2g}")
    return table


def _bands_text(d: dict[str, Any]) -> str:
    """Return what follows the noise multiplier where noise is correlated over several steps (bands); else nothing."""
    if d["num_bands"] is None:
        return ""
    return (
        f", correlated over {d['num_bands']} steps (column norm {d['column_norm']:.4g})\nat the same ε, relative to "
        f"independent noise: {d['relative_noise_of_one_band']:.2f} × in the weights (predicted), "
        f"{d['relative_noise_of_late_step']:.2f} × in a step, which AdamW's step size shrinks with"
    )


def _unit_text(d: dict[str, Any]) -> str:
    """Return whom ε protects and, where records are sampled but users protected, how the one follows from the other."""
    how = USER_ACCOUNTING[d["user_accounting"]].how
    if not how:
        return d["unit"]
    return f"user, by {how} over {d['records_per_user_in_training_set']} sampled records"


def _selection_text(d: dict[str, Any]) -> str:
    return f"chosen: {d['selection'].replace('_', ' ')}"


def _print_spending(console: Console, d: dict[str, Any]) -> None:
    """Print ε after some steps as a bar chart; the last bar, ε of the run, is 40 characters long."""
    for step, value in d["epsilon_after_steps"].items():
        if value is not None and d["epsilon"]:
            bar = "█" * max(1, round(40 * value / d["epsilon"]))
            console.print(f"  after step {step:>6}  ε {value:7.3f}  {bar}")


def _accountant_table(rows: list[dict[str, Any]]) -> Table:
    """Return ε of the run by each accountant; one that cannot answer has no answer but a refusal in words."""
    table = Table("accountant", "ε of the run", "kind")
    for row in rows:
        answer = row["answer"]
        if answer is None:
            table.add_row(row["name"], "refused", row["refusal"])
            continue
        value = float(answer["upper" if answer["kind"] == "certified_upper" else "estimate"])
        table.add_row(row["name"], "∞" if math.isinf(value) else f"{value:.4f}", answer["kind"])
    return table


def _price_table(prices: list[dict[str, Any]]) -> Table:
    """Return a row for each possible change of the plan: ε, and noise as a multiple of the plan's as it stands."""
    columns = "what a change costs", "ε", "noise multiplier", "noise of a step", "noise of the run"
    table = Table(*columns, caption="on the mean gradient and on its sum over all steps, relative to this plan")
    for price in prices:
        relative = f"{price['relative_noise']:.2f} ×", f"{price['relative_noise_of_run']:.2f} ×"
        table.add_row(price["change"], f"{price['epsilon']:.3f}", f"{price['noise_multiplier']:g}", *relative)
    return table


def _print_optimum(console: Console, optimum: dict[str, Any]) -> None:
    """Print the best plan for each number of steps, the keys to change for the best of all, and what that rests on.

    Args:
        console: where to print.
        optimum: ``now``: the plan as it stands, or None; ``frontier``: the best choice for each number of steps;
            ``best``: the best of these; ``overrides``: dotted key → value that gives the best; ``rests_on``:
            assumptions, in words.
    """
    columns = "", "steps", "batch", "records", "bands", "noise multiplier", "noise of the run", "gain", "learning rate"
    caption = f"{optimum['record_draws']:,.0f} records in all; gain: predicted fall of the loss, relative to the best"
    table = Table(*columns, title="the same ε and compute", caption=caption)
    most_gain = max(choice["predicted_gain"] for choice in optimum["frontier"])
    marked = [("now", optimum["now"])] if optimum["now"] else []
    marked += [("best" if choice == optimum["best"] else "", choice) for choice in optimum["frontier"]]
    for mark, choice in marked:
        table.add_row(
            mark,
            str(choice["num_steps"]),
            str(choice["batch"]),
            str(choice["records_per_unit"]),
            str(choice["num_bands"]),
            f"{choice['noise_multiplier']:g}",
            f"{choice['relative_noise']:.3g}",
            f"{choice['predicted_gain'] / most_gain:.2f}",
            f"{choice['learning_rate']:.2g}",
        )
    console.print(table)
    overrides = {key: "null" if value is None else value for key, value in optimum["overrides"].items()}
    words = " ".join(f"{key}={value}" for key, value in overrides.items())
    console.print(f"to take the best, add: {words}", soft_wrap=True)
    for reason in optimum["rests_on"]:
        console.print(f"rests on: {reason}", soft_wrap=True)


def _print_memory(console: Console, d: dict[str, Any]) -> None:
    """Print memory of one rank by part, and how long training takes at most, where the throughput is known."""
    if not d["memory_bytes_per_rank"]:
        console.print(f"memory: not estimated: {d['memory_unknown_because']}")
    else:
        table = Table("memory of one rank", f"GiB ({d['num_ranks']} ranks)")
        for part, num_bytes in d["memory_bytes_per_rank"].items():
            table.add_row(part, f"{num_bytes / _GIB:.2f}")
        total = sum(d["memory_bytes_per_rank"].values())
        table.add_row("[bold]together, at most[/]", f"[bold]{total / _GIB:.2f}[/]")
        console.print(table)
    if d["most_training_seconds"] is not None:
        console.print(
            f"time: at most {d['most_training_seconds'] / 3600:.2f} hours "
            f"({d['most_tokens_per_step']:,} tokens a step, if every record is as long as data.max_length)"
        )
