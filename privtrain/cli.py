"""The command line: thin, lazy, and polite about mistakes."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from privtrain.command import run_command
from privtrain.registry import commands as registry_commands

app = typer.Typer(
    name="privtrain",
    help="Differentially private fine-tuning of language models, with a contribution ledger.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
ledger_app = typer.Typer(help="Read and check a run's contribution ledger.", no_args_is_help=True)
app.add_typer(ledger_app, name="ledger")
app.add_typer(registry_commands.app, name="registry")
ledger_app.command("forget")(registry_commands.forget)
ledger_app.command("serve")(registry_commands.serve)

ConfigPath = Annotated[pathlib.Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")]
RunPath = Annotated[pathlib.Path, typer.Argument(help="Run directory, e.g. runs/demo.", metavar="RUN")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, e.g. privacy.target_epsilon=4.", metavar="[KEY=VALUE]...")
]


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Show the privacy budget of a run before paying for it: no weights, no process group."""
    from privtrain.planning import describe_plan, print_plan

    description = describe_plan(config, overrides or [])
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        print_plan(description)


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train and release; the same command resumes. Start it with: accelerate launch ... -m privtrain train CONFIG."""
    from privtrain.training.job import train as run_training

    run_training(config, overrides or [])


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    from privtrain.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


@ledger_app.command("show")
def ledger_show(run: RunPath) -> None:
    """Show what each step used, by pseudonym counts; names never appear."""
    from privtrain.ledger.view import print_ledger

    print_ledger(run)


@ledger_app.command("verify")
def ledger_verify(run: RunPath) -> None:
    """Check the chain, the contribution bound and the head that the privacy statement quotes."""
    from privtrain.ledger.view import verify_run

    typer.echo(verify_run(run))


@registry_commands.app.command("refund")
def registry_refund(run: RunPath, registry: registry_commands.Url = None) -> None:
    """End a run that was given up; steps that its ledger never began are given back."""
    from privtrain.registry.database import default_url
    from privtrain.training.budget import refund_run

    typer.echo(refund_run(run, registry or default_url()))


def main() -> None:
    """Run the command line; a user's mistake is one clear message and an exit code, never a traceback."""
    run_command("privtrain", app)


if __name__ == "__main__":
    main()
