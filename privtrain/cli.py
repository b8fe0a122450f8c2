"""Command-line entry point; commands import their implementation lazily."""

from __future__ import annotations

import json
import pathlib
from typing import Annotated, Literal

import typer

import privtrain
from privtrain.errors import PrivtrainError
from privtrain.ledger.commands import RunPath, ledger_app
from privtrain.process.exit import run_command
from privtrain.process.options import AsJson
from privtrain.registry import commands as registry_commands

app = typer.Typer(
    name="privtrain",
    help="Differentially private fine-tuning of language models, with a contribution ledger.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(ledger_app, name="ledger")
track_app = typer.Typer(help="Metrics of a run, elsewhere.", no_args_is_help=True)
app.add_typer(track_app, name="track")
app.add_typer(registry_commands.app, name="registry")
ledger_app.command("forget")(registry_commands.forget)
ledger_app.command("serve")(registry_commands.serve)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(privtrain.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Declare the options of ``privtrain`` itself; they act by their callbacks."""


ConfigPath = Annotated[pathlib.Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, e.g. privacy.target_epsilon=4.", metavar="[KEY=VALUE]...")
]


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="Directory or hub name of the base model.")],
    files: Annotated[list[pathlib.Path], typer.Argument(help="JSONL, CSV or Parquet files of one kind, or patterns.")],
    output: Annotated[pathlib.Path, typer.Option(help="Configuration to write; must not exist.")] = pathlib.Path(
        "privtrain.yaml"
    ),
    user_column: Annotated[str | None, typer.Option(help="Column of the user id; guessed without it.")] = None,
    num_users: Annotated[int | None, typer.Option(help="A public number of users, for the plan.", min=1)] = None,
    held_out_fraction: Annotated[
        float | None, typer.Option(help="Share of users held out; 0.5 for a run that is to be attacked.")
    ] = None,
) -> None:
    """Write a complete, commented configuration from a model and a file of rows, with every guess shown."""
    from privtrain.commands.init import write_config

    config = write_config(
        model,
        files,
        output,
        user_column=user_column,
        num_users=num_users,
        held_out_fraction=held_out_fraction,
    )
    typer.echo(f"wrote {output}: {config.data.format} of users in {config.data.user_column!r}; read it, then:")
    typer.echo(f"  privtrain preview {output}\n  privtrain plan {output}\n  privtrain train {output}")


@app.command("from")
def from_stack(
    stack: Annotated[Literal["trl", "axolotl", "llamafactory"], typer.Argument(help="Whose configuration it is.")],
    file: Annotated[pathlib.Path, typer.Argument(help="YAML or JSON file of TRL, axolotl or LLaMA-Factory.")],
    output: Annotated[pathlib.Path, typer.Option(help="Configuration to write; must not exist.")] = pathlib.Path(
        "privtrain.yaml"
    ),
    user_column: Annotated[str | None, typer.Option(help="Column of the user id.")] = None,
    num_users: Annotated[int | None, typer.Option(help="A public number of users, for the plan.", min=1)] = None,
    without: Annotated[list[str] | None, typer.Option(help="Key to leave out knowingly; may be repeated.")] = None,
) -> None:
    """Translate a configuration of another stack key by key, or refuse it by name; says what the plan still needs."""
    from privtrain.commands.stacks.translate import write_translation

    write_translation(stack, file, output, num_users=num_users, user_column=user_column, without=tuple(without or ()))


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    accelerate: Annotated[
        pathlib.Path | None, typer.Option(help="Accelerate config of the launch: memory and command are for it.")
    ] = None,
    num_users: Annotated[
        int | None, typer.Option(help="Users of a data set that is not at hand; nothing is read then.", min=1)
    ] = None,
    num_ranks: Annotated[
        int | None, typer.Option(help="Processes of the launch; default: the accelerate config's.", min=1)
    ] = None,
    tokens_per_second: Annotated[float | None, typer.Option(help="Throughput of one rank, for the time.")] = None,
    prices: Annotated[bool, typer.Option(help="Show what ε, batch and steps trade for one another.")] = True,
    optimize: Annotated[
        bool,
        typer.Option("--optimize", help="Choose batch, steps, records, bands and learning rate for a compute budget."),
    ] = False,
    user_draws: Annotated[
        float | None, typer.Option(help="That budget in users drawn over all steps; default: the plan's own.", min=1)
    ] = None,
    hours: Annotated[float | None, typer.Option(help="That budget in hours at --tokens-per-second.", min=0.001)] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Predict a step on GPUs, such as 8xh100: time, parts, what would shorten it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the privacy budget and the cost of a run before paying for it: no weights, no process group."""
    from privtrain.commands.plan import PlanOptions, describe_plan
    from privtrain.commands.plan_view import print_plan

    options = PlanOptions(
        num_users=num_users,
        accelerate=accelerate,
        tokens_per_second=tokens_per_second,
        prices=prices,
        num_ranks=num_ranks,
        optimize=optimize,
        user_draws=user_draws,
        hours=hours,
        cluster=cluster,
    )
    description = describe_plan(config, overrides or [], options)
    if as_json:
        typer.echo(json.dumps(description, indent=2))
    else:
        print_plan(description)


@app.command()
def preview(
    config: ConfigPath,
    overrides: Overrides = None,
    records: Annotated[int, typer.Option(help="Records that are shown whole.", min=0)] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="For machines: counts, and no record.")] = False,
) -> None:
    """Show what a run would learn from: rows by rule, tokens, what is predicted, lengths, what is dropped and why."""
    from privtrain.commands.preview import preview as show_rows

    raise typer.Exit(show_rows(config, overrides or [], num_shown=records, as_json=as_json))


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train and release; the same command resumes. Start it with: accelerate launch ... -m privtrain train CONFIG."""
    from privtrain.inputs import load_checked

    checked = load_checked(config, overrides or [])  # a mistake is told before torch and transformers are imported
    from privtrain.job.train import train as run_training

    run_training(checked)


@app.command()
def tune(
    config: ConfigPath,
    overrides: Overrides = None,
    candidates: Annotated[
        list[str] | None,
        typer.Option("--try", help="Settings of a candidate, e.g. 'training.learning_rate=0.003'; may be repeated."),
    ] = None,
) -> None:
    """Train a secret number of trials and release the best on public rows; ε is that of the whole procedure."""
    from privtrain.job.tune import tune as run_tuning

    run_tuning(config, overrides or [], candidates or [])


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def launch(
    command: Annotated[list[str], typer.Argument(help="e.g. accelerate launch ... -m privtrain train CONFIG")],
) -> None:
    """Run a launcher and leave with the job's own exit code: 75 to be queued again, 2 for a mistake, ..."""
    from privtrain.process.launcher import launch as run_launcher

    raise typer.Exit(run_launcher(command))


