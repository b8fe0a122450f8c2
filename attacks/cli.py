"""The ``attacks`` command. Heavy imports live inside the commands, so that ``--help`` answers at once."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from privtrain.errors import EXIT_REFUSED_RELEASE
from privtrain.process.exit import run_command

app = typer.Typer(
    name="attacks",
    help="Attack a finished fine-tuning run and report what the attack shows: prepare before training; then score, "
    "analyse, report; verify a report that you were given.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Run = Annotated[pathlib.Path, typer.Argument(metavar="RUN", help="Directory of a finished run.", show_default=False)]


@app.command()
def prepare(
    config: Annotated[pathlib.Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Dotted overrides, e.g. canaries.num_users=200.", metavar="[KEY=VALUE]..."),
    ] = None,
    spans: Annotated[
        str | None, typer.Option(help="Column of labelled [start, end] spans of sensitive text, to be sealed too.")
    ] = None,
) -> None:
    """Flip all coins and plant the canaries of a run before it is trained; seals them in its secret/ (no model)."""
    from attacks.coins import prepare as preparing

    done = preparing.prepare(config, overrides or [], spans_column=spans)
    typer.echo(
        f"{done.run}: {done.num_users} users, the attacker holds {done.num_attacker_records} records of "
        f"{done.num_attacked}; {done.num_canaries} canary users; {done.num_labelled} records with labelled spans"
    )
    if done.num_opted_out:
        typer.echo(f"{done.num_opted_out} users who opted out are left out")
    typer.echo(f"coins committed to as {done.commitment}; write it down: privacy.json and the report will quote it")
    if done.num_canaries:
        typer.echo(f"how much these {done.num_canaries} canary users can show: attacks audit-plan {config}")
    typer.echo(f"next: privtrain train {' '.join([str(config), *(overrides or [])])}")


@app.command(name="sample-canaries")
def sample_canaries(
    config: Annotated[pathlib.Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG", show_default=False)],
    out: Annotated[pathlib.Path, typer.Option(help="File to write: one JSON string a line.", show_default=False)],
    count: Annotated[
        int, typer.Option(min=2, help="Texts; those that are not planted are what others rank among.")
    ] = 400,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 24,
    temperature: Annotated[
        float, typer.Option(min=0.1, help="Of the sampling; above 0.8 they are unlike people's.")
    ] = 1.5,
    seed: Annotated[int, typer.Option(help="Of the sampling; not secret.")] = 0,
) -> None:
    """Draw texts from the base model at a high temperature, for canaries.kind: samples (loads the base model)."""
    from attacks.scoring import samples

    num = samples.write_samples(config, out, count=count, num_tokens=tokens, temperature=temperature, seed=seed)
    typer.echo(f"{num} texts in {out}; next: canaries.kind=samples canaries.samples_file={out}, then attacks prepare")


@app.command(name="audit-plan")
def audit_plan(
    config: Annotated[
        pathlib.Path | None,
        typer.Argument(
            help="YAML file of the run, whose claim is to be tested.", metavar="[CONFIG]", show_default=False
        ),
    ] = None,
    epsilon: Annotated[float | None, typer.Option(min=0, help="Claimed epsilon, instead of a CONFIG.")] = None,
    delta: Annotated[float, typer.Option(min=0, max=1, help="Its delta, instead of a CONFIG.")] = 1e-5,
    target: Annotated[float | None, typer.Option(min=0, help="Lower bound that is wanted; default: the claim.")] = None,
    power: Annotated[float, typer.Option(min=0.01, max=0.99, help="Chance with which it is to be reached.")] = 0.8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how many canary users an audit needs to show a wanted epsilon, or notice missing noise (before training)."""
    from attacks.analysis.audit import planning

    plan = planning.plan_of(config, epsilon, delta, target_epsilon=target, power=power)
    if as_json:
        typer.echo(planning.to_json(plan))
    else:
        import rich.console

        advice = [] if config is None else [planning.canaries_for(config)]
        rich.console.Console().print(*planning.printed(plan), *advice, sep="\n")


