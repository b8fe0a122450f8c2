"""What a well-formed event is: checked where events are made and again where any event is accounted for.

An accountant's formulas are true of probabilities, positive noise and whole numbers of steps only; outside them they
give numbers anyway. Every fault is named, with its place in a nested event.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any, cast

import attr
import dp_accounting

#: How far from 1 the weights of a mixture may sum: the rounding of their own.
WEIGHTS_ERROR = 1e-12

#: The largest count: up to here float64 holds every integer.
MAX_COUNT = 2**53

#: A rule is called with a value, and returns what such a value must be; None if the value is so.
_Rule = Callable[[Any], str | None]


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(float(value))


def not_negative(value: Any) -> str | None:
    """Rule of noise and sensitivities: return what one must be, or None if ``value`` is so."""
    return None if _is_number(value) and value >= 0 else "must be a finite number and not negative"


def probability(value: Any) -> str | None:
    """Rule of sampling probabilities: return what one must be, or None if ``value`` is so."""
    return None if _is_number(value) and 0 <= value <= 1 else "must be a number in [0, 1]"


def whole(smallest: int) -> _Rule:
    """Return the rule of counts that are at least ``smallest``."""

    def rule(value: Any) -> str | None:
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < smallest:
            return f"must be an integer of at least {smallest}"
        return None if int(value) <= MAX_COUNT else "must be at most 2**53, where float64 loses count"

    return rule


def _mean_runs(value: Any) -> str | None:
    return None if _is_number(value) and value >= 1 else "must be a finite number of at least 1"


def _shape(value: Any) -> str | None:
    good = isinstance(value, Real) and float(value) >= 0
    return None if good else "must be at least 0, or infinite for a Poisson number"


def _each(rule: _Rule) -> _Rule:
    """Return the rule of a non-empty list whose values all obey ``rule``."""

    def all_of(values: Any) -> str | None:
        if not isinstance(values, Sequence) or isinstance(values, str) or not values:
            return "must be a list that is not empty"
        for value in cast(Sequence[Any], values):
            if fault := rule(value):
                return fault
        return None

    return all_of


#: Field -> its rule, wherever it appears in an event.
_RULES: dict[str, _Rule] = {
    "noise_multiplier": not_negative,
    "standard_deviation": not_negative,
    "noise_parameter": not_negative,
    "sampling_probability": probability,
    "sampling_probs": _each(probability),
    "sensitivities": _each(not_negative),
    "sensitivity": not_negative,
    "count": whole(0),
    "num_steps": whole(1),
    "num_selected": whole(1),
    "num_batches": whole(1),
    "num_epochs": whole(0),
    "num_buckets": whole(2),
    "dataset_size": whole(1),
    "truncated_batch_size": whole(1),
    "source_dataset_size": whole(1),
    "sample_size": whole(1),
    "rho": not_negative,
    "xi": not_negative,
    "mean": _mean_runs,
    "shape": _shape,
}


def check_event(event: dp_accounting.DpEvent) -> None:
    """Raise unless an event and all events in it are well formed.

    Raises:
        ValueError: with every fault: the field, its value, and what is allowed.
    """
    if faults := list(_faults(event, "")):
        raise ValueError("; ".join(faults))


def check_values(**rules_and_values: tuple[_Rule, Any]) -> None:
    """Raise unless all arguments obey their rules.

    Args:
        rules_and_values: argument name → (rule, value).

    Raises:
        ValueError: with every fault.
    """
    faults: list[str] = []
    for name, (rule, value) in rules_and_values.items():
        if fault := rule(value):
            faults.append(f"{name}={value!r} {fault}")
    if faults:
        raise ValueError("; ".join(faults))


def _faults(event: Any, place: str) -> Iterator[str]:
    """Yield what is wrong with an event and its parts.

    Args:
        event: whatever was given for one.
        place: its path in the outermost event, such as ``ComposedDpEvent.events[2]``; empty for that event itself.
    """
    if not isinstance(event, dp_accounting.DpEvent):
        yield f"{place or 'event'}={event!r} must be a dp_accounting.DpEvent"
        return
    kind = type(event).__name__
    values: dict[str, Any] = {name: getattr(event, name) for name in attr.fields_dict(type(event))}
    fields_are_sound = True  # what they say together is looked at only then
    for name, value in values.items():
        path = f"{place}.{name}" if place else f"{kind}.{name}"
        if name == "event":
            yield from _faults(value, path)
        elif name == "events" and not isinstance(value, list | tuple):
            yield f"{path}={value!r} must be a list of events"
        elif name == "events":
            for index, part in enumerate(cast(Sequence[Any], value)):
                yield from _faults(part, f"{path}[{index}]")
        elif name == "step_counts":
            rule = _each(whole(0)) if isinstance(value, Sequence) else whole(0)  # a list of counts, or a single one
            if fault := rule(value):
                yield f"{path}={value!r} {fault}"
        elif name in _RULES and (fault := _RULES[name](value)):
            fields_are_sound = False
            yield f"{path}={value!r} {fault}"
    if fields_are_sound:
        yield from _joint_faults(values, place or kind)


def _joint_faults(values: dict[str, Any], place: str) -> Iterator[str]:
    """Yield faults between the fields of one event (``values`` by name), each of which is well formed by itself."""
    if "sampling_probs" in values:
        probs, sensitivities = values["sampling_probs"], values["sensitivities"]
        if len(probs) != len(sensitivities):
            yield f"{place} has {len(sensitivities)} sensitivities and {len(probs)} sampling_probs; one of each"
        elif abs(math.fsum(probs) - 1) > WEIGHTS_ERROR:
            yield f"{place}.sampling_probs={list(probs)!r} must sum to 1, not {math.fsum(probs)!r}"
    for part, whole_name in (("sample_size", "source_dataset_size"), ("num_selected", "num_steps")):
        if part in values and whole_name in values and values[part] > values[whole_name]:
            yield f"{place}.{part}={values[part]!r} must not exceed {whole_name}={values[whole_name]!r}"
