"""A guarantee for users from records that are sampled and clipped one by one: ``privacy.user_accounting``.

No user has more than k records in the training set (:mod:`privtrain.data.selection`), so adding or removing a user adds
or removes at most k records. Two ways to say what that costs:

* ``mixture``: each of the k records joins a step by a coin of its own, so a user moves the sum by a Binomial(k, q)
  number of clipped vectors; the worst case is a mixture of Gaussians (Charles et al. 2024, arXiv 2407.07737, theorem
  2), composed exactly. Needs the coins to be independent: Poisson sampling of records.
* ``group``: the guarantee (ε₁, δ₁) for one record is (k ε₁, δ₁ (e^(k ε₁) - 1)/(e^ε₁ - 1)) for k (Vadhan 2017, lemma
  2.2), with ε₁ chosen best. Knows nothing of the mechanism, and never gives less than ``mixture``.

Both are for a user added or removed with all records, under either neighbouring relation that Poisson sampling has.
"""

from __future__ import annotations

import math
from typing import Any

import accountants
from accountants.units import group_epsilon, group_event, record_delta_of
from privtrain.privacy.sampling import Poisson, Scheme, relation_of

#: Accountants that can certify, the first is the default: as tight as pld on mixtures, many times faster, and good at
#: the tiny δ that group privacy asks about.
ACCOUNTANTS = {"group": ("tilted", "rdp"), "mixture": ("tilted", "pld", "rdp")}

#: Improvements of a group ε that holds already; each takes one evaluation, and a handful settles four digits.
_NUM_REFINEMENTS = 6


def mixture_event(scheme: Scheme, noise_multiplier: float, num_steps: int, num_records: int) -> Any:
    """What a user with ``num_records`` records sees of ``num_steps`` steps."""
    assert isinstance(scheme, Poisson), scheme
    if num_records == 1:
        return scheme.event_of_steps(noise_multiplier, num_steps)
    return group_event(
        noise_multiplier=noise_multiplier,
        sampling_prob=scheme.sampling_prob,
        num_steps=num_steps,
        num_records=num_records,
    )


def group_noise(
    scheme: Scheme, num_steps: int, num_records: int, *, epsilon: float, delta: float, accountant: str, relation: str
) -> float:
    """The smallest noise multiplier with which black-box group privacy certifies (``epsilon``, ``delta``) for a user.

    Raises:
        CalibrationError: if there is none.
    """
    record_delta = record_delta_of(epsilon / num_records, delta, num_records)
    if record_delta == 0:
        raise accountants.CalibrationError(
            f"target_epsilon={epsilon:g} for {num_records} records needs a delta for one record that underflows; lower "
            "it, lower privacy.records_per_user, or use user_accounting: mixture"
        )
    return accountants.calibrate_noise(
        lambda noise: scheme.event_of_steps(noise, num_steps),
        target_epsilon=epsilon / num_records,
        target_delta=record_delta,
        accountant=accountant,
        relation=relation_of(relation),
    )


def group_answer(
    record_event: Any, delta: float, num_records: int, *, accountant: str, relation: str, known: float = math.inf
) -> accountants.PrivacyAnswer:
    """Black-box group privacy's ε of a user at ``delta``, by the record's whole curve.

    Args:
        record_event: what one record sees.
        delta: the user's.
        num_records: k.
        accountant: one of ``ACCOUNTANTS["group"]``.
        relation: the neighbouring relation.
        known: a user ε that is known to hold, to start from.

    Returns:
        A certified upper bound, infinite if no record ε below 400 works.
    """
    judge = accountants.get_accountant(accountant)
    of_record = judge.epsilon(record_event, delta, relation_of(relation))
    epsilon = known if math.isfinite(of_record.upper) else math.inf
    if math.isinf(epsilon) and math.isfinite(of_record.upper):
        of_group = group_epsilon(record_event, delta, num_records, judge, relation=relation_of(relation))
        epsilon = accountants.certified_upper(of_group, relation_of(relation))
    for _ in range(_NUM_REFINEMENTS):
        record_delta = 0.0 if math.isinf(epsilon) else record_delta_of(epsilon / num_records, delta, num_records)
        if record_delta == 0:
            break
        # If ε holds then so does this: less ε₁ at the δ₁ that ε asks for needs less of the user's δ.
        answer = judge.epsilon(record_event, record_delta, relation_of(relation))
        epsilon = min(epsilon, num_records * accountants.certified_upper(answer, relation_of(relation)))
    return accountants.PrivacyAnswer(
        "epsilon",
        0.0,
        epsilon,
        epsilon,
        accountants.BoundKind.CERTIFIED_UPPER,
        f"group({accountant})",
        of_record.version,
        relation=relation_of(relation).name,
        note=f"group of {num_records}",
    )


def group_holds(
    record_event: Any, epsilon: float, delta: float, num_records: int, *, accountant: str, relation: str
) -> bool:
    """Whether group privacy over ``num_records`` records certifies (``epsilon``, ``delta``) for a user."""
    if math.isinf(epsilon):
        return True
    record_delta = record_delta_of(epsilon / num_records, delta, num_records)
    if record_delta == 0:
        return False
    answer = accountants.get_accountant(accountant).epsilon(record_event, record_delta, relation_of(relation))
    # Round-off between machines moves the last digits of an answer.
    return num_records * accountants.certified_upper(answer, relation_of(relation)) <= epsilon * (1 + 1e-6)
