"""A guarantee for users from records that are sampled and clipped one by one."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from attacks.analysis import verdict
from attacks.analysis.verdict import Cap
from attacks.rundir import read_statement
from privtrain.config import validate
from privtrain.config.privacy import PrivacySection
from privtrain.data.corpus import load_corpus
from privtrain.errors import ConfigError, GuaranteeLost
from privtrain.job import contributions, reservation
from privtrain.job.train import train
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.sampling import Poisson, UnitSampler
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.user_level import USER_ACCOUNTING, Mixture, mixture_event
from privtrain.run.directory import RunDirectory
from tests.conftest import write_config
from tests.privtrain.models_for_tests import clipped_sum, invented_users, make_clipper, tiny_lora

pytestmark = pytest.mark.usefixtures("no_self_test")

METHODS = ("group", "mixture")


def section(**changes) -> PrivacySection:
    values = {
        "unit": "example",
        "records_per_user": 4,
        "sampling_prob": 0.05,
        "expected_batch_size": 6,
        "target_epsilon": 6.0,
        "target_delta": 1e-4,
        "num_steps": 60,
    }
    return PrivacySection(**{**values, **changes})


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_both_meet_target_and_mixture_needs_no_more_noise(k, epsilon):
    plans = {
        method: PrivacyPlan.build(section(records_per_user=most, target_epsilon=epsilon, user_accounting=method))
        for method, most in (("none", None), *((method, k) for method in METHODS))
    }
    for plan in plans.values():
        assert 0.98 * epsilon < plan.epsilon <= epsilon
    sigma = {method: plan.noise_multiplier for method, plan in plans.items()}
    if k == 1:
        assert sigma["mixture"] == pytest.approx(sigma["none"], abs=2e-4)
        assert sigma["group"] == pytest.approx(sigma["none"], rel=1e-3)
    else:
        assert sigma["none"] < sigma["mixture"] <= sigma["group"]


@pytest.mark.parametrize("method", METHODS)
def test_epsilon_grows_and_never_shows_less_than_spent(method):
    plan = PrivacyPlan.build(section(user_accounting=method, num_steps=12, sampling_prob=0.2))
    curve = [plan.epsilon_after(n) for n in range(plan.num_steps + 3)]
    assert curve[0] == 0
    assert curve == sorted(curve)
    assert curve[plan.num_steps] == plan.epsilon


@pytest.mark.parametrize("method", METHODS)
def test_noise_that_was_given_is_accounted_for_the_user(method):
    record = PrivacyPlan.build(section(target_epsilon=None, noise_multiplier=1.0, records_per_user=None))
    user = PrivacyPlan.build(section(target_epsilon=None, noise_multiplier=1.0, user_accounting=method))
    assert user.epsilon > 2 * record.epsilon
    assert user.unit_epsilon_after(60) == pytest.approx(record.epsilon, rel=1e-3)
    assert (record.guaranteed_unit, user.guaranteed_unit, user.unit) == ("example", "user", "example")
    assert len({record.fingerprint(), user.fingerprint()}) == 2


def test_group_privacy_holds_at_the_pair_that_it_states():
    """Lemma 2.2 of Vadhan 2017, checked forwards: the record's δ at ε/k, grown to the group, is within the user's δ."""
    import accountants

    plan = PrivacyPlan.build(section(user_accounting="group"))
    k, record_epsilon = 4, plan.epsilon / 4
    delta = accountants.delta(plan.record_event_of_steps(60), record_epsilon, accountant="tilted").upper
    grown = delta * math.expm1(k * record_epsilon) / math.expm1(record_epsilon)
    assert 0.9 * plan.delta < grown <= plan.delta * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("change", [{"records_per_user": None}, {"records_per_user": 0}, {"user_accounting": "other"}])
def test_a_plan_without_a_bound_on_users_is_not_rebuilt(method, change):
    body = PrivacyPlan.build(section(target_epsilon=None, noise_multiplier=1.0, user_accounting=method)).body()
    found = PrivacyPlan.from_body(body).user_accounting
    assert (type(found), found.records_per_user) == (USER_ACCOUNTING[method], 4)
    with pytest.raises(ValueError, match="no plan can be rebuilt"):
        PrivacyPlan.from_body(body | change)


@pytest.mark.parametrize("way", USER_ACCOUNTING.values())
def test_event_counts_the_records_of_ledger_and_registry(way):
    """Event, number of sampled units and guaranteed unit say one thing of each way."""
    k = 3
    found, scheme = way(k), Poisson(0.1)
    assert found.event(scheme, 1.2, 5) == mixture_event(scheme, 1.2, 5, found.num_sampled)
    assert (found.num_sampled, found.guaranteed_unit("example")) in ((1, "example"), (k, "user"))
    assert bool(found.how) == bool(found.assumption) == (found.num_sampled == k)


def test_noise_zero_is_said_to_be_no_privacy():
    for method in METHODS:
        plan = PrivacyPlan.build(section(target_epsilon=None, noise_multiplier=0, user_accounting=method))
        assert math.isinf(plan.epsilon)
        assert plan.not_private_reasons


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "user"}, "for privacy.unit: example"),
        ({"records_per_user": None}, "needs privacy.records_per_user"),
        (
            {"sampling": "shuffle", "sampling_prob": None, "steps_per_epoch": 4, "max_num_units": 99},
            "sampling: poisson",
        ),
        ({"user_accounting": "group", "accountant": "pld"}, "must be tilted or rdp"),
    ],
)
def test_what_does_not_fit_is_refused_by_key(tree, changes, message):
    del tree["privacy"]["records_per_user"]
    tree["privacy"] |= {"unit": "example", "records_per_user": 3, "user_accounting": "mixture"} | changes
    with pytest.raises(ConfigError, match=message):
        validate(tree)


def test_each_record_joins_by_a_coin_of_its_own():
    """What the mixture assumes: of a user's k records Binomial(k, q) join a step, whatever other records do."""
    k, prob, num_users, num_steps = 4, 0.3, 50, 400
    plan = PrivacyPlan.build(section(sampling_prob=prob, user_accounting="mixture"))
    sampler = UnitSampler(plan.scheme, plan.records_per_unit, SecretKey.insecure(3, "s"), [1] * (k * num_users))
    joined = np.zeros((num_steps, k * num_users))
    for step in range(num_steps):
        drawn = sampler.draw(step)
        assert all(d.record_indices == (0,) for d in drawn)
        joined[step, [d.unit for d in drawn]] = 1
    counts = joined.reshape(num_steps, num_users, k).sum(axis=2).ravel().astype(int)
    observed = np.bincount(counts, minlength=k + 1)
    assert stats.chisquare(observed, len(counts) * stats.binom(k, prob).pmf(range(k + 1))).pvalue > 1e-3
    together = (joined[:, :-1] * joined[:, 1:]).mean()
    assert together == pytest.approx(prob**2, abs=5 * prob / np.sqrt(joined.size))


