"""Renyi accounting, over orders wide enough that the optimum is not at an end, with dp-accounting's conversions.

Mironov 2017 (arXiv 1702.07476) for composition; Mironov, Talwar, Zhang 2019 (arXiv 1908.10530) for Poisson sampling;
Wang, Balle, Kasiviswanathan 2019 (arXiv 1808.00087) for sampling without replacement; the conversion of Canonne,
Kamath, Steinke 2020 (arXiv 2004.00010, proposition 12). Upper bounds for every delta, without a floor; both directions.

Convention. ``RdpAccountant(REPLACE_ONE)`` reads a noise multiplier as relative to the sensitivity 2C of replacement,
where ``PLDAccountant(REPLACE_ONE)`` reads it as relative to C. All events here are relative to C; under ``REPLACE_ONE``
this module halves every multiplier before it hands the event on.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from typing import Any

import attr
import dp_accounting
import numpy as np
from dp_accounting import dp_event, rdp
from dp_accounting.rdp import rdp_privacy_accountant as conversion
from typing_extensions import override

from accountants.answer import Bounds
from accountants.mixtures import Array, Composition, MixtureStep, composition
from accountants.protocol import Accountant, Question, UnsupportedEventError

NeighboringRelation = dp_accounting.NeighboringRelation

#: Orders from close to 1 (large epsilon) to 2048 (small epsilon). Nearer to 1 the conversion loses all digits.
ORDERS: tuple[float, ...] = (
    *(1 + x for x in np.geomspace(0.01, 1, 15)[:-1].tolist()),
    *np.arange(2.0, 11.0, 0.25).tolist(),
    *(float(order) for order in range(11, 64)),
    *(float(order) for order in np.unique(np.geomspace(64, 2048, 16).astype(int))),
)

#: An order whose divergence is so far above that of order 2 is of no use: -log of the smallest float64, and some.
_HOPELESS = 750.0

#: Up to this order the conversion by (order - 1) loses all digits.
_NEAREST_ORDER = 1.01
#: Relative round-off of the conversion's logarithms.
_ROUND_OFF = 1e-13

#: Distance of the trapezoidal rule's nodes in ``z``.
_SPACING = 0.1


class RdpAccountant(Accountant):
    """Certified upper bounds from Renyi divergences; any delta in (0, 1)."""

    name = "rdp"
    version = f"dp-accounting {importlib.metadata.version('dp-accounting')}"
    covers_replacement = True

    @override
    def bounds(self, question: Question) -> Bounds:
        orders, divergences = _divergences(question.event, question.relation)
        # A divergence below 0 is the library's round-off, of which it would make an epsilon or delta of 0: that order
        # is not used. One of 0 was too small for float64, unless nothing was released.
        if not isinstance(question.event, dp_accounting.NoOpDpEvent):
            divergences = [math.inf if value < 0 else max(value, math.ulp(0.0)) for value in divergences]
        convert = conversion.compute_epsilon if question.quantity == "epsilon" else _delta_of
        value, order = convert(orders, divergences, question.argument)
        upper = math.inf if math.isnan(value) else float(value)
        note = "the optimal order is the largest tried" if order == ORDERS[-1] else ""
        return Bounds(0.0, upper, estimate=upper, note=note)


def _delta_of(orders: Sequence[float], divergences: Sequence[float], epsilon: float) -> tuple[float, float]:
    """Return delta at ``epsilon`` and the order that gives it: Canonne et al. 2020 (arXiv 2004.00010), proposition 12.

    The library's own conversion takes ``1 - exp(-divergence)`` as a difference, which has no digits below 1e-16.

    Args:
        orders: at least one.
        divergences: one for each order; 0 only where nothing was released, which :meth:`RdpAccountant.bounds` sees to.
        epsilon: at which delta is wanted.
    """
    best, best_order = math.inf, orders[0]  # the least log delta, and its order
    for order, divergence in zip(orders, divergences, strict=True):
        # Two bounds hold, and the lower is taken. First: delta is at most the total variation, which any of the
        # divergences bounds (Bretagnolle and Huber). Of no divergence that is delta 0.
        by_total_variation = 0.5 * math.log(-math.expm1(-divergence)) if divergence > 0 else -math.inf
        log_delta = by_total_variation
        if order > _NEAREST_ORDER:  # second: the proposition
            by_proposition = (order - 1) * (divergence - epsilon + math.log1p(-1 / order)) - math.log(order)
            log_delta = min(log_delta, by_proposition)
        if log_delta < best:
            best, best_order = log_delta, order
    if best == -math.inf:
        return 0.0, best_order  # nothing was released
    # An upper bound is rounded up: the logarithm by its round-off, the result by one float64 (so it is never 0).
    log_delta = best + _ROUND_OFF * (1 + abs(best))
    delta = math.exp(min(log_delta, 0.0))  # no probability is above 1
    return math.nextafter(delta, 1.0), best_order


def _divergences(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> tuple[tuple[float, ...], list[float]]:
    """Return the orders, and the Renyi divergence at each in the worse direction.

    By our own quadrature where the event has a normal form, which is for adding and removing; else the library's.
    """
    if relation is NeighboringRelation.REPLACE_ONE:
        event = halve_noise(event)
    else:
        try:
            return ORDERS, mixture_divergences(composition(event))
        except UnsupportedEventError:
            pass  # no normal form: a composition of other events, or for the library
    if (own := _of_parts(event, relation)) is not None:
        return ORDERS, own
    accountant = rdp.RdpAccountant(ORDERS, relation)
    try:
        accountant.compose(event)
    except dp_accounting.UnsupportedEventError as error:
        raise UnsupportedEventError(f"rdp under {relation.name}: {error}") from error
    # The library has no public accessor for the divergences that it converts, and may leave orders out.
    return tuple(vars(accountant)["_orders"]), list(vars(accountant)["_rdp"])


def _of_parts(event: dp_accounting.DpEvent, relation: NeighboringRelation) -> list[float] | None:
    """Return Renyi divergences of an event that contains others, from theirs; ``None`` for a single mechanism.

    Compositions add them up. For the best of a random number of runs (Papernot and Steinke 2022, arXiv 2110.03620,
    theorems 2 and 6) the library's formula is used, on divergences of our own: its series for fractional orders may
    miss digits.
    """
    if relation is NeighboringRelation.REPLACE_ONE:
        return None  # noise is halved already: the inner events are the library's business
    if isinstance(event, dp_event.RepeatAndSelectDpEvent):
        orders, inner = _divergences(event.event, relation)
        select = vars(conversion)["_compute_rdp_repeat_and_select"]  # the library has no public name for it
        return [float(value) for value in select(orders, np.array(inner), event.mean, event.shape)]
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return [event.count * value for value in _divergences(event.event, relation)[1]]
    if isinstance(event, dp_accounting.ComposedDpEvent):
        parts = [_divergences(part, relation)[1] for part in event.events]
        return [math.fsum(values) for values in zip(*parts, strict=True)] or None
    return None


def renyi_epsilon(composed: Composition, delta: float) -> float:
    """Return the certified epsilon of a composition by Rényi DP, minimised over ``ORDERS``."""
    epsilon, _ = conversion.compute_epsilon(ORDERS, mixture_divergences(composed), delta)
    return float(epsilon)


def mixture_divergences(composed: Composition) -> list[float]:
    """Return Renyi divergences of a normal form: ``log E[exp((a - 1) loss)] / (a - 1)`` summed over steps.

    By the trapezoidal rule, whose error for these Gaussian integrands is below rounding at spacings of 0.1; a relative
    margin of 1e-11 and an absolute one of 1e-13 a step cover it. The library's series for fractional orders does not
    converge at small noise.

    Orders at which the divergence exceeds that of order 2 by more than 750 cannot be the best at any delta that float64
    holds. They are not integrated: the divergence of the largest shift alone bounds them (the convexity of Renyi
    divergence in its first argument, van Erven and Harremoes 2014, arXiv 1206.2459, theorem 13).
    """
    if composed.non_private:
        return [math.inf] * len(ORDERS)
    tables = [_LossTable(step) for step, _ in composed.phases]
    totals: list[float] = []
    at_two = math.inf  # the divergence of order 2, once it is known
    for order in ORDERS:  # increasing, and divergences with them
        if totals and totals[-1] > at_two + _HOPELESS:
            largest = math.fsum(count * step.shifts[-1] ** 2 for step, count in composed.phases)
            totals.append(order * largest / 2)
            continue
        sides = np.zeros(2)  # log moments of the directions remove and add
        for table, (_, count) in zip(tables, composed.phases, strict=True):
            sides += count * table.log_moments(order)
        totals.append(float(np.max(sides)) / (order - 1))
        at_two = totals[-1] if order == 2 else at_two
    return totals


class _LossTable:
    """One step's loss on a grid of ``z`` that is extended as larger orders ask for it."""

    def __init__(self, step: MixtureStep) -> None:
        self._step = step
        self._start, self._loss = 0, np.zeros(0)

    def log_moments(self, order: float) -> Array:
        """Return upper bounds on ``log E_P[e^(order loss)]`` (remove) and ``log E_P[e^(-(order - 1) loss)]`` (add)."""
        shifts = self._step.shifts
        if len(shifts) == 1:
            return np.full(2, order * (order - 1) * shifts[0] ** 2 / 2)
        # Both integrands have their mass within 14 of their means. That of remove is at most order times the largest
        # shift. That of add is near 0 if the loss is bounded below, else at least -(order - 1) times the largest shift.
        low = -14.0 - (order - 1) * (shifts[-1] if shifts[0] > 0 else 0.0)
        z, loss = self._between(math.floor(low / _SPACING), math.ceil((14.0 + order * shifts[-1]) / _SPACING))
        base = -z * z / 2 + math.log(_SPACING / math.sqrt(2 * math.pi))
        values: list[float] = []
        for logs in (base + order * loss, base - (order - 1) * loss):
            top = float(np.max(logs))
            value = top + math.log(float(np.sum(np.exp(logs - top))))
            values.append(max(value, 0.0) * (1 + 1e-11) + 1e-13)
        return np.array(values)

    def _between(self, first: int, last: int) -> tuple[Array, Array]:
        """Return ``z`` (0.1 times the index) and loss at indices [first, last); extend the table where it is short."""
        start, stop = self._start, self._start + len(self._loss)
        if first < start or last > stop:
            # By a quarter more than asked for: the next order asks for more.
            start = first + first // 4 if first < start else start
            stop = last + last // 4 if last > stop else stop
            self._start, self._loss = start, self._step.loss(_SPACING * np.arange(start, stop))
        part = slice(first - self._start, last - self._start)
        return _SPACING * np.arange(first, last), self._loss[part]


def halve_noise(event: dp_accounting.DpEvent) -> dp_accounting.DpEvent:
    """Return the same event with every noise multiplier halved: relative to 2C instead of C."""
    changes: dict[str, Any] = {}
    for name in attr.fields_dict(type(event)):
        value = getattr(event, name)
        if name == "noise_multiplier":
            changes[name] = value / 2
        elif isinstance(value, dp_accounting.DpEvent):
            changes[name] = halve_noise(value)
        elif name == "events":
            changes[name] = [halve_noise(part) for part in value]
    return attr.evolve(event, **changes)
