"""The plan holds everything that the guarantee depends on, and nothing else."""

from __future__ import annotations

import copy
import math

import pytest

from privtrain.config import validate
from privtrain.privacy.plan import PrivacyPlan


def fingerprint(tree) -> str:
    return PrivacyPlan.build(validate(tree).privacy).fingerprint("data")


OTHER_VALUES = {
    "microbatch_size": 2,
    "packing": "lines",
    "microbatch_tokens": 4096,
    "reduce_once": True,
    "clipping_route": "one_unit",
    "gradient_checkpointing": True,
    "precision": "bf16",
    "num_threads": 2,
    "count_flops": True,
    "index_dir": "elsewhere",
    "checkpoint_interval_steps": 7,
    "num_checkpoints_kept": 5,
    "collective_timeout_seconds": 60,
    "heartbeat_timeout_seconds": 30,
}


def test_no_performance_key_changes_the_fingerprint(tree):
    before = fingerprint(tree)
    assert set(OTHER_VALUES) == set(type(validate(tree).performance).model_fields), "a new key needs a value here"
    for key, value in OTHER_VALUES.items():
        changed = copy.deepcopy(tree)
        changed["performance"][key] = value
        assert fingerprint(changed) == before, key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("records_per_user", 2),
        ("unit", "example"),
        ("sampling_prob", 0.41),
        ("expected_batch_size", 7),
        ("clipping_norm", 2.0),
        ("clipping_style", "automatic"),
        ("noise_multiplier", 1.1),
        ("target_delta", 1e-4),
        ("num_steps", 5),
        ("insecure_seed", 8),
    ],
)
def test_every_privacy_key_changes_the_fingerprint(tree, key, value):
    if key == "unit":
        del tree["privacy"]["records_per_user"]  # which is refused where ε is for one record
    before = fingerprint(tree)
    tree["privacy"][key] = value
    assert fingerprint(tree) != before


def test_data_change_run_fingerprint_not_published_one(tree):
    plan = PrivacyPlan.build(validate(tree).privacy)
    assert len({plan.fingerprint("data"), plan.fingerprint("other data"), plan.fingerprint()}) == 3


def test_calibration_meets_the_target_from_below(tree):
    tree["privacy"] |= {"target_epsilon": 3.0, "noise_multiplier": None}
    plan = PrivacyPlan.build(validate(tree).privacy)
    assert 2.9 < plan.epsilon <= 3.0


@pytest.mark.parametrize("accountant", ["tilted", "rdp"])
def test_other_certified_accountants_can_be_chosen(tree, accountant):
    plan = PrivacyPlan.build(validate(tree).privacy)
    tree["privacy"]["accountant"] = accountant
    other = PrivacyPlan.build(validate(tree).privacy)
    assert other.fingerprint() != plan.fingerprint()
    assert other.epsilon == pytest.approx(plan.epsilon, rel=1e-3 if accountant == "tilted" else 0.3)
    tree["privacy"] |= {"accountant": "tilted", "target_delta": 1e-14}
    assert PrivacyPlan.build(validate(tree).privacy).epsilon > plan.epsilon


def test_epsilon_shown_never_falls_below_what_was_spent(tree):
    plan = PrivacyPlan.build(validate(tree).privacy)
    curve = [plan.epsilon_after(n) for n in range(plan.num_steps + 3)]
    assert curve[0] == 0
    assert curve == sorted(curve)
    assert curve[plan.num_steps] == plan.epsilon


def test_plan_without_noise_or_with_seed_is_not_private(tree):
    tree["privacy"]["noise_multiplier"] = 0
    plan = PrivacyPlan.build(validate(tree).privacy)
    assert math.isinf(plan.epsilon)
    assert len(plan.not_private_reasons) == 2
