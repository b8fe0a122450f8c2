"""The registry in a terminal."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privtrain.registry.refusal import describe_period
from privtrain.registry.views import BudgetView, RunView, UserView

_BAR = 20


def upwards(value: float) -> str:
    """Return a spent ε to three decimals, never shown below what it is."""
    return "∞" if math.isinf(value) else f"{math.ceil(round(value * 1000, 6)) / 1000:.3f}"


def downwards(value: float) -> str:
    """Return what is left to three decimals, never shown above what it is."""
    return f"{math.floor(round(value * 1000, 6)) / 1000:.3f}"


def day(seconds: float | None) -> str:
    """Return a time as UTC to the minute; empty for none."""
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def mechanism_text(view: RunView) -> str:
    """Return what a run is charged for in one phrase, e.g. ``noise 1.1, prob 0.01, 1,000 steps``."""
    known = view.mechanism
    if "noise_multiplier" not in known:
        return f"{known['count']} times {known['mechanism']}"
    return f"noise {known['noise_multiplier']:g}, prob {known['sampling_prob']:g}, {known['num_steps']:,} steps"


def print_budgets(views: Sequence[BudgetView]) -> None:
    """Print a table of budgets, one row each."""
    console = Console(highlight=False)
    if not views:
        console.print("no budgets yet; set one: privtrain registry budget set DATASET --epsilon 8 --delta 1e-6")
        return
    bar_width = _BAR if console.width >= 120 else 0
    table = Table("budget of", "ε, δ", "spent ε", "", "left ε", "sum of the runs' ε (not used)", "runs", "open")
    table.columns[0].overflow = "fold"
    for view in views:
        whose = "each user of" if view.scope == "user" else "data set"
        table.add_row(
            f"{whose} {escape(view.name)}",
            f"{view.epsilon:g}, {view.delta:g}{describe_period(view.period_seconds)}",
            f"{upwards(view.spent)} ({view.method})",
            _bar(min(1.0, view.spent / view.epsilon), bar_width),
            downwards(view.left),
            f"{upwards(view.sum_of_epsilons)} at δ {view.sum_of_deltas:.2g}",
            str(view.num_runs),
            str(view.num_live),
        )
    console.print(table)


def _bar(share: float, width: int) -> str:
    """Return a bar that is filled up to a share, green while much is left; nothing for the width 0."""
    colour = "green"
    if share >= 0.7:
        colour = "yellow"
    if share >= 0.95:
        colour = "red"
    num_filled = round(share * width)
    return f"[{colour}]{'█' * num_filled}[/]{'·' * (width - num_filled)}"


def print_runs(views: Sequence[RunView]) -> None:
    """Print a table of reservations, one row each."""
    console = Console(highlight=False)
    table = Table(
        "run", "data set", "state", "mechanism charged", "of", "ε, δ of the run", "begun", "ended", "reservation"
    )
    for view in views:
        table.add_row(
            escape(view.name),
            escape(view.dataset),
            view.state,
            mechanism_text(view),
            f"{view.num_reserved:,}",
            f"{upwards(view.epsilon)}, {view.delta:g}",
            day(view.created_at),
            day(view.closed_at),
            view.reservation,
        )
    console.print(table if views else "no runs yet")


def print_user(view: UserView) -> None:
    """Print which models hold a user's contribution, under which guarantee, and whether the user opted out."""
    console = Console(highlight=False, soft_wrap=True)
    listed = "not on the do-not-train list"
    if view.opted_out_at is not None:
        listed = (
            f"on the do-not-train list since {day(view.opted_out_at)}: no run that begins later trains on this user"
        )
    console.print(f"user {view.pseudonym}: {listed}")
    if not view.held:
        console.print("no finished model holds a contribution of this user")
    else:
        table = Table("model of run", "data set", "steps", "records", "guarantee", "ended")
        for held in view.held:
            run = held.run
            guarantee = f"({upwards(run.epsilon)}, {run.delta:g})-DP for one {run.unit}"
            table.add_row(
                escape(run.name),
                escape(run.dataset),
                str(held.num_steps),
                str(held.num_records),
                guarantee,
                day(run.closed_at),
            )
        console.print(table)
    if view.unfinished:
        names = ", ".join(f"{escape(run.name)} ({run.state}, began {day(run.created_at)})" for run in view.unfinished)
        console.print(f"not finished: {names}. Their users are recorded when they settle")
        if view.opted_out_at is not None:
            console.print("they began before this user opted out; to keep the user out, stop them and start new runs")
