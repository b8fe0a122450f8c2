"""``privtrain ledger ...``: the commands over one run's contribution log."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from privtrain.errors import PrivtrainError
from privtrain.process.options import AsJson

ledger_app = typer.Typer(help="Read, check and prove what a run's contribution ledger says.", no_args_is_help=True)

RunPath = Annotated[pathlib.Path, typer.Argument(help="Run directory, e.g. runs/demo.", metavar="RUN")]
Pseudonym = Annotated[str | None, typer.Option(help="A pseudonym of 32 hexadecimal digits, instead of the user.")]


@ledger_app.command("show")
def show(
    run: RunPath,
    last: Annotated[int, typer.Option(min=1, help="How many records to show, from the end.")] = 40,
    as_json: AsJson = False,
) -> None:
    """Show what each step used, by counts; names never appear."""
    from privtrain.ledger.view import print_ledger

    print_ledger(run, last, as_json)


@ledger_app.command("verify")
def verify(
    run: RunPath,
    head: Annotated[str | None, typer.Option(help="A head noted earlier, which the log must still contain.")] = None,
) -> None:
    """Check chain, bodies, roots, the contribution bound, and what the privacy statement says of the log."""
    from privtrain.ledger.view import verify_run

    typer.echo(verify_run(run, head))


@ledger_app.command("top")
def top(
    run: RunPath,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="How many users.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show the heaviest contributors by pseudonym."""
    from privtrain.ledger.view import print_top

    print_top(run, count, as_json)


@ledger_app.command("user")
def user(
    run: RunPath,
    name: Annotated[
        str | None, typer.Argument(help="The user's id; USER#RECORD where the unit is the example.", metavar="USER")
    ] = None,
    pseudonym: Pseudonym = None,
    as_json: AsJson = False,
) -> None:
    """Show one user's part in every step that the user joined."""
    from privtrain.ledger.view import print_user

    print_user(run, name, pseudonym, as_json)


@ledger_app.command("stats")
def stats(
    run: RunPath,
    cap: Annotated[int | None, typer.Option(min=1, help="Also show who has more records than this.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show how the contributions are spread over users."""
    from privtrain.ledger.view import print_statistics

    print_statistics(run, cap, as_json)


@ledger_app.command("export")
def export(
    run: RunPath,
    target: Annotated[pathlib.Path, typer.Argument(help="The file to write.", metavar="FILE")],
    parquet: Annotated[bool, typer.Option("--parquet", help="Write Parquet.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Write CSV.")] = False,
) -> None:
    """Write every contribution, by pseudonym, to one file."""
    from privtrain.ledger.view import export_run

    if parquet == csv:
        raise PrivtrainError("give --parquet or --csv")
    typer.echo(export_run(run, target, "parquet" if parquet else "csv"))


@ledger_app.command("prove")
def prove(
    run: RunPath,
    user: Annotated[str | None, typer.Option(help="The user's id.")] = None,
    pseudonym: Pseudonym = None,
    output: Annotated[pathlib.Path, typer.Option("-o", "--output", help="Where to write it.")] = pathlib.Path(
        "proof.json"
    ),
) -> None:
    """Write a proof of one user's part, or absence, in every step, without the other users'."""
    from privtrain.ledger.view import prove_run

    typer.echo(prove_run(run, user, pseudonym, output))


@ledger_app.command("check-proof")
def check_proof(
    proof: Annotated[pathlib.Path, typer.Argument(help="File that `ledger prove` wrote.", metavar="FILE")],
    head: Annotated[str, typer.Option(help="The ledger head, from privacy.json or the model card.")],
    user: Annotated[str | None, typer.Option(help="The user that it must be about.")] = None,
    key: Annotated[pathlib.Path | None, typer.Option(help="The run's pseudonym key, if you were shown it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a proof; the run is not needed."""
    from privtrain.ledger.view import print_checked_proof

    print_checked_proof(proof, head, key, user, as_json)


@ledger_app.command("shred")
def shred(
    run: RunPath,
    yes: Annotated[bool, typer.Option("--yes", help="Confirm: this cannot be undone.")] = False,
    abandon: Annotated[bool, typer.Option("--abandon", help="Also where the run has not finished.")] = False,
) -> None:
    """Destroy keys and attack files that link the log to people; its counts and its chain still verify."""
    from privtrain.ledger.shred import shred as run_shredding

    if not yes:
        raise PrivtrainError(
            "this destroys pseudonym.key, the generation keys and secret/attack, where the attack job keeps its "
            "signals and shadow runs, for good: users can no longer be looked up or proven, the run cannot go on, and "
            "`attacks score` and `attacks analyse` cannot run. The report stays. Add --yes to confirm"
        )
    destroyed, remaining = run_shredding(run, abandon=abandon)
    typer.echo(f"destroyed: {', '.join(destroyed) or 'nothing; it was shredded before'}")
    for name, what in remaining.items():
        typer.echo(f"still there: {run / 'secret' / name} ({what})")
    typer.echo("copies in backups and snapshots are yours to destroy")
