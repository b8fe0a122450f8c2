"""``privtrain registry``: budgets over runs, for people. Everything heavy is imported when a command runs."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from typing import Annotated, Any

import typer

from privtrain.errors import PrivtrainError
from privtrain.process.options import AsJson

app = typer.Typer(help="Budgets over runs: set them, see what is spent, opt users out.", no_args_is_help=True)
budget_app = typer.Typer(help="Set and list budgets.", no_args_is_help=True)
app.add_typer(budget_app, name="budget")

Url = Annotated[
    str | None,
    typer.Option(
        "--registry",
        envvar="PRIVTRAIN_REGISTRY",
        show_envvar=True,
        show_default=False,
        help="SQLite file or postgresql:// URL; default: registry.db in the user's data directory.",
    ),
]

_UNITS = {"s": 1, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


@app.command()
def init(registry: Url = None) -> None:
    """Make the registry: its tables, and the key behind its pseudonyms. A SQLite file is also made when first used."""
    _bring_up_to_date(registry)


@app.command()
def upgrade(registry: Url = None) -> None:
    """Bring an older registry to this version's schema."""
    _bring_up_to_date(registry)


@budget_app.command("set")
def budget_set(
    dataset: Annotated[str, typer.Argument(help="Name that configs use in registry.dataset.")],
    epsilon: Annotated[float, typer.Option(help="What all runs together may spend.")],
    delta: Annotated[float, typer.Option(help="At this δ.")],
    per: Annotated[
        str, typer.Option(help="user: every user, over all data sets of the population; dataset: this data set alone.")
    ] = "user",
    period: Annotated[
        str | None, typer.Option(help="In every window of this length, e.g. 365d, 12w, 24h; default: for ever.")
    ] = None,
    population: Annotated[
        str | None, typer.Option(help="Whose records these are; data sets of one population share users.")
    ] = None,
    unit: Annotated[str, typer.Option(help="Privacy unit of the data set: user or example.")] = "user",
    registry: Url = None,
) -> None:
    """Set or change the budget of a data set; a data set that is new is added."""
    from privtrain.registry.refusal import describe_period, describe_scope

    key = _open(registry).set_budget(
        dataset,
        epsilon=epsilon,
        delta=delta,
        scope=per,
        period_seconds=None if period is None else parse_period(period),
        population=population,
        unit=unit,
    )
    typer.echo(f"{describe_scope(key)}: ε {epsilon:g} at δ {delta:g}{describe_period(key.period_seconds)}")


@budget_app.command("list")
@app.command("status")
def status(registry: Url = None, as_json: AsJson = False) -> None:
    """Show what is spent of every budget: the runs composed, and the sum of their ε's beside it."""
    from privtrain.registry import printing, views

    budgets = views.budgets(_open(registry, read_only=True).database)
    if as_json:
        _echo_json([dataclasses.asdict(view) for view in budgets])
    else:
        printing.print_budgets(budgets)


@app.command("runs")
def runs(registry: Url = None, as_json: AsJson = False) -> None:
    """Show every reservation: what it may spend, what it did spend, and whether its run is alive."""
    from privtrain.registry import printing, views

    reservations = views.runs(_open(registry, read_only=True).database)
    if as_json:
        _echo_json([dataclasses.asdict(view) for view in reservations])
    else:
        printing.print_runs(reservations)


