"""Whose privacy: from records to users.

Three routes for a user with up to k records, all for add-or-remove-one of the user:

* **ULS** (user-level sampling; Charles et al. 2024, arXiv 2407.07737; User-wise DP-SGD of Chua et al. 2024, arXiv
  2406.14322): users are sampled and each user's gradient is clipped once. Account as DP-SGD with
  ``sampling_prob = cohort / users``: :func:`accountants.events.dp_sgd_event`, no conversion.
* **ELS** (example-level sampling): records are sampled one by one and clipped one by one. A user with k records
  contributes Binomial(k, q) clipped vectors to a step, each of norm at most C; the worst pair is the mixture of
  Gaussians with sensitivities 0..k and binomial weights (Charles et al., theorem 2). Exact: :func:`group_event`.
* **Black-box group privacy**: an (eps, delta)-DP release for one record is
  (k eps, delta (e^(k eps) - 1)/(e^eps - 1))-DP for k; never k delta. Optimised over the record curve:
  :func:`group_epsilon`.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math

import dp_accounting
from dp_accounting import dp_event

from accountants.answer import OWN_VERSION, BoundKind, PrivacyAnswer
from accountants.protocol import Accountant, check_delta
from accountants.validation import check_values, not_negative, probability, whole

NeighboringRelation = dp_accounting.NeighboringRelation

#: Largest variance of the number of a user's records in a step: a wider law has so many outcomes that to account for
#: them takes minutes.
_LARGEST_VARIANCE = 1e6
#: Binomial weights below the first are left out; the upper tail together counts the second at least. Both are relative
#: to the largest weight.
_SMALLEST_WEIGHT, _LEAST_TAIL = 1e-282, 1e-290
#: Steps of bisection to the smallest feasible record epsilon, in black-box conversions.
_NUM_BISECTIONS = 10
#: Least log delta of one record: float64 holds e^-690 with all digits, and not much less.
_SMALLEST_LOG_DELTA = -690.0


def group_event(
    *, noise_multiplier: float, sampling_prob: float, num_steps: int, num_records: int
) -> dp_accounting.DpEvent:
    """Return the event of DP-SGD on records for a user who owns ``num_records`` of them: a mixture of Gaussians (ELS).

    Args:
        noise_multiplier: noise standard deviation over the clipping norm of one record.
        sampling_prob: of one record and step.
        num_steps: the number of steps.
        num_records: k, the cap on a user's records; must not depend on the data.

    Raises:
        ValueError: if ``num_records`` is below 1 or another argument outside its range.
    """
    check_values(
        noise_multiplier=(not_negative, noise_multiplier),
        sampling_prob=(probability, sampling_prob),
        num_steps=(whole(0), num_steps),
        num_records=(whole(1), num_records),
    )
    if num_steps == 0 or sampling_prob == 0:
        return dp_accounting.NoOpDpEvent()
    if noise_multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    if sampling_prob == 1:
        # Nothing is mixed, and the library's mixtures need several parts.
        return dp_accounting.SelfComposedDpEvent(
            dp_accounting.GaussianDpEvent(noise_multiplier / num_records), num_steps
        )
    weights = _binomial(num_records, sampling_prob)
    step = dp_event.MixtureOfGaussiansDpEvent(noise_multiplier, [float(i) for i, _ in weights], [p for _, p in weights])
    return dp_accounting.SelfComposedDpEvent(step, num_steps)


def _binomial(count: int, prob: float) -> list[tuple[int, float]]:
    """Return binomial weights of sum one; those too small for float64 go to the largest outcome, which is safe.

    By ratios from the most likely outcome on, which keeps their relative error below 1e-15 an outcome.
    """
    if count == 1:
        return [(0, 1 - prob), (1, prob)]
    if count * prob * (1 - prob) > _LARGEST_VARIANCE:
        raise ValueError(
            f"num_records={count} at sampling_prob={prob:g} gives too many outcomes to account for; their number in a "
            f"step may have a variance of at most {_LARGEST_VARIANCE:g}"
        )
    odds = prob / (1 - prob)
    mode = min(count, int((count + 1) * prob))
    # From the most likely outcome outwards, by the ratio of neighbouring weights: no factorial overflows.
    weights = {mode: 1.0}
    for i in range(mode, 0, -1):
        weight = weights[i] * (i / ((count - i + 1) * odds))
        if weight < _SMALLEST_WEIGHT:
            break  # the division below gives the weights left out to larger outcomes, which is safe
        weights[i - 1] = weight
    for i in range(mode, count):
        ratio = (count - i) / (i + 1) * odds
        if ratio < 1 and weights[i] * ratio < _SMALLEST_WEIGHT:
            # All weights that are left lie below a geometric series; the largest outcome gets its sum.
            weights[count] = max(weights[i] * ratio / (1 - ratio), _LEAST_TAIL)
            break
        weights[i + 1] = weights[i] * ratio
    total = math.fsum(weights.values())
    return sorted((i, weight / total) for i, weight in weights.items() if weight > 0)


def _log_group_factor(epsilon: float, num_records: int) -> float:
    """Return log of ``(e^(k eps) - 1) / (e^eps - 1)``; its limit k at 0."""
    if epsilon == 0:
        return math.log(num_records)
    return (num_records - 1) * epsilon + math.log(math.expm1(-num_records * epsilon) / math.expm1(-epsilon))


def group_delta_of(epsilon: float, delta: float, num_records: int) -> tuple[float, float]:
    """Return the (epsilon, delta) of k records from that of one by black-box group privacy, rounded up.

    ``(k eps, delta (e^(k eps) - 1) / (e^eps - 1))`` (Vadhan 2017, lemma 2.2), with the limit k delta only at eps = 0.
    """
    check_values(epsilon=(not_negative, epsilon), delta=(probability, delta), num_records=(whole(1), num_records))
    if num_records == 1 or delta == 0:
        return num_records * epsilon, delta
    log_delta = math.log(delta) + _log_group_factor(epsilon, num_records)
    # Round-off of the logarithms, which exponentials make relative.
    log_delta += 1e-15 * (8 + abs(math.log(delta)) + num_records * epsilon)
    return num_records * epsilon, math.exp(min(log_delta, 0.0))


def record_delta_of(record_epsilon: float, delta: float, num_records: int) -> float:
    """Return ``delta (e^e1 - 1) / (e^(k e1) - 1)``: what one record may have of a user's delta, rounded down.

    0 where it is too small for float64 to hold with all its digits.
    """
    log_delta = math.log(delta) - _log_group_factor(record_epsilon, num_records)
    log_delta -= 1e-15 * (8 + abs(math.log(delta)) + num_records * record_epsilon)
    return math.exp(log_delta) if log_delta > _SMALLEST_LOG_DELTA else 0.0


def group_epsilon(
    event: dp_accounting.DpEvent,
    delta: float,
    num_records: int,
    accountant: Accountant,
    *,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> PrivacyAnswer:
    """Return black-box epsilon for k records, optimised over the record's curve.

    For a record epsilon e1 the record needs ``delta1 = delta (e^e1 - 1)/(e^(k e1) - 1)``. Every pair on the curve gives
    a valid bound; the smallest feasible e1 is found by bisection, and the returned value was itself checked.

    Args:
        event: the record-level event.
        delta: for the user.
        num_records: k.
        accountant: a certified one without a floor in delta: ``tilted``, not ``pld``.
        relation: of the record, and thereby of the user.

    Returns:
        A certified upper bound, infinite (with a note) if no record epsilon below 400 works.

    Raises:
        NotCertifiedError: if the accountant does not certify both directions of the relation.
    """
    check_delta(delta)
    check_values(num_records=(whole(1), num_records))

    def epsilon_at(record_delta: float) -> float:
        return accountant.epsilon(event, record_delta, relation).certified_upper(relation.name)

    def feasible(record_epsilon: float) -> bool:
        record_delta = record_delta_of(record_epsilon, delta, num_records)
        return record_delta > 0 and epsilon_at(record_delta) <= record_epsilon

    low, high = 0.0, max(epsilon_at(delta), 1e-6)
    while not feasible(high):
        low, high = high, 1.5 * high
        if high * num_records > 680 or high > 400:  # e^(k e1) is close to where float64 ends, at e^709
            note = "no record epsilon works: delta for one record would underflow"
            return group_answer(math.inf, accountant.name, note, relation)
    for _ in range(_NUM_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if feasible(middle) else (middle, high)
    return group_answer(num_records * high, accountant.name, f"group of {num_records}", relation)


def group_answer(
    value: float, method: str, note: str, relation: NeighboringRelation, version: str = OWN_VERSION
) -> PrivacyAnswer:
    """Return an epsilon of black-box group privacy as a certified upper bound by ``method`` on one record."""
    return PrivacyAnswer(
        "epsilon",
        0.0,
        value,
        value,
        BoundKind.CERTIFIED_UPPER,
        f"group({method})",
        version,
        relation=relation.name,
        note=note,
    )
