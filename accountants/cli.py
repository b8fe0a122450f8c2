"""The command line: ``accountants epsilon | delta | calibrate | compare | curve | convert``.

Everything heavy is imported inside the commands, so that ``--help`` answers at once. A mistake of the user is one line
on standard error and exit code 2.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import dp_accounting

    from accountants.answer import PrivacyAnswer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Differential-privacy accounting: certified bounds, labelled as such, side by side.",
)


class Sampler(enum.StrEnum):
    """How the units of a step are chosen."""

    POISSON = "poisson"
    TRUNCATED = "truncated-poisson"
    FIXED = "fixed-size"
    ALLOCATION = "random-allocation"
    SHUFFLED = "shuffled"


class Relation(enum.StrEnum):
    """Neighbouring relations, by dp_accounting's names in lower case."""

    ADD_OR_REMOVE_ONE = "add_or_remove_one"
    REPLACE_ONE = "replace_one"
    REPLACE_SPECIAL = "replace_special"


class Quantity(enum.StrEnum):
    """What ``calibrate`` solves for."""

    NOISE = "noise-multiplier"
    STEPS = "num-steps"
    PROBABILITY = "sampling-prob"
    RECORDS = "num-records"


Noise = Annotated[float, typer.Option("--noise-multiplier", "-s", help="Noise standard deviation over clipping norm.")]
Prob = Annotated[float, typer.Option("--sampling-prob", "-q", help="Probability per unit and step.")]
Steps = Annotated[int, typer.Option("--num-steps", "-t", help="Steps (per epoch for random-allocation and shuffled).")]
Epsilon = Annotated[float, typer.Option("--epsilon", "-e", help="The epsilon at which delta is wanted.")]
Delta = Annotated[float, typer.Option("--delta", "-d", help="Failure probability.")]
Records = Annotated[int, typer.Option("--num-records", "-k", help="Records per user (exact mixture of Gaussians).")]
SamplerOption = Annotated[Sampler, typer.Option("--sampler", help="The sampler that was really used.")]
Epochs = Annotated[int, typer.Option("--num-epochs", help="Epochs of random-allocation and shuffled.")]
Selected = Annotated[int, typer.Option("--num-selected", help="Steps per epoch that a unit joins (random-allocation).")]
Units = Annotated[int, typer.Option("--num-units", help="Public number of units (truncated-poisson, fixed-size).")]
Batch = Annotated[int, typer.Option("--batch-size", help="Cap (truncated-poisson) or size (fixed-size) of a batch.")]
Name = Annotated[str, typer.Option("--accountant", "-a", help="pld, tilted, rdp, prv, eeai, ...")]
RelationOption = Annotated[Relation, typer.Option("--relation", help="Which data sets are neighbours.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture to this file.")]

#: What ``compare`` asks: all accountants but the slow ones, or those that have an analysis of a sampler.
_EVERYTHING = "tilted,pld,tilted-edgeworth,rdp,contour,gdp,aea1,aea2,aea3,eeai"
_FITTING = {Sampler.TRUNCATED: "pld", Sampler.FIXED: "rdp", Sampler.ALLOCATION: "allocation"}


@dataclasses.dataclass(frozen=True)
class Run:
    """The options that describe a run, shared by the commands."""

    noise: Noise
    steps: Steps
    prob: Prob = 1.0
    sampler: SamplerOption = Sampler.POISSON
    records: Records = 1
    epochs: Epochs = 1
    selected: Selected = 1
    units: Units = 0
    batch: Batch = 0
    relation: RelationOption = Relation.ADD_OR_REMOVE_ONE

    def neighbours(self) -> dp_accounting.NeighboringRelation:
        """The relation as the library's value."""
        import dp_accounting

        return dp_accounting.NeighboringRelation[self.relation.name]

    def event(self) -> dp_accounting.DpEvent:
        """What the run released."""
        from accountants import events
        from accountants import units as user_units

        if self.records > 1 and self.sampler is not Sampler.POISSON:
            raise ValueError(f"--num-records={self.records} is available for --sampler poisson only")
        noise, prob, steps = self.noise, self.prob, self.steps
        match self.sampler:
            case Sampler.POISSON if self.records != 1:
                return user_units.group_event(
                    noise_multiplier=noise, sampling_prob=prob, num_steps=steps, num_records=self.records
                )
            case Sampler.POISSON:
                return events.dp_sgd_event(noise_multiplier=noise, sampling_prob=prob, num_steps=steps)
            case Sampler.TRUNCATED:
                return events.truncated_poisson_event(
                    noise_multiplier=noise,
                    sampling_prob=prob,
                    max_batch_size=self.batch,
                    num_units=self.units,
                    num_steps=steps,
                )
            case Sampler.FIXED:
                return events.fixed_size_event(
                    noise_multiplier=noise, batch_size=self.batch, num_units=self.units, num_steps=steps
                )
            case Sampler.ALLOCATION:
                return events.random_allocation_event(
                    noise_multiplier=noise, num_steps=steps, num_selected=self.selected, num_epochs=self.epochs
                )
            case Sampler.SHUFFLED:
                return events.shuffled_event(noise_multiplier=noise, num_batches=steps, num_epochs=self.epochs)


