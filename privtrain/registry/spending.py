"""What runs spend together: their mechanisms composed by the accountants, never the sum of their epsilons.

A *part* is one mechanism, e.g. one step of DP-SGD, and how often it was run by all runs together. So the work depends
on the number of different (noise multiplier, sampling probability), not on the number of runs. The composition's Rényi
bound is a sum of stored numbers and decides almost always. Only a run that lands between that bound and the true ε
needs an exact accountant, which composes privacy loss distributions.

The composition is for add-or-remove-one and holds if the settings of a run do not depend on what earlier runs released;
choosing them from earlier results would need a privacy filter.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import dp_accounting
import numpy as np
from dp_accounting.rdp import rdp_privacy_accountant as conversion

import accountants
from accountants.calibration import calibrate_noise
from accountants.events import event_from_json, event_to_json
from accountants.methods.rdp import ORDERS, mixture_divergences
from accountants.methods.tilted import TiltedAccountant
from accountants.mixtures import composition
from accountants.units import group_event

#: With more different mechanisms than this the exact composition takes seconds; then the Rényi bound alone decides.
MAX_EXACT_MECHANISMS = 256

#: Accountants of :mod:`accountants`, in the order in which they are asked; the first that knows every part decides.
_EXACT = ("tilted", "pld", "rdp")


class Part(NamedTuple):
    """A mechanism and how often it was run. A tuple: thousands are made for one reservation.

    Attributes:
        text: one repetition's event as canonical JSON.
        count: repetitions.
        divergences: Rényi divergences of one repetition at the accountants' orders; ``None`` if it has no such form.
    """

    text: str
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    divergences: np.ndarray | None

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The event of one repetition."""
        return parse_event(self.text)


@dataclasses.dataclass(frozen=True)
class Spent:
    """A certified ε of a composition, and the method that computed it."""

    epsilon: float
    method: str


@dataclasses.dataclass(frozen=True)
class Limit:
    """A budget's ε and δ, with the mechanisms already charged to it."""

    epsilon: float
    delta: float
    spent: Sequence[Part]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a DP-SGD run with Poisson sampling.

    Attributes:
        noise_multiplier: standard deviation of the noise over the clipping norm of a sampled unit.
        sampling_prob: chance that a unit is in a step.
        num_steps: steps.
        num_records: sampled units that one protected unit may own. 1 where users are sampled and protected; more where
            records are sampled and their users are protected.
    """

    noise_multiplier: float
    sampling_prob: float
    num_steps: int
    num_records: int = 1

    def event(self) -> dp_accounting.DpEvent:
        """Return what the run releases of one unit."""
        if self.num_records == 1:
            return accountants.dp_sgd_event(
                noise_multiplier=self.noise_multiplier, sampling_prob=self.sampling_prob, num_steps=self.num_steps
            )
        return group_event(**dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The single changes that would each make a run fit; ``None`` where no value does.

    Attributes:
        num_steps: the most steps.
        noise_multiplier: the least noise, four decimals.
        epsilon: the run's own ε at its own δ with that noise.
        sampling_prob: the largest sampling probability.
    """

    num_steps: int | None
    noise_multiplier: float | None
    epsilon: float | None
    sampling_prob: float | None


def part_of(event: dp_accounting.DpEvent) -> Part:
    """Return one run's event as a mechanism and its repetitions: 1 unless the event is a self-composition."""
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return Part(event_text(event.event), event.count, divergences_of(event.event))
    if isinstance(event, dp_accounting.NoOpDpEvent):  # a run that releases nothing
        return Part(event_text(event), 0, np.zeros(len(ORDERS)))
    return Part(event_text(event), 1, divergences_of(event))


def divergences_of(event: dp_accounting.DpEvent) -> np.ndarray | None:
    """Return an event's Rényi divergences at ``ORDERS``; ``None`` unless it is Gaussian noise on a sampled sum."""
    try:
        return np.asarray(mixture_divergences(composition(event)))
    except accountants.UnsupportedEventError:
        return None


