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
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

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
    EPOCHS = "num-epochs"
    PROBABILITY = "sampling-prob"
    RECORDS = "num-records"


#: What ``--for`` names -> the field of :class:`Run` that ``calibrate`` solves for.
_SOUGHT = {
    Quantity.NOISE: "noise",
    Quantity.STEPS: "steps",
    Quantity.EPOCHS: "epochs",
    Quantity.PROBABILITY: "prob",
    Quantity.RECORDS: "records",
}


Noise = Annotated[float | None, typer.Option("--noise-multiplier", "-s", help="Noise deviation over clipping norm.")]
Prob = Annotated[float | None, typer.Option("--sampling-prob", "-q", help="Probability per unit and step.")]
Steps = Annotated[
    int | None, typer.Option("--num-steps", "-t", help="Steps (per epoch for random-allocation and shuffled).")
]
Epsilon = Annotated[float, typer.Option("--epsilon", "-e", help="The epsilon at which delta is wanted.")]
Delta = Annotated[float, typer.Option("--delta", "-d", help="Failure probability.")]
Records = Annotated[
    int | None, typer.Option("--num-records", "-k", help="Records per user (exact mixture of Gaussians); else 1.")
]
SamplerOption = Annotated[Sampler, typer.Option("--sampler", help="The sampler that was really used.")]
Epochs = Annotated[int | None, typer.Option("--num-epochs", help="Epochs of random-allocation and shuffled.")]
Selected = Annotated[
    int | None, typer.Option("--num-selected", help="Steps per epoch that a unit joins (random-allocation).")
]
Units = Annotated[
    int | None, typer.Option("--num-units", help="Public number of units (truncated-poisson, fixed-size).")
]
Batch = Annotated[
    int | None, typer.Option("--batch-size", help="Cap (truncated-poisson) or size (fixed-size) of a batch.")
]
Phases = Annotated[
    list[str] | None,
    typer.Option(
        "--phase",
        metavar="NOISE:PROB:STEPS",
        help="A phase of a poisson run, once for each: its noise relative to --noise-multiplier, its sampling "
        "probability and its steps.",
    ),
]
Name = Annotated[
    str | None, typer.Option("--accountant", "-a", help="pld, tilted, rdp, prv, eeai, ...; else one that fits.")
]
RelationOption = Annotated[
    Relation | None, typer.Option("--relation", help="Which data sets are neighbours; else the sampler's own.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Plot = Annotated[Path | None, typer.Option("--plot", help="Write a picture to this file.")]

#: What ``compare`` asks where every method has an analysis: all accountants but the slow ones.
_EVERYTHING = "tilted,pld,tilted-edgeworth,rdp,gdp,aea1,aea2,aea3,eeai"


class _Needs(NamedTuple):
    """What a sampler asks of :class:`Run`."""

    needed: tuple[str, ...]  # fields that must be given
    optional: tuple[str, ...]  # fields that may be given
    relation: Relation  # the relation that its event is for


_SAMPLERS = {
    Sampler.POISSON: _Needs(("noise", "prob", "steps"), ("records",), Relation.ADD_OR_REMOVE_ONE),
    Sampler.TRUNCATED: _Needs(("noise", "prob", "steps", "units", "batch"), (), Relation.REPLACE_SPECIAL),
    Sampler.FIXED: _Needs(("noise", "steps", "units", "batch"), (), Relation.REPLACE_ONE),
    Sampler.ALLOCATION: _Needs(("noise", "steps", "selected", "epochs"), (), Relation.ADD_OR_REMOVE_ONE),
    Sampler.SHUFFLED: _Needs(("noise", "steps", "epochs"), (), Relation.REPLACE_SPECIAL),
}
#: Field of :class:`Run` -> its option on the command line.
_FLAGS = {
    "noise": "--noise-multiplier",
    "prob": "--sampling-prob",
    "steps": "--num-steps",
    "records": "--num-records",
    "epochs": "--num-epochs",
    "selected": "--num-selected",
    "units": "--num-units",
    "batch": "--batch-size",
    "phases": "--phase",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The options that describe a run, shared by the commands; :func:`_with_run` gives a command these options.

    A field is None, or ``phases`` empty, if its option was not given.
    """

    noise: Noise = None
    steps: Steps = None
    prob: Prob = None
    sampler: SamplerOption = Sampler.POISSON
    records: Records = None
    epochs: Epochs = None
    selected: Selected = None
    units: Units = None
    batch: Batch = None
    phases: Phases = None
    relation: RelationOption = None

    def neighbours(self) -> dp_accounting.NeighboringRelation:
        """Return the relation given, or else the sampler's own, as dp_accounting's value."""
        import dp_accounting

        relation = self.relation or _SAMPLERS[self.sampler].relation
        return dp_accounting.NeighboringRelation[relation.name]

    def check(self, sought: str = "") -> None:
        """Raise unless exactly the options that the sampler reads were given.

        Args:
            sought: the field that a calibration solves for, which must not be given; empty for other commands.

        Raises:
            ValueError: with every option that is missing, not read, or given although it is sought.
        """
        needed, optional, _ = _SAMPLERS[self.sampler]
        if self.phases and self.sampler is Sampler.POISSON:
            needed, optional = ("noise",), ("records", "phases")  # each phase has its own probability and steps
        reader = f"--sampler {self.sampler.value}" + (" with --phase" if "phases" in optional else "")
        faults: list[str] = []
        for field, flag in _FLAGS.items():
            value = getattr(self, field)
            is_given = value is not None and value != []
            if field == sought and is_given:
                faults.append(f"{flag}={value} is what --for finds: leave it out")
            elif field in needed and field != sought and not is_given:
                faults.append(f"{flag} is missing: {reader} needs it")
            elif is_given and field not in (*needed, *optional):
                faults.append(f"{flag}={value} is not read by {reader}: leave it out")
        if sought and sought not in (*needed, *optional):
            faults.append(f"{_FLAGS[sought]} cannot be found for {reader}: it reads none")
        if faults:
            raise ValueError("; ".join(faults))

    def event(self) -> dp_accounting.DpEvent:
        """Return the event of what the run released. Call :meth:`check` first, which makes the fields read here set."""
        from accountants import events

        values: dict[str, Any] = {"noise_multiplier": self.noise, "num_steps": self.steps}
        match self.sampler:
            case Sampler.POISSON if self.phases:
                return self._phased_event()
            case Sampler.POISSON:
                return _poisson_event(self.noise, self.prob, self.steps, self.records)
            case Sampler.TRUNCATED:
                return events.truncated_poisson_event(
                    **values,
                    sampling_prob=_given(self.prob),
                    max_batch_size=_given(self.batch),
                    num_units=_given(self.units),
                )
            case Sampler.FIXED:
                return events.fixed_size_event(**values, batch_size=_given(self.batch), num_units=_given(self.units))
            case Sampler.ALLOCATION:
                return events.random_allocation_event(
                    **values, num_selected=_given(self.selected), num_epochs=_given(self.epochs)
                )
            case Sampler.SHUFFLED:
                return events.shuffled_event(
                    noise_multiplier=_given(self.noise), num_batches=_given(self.steps), num_epochs=_given(self.epochs)
                )

    def _phased_event(self) -> dp_accounting.DpEvent:
        """Return the composition of every ``--phase`` NOISE:PROB:STEPS; NOISE is relative to ``--noise-multiplier``."""
        import dp_accounting

        parts: list[dp_accounting.DpEvent] = []
        for text in self.phases or ():
            try:
                noise, prob, steps = text.split(":")
                multiplier, sampling_prob, num_steps = float(noise) * _given(self.noise), float(prob), int(steps)
            except ValueError:
                raise ValueError(f"--phase={text} must be NOISE:PROB:STEPS, for example 1.2:0.01:500") from None
            parts.append(_poisson_event(multiplier, sampling_prob, num_steps, self.records))
        return dp_accounting.ComposedDpEvent(parts)


def _given(value: Any) -> Any:
    """Return an option's value, which ``Run.check`` found to be given."""
    assert value is not None, "checked before"
    return value


def _poisson_event(
    noise: float | None, prob: float | None, steps: int | None, records: int | None
) -> dp_accounting.DpEvent:
    """Return the event of Poisson-sampled steps for one record, or for a user with so many ``records``."""
    from accountants import events, units

    values: dict[str, Any] = {"noise_multiplier": noise, "sampling_prob": prob, "num_steps": steps}
    if records is None or records == 1:
        return events.dp_sgd_event(**values)
    return units.group_event(**values, num_records=records)


def _with_run(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that takes the fields of :class:`Run` as options, in place of a ``Run`` as its first parameter.

    Typer makes options of a function's signature and annotations, so both are written on the new function.
    """
    options = inspect.signature(Run, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]  # all but the run

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
    """Print an answer as JSON, or as a line that begins with the certified upper end, or else the estimate."""
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
def epsilon(run: Run, *, delta_value: Delta, accountant: Name = None, as_json: Json = False) -> None:
    """Print epsilon of a run at a delta."""
    from accountants import api

    run.check()
    answer = api.epsilon(run.event(), delta_value, accountant=accountant, relation=run.neighbours())
    _print_answer(answer, as_json)


@app.command()
@_with_run
def delta(run: Run, *, epsilon_value: Epsilon, accountant: Name = None, as_json: Json = False) -> None:
    """Print delta of a run at an epsilon."""
    from accountants import api
    from accountants.registry import fitting

    run.check()
    event, relation = run.event(), run.neighbours()
    # By default `tilted` where it fits: it has no floor in delta, as `pld` has.
    names = fitting(event, relation.name)
    name = accountant or ("tilted" if "tilted" in names else names[0])
    _print_answer(api.delta(event, epsilon_value, accountant=name, relation=relation), as_json)


@app.command()
@_with_run
def calibrate(
    run: Run,
    *,
    target_epsilon: Annotated[float, typer.Option("--epsilon", "-e", help="The budget.")],
    delta_value: Delta,
    solve_for: Annotated[Quantity, typer.Option("--for", help="The parameter to find.")] = Quantity.NOISE,
    accountant: Name = None,
    as_json: Json = False,
) -> None:
    """Find the least noise, or the most steps, epochs, sampling or records for a budget; certified accountants only.

    For every sampler and relation, and with --phase for several phases.
    """
    from accountants import api, calibration
    from accountants.registry import fitting

    field = _SOUGHT[solve_for]
    run.check(field)
    if field == "steps" and run.sampler in (Sampler.ALLOCATION, Sampler.SHUFFLED):
        raise ValueError(
            f"--for num-steps: for --sampler {run.sampler.value} that is a part of an epoch; use num-epochs"
        )

    def make_event(value: float) -> dp_accounting.DpEvent:
        return dataclasses.replace(run, **{field: value}).event()

    relation = run.neighbours()
    # The accountant that fits is the same for every value of the field; a count of 1 is in every field's range.
    example_values = {"noise": 1.0, "prob": 0.5}
    name = accountant or fitting(make_event(example_values.get(field, 1)), relation.name)[0]
    target: dict[str, Any] = {"target_epsilon": target_epsilon, "target_delta": delta_value, "accountant": name}
    match solve_for:
        case Quantity.NOISE:
            value: float = calibration.calibrate_noise(make_event, relation=relation, **target)
        case Quantity.PROBABILITY:
            value = calibration.calibrate_probability(make_event, relation=relation, **target)
        case _:
            # The search ends at 1024 records: a user's mixture has an outcome for every number of them.
            largest = 1024 if field == "records" else calibration.LARGEST_COUNT
            value = calibration.calibrate_count(
                make_event, name=solve_for.value, relation=relation, largest=largest, **target
            )
    spent = api.epsilon(make_event(value), delta_value, accountant=name, relation=relation)
    if as_json:
        _print_json({"parameter": solve_for.value, "value": value, **target, "answer": spent.to_json()})
    else:
        typer.echo(f"{solve_for.value} = {value}")
        _print_answer(spent, as_json=False)


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
    """Print every accountant side by side, with the kind of its answer and its time."""
    from accountants import comparison
    from accountants.registry import fitting

    run.check()
    event, relation = run.event(), run.neighbours()
    certifying = fitting(event, relation.name)
    # Where `tilted` fits, the event is Gaussian noise on sampled sums, of which every method has an analysis.
    by_default = _EVERYTHING if "tilted" in certifying else ",".join(certifying)
    chosen = [name.strip() for name in (names or by_default).split(",")]
    rows = comparison.compare(event, delta_value, chosen, relation=relation)
    if plot is not None:
        comparison.draw_rows(rows, plot)
    if as_json:
        _print_json([row.to_json() for row in rows])
    else:
        comparison.print_table(rows)


@app.command()
@_with_run
def curve(
    run: Run,
    *,
    delta_value: Delta,
    accountant: Name = None,
    points: Annotated[int, typer.Option(help="Points of each curve.")] = 25,
    as_json: Json = False,
    plot: Plot = None,
) -> None:
    """Print epsilon over steps, delta over epsilon, and the trade-off function with its cap on attacks; poisson."""
    from accountants import comparison

    run.check()
    if run.sampler is not Sampler.POISSON or run.phases or run.records or run.neighbours().name == "REPLACE_ONE":
        raise ValueError("curve is for --sampler poisson, without --phase, --num-records and --relation replace_one")
    curves = comparison.curves(
        noise_multiplier=_given(run.noise),
        sampling_prob=_given(run.prob),
        num_steps=_given(run.steps),
        delta=delta_value,
        accountant=accountant or "tilted",
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
    records: Annotated[int, typer.Option("--num-records", "-k", help="Records of the user.")],
    as_json: Json = False,
) -> None:
    """Print the black-box group guarantee of a user with k records: (k eps, delta (e^(k eps) - 1)/(e^eps - 1))."""
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