def _with_run(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command whose first parameter is a :class:`Run` the options of one."""
    options = inspect.signature(Run, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    def run_command(**given: Any) -> None:
        run = Run(**{name: given.pop(name) for name in options})
        command(run, **given)

    parameters = [*options.values(), *own]
    run_command.__name__, run_command.__doc__ = command.__name__, command.__doc__
    vars(run_command)["__signature__"] = inspect.Signature(
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def _number(value: float) -> str:
    return "inf" if math.isinf(value) else f"{value:.6g}"


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False))


def _print_answer(answer: PrivacyAnswer, as_json: bool) -> None:
    if as_json:
        _print_json(answer.to_json())
        return
    known = f"in [{_number(answer.lower)}, {_number(answer.upper)}]"
    note = f"; {answer.note}" if answer.note else ""
    value = answer.upper if answer.kind == "certified_upper" else answer.estimate
    typer.echo(
        f"{answer.quantity} = {_number(value)}  ({answer.kind.value}, {known}; {answer.method}, {answer.version}, "
        f"{answer.direction.value}, {answer.relation}{note})"
    )


@app.command()
@_with_run
def epsilon(run: Run, *, delta_value: Delta, accountant: Name = "pld", as_json: Json = False) -> None:
    """Epsilon of a run at a delta."""
    from accountants import api

    answer = api.epsilon(run.event(), delta_value, accountant=accountant, relation=run.neighbours())
    _print_answer(answer, as_json)


@app.command()
@_with_run
def delta(run: Run, *, epsilon_value: Epsilon, accountant: Name = "tilted", as_json: Json = False) -> None:
    """Delta of a run at an epsilon."""
    from accountants import api

    answer = api.delta(run.event(), epsilon_value, accountant=accountant, relation=run.neighbours())
    _print_answer(answer, as_json)


@app.command()
def calibrate(
    target_epsilon: Annotated[float, typer.Option("--epsilon", "-e", help="The budget.")],
    delta_value: Delta,
    solve_for: Annotated[Quantity, typer.Option("--for", help="The parameter to find.")] = Quantity.NOISE,
    noise: Noise = 0.0,
    prob: Prob = 1.0,
    steps: Steps = 1,
    accountant: Name = "pld",
    as_json: Json = False,
) -> None:
    """The least noise, or the most steps, sampling or records, for a budget; certified accountants only."""
    from accountants import calibration

    target: dict[str, Any] = {
        "target_epsilon": target_epsilon,
        "target_delta": delta_value,
        "accountant": accountant,
    }
    match solve_for:
        case Quantity.NOISE:
            value: float = calibration.calibrate_noise_multiplier(sampling_prob=prob, num_steps=steps, **target)
        case Quantity.STEPS:
            value = calibration.calibrate_num_steps(noise_multiplier=noise, sampling_prob=prob, **target)
        case Quantity.PROBABILITY:
            value = calibration.calibrate_sampling_prob(noise_multiplier=noise, num_steps=steps, **target)
        case Quantity.RECORDS:
            value = calibration.calibrate_num_records(
                noise_multiplier=noise, sampling_prob=prob, num_steps=steps, **target
            )
    if as_json:
        _print_json({"parameter": solve_for.value, "value": value, **target})
    else:
        typer.echo(f"{solve_for.value} = {value}")


@app.command()
@_with_run
def compare(
    run: Run,
    *,
    delta_value: Delta,
    names: Annotated[
        str, typer.Option("--accountants", help="Comma-separated names; default: those that fit the sampler.")
    ] = "",
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Every accountant side by side, with the kind of its answer and its time."""
    from accountants import comparison

    chosen = names or _FITTING.get(run.sampler, _EVERYTHING)
    rows = comparison.compare(
        run.event(), delta_value, [name.strip() for name in chosen.split(",")], relation=run.neighbours()
    )
    if plot is not None:
        comparison.draw_rows(rows, plot)
    if as_json:
        _print_json([row.to_json() for row in rows])
    else:
        comparison.print_table(rows)


@app.command()
def curve(
    noise: Noise,
    delta_value: Delta,
    steps: Steps,
    prob: Prob = 1.0,
    accountant: Name = "tilted",
    points: Annotated[int, typer.Option(help="Points of each curve.")] = 25,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Epsilon over steps, delta over epsilon, and the trade-off function with its cap on attacks."""
    from accountants import comparison

    curves = comparison.curves(
        noise_multiplier=noise,
        sampling_prob=prob,
        num_steps=steps,
        delta=delta_value,
        accountant=accountant,
        points=points,
    )
    if plot is not None:
        comparison.draw(curves, plot)
    if as_json or plot is None:
        _print_json(curves)
    else:
        typer.echo(f"wrote {plot}")


@app.command()
def convert(
    epsilon_value: Annotated[float, typer.Option("--epsilon", "-e", help="For one record.")],
    delta_value: Delta,
    records: Records,
    as_json: Json = False,
) -> None:
    """The black-box group guarantee of a user with several records: (k eps, delta (e^(k eps) - 1)/(e^eps - 1))."""
    from accountants import units as user_units
    from accountants.protocol import check_delta, check_epsilon

    check_epsilon(epsilon_value)
    check_delta(delta_value)
    group_epsilon, group_delta = user_units.group_delta_of(epsilon_value, delta_value, records)
    if as_json:
        _print_json({"num_records": records, "epsilon": group_epsilon, "delta": group_delta})
    else:
        typer.echo(f"epsilon = {_number(group_epsilon)}, delta = {_number(group_delta)} for {records} records")
        if group_delta == 1:
            typer.echo("this says nothing: use --num-records with 'accountants epsilon' for the exact bound")


def main() -> None:
    """Run the command line; a ``ValueError`` is the user's mistake."""
    try:
        app()
    except ValueError as error:
        sys.stderr.write(f"accountants: {error}\n")
        sys.exit(2)