def event_text(event: dp_accounting.DpEvent) -> str:
    """Return an event's canonical JSON."""
    return json.dumps(event_to_json(event), sort_keys=True, separators=(",", ":"))


def event_digest(text: str) -> str:
    """Return SHA-256 of an event's canonical JSON."""
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=65536)
def parse_event(text: str) -> dp_accounting.DpEvent:
    """Return the inverse of :func:`event_text`."""
    return event_from_json(json.loads(text))


def fits(parts: Sequence[Part], epsilon: float, delta: float) -> bool:
    """Return whether the composition is certified to be (``epsilon``, ``delta``)-differentially private."""
    parts = [part for part in parts if part.count]
    if not parts or renyi_epsilon(parts, delta) <= epsilon:
        return True
    if len(parts) > MAX_EXACT_MECHANISMS:
        return False
    event = _composed(parts)
    # Cheap accountants first. Each gives certified bounds from below and above, which decide if both are on one side.
    try:
        by_delta = accountants.delta(event, epsilon, accountant="tilted-edgeworth")
        if accountants.certified_upper(by_delta) <= delta:
            return True
        if by_delta.lower > delta:
            return False
        by_epsilon = TiltedAccountant(tolerance=5e-3).epsilon(event, delta)  # a third of the time of the default
        if accountants.certified_upper(by_epsilon) <= epsilon:
            return True
        if by_epsilon.lower > epsilon:
            return False
    except (ValueError, ArithmeticError):  # unsupported, or outside the accountant's range
        pass
    return composed_epsilon(parts, delta).epsilon <= epsilon


def composed_epsilon(parts: Sequence[Part], delta: float) -> Spent:
    """Return a certified ε of the composition at ``delta``, by the first accountant that knows all its mechanisms."""
    parts = [part for part in parts if part.count]
    if not parts:
        return Spent(0.0, "none")
    if len(parts) > MAX_EXACT_MECHANISMS:
        return Spent(renyi_epsilon(parts, delta), "rdp")
    event = _composed(parts)
    for name in _EXACT:
        try:
            return Spent(accountants.certified_upper(accountants.epsilon(event, delta, accountant=name)), name)
        except ValueError:  # unsupported, or outside the accountant's range
            continue
    return _split_delta(parts, delta)


def renyi_epsilon(parts: Sequence[Part], delta: float) -> float:
    """Return the Rényi bound of the composition from the stored divergences; infinite where a part has none."""
    divergences = [part.divergences for part in parts if part.divergences is not None]
    if len(divergences) < len(parts):
        return math.inf
    counts = np.array([part.count for part in parts], dtype=np.float64)
    total = counts @ np.stack(divergences)  # at each order: divergences of a composition add up
    epsilon, _ = conversion.compute_epsilon(ORDERS, total.tolist(), delta)
    return math.inf if math.isnan(epsilon) else float(epsilon)


def _composed(parts: Sequence[Part]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(p.event, p.count) for p in parts])


def _split_delta(parts: Sequence[Part], delta: float) -> Spent:
    """Return ε where no accountant knows all mechanisms: the sum over kinds of mechanism, each at an equal share of δ.

    A kind is a type of DP event; its mechanisms are composed by whichever accountant gives the least ε.
    """
    kinds = sorted({type(part.event).__name__ for part in parts})
    total = 0.0
    for kind in kinds:
        of_kind = [part for part in parts if type(part.event).__name__ == kind]
        first = of_kind[0]
        is_single = len(of_kind) == 1 and first.count == 1
        # A single event goes to the accountants as it is: some know it only outside a composition.
        event = first.event if is_single else _composed(of_kind)
        total += min(_certified(event, delta / len(kinds), name) for name in (*_EXACT, "allocation"))
    return Spent(total, "basic composition of " + ", ".join(kinds))


