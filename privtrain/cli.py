"""The command line: thin, lazy, and polite about mistakes."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated

import typer

from privtrain.command import run_command
from privtrain.ledger_cli import RunPath, ledger_app
from privtrain.registry import commands as registry_commands

app = typer.Typer(
    name="privtrain",
    help="Differentially private fine-tuning of language models, with a contribution ledger.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(ledger_app, name="ledger")
app.add_typer(registry_commands.app, name="registry")
ledger_app.command("forget")(registry_commands.forget)
ledger_app.command("serve")(registry_commands.serve)

ConfigPath = Annotated[pathlib.Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")]
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


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(help="e.g. accelerate launch ... -m privtrain train CONFIG")],
) -> None:
    """Run a launcher and leave with the job's own exit code: 75 to be queued again, 2 for a mistake, ..."""
    from privtrain.launcher import launch as run_launcher

    raise typer.Exit(run_launcher(command))


@app.command()
def doctor(
    config: Annotated[
        pathlib.Path | None, typer.Argument(help="YAML file of the run; without it the environment alone.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Check ranks, versions, network, disk, W&B and, with CONFIG, the guarantee on the real model; trains nothing."""
    from privtrain.training.doctor import examine

    raise typer.Exit(examine(config, overrides or [], as_json=as_json))


@app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    from privtrain.config import Config

    typer.echo(json.dumps(Config.model_json_schema(), indent=2))


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