@app.command()
def score(
    run: Run,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in one forward pass, padding included.")] = 2048,
    training_records: Annotated[
        int,
        typer.Option(min=0, help="Records of each user to score beside the attacker's: at most 8; for membership."),
    ] = 2,
    canary_references: Annotated[
        int, typer.Option(min=0, help="Secrets that each canary is compared with, where the run has canaries.")
    ] = 128,
    variants: Annotated[
        str, typer.Option(help="Re-written texts to score too: lowercase, recall, neighbours:N, control_prefix.")
    ] = "",
    sampling: Annotated[
        str, typer.Option(help="How text would be drawn from the model, for extraction.")
    ] = "temperature=1,top_k=40,top_p=1",
    spans: Annotated[
        str | None, typer.Option(help="Column of labelled [start, end] spans of sensitive text, or: presidio.")
    ] = None,
    date: Annotated[str | None, typer.Option(help="Column of dates, for the blind baseline.")] = None,
    language: Annotated[str | None, typer.Option(help="Column of languages; guessed from the text without.")] = None,
    documents_of: Annotated[
        pathlib.Path | None, typer.Option(help="Another run, of which this one is a shadow: score its documents.")
    ] = None,
) -> None:
    """Score documents under the fine-tuned model and its base (loads the models; resumes where it was killed)."""
    from attacks.scoring import score as scoring

    options = scoring.ScoreOptions(
        batch_tokens, training_records, canary_references, variants, sampling, spans, date, language
    )
    scoring.score_run(run, options, documents_of=documents_of)


@app.command()
def shadows(run: Run, count: Annotated[int, typer.Option(min=1, help="How many shadow models.")] = 8) -> None:
    """Write recipes of shadow models for LiRA and RMIA into secret/attack/shadows (trains nothing)."""
    from attacks.scoring.shadows import commands, write_recipes

    for line in commands(run, write_recipes(run, count)):
        typer.echo(line)


@app.command()
def analyse(
    run: Run,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap; it protects nobody.")] = 0,
    audit_delta: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Delta of the audit, chosen before its result; default: the claim's own."),
    ] = None,
) -> None:
    """Compute the statistics of a scored run into report/attacks.json (no model, no GPU)."""
    from attacks.analysis import analyse as analysis

    analysis.analyse_run(run, seed=seed, audit_delta=audit_delta)
    typer.echo(f"wrote {run / analysis.ATTACKS_PATH}; run next: attacks report {run}")


@app.command(name="audit-corpus")
def audit_corpus(
    run: Run,
    corpus: Annotated[
        pathlib.Path, typer.Argument(metavar="CORPUS", help="What privtrain generate wrote.", show_default=False)
    ],
    seed: Annotated[int, typer.Option(min=0, help="Seed of ties; it protects nobody.")] = 0,
) -> None:
    """Ask what a sampled corpus tells of the run's users: a lower bound on epsilon from the texts alone (no model)."""
    from attacks.analysis.audit import sampled_corpus

    findings, path = sampled_corpus.audit_corpus(run, corpus, seed=seed)
    for finding in findings:
        typer.echo(
            f"{finding.name}: {finding.verdict}: {finding.verdict_reason} (delta = {finding.delta:.2g}, at most "
            f"{finding.epsilon_ceiling:.3g} could have been shown)"
        )
    typer.echo(f"private, in {path}")


@app.command()
def report(
    run: Run,
    policy: Annotated[
        pathlib.Path | None, typer.Option(help="YAML file that says which findings end with exit code 3.")
    ] = None,
    wandb: Annotated[bool, typer.Option(help="Also log the report to Weights & Biases (offline by default).")] = False,
    wandb_project: Annotated[str, typer.Option(help="Its project.")] = "privtrain",
) -> None:
    """Write report/index.html, report.json and report.md of an analysed run, and print the summary."""
    import rich.console

    from attacks.reporting import policy as policies
    from attacks.reporting import report as reporting

    rules = None if policy is None else policies.read_policy(policy)
    path = reporting.write_report(run)
    rich.console.Console().print(reporting.summary_table(run))
    if wandb:
        from attacks.reporting import tracking

        tracking.log_report(run, reporting.read_results(run), project=wandb_project)
    typer.echo(f"report: {path}")
    violations = [] if rules is None else rules.violations(reporting.read_results(run))
    for violation in violations:
        typer.echo(f"attacks: the policy {policy} is violated: {violation}", err=True)
    if violations:
        raise typer.Exit(EXIT_REFUSED_RELEASE)


@app.command()
def verify(
    run: Annotated[
        pathlib.Path,
        typer.Argument(metavar="RUN", help="A run directory, or what was published of one.", show_default=False),
    ],
) -> None:
    """Check a report: that its files belong together and to the model beside them, and with secret/ their seals."""
    from attacks.reporting.verify import verify_report

    checked = verify_report(run)
    for sentence in checked.holds:
        typer.echo(f"checked: {sentence}")
    for sentence in checked.not_checked:
        typer.echo(f"not checked: {sentence}")


def main() -> None:
    """Run the command; a user's own mistake is one line on stderr and its exit code."""
    run_command("attacks", app)