def _certified(event: dp_accounting.DpEvent, delta: float, name: str) -> float:
    """Return an accountant's certified ε; infinite if it does not know the event."""
    try:
        return accountants.certified_upper(accountants.epsilon(event, delta, accountant=name))
    except (ValueError, ImportError):
        return math.inf


def knobs(settings: Settings, *, own_delta: float, limits: Sequence[Limit]) -> Knobs:
    """Return which single changes of ``settings`` would make a refused run fit into every budget.

    Args:
        settings: of the run.
        own_delta: δ of the run's own guarantee.
        limits: the budgets, with what is charged to them.
    """

    def allowed(changed: Settings) -> bool:
        """Return whether a run with these settings fits into every budget."""
        part = part_of(changed.event())
        return all(fits([*limit.spent, part], limit.epsilon, limit.delta) for limit in limits)

    if not all(fits(limit.spent, limit.epsilon, limit.delta) for limit in limits):  # full without this run already
        return Knobs(num_steps=None, noise_multiplier=None, epsilon=None, sampling_prob=None)
    num_steps = _largest(lambda n: allowed(dataclasses.replace(settings, num_steps=n)), settings.num_steps)
    noise = _least_noise(settings, limits)
    epsilon = None
    if noise is not None:
        event = dataclasses.replace(settings, noise_multiplier=noise).event()
        # Rounded down, so that calibrating to it gives at least this noise.
        epsilon = math.floor(1e4 * accountants.certified_upper(accountants.epsilon(event, own_delta))) / 1e4
    # Probabilities are searched as multiples of a millionth.
    num_millionths = _largest(
        lambda n: allowed(dataclasses.replace(settings, sampling_prob=round(n * 1e-6, 6))),
        below=math.floor(settings.sampling_prob / 1e-6),
        precision=1e-3,
    )
    sampling_prob = round(num_millionths * 1e-6, 6)
    # A value of 0 is no advice.
    return Knobs(
        num_steps=num_steps or None,
        noise_multiplier=noise,
        epsilon=epsilon or None,
        sampling_prob=sampling_prob or None,
    )


def _least_noise(settings: Settings, limits: Sequence[Limit]) -> float | None:
    """Return the least noise multiplier, from the run's own on, with which it fits into every limit; None if none."""
    least = settings.noise_multiplier
    for limit in limits:

        def event(noise: float, before: Sequence[Part] = limit.spent) -> dp_accounting.DpEvent:
            """Return what is charged to this limit, composed with the run at this noise."""
            own = dataclasses.replace(settings, noise_multiplier=noise).event()
            return dp_accounting.ComposedDpEvent([_composed(before), own])

        try:
            noise = calibrate_noise(event, target_epsilon=limit.epsilon, target_delta=limit.delta, accountant="tilted")
        except ValueError:
            return None
        least = max(least, noise)
    return least


def _largest(allowed: Callable[[int], bool], below: int, precision: float = 0.0) -> int:
    """Return the largest count in [0, ``below``) that is allowed, by bisection; 0 if no other is.

    The count returned is allowed, and smaller than the largest by at most the relative ``precision``.
    """
    low, high = 0, below
    while high - low > max(1, precision * low):
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low


def settings_of(text: str, count: int) -> dict[str, Any]:
    """Return a mechanism and its repetitions for display.

    Of DP-SGD: ``noise_multiplier``, ``sampling_prob`` and ``num_steps``; of anything else ``mechanism``, the type of
    its event, and ``count``.

    Args:
        text: of the mechanism's event, as :func:`event_text` gives it.
        count: repetitions.
    """
    event = parse_event(text)
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        prob, inner = event.sampling_probability, event.event
    else:  # not sampled: each unit is in every step
        prob, inner = 1.0, event
    if isinstance(inner, dp_accounting.GaussianDpEvent):
        return {"noise_multiplier": inner.noise_multiplier, "sampling_prob": prob, "num_steps": count}
    return {"mechanism": type(event).__name__, "count": count}
