"""The ``attacks`` command. Heavy imports live inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from privtrain.command import run_command

app = typer.Typer(
    name="attacks",
    help="Attack a finished fine-tuning run and report what the attack shows: score, then analyse, then report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Run = Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="Directory of a finished run.", show_default=False)]


@app.command()
def score(
    run: Run,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one forward pass, padding included.")] = 2048,
) -> None:
    """Score the attacker's documents under the fine-tuned model and its base (loads both models)."""
    from attacks import score as scoring

    scoring.score_run(run, batch_tokens)


@app.command()
def analyse(
    run: Run,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap; it protects nobody.")] = 0,
) -> None:
    """Compute the statistics of a scored run into report/attacks.json (no model, no GPU)."""
    from attacks import analyse as analysis

    analysis.analyse_run(run, seed=seed)
    typer.echo(f"wrote {run / analysis.ATTACKS_PATH}; run next: attacks report {run}")


@app.command()
def report(run: Run) -> None:
    """Write report/index.html and report/report.json of an analysed run, and print the summary."""
    import rich.console

    from attacks import report as reporting

    path = reporting.write_report(run)
    rich.console.Console().print(reporting.summary_table(run))
    typer.echo(f"report: {path}")


def main() -> None:
    """Runs the command; a user's own mistake is one line on stderr and its exit code."""
    run_command("attacks", app)