@app.command()
def doctor(
    config: Annotated[
        pathlib.Path | None, typer.Argument(help="YAML file of the run; without it the environment alone.")
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check ranks, versions, network, disk, W&B and, with CONFIG, the guarantee on the real model; trains nothing."""
    from privtrain.commands.doctor import examine

    raise typer.Exit(examine(config, overrides or [], as_json=as_json))


@app.command()
def invent_customers(
    output: Annotated[pathlib.Path, typer.Argument(help="JSONL file to write; must not exist.")],
    num_users: Annotated[int, typer.Option(help="Customers.")] = 1000,
    mean_records: Annotated[float, typer.Option(help="Messages of a customer, on average.")] = 12.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same texts.")] = 0,
    repeat_prob: Annotated[float, typer.Option(help="Chance that a message is an earlier one, sent again.")] = 0.0,
) -> None:
    """Write messages of customers who do not exist, sensitive spans labelled, to try things on; no model is asked."""
    from privtrain.data.invented_customers import customer_records, write_customers

    records = customer_records(num_users, seed=seed, mean_records=mean_records, repeat_prob=repeat_prob)
    num_records = write_customers(output, records)
    typer.echo(f"wrote {num_records} messages of {num_users} customers to {output}")


@app.command()
def export(
    run: RunPath,
    output: Annotated[pathlib.Path, typer.Argument(help="Directory to make; must not exist.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge the adapter into its base model.")] = False,
    dtype: Annotated[str, typer.Option(help="Of merged or full weights: fp32, bf16 or fp16.")] = "bf16",
) -> None:
    """Copy what a finished run released, or merge it into one model, with tokenizer, card and privacy statement."""
    from privtrain.commands.export import export_run

    typer.echo(export_run(run, output, merge=merge, dtype=dtype))


@app.command()
def generate(
    run: RunPath,
    output: Annotated[pathlib.Path, typer.Argument(help="Directory to make; must not exist.")],
    num_texts: Annotated[int, typer.Option(help="Different texts.")] = 1000,
    prompts: Annotated[
        pathlib.Path | None,
        typer.Option(help='Public prompts: JSON lines of {"prompt"} or {"messages"}, with "label" if it has one.'),
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Instead of --prompts: a label; may be repeated.")] = None,
    template: Annotated[str, typer.Option(help="The prompt that stands for a label.")] = "{label}",
    temperature: Annotated[float, typer.Option(help="Divides the logits.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Keep the most likely tokens with this probability; 1: all.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep so many most likely tokens; 0: all.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a text. Default: what data.max_length leaves.")
    ] = None,
    min_new_tokens: Annotated[int, typer.Option(help="Fewest tokens of a text.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Texts that are sampled at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Public: the same seed, batch size and machine give the same texts.")] = 0,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"], typer.Option(help="auto: vllm if it is installed and can.")
    ] = "auto",
    base_model: Annotated[
        pathlib.Path | None, typer.Option(help="Directory of the base model; default: where the run had it.")
    ] = None,
    copy_tokens: Annotated[int, typer.Option(help="Consecutive tokens of a record that make a copy.")] = 50,
) -> None:
    """Sample a corpus from a released model, covered by the run's ε; compare it with the records in secret/ alone."""
    from privtrain.commands.generate import GenerateOptions
    from privtrain.commands.generate import generate as sample

    options = GenerateOptions(
        num_texts=num_texts,
        prompts=prompts,
        labels=tuple(label or ()),
        template=template,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        batch_size=batch_size,
        seed=seed,
        engine=engine,
        base_model=base_model,
        copy_tokens=copy_tokens,
    )
    lines = sample(run, output, options)
    if lines:  # rank 0 alone has something to say
        typer.echo(lines)


@app.command()
def verify(
    directory: Annotated[pathlib.Path, typer.Argument(help="A run, its adapter or model, or an export.")],
    digest: Annotated[str | None, typer.Option(help="The release digest, from a source that you trust.")] = None,
    public_key: Annotated[
        pathlib.Path | None, typer.Option(help="PEM file; the directory must be signed with its private key.")
    ] = None,
    certificate: Annotated[
        list[pathlib.Path] | None, typer.Option(help="PEM file of a root certificate to trust; may be repeated.")
    ] = None,
    released: Annotated[
        pathlib.Path | None, typer.Option(help="The run that an export was made from: its weights are made again.")
    ] = None,
    base_model: Annotated[pathlib.Path | None, typer.Option(help="Directory of the base model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a directory is what was released, without secret/; names every file and field that is not."""
    from privtrain.commands.verify import Anchors, print_verified
    from privtrain.run.signing import Keys

    if public_key is not None and certificate:
        raise PrivtrainError("give --public-key or --certificate")
    keys = Keys(key=public_key, chain=tuple(certificate or ())) if public_key or certificate else None
    anchors = Anchors(digest=digest, keys=keys, released=released, base_model=base_model)
    print_verified(directory, anchors, as_json=as_json)


@app.command()
def push(
    directory: Annotated[pathlib.Path, typer.Argument(help="A run, its adapter or model, an export, or a corpus.")],
    repository: Annotated[str, typer.Argument(help="NAMESPACE/NAME on the Hugging Face hub; made if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
    not_private: Annotated[bool, typer.Option("--not-private", help="Upload also what no ε covers.")] = False,
) -> None:
    """Verify a directory and upload it to the hub, with its card; the token is HF_TOKEN's, or hf auth login's."""
    from privtrain.commands.push import push as upload

    typer.echo(upload(directory, repository, is_public=public, is_consented=not_private))


@app.command()
def disclose(
    run: RunPath,
    form: Annotated[
        Literal["opendp", "nist", "gdp"],
        typer.Option("--as", help="A registry's record, an evaluator's checklist, or one number for the curve."),
    ] = "nist",
) -> None:
    """Print a finished run in the form that a registry or an evaluator asks for, filled from its privacy statement."""
    from privtrain.commands.disclose import disclose as describe

    typer.echo(describe(run, form), nl=False)


@app.command()
def sign(
    directory: Annotated[pathlib.Path, typer.Argument(help="A run, its adapter or model, or an export.")],
    private_key: Annotated[pathlib.Path, typer.Option(help="PEM file of an elliptic-curve key.")],
    certificate: Annotated[pathlib.Path | None, typer.Option(help="PEM file of the key's certificate.")] = None,
    chain: Annotated[
        list[pathlib.Path] | None, typer.Option(help="PEM file of a certificate above it; may be repeated.")
    ] = None,
    password: Annotated[
        str | None, typer.Option(help="Of the private key.", envvar="PRIVTRAIN_SIGNING_PASSWORD", show_default=False)
    ] = None,
) -> None:
    """Sign what was released (model.sig, OpenSSF Model Signing); offline. Verifies the directory first."""
    from privtrain.commands.verify import verify_directory
    from privtrain.run.signing import Keys, signed_files
    from privtrain.run.signing import sign as sign_files

    verify_directory(directory)
    keys = Keys(key=private_key, certificate=certificate, chain=tuple(chain or ()))
    signature = sign_files(directory, keys, signed_files(directory), password)
    typer.echo(f"wrote {signature}; check it with: privtrain verify {directory} --public-key FILE")


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="Of launch/recipes/studies: ew-tune, user-level-dp, ...")],
    scale: Annotated[str, typer.Option(help="small: minutes on a CPU; paper: the paper's models and data.")] = "small",
    output: Annotated[
        pathlib.Path | None, typer.Option(help="Directory of the study; default: runs/studies/NAME-SCALE.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at the same time.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads of each.", min=1)] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Shell pattern of cell names; may be repeated.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the grid; start nothing.")] = False,
    here: Annotated[bool, typer.Option("--here", help="Run the cells of --scale paper on this machine.")] = False,
    submit: Annotated[str | None, typer.Option(help="Hand --scale paper to a scheduler, e.g. sbatch.")] = None,
    recipe: Annotated[pathlib.Path | None, typer.Option(help="Recipe of your own.")] = None,
) -> None:
    """Run a paper's grid of trainings and attacks, resume what is done, and report what reproduced."""
    from privtrain.studies.runner import StudyOptions, run_study

    options = StudyOptions(
        scale=scale,
        recipe=recipe,
        output=output,
        num_jobs=jobs,
        num_threads=threads,
        only=tuple(only or ()),
        dry_run=dry_run,
        here=here,
        submit=submit,
    )
    run_study(name, options)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page that lists every key.")] = False,
) -> None:
    """Print the schema of the configuration: JSON schema, or a page for readers."""
    from privtrain.config import Config
    from privtrain.config.reference import markdown_reference

    typer.echo(
        markdown_reference(Config) if markdown else json.dumps(Config.model_json_schema(), indent=2), nl=not markdown
    )


@registry_commands.app.command("refund")
def registry_refund(run: RunPath, registry: registry_commands.Url = None) -> None:
    """End a run that was given up; steps that its ledger never began are given back."""
    from privtrain.job.reservation import refund_run
    from privtrain.registry.database import default_url

    typer.echo(refund_run(run, registry or default_url()))


@track_app.command("sync")
def track_sync(run: RunPath) -> None:
    """Send a run's released metrics to W&B as one run, however often the job was interrupted and resumed."""
    from privtrain.tracking.sync import sync_run

    typer.echo(sync_run(run))


def main() -> None:
    """Run the command line; a user's mistake is one clear message and an exit code, never a traceback."""
    run_command("privtrain", app)


if __name__ == "__main__":
    main()
