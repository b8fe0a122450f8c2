"""One gate decides which numbers a guarantee may be built on."""

import dataclasses
import itertools

import dp_accounting
import pytest
from accounting_cases import dp_sgd

import accountants
from accountants.answer import BoundKind, Direction, PrivacyAnswer
from accountants.methods.prv import PrvAccountant
from accountants.methods.tilted import TiltedAccountant
from accountants.units import group_epsilon

RELATIONS = [relation.name for relation in dp_accounting.NeighboringRelation]


@pytest.mark.parametrize(("kind", "direction", "relation"), itertools.product(BoundKind, Direction, RELATIONS))
def test_gate_passes_certified_upper_bounds_alone(kind, direction, relation):
    bound = {} if kind in (BoundKind.CERTIFIED_UPPER, BoundKind.CERTIFIED_LOWER) else {"upper": float("inf")}
    answer = PrivacyAnswer("epsilon", 0.0, 1.0, 2.0, BoundKind.CERTIFIED_UPPER, "x", "1", direction, relation)
    answer = dataclasses.replace(answer, kind=kind, **bound)
    for asked in dp_accounting.NeighboringRelation:
        good = kind is BoundKind.CERTIFIED_UPPER and direction is Direction.BOTH and relation == asked.name
        if good:
            assert accountants.certified_upper(answer, asked) == 2.0
        else:
            with pytest.raises(accountants.NotCertifiedError):
                accountants.certified_upper(answer, asked)


def test_a_group_is_not_certified_from_one_direction():
    with pytest.raises(accountants.NotCertifiedError, match="remove direction only"):
        group_epsilon(dp_sgd(0.01, 1.0, 50), 1e-6, 2, PrvAccountant())


def test_calibration_refuses_one_direction_and_estimates():
    for name in ("prv", "aea1", "gdp", "contour"):
        with pytest.raises(accountants.NotCertifiedError):
            accountants.calibrate_noise_multiplier(
                target_epsilon=2.0, target_delta=1e-5, sampling_prob=0.01, num_steps=100, accountant=name
            )


def test_group_answer_keeps_the_relation_asked():
    for relation in (
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE,
        dp_accounting.NeighboringRelation.REPLACE_SPECIAL,
    ):
        answer = group_epsilon(dp_sgd(0.01, 2.0, 50), 1e-6, 2, TiltedAccountant(), relation=relation)
        assert accountants.certified_upper(answer, relation) > 0
        assert answer.relation == relation.name