@app.command("user")
def user(
    user_id: Annotated[str | None, typer.Argument(help="User id as in the data.", metavar="[USER]")] = None,
    pseudonym: Annotated[str | None, typer.Option(help="The registry's pseudonym instead.")] = None,
    registry: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show which models hold a user's contribution, under which guarantee."""
    opened = _open(registry, read_only=True)
    _show_user(opened, _pseudonym(opened, user_id, pseudonym), as_json)


def forget(
    user_id: Annotated[str | None, typer.Argument(help="User id as in the data.", metavar="[USER]")] = None,
    pseudonym: Annotated[str | None, typer.Option(help="The registry's pseudonym instead.")] = None,
    registry: Url = None,
    as_json: AsJson = False,
) -> None:
    """Put a user on the do-not-train list, and show which models hold their contribution under which guarantee."""
    opened = _open(registry)
    chosen = _pseudonym(opened, user_id, pseudonym)
    opened.forget(chosen)
    _show_user(opened, chosen, as_json)


@app.command("close")
def close(
    reservation: Annotated[str, typer.Argument(help="Reservation, from: privtrain registry runs")],
    registry: Url = None,
) -> None:
    """End an expired reservation as charged in full, so that the budget's period begins to run for it."""
    _open(registry).close(reservation)
    typer.echo(f"reservation {reservation} is closed and charged in full")


@app.command("clock")
def show_clock(
    confirm: Annotated[
        str | None,
        typer.Option(help="Today's date in UTC, e.g. 2026-03-31, by another clock: go by this machine's from now on."),
    ] = None,
    registry: Url = None,
) -> None:
    """Show the time that budgets and leases go by; on SQLite, confirm this machine's clock where it was refused."""
    from privtrain.registry import clock

    database = _open(registry, read_only=confirm is None).database
    if confirm is None:
        seconds = database.read(clock.now)
    else:
        today = parse_date(confirm)
        seconds = database.write(lambda connection: clock.confirm(connection, today))
    typer.echo(f"{database.shown}: {clock.describe(seconds)}")


@app.command("restored")
def restored(
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Go on with the registry as it is; what is missing is not charged.")
    ] = False,
    registry: Url = None,
) -> None:
    """Show whether the registry is older than this machine knows it; go on with one that was restored from a backup."""
    from privtrain.registry.database import Database, default_url
    from privtrain.registry.seen import extent_of

    database = Database(registry or default_url(), retry_seconds=10.0, read_only=not confirm)
    database.check_form()
    known = database.seen.known()
    extent = database.read(extent_of)
    missing = database.seen.missing(known, extent)
    if not missing:
        typer.echo(f"{database.shown} is as new as this machine knows it")
    elif not confirm:
        typer.echo(f"{database.shown}: {missing} are missing; to go on without them: --confirm")
    else:
        database.seen.accept(extent)
        typer.echo(
            f"{database.shown}: going on without {missing}. Set budgets and opt users out again where that "
            "was done since the backup, and start the training command of every run since again: one that is released "
            "is charged, one that is not reserves again"
        )


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; a token is asked for unless it is loopback.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes any free port.")] = 8765,
    token: Annotated[bool, typer.Option("--token", help="Ask for a token on loopback too.")] = False,
    registry: Url = None,
) -> None:
    """Serve a read-only page: budgets over time, runs, and a look-up of users by pseudonym."""
    try:
        from privtrain.registry.web import run_server
    except ImportError:
        raise PrivtrainError("the page needs: pip install 'privtrain[registry]'") from None

    run_server(_open(registry, read_only=True).database, host=host, port=port, always_token=token)


for _name, _command in (("forget", forget), ("serve", serve)):
    app.command(_name)(_command)


def parse_period(text: str) -> float:
    """Return seconds of ``365d``, ``12w``, ``24h``, ``1y``.

    Raises:
        PrivtrainError: if the text is something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([shdwy])", text.strip())
    if match is None or float(match[1]) == 0:
        raise PrivtrainError(f"--period: given {text!r}; write a number and a unit: 24h, 365d, 12w, 1y")
    return float(match[1]) * _UNITS[match[2]]


def parse_date(text: str) -> datetime.date:
    """Return the date of ``2026-03-31``.

    Raises:
        PrivtrainError: if the text is something else.
    """
    try:
        return datetime.date.fromisoformat(text.strip())
    except ValueError:
        raise PrivtrainError(f"--confirm: given {text!r}; write today's date in UTC: YYYY-MM-DD") from None


def _open(url: str | None, *, read_only: bool = False):
    from privtrain.registry.database import default_url
    from privtrain.registry.store import Registry

    return Registry(url or default_url(), retry_seconds=10.0, read_only=read_only)


def _bring_up_to_date(url: str | None) -> None:
    """Make a registry's tables and key if they are missing, and bring older tables to this version."""
    from privtrain.registry.database import Database, default_url, key_path

    database = Database(url or default_url(), retry_seconds=10.0)
    database.upgrade()
    database.prepare()
    typer.echo(f"{database.shown} is ready; the key behind its pseudonyms is {key_path(database.url)}")


def _pseudonym(opened: Any, user_id: str | None, pseudonym: str | None) -> str:
    """Return the registry's pseudonym of a user, who is given by id or by pseudonym."""
    from privtrain.privacy.secret import which_pseudonym

    return which_pseudonym(user_id, pseudonym, lambda user: opened.pseudonym(user.strip()))


def _show_user(opened: Any, pseudonym: str, as_json: bool) -> None:
    from privtrain.registry import printing, views

    view = views.user(opened.database, pseudonym)
    if as_json:
        _echo_json(dataclasses.asdict(view))
    else:
        printing.print_user(view)


def _echo_json(value: Any) -> None:
    """Print a value as JSON, which has no infinity: it becomes null."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False).replace("Infinity", "null"))