@pytest.mark.parametrize("k", [1, 3])
def test_k_records_move_the_sum_by_at_most_k_norms(tiny_llama, k):
    model, layout = tiny_lora(tiny_llama)
    clipper = make_clipper(model, layout, clipping_norm := 0.05)
    others = [[record] for user in invented_users(4, most_records=2) for record in user]
    same = invented_users(1, most_records=1, seed=5)[0][0]
    with_user = clipped_sum(clipper, [*others, *([[same]] * k)], 3)
    moved = float((with_user - clipped_sum(clipper, others, 3)).norm())
    assert moved <= k * clipping_norm * (1 + 1e-4)
    assert moved > 0.999 * k * clipping_norm, "records that agree reach it: the mixture is not too pessimistic"


@pytest.fixture
def user_tree(tree):
    del tree["privacy"]["insecure_seed"]
    del tree["privacy"]["noise_multiplier"]
    tree["privacy"] |= {
        "unit": "example",
        "records_per_user": 3,
        "user_accounting": "mixture",
        "target_epsilon": 4.0,
        "sampling_prob": 0.1,
    }
    return tree


@pytest.mark.parametrize("method", METHODS)
def test_the_statement_says_user_and_how(user_tree, tmp_path, method, capsys):
    user_tree["privacy"]["user_accounting"] = method
    train(write_config(user_tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    statement = json.loads((run / "privacy.json").read_text())
    assert (statement["unit"], statement["mechanism"]["unit"]) == ("user", "example")
    assert statement["contribution_bound"] == {
        "records_per_unit_per_step": 1,
        "selection": "random",
        "records_per_user_in_training_set": 3,
    }
    told = statement["user_accounting"]
    assert (told["method"], told["records_per_user"], told["sampled_unit"]) == (method, 3, "example")
    assert told["epsilon_of_one_record"] < statement["epsilon"] <= 4.0
    assert "user, with at most 3 records in the training set" in (run / "adapter" / "README.md").read_text()
    assert "user, with at most 3 records" in capsys.readouterr().out
    found = read_statement(run)
    assert found.sampled_records_per_unit == 3
    assert verdict._mechanism(found)[-1] == 3, "the cap is read off the event of three records"
    if method == "mixture":
        _cap_is_that_of_all_records(found)
    _the_ledger_bounds_users(run, user_tree)


def _cap_is_that_of_all_records(found):
    cap = Cap.of(found)
    assert not cap.conversion
    assert cap.curve is not None
    assert cap.curve.source == "tilted", "pld takes many seconds a point of a mixture"
    wrong = Cap.of(found.model_copy(update={"mechanism": found.mechanism.model_copy(update={"unit": "user"})}))
    assert cap.curve.max_auroc() > wrong.curve.max_auroc(), "plain DP-SGD of the user would claim too much"
    assert cap.auroc(30) <= min(b.max_auroc() for b in (cap.bound, cap.curve)) + 0.05


def _the_ledger_bounds_users(run, tree):
    """The check before a release reads the ledger, not the selection."""
    corpus, plan = load_corpus(validate(tree).data), PrivacyPlan.build(validate(tree).privacy)
    contributions.check_contributed(RunDirectory(run), corpus, plan)
    joined = contributions.contributions_of(RunDirectory(run), corpus, plan)
    assert joined
    without = {user: texts for user, texts in corpus.records.items() if user != next(iter(joined))}
    with pytest.raises(GuaranteeLost, match="no user's"):
        contributions.check_contributed(RunDirectory(run), dataclasses.replace(corpus, records=without), plan)


def test_a_ledger_with_a_user_above_the_bound_is_not_released(user_tree, tmp_path):
    user_tree["privacy"] |= {"sampling_prob": 0.9, "target_epsilon": 50.0, "expected_batch_size": 30}
    train(write_config(user_tree, tmp_path / "c.yaml"))
    plan = PrivacyPlan.build(validate(user_tree).privacy)
    run, corpus = RunDirectory(tmp_path / "runs" / "tiny"), load_corpus(validate(user_tree).data)
    with pytest.raises(GuaranteeLost, match="allows 2"):
        contributions.check_contributed(run, corpus, dataclasses.replace(plan, user_accounting=Mixture(2)))


def test_the_registry_charges_the_user_for_the_mixture(user_tree, tmp_path):
    from accountants.mixtures import composition

    plan = PrivacyPlan.build(validate(user_tree).privacy)
    event = reservation._settings(plan).event()
    assert event == plan.event_of_steps(plan.num_steps)
    ((step, count),) = composition(event).phases
    assert (len(step.shifts), count) == (4, plan.num_steps)
    assert torch.tensor(step.shifts[-1]) == pytest.approx(3 / plan.noise_multiplier)
