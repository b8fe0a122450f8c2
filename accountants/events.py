"""What a training run released, as ``dp_accounting`` event values; two events of our own where the library has none.

Every noise multiplier is the standard deviation of the noise over the clipping norm C, the most that one unit moves the
sum when it is added or removed. The constructors say for which neighbouring relation the event's guarantee is meant;
the accountants refuse any other.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import attr
import dp_accounting
from dp_accounting import dp_event

from accountants.answer import UnsupportedEventError
from accountants.validation import check_event, check_values, not_negative, probability, whole

NeighboringRelation = dp_accounting.NeighboringRelation


@attr.s(frozen=True, slots=True, auto_attribs=True)
class RandomAllocationDpEvent(dp_accounting.DpEvent):
    """Every unit joins ``num_selected`` of ``num_steps`` Gaussian releases, chosen uniformly; once per epoch.

    With ``num_selected = 1`` this is balls-and-bins sampling. Feldman and Shenfeld 2025 (arXiv 2502.08202) and 2026
    (arXiv 2602.17284).
    """

    noise_multiplier: float
    num_steps: int
    num_selected: int = 1
    num_epochs: int = 1

    def __attrs_post_init__(self) -> None:
        check_event(self)


@attr.s(frozen=True, slots=True, auto_attribs=True)
class ShuffledBatchesDpEvent(dp_accounting.DpEvent):
    """Every epoch shuffles the units into ``num_batches`` fixed batches and releases each with Gaussian noise.

    No amplification by the shuffle is claimed: no upper bound better than the fixed order's is known.
    """

    noise_multiplier: float
    num_batches: int
    num_epochs: int

    def __attrs_post_init__(self) -> None:
        check_event(self)


def dp_sgd_event(*, noise_multiplier: float, sampling_prob: float, num_steps: int) -> dp_accounting.DpEvent:
    """Return the event of ``num_steps`` Poisson-sampled Gaussian releases.

    Args:
        noise_multiplier: standard deviation of the noise divided by the clipping norm; 0 means no noise at all.
        sampling_prob: the probability with which each privacy unit joins a step, independently, in [0, 1].
        num_steps: the number of steps; 0 gives the event that releases nothing.

    Returns:
        An event for the add-or-remove-one relation over the unit that is sampled and clipped: if users are sampled and
        each user's whole gradient is clipped once, the unit is the user (Chua et al. 2024, arXiv 2406.14322, section
        3).

    Raises:
        ValueError: if an argument is outside its range.
    """
    check_values(
        noise_multiplier=(not_negative, noise_multiplier),
        sampling_prob=(probability, sampling_prob),
        num_steps=(whole(0), num_steps),
    )
    if num_steps == 0 or sampling_prob == 0:
        return dp_accounting.NoOpDpEvent()
    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    step: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_prob < 1:
        step = dp_accounting.PoissonSampledDpEvent(sampling_prob, step)
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def phased_event(phases: Sequence[tuple[float, float, int]]) -> dp_accounting.DpEvent:
    """Return the event of DP-SGD by phases of ``(noise_multiplier, sampling_prob, num_steps)``.

    An accountant composes the phases' distributions, not their epsilons. The settings of all phases must be fixed
    before the first release: to choose later ones from earlier releases needs a privacy filter.
    """
    events = [
        dp_sgd_event(noise_multiplier=noise, sampling_prob=prob, num_steps=steps) for noise, prob, steps in phases
    ]
    return dp_accounting.ComposedDpEvent(events)


def truncated_poisson_event(
    *, noise_multiplier: float, sampling_prob: float, max_batch_size: int, num_units: int, num_steps: int
) -> dp_accounting.DpEvent:
    """Return the event of Poisson sampling cut to ``max_batch_size`` by a random subset (Ganesh 2025, 2508.15089).

    For zero-out adjacency (``REPLACE_SPECIAL``) with the number of units public; dp-accounting also accepts
    add-or-remove-one.
    """
    check_values(
        noise_multiplier=(not_negative, noise_multiplier),
        sampling_prob=(probability, sampling_prob),
        max_batch_size=(whole(1), max_batch_size),
        num_units=(whole(1), num_units),
        num_steps=(whole(0), num_steps),
    )
    step = dp_event.TruncatedSubsampledGaussianDpEvent(num_units, sampling_prob, max_batch_size, noise_multiplier)
    if (plain := _plain(noise_multiplier, num_steps)) is not None:
        return plain
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def fixed_size_event(
    *, noise_multiplier: float, batch_size: int, num_units: int, num_steps: int
) -> dp_accounting.DpEvent:
    """Return the event of batches of exactly ``batch_size`` distinct units, drawn each step; ``REPLACE_ONE`` only."""
    check_values(
        noise_multiplier=(not_negative, noise_multiplier),
        batch_size=(whole(1), batch_size),
        num_units=(whole(1), num_units),
        num_steps=(whole(0), num_steps),
    )
    if batch_size > num_units:
        raise ValueError(f"batch_size={batch_size} must lie in [1, num_units={num_units}]")
    inner = dp_accounting.GaussianDpEvent(noise_multiplier)
    if (plain := _plain(noise_multiplier, num_steps)) is not None:
        return plain
    step = dp_accounting.SampledWithoutReplacementDpEvent(num_units, batch_size, inner)
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def random_allocation_event(
    *, noise_multiplier: float, num_steps: int, num_selected: int = 1, num_epochs: int = 1
) -> dp_accounting.DpEvent:
    """Return the event of allocating each unit to ``num_selected`` of ``num_steps`` steps in each of ``num_epochs``.

    For add-or-remove-one and zero-out. With ``num_selected = 1`` every unit takes part once per epoch.
    """
    check_values(
        noise_multiplier=(not_negative, noise_multiplier),
        num_steps=(whole(1), num_steps),
        num_selected=(whole(1), num_selected),
        num_epochs=(whole(0), num_epochs),
    )
    if num_selected > num_steps:
        raise ValueError(f"num_selected={num_selected} must lie in [1, num_steps={num_steps}]")
    if (plain := _plain(noise_multiplier, num_epochs)) is not None:
        return plain
    return RandomAllocationDpEvent(noise_multiplier, num_steps, num_selected, num_epochs)


def shuffled_event(*, noise_multiplier: float, num_batches: int, num_epochs: int) -> dp_accounting.DpEvent:
    """Return the event of shuffled fixed batches, not amplified; for ``REPLACE_SPECIAL`` and ``REPLACE_ONE``."""
    check_values(
        noise_multiplier=(not_negative, noise_multiplier),
        num_batches=(whole(1), num_batches),
        num_epochs=(whole(0), num_epochs),
    )
    if (plain := _plain(noise_multiplier, num_epochs)) is not None:
        return plain
    return ShuffledBatchesDpEvent(noise_multiplier, num_batches, num_epochs)


def _plain(noise_multiplier: float, count: int) -> dp_accounting.DpEvent | None:
    """Return the event of ``count`` releases where that is trivial: none made, or made without noise; else None."""
    if count == 0:
        return dp_accounting.NoOpDpEvent()
    return dp_accounting.NonPrivateDpEvent() if noise_multiplier == 0 else None


def joint_noise_multiplier(*noise_multipliers: float) -> float:
    """Return the noise multiplier of several Gaussian releases made together from one sample: ``(sum 1/s^2)^(-1/2)``.

    For statistics that are released beside a step's gradient, each with noise relative to its own bound. Together with
    the gradient, every part divided by its noise, they are one Gaussian release, so the number of steps stays the same.

    Raises:
        ValueError: if a multiplier is not positive.
    """
    if not noise_multipliers or not all(0 < value < math.inf for value in noise_multipliers):
        raise ValueError(f"noise_multipliers={noise_multipliers} must all be positive and finite")
    return 1 / math.sqrt(math.fsum(value**-2 for value in noise_multipliers))


def adaptive_clipping_noise(noise_multiplier: float, count_noise: float) -> float:
    """Return the gradient noise multiplier that leaves room for the noised count of unclipped units.

    Andrew et al. 2021 (arXiv 1905.03871, theorem 1): the count is shifted to take values +-1/2, so its sensitivity is
    1/2 and noise of standard deviation ``count_noise`` has multiplier ``2 * count_noise``. Gradient and count together
    then are one Gaussian release of ``noise_multiplier``.

    Raises:
        ValueError: if ``count_noise`` is too small for any gradient noise to suffice.
    """
    if not (0 < noise_multiplier < math.inf and 0 < count_noise < math.inf):
        raise ValueError(f"noise_multiplier={noise_multiplier} and count_noise={count_noise} must be positive")
    room = noise_multiplier**-2 - (2 * count_noise) ** -2
    if room <= 0:
        raise ValueError(f"count_noise={count_noise} must exceed noise_multiplier/2={noise_multiplier / 2}")
    return room**-0.5


def resolve(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> dp_accounting.DpEvent:
    """Return an event in the form that the methods read.

    Shuffled batches become what is known of them: one Gaussian release per epoch, in a fixed order. What is composed
    zero times, sampled with probability zero, or made of such parts becomes ``NoOpDpEvent``. Counts become Python's
    integers.

    Raises:
        UnsupportedEventError: for shuffled batches under add-or-remove-one, where a unit's arrival moves the others.
    """
    match event:
        case ShuffledBatchesDpEvent():
            if relation is NeighboringRelation.ADD_OR_REMOVE_ONE:
                raise UnsupportedEventError(
                    "ShuffledBatchesDpEvent has no bound under ADD_OR_REMOVE_ONE; zero-out only"
                )
            if event.num_epochs == 0:
                return dp_accounting.NoOpDpEvent()
            inner = dp_accounting.GaussianDpEvent(event.noise_multiplier)
            return dp_accounting.SelfComposedDpEvent(inner, int(event.num_epochs))
        case dp_accounting.SelfComposedDpEvent():
            inner = resolve(event.event, relation)
            if event.count == 0 or isinstance(inner, dp_accounting.NoOpDpEvent):
                return dp_accounting.NoOpDpEvent()
            return dp_accounting.SelfComposedDpEvent(inner, int(event.count))
        case dp_accounting.ComposedDpEvent():
            parts = [resolve(part, relation) for part in event.events]
            left = [part for part in parts if not isinstance(part, dp_accounting.NoOpDpEvent)]
            return dp_accounting.ComposedDpEvent(left) if left else dp_accounting.NoOpDpEvent()
        case dp_accounting.PoissonSampledDpEvent():
            inner = resolve(event.event, relation)
            if event.sampling_probability == 0 or isinstance(inner, dp_accounting.NoOpDpEvent):
                return dp_accounting.NoOpDpEvent()
            return dp_accounting.PoissonSampledDpEvent(event.sampling_probability, inner)
        case _:
            return event


def poisson_counterpart(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """Return plain Poisson sampling of the same rate, noise and number of steps; other events unchanged.

    Its epsilon is of the size of the event's own, for grids and searches. It is no bound on it.
    """
    match event:
        case RandomAllocationDpEvent():
            return dp_sgd_event(
                noise_multiplier=event.noise_multiplier,
                sampling_prob=event.num_selected / event.num_steps,
                num_steps=event.num_steps * event.num_epochs,
            )
        case dp_accounting.SelfComposedDpEvent(event=dp_event.TruncatedSubsampledGaussianDpEvent() as step):
            return dp_sgd_event(
                noise_multiplier=step.noise_multiplier,
                sampling_prob=step.sampling_probability,
                num_steps=event.count,
            )
        case _:
            return event


def event_to_json(event: dp_accounting.DpEvent) -> dict[str, Any]:
    """Return a dictionary of JSON values, with the event's class name under ``"kind"``."""
    record: dict[str, Any] = {"kind": type(event).__name__}
    for name in attr.fields_dict(type(event)):
        value = getattr(event, name)
        record[name] = _value_to_json(value)
    return record


def _value_to_json(value: Any) -> Any:
    """Return a field of an event for JSON: events by `event_to_json`, tuples as lists."""
    if isinstance(value, dp_accounting.DpEvent):
        return event_to_json(value)
    if isinstance(value, list | tuple):
        return [_value_to_json(part) for part in cast(Sequence[Any], value)]
    return value


def _value_from_json(value: Any) -> Any:
    """Undo `_value_to_json`; a mapping can only be an event."""
    if isinstance(value, Mapping):
        return event_from_json(cast(Mapping[str, Any], value))
    if isinstance(value, list):
        return [_value_from_json(part) for part in cast(list[Any], value)]
    return value


_OWN = {cls.__name__: cls for cls in (RandomAllocationDpEvent, ShuffledBatchesDpEvent)}


def event_from_json(record: Mapping[str, Any]) -> dp_accounting.DpEvent:
    """Return the inverse of :func:`event_to_json`.

    Raises:
        ValueError: if the record names no event class, one of its fields does not exist, or a value is not allowed.
    """
    kind = record.get("kind")
    cls = _OWN.get(str(kind)) or getattr(dp_event, str(kind), None)
    if not (isinstance(cls, type) and issubclass(cls, dp_accounting.DpEvent)):
        raise ValueError(f"kind={kind!r} names no event")
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name == "kind":
            continue
        values[name] = _value_from_json(value)
    fields = attr.fields_dict(cls)
    if unknown := values.keys() - fields.keys():
        raise ValueError(f"{kind} has no field {', '.join(sorted(unknown))}")
    event = cls(**values)
    check_event(event)
    return event
