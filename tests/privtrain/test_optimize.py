"""``plan --optimize``: what is chosen keeps ε and compute, and follows a law that was fitted to measured trainings."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
from scipy import stats

from privtrain.commands import optimize as module
from privtrain.commands.optimize import can_be_banded, optimize, record_draws_of
from privtrain.commands.plan import PlanOptions, describe_plan
from privtrain.commands.plan_view import print_plan
from privtrain.config import validate
from privtrain.config.load import load_config
from privtrain.errors import ConfigError
from privtrain.job.advice import learning_rate_warnings, recommended_learning_rate
from privtrain.privacy import noise_law
from privtrain.privacy.noise_law import Point
from privtrain.privacy.plan import PrivacyPlan
from tests.conftest import write_config

NUM_USERS = 2000


@pytest.fixture
def few_choices(monkeypatch):
    monkeypatch.setattr(module, "_STEPS", (8, 64))
    monkeypatch.setattr(module, "BANDS", (1, 4))
    monkeypatch.setattr(module, "_RECORDS", (1,))


@pytest.fixture
def private_tree(tree):
    del tree["privacy"]["insecure_seed"]
    tree["privacy"] |= {"target_epsilon": 4.0, "noise_multiplier": None, "target_delta": 1e-5, "accountant": "tilted"}
    tree["privacy"] |= {"sampling_prob": 0.02, "expected_batch_size": 40, "num_steps": 32, "records_per_user": 2}
    return tree


def _best_of(tree, **values):
    config = validate(tree)
    return config, optimize(config, NUM_USERS, 10_000, record_draws_of(config.privacy), **values)


def test_the_best_plan_keeps_epsilon_and_compute(private_tree, few_choices, tmp_path):
    config, found = _best_of(private_tree)
    words = [f"{key}={json.dumps(value)}" for key, value in found.best.overrides(config).items()]
    changed = load_config(write_config(private_tree, tmp_path / "c.yaml"), words)
    plan = PrivacyPlan.build(changed.privacy, changed.training)
    assert plan.epsilon <= config.privacy.target_epsilon
    assert plan.noise_multiplier == pytest.approx(found.best.noise_multiplier, rel=1e-3)
    assert record_draws_of(changed.privacy) <= record_draws_of(config.privacy)
    for choice in found.frontier:
        assert choice.num_steps * choice.batch * choice.records_per_unit <= found.record_draws
        assert choice.batch * choice.num_bands <= NUM_USERS
    assert found.best.predicted_gain >= found.now.predicted_gain


def test_a_law_that_forgets_noise_is_seen(private_tree, few_choices, monkeypatch):
    """The mutant takes the most steps, whatever their noise."""
    _, right = _best_of(private_tree)
    law = dataclasses.replace(noise_law.fitted(), half_noise=1e9)
    monkeypatch.setattr(noise_law, "fitted", lambda: law)
    _, wrong = _best_of(private_tree)
    assert wrong.best.relative_noise >= right.best.relative_noise
    by_noise = [law.gain(Point(64, noise)) for noise in (0.1, 1.0, 10.0)]
    assert by_noise[0] == pytest.approx(by_noise[-1])  # what the next test would not accept


def test_gain_falls_with_noise_and_rises_with_steps():
    law = noise_law.fitted()
    gains = np.array([[law.gain(Point(steps, noise)) for noise in (0, 0.1, 1, 10)] for steps in (8, 32, 128)])
    assert (np.diff(gains, axis=1) < 0).all()
    assert (np.diff(gains, axis=0) > 0).all()
    rates = [law.learning_rate(Point(64, noise)) for noise in (0.1, 1, 10)]
    assert rates == sorted(rates, reverse=True)
    assert law.learning_rate(Point(256, 1.0)) < law.learning_rate(Point(16, 1.0))
    assert law.learning_rate(Point(64, 1.0, noise_kept=0.2)) > 1.3 * law.learning_rate(Point(64, 1.0))
    assert law.learning_rate(Point(64, 1.0, noise_kept=0.01)) == law.learning_rate(Point(64, 1.0, 1, 4, law.least_kept))


def test_noise_that_is_taken_out_later_harms_on_the_way():
    """Two plans at ε 1, measured: as much noise in the weights, and the one without bands won."""
    law = noise_law.fitted()
    independent, banded = Point(128, 0.41), Point(256, 0.42, noise_kept=0.12)
    assert law.gain(independent) > law.gain(banded)
    assert law.gain(dataclasses.replace(banded, noise_kept=1.0)) > law.gain(independent)


@pytest.mark.parametrize("bands", [1, 4, 8, 16, 32, 64])
def test_law_is_not_biased_towards_bands(bands):
    rows = [row for row in noise_law.table() if row.purpose in ("fit", "batch", "bands") and row.num_bands == bands]
    best, law = noise_law.best_of(rows), noise_law.fitted()
    scale = np.median([b.drop / law.gain(b.point) for b in noise_law.best_of(noise_law.table()) if b.drop > 0.2])
    off = [law.gain(b.point) * scale - b.drop for b in best]
    assert abs(np.mean(off)) < 0.1 * max(b.drop for b in best)


def test_law_agrees_with_the_trainings_it_was_fitted_to():
    rows = [row for row in noise_law.table() if row.purpose not in noise_law.JUDGES]
    best = noise_law.best_of(rows)
    law = noise_law.fitted()
    gains = [law.gain(b.point) for b in best]
    assert stats.spearmanr(gains, [b.drop for b in best])[0] > 0.95
    off = [math.log(law.learning_rate(b.point) / b.learning_rate) for b in best if b.drop > 0.2]
    assert np.median(np.abs(off)) < math.log(1.5)


def test_a_table_with_too_few_trainings_fits_no_law():
    with pytest.raises(ValueError, match="noise_law"):
        noise_law.fit(noise_law.table()[:8])


@pytest.mark.parametrize(("num_steps", "most"), [(32, 256), (1000, 1000)])
def test_steps_are_those_measured_or_no_more_than_now(private_tree, num_steps, most):
    """The law grows with the number of steps: without that limit it ends at a batch of one."""
    private_tree["privacy"] |= {"num_steps": num_steps}
    tried = [steps for steps, *_ in module._shapes(validate(private_tree), NUM_USERS, 8192)]
    assert max(tried) == most
    assert max(tried) <= max(noise_law.fitted().most_steps * 1.3, num_steps)


@pytest.mark.parametrize(
    "change",
    [
        {"clipping_style": "adaptive"},
        {"unit": "example", "user_accounting": "group", "records_per_user": 3},
    ],
)
def test_bands_are_not_offered_where_they_are_refused(private_tree, few_choices, change):
    private_tree["privacy"] |= change
    config = validate(private_tree)
    assert not can_be_banded(config)
    assert all(shape.num_bands == 1 for shape in module._shapes(config, NUM_USERS, 1000))


def test_bands_need_steps_of_more_noise_than_signal(private_tree, few_choices):
    """As in the measured trainings: with less noise in a step than signal, no bands gained more than any."""
    config = validate(private_tree)
    noisy, quiet = (optimize(config, NUM_USERS, num_trained, 1280) for num_trained in (10_000_000, 20))
    assert any(choice.num_bands > 1 for choice in noisy.frontier)
    assert all(choice.num_bands == 1 for choice in quiet.frontier)
    rows = [row for row in noise_law.table() if row.purpose == "grid" and row.num_steps <= 16]
    alone = {b.point.num_steps: b.drop for b in noise_law.best_of([row for row in rows if row.num_bands == 1])}
    banded = noise_law.best_of([row for row in rows if row.num_bands > 1])
    assert banded
    assert all(b.drop < alone[b.point.num_steps] for b in banded)


def test_optimize_refuses_what_it_cannot_calibrate(private_tree):
    private_tree["privacy"] |= {"target_epsilon": None, "noise_multiplier": 1.0}
    with pytest.raises(ConfigError, match=r"privacy\.target_epsilon"):
        _best_of(private_tree)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"optimize": False, "user_draws": 100.0}, "--optimize"),
        ({"optimize": True, "user_draws": 100.0, "hours": 1.0}, "one of the two"),
        ({"optimize": True, "hours": 1.0}, "--tokens-per-second"),
    ],
)
def test_a_budget_is_stated_in_full(options, problem):
    with pytest.raises(ConfigError, match=problem):
        PlanOptions(**options)


def test_the_frontier_is_shown_with_what_it_rests_on(private_tree, few_choices, tmp_path, capsys):
    path = write_config(private_tree, tmp_path / "c.yaml")
    hours = PlanOptions(num_users=NUM_USERS, prices=False, optimize=True, hours=0.01, tokens_per_second=3000.0)
    found = describe_plan(path, [], hours)
    json.dumps(found, allow_nan=False)
    assert found["optimum"]["record_draws"] == pytest.approx(0.01 * 3600 * 3000 / 24)
    print_plan(found)
    shown = capsys.readouterr().out
    assert "best" in shown
    assert "rests on: batch, steps and records" in shown


@pytest.mark.parametrize(("factor", "word"), [(1.0, ""), (20.0, "above"), (1 / 20, "below")])
def test_a_learning_rate_far_from_the_law_is_warned_about(private_tree, factor, word):
    config = validate(private_tree)
    plan = PrivacyPlan.build(config.privacy, config.training)
    rate = recommended_learning_rate(config, plan, 10_000)
    private_tree["training"]["learning_rate"] = rate * factor
    found = learning_rate_warnings(validate(private_tree), plan, 10_000)
    assert (word in "".join(found)) if word else not found


def test_a_large_model_keeps_its_own_learning_rate(private_tree, few_choices):
    """The law is of a narrow model: of a wide one it knows how the rate changes between plans, not the rate."""
    private_tree["training"]["learning_rate"] = 3e-4
    config = validate(private_tree)
    plan = PrivacyPlan.build(config.privacy, config.training)
    small, large = (optimize(config, NUM_USERS, n, record_draws_of(config.privacy)) for n in (10**6, 10**6 + 1))
    assert "below" in learning_rate_warnings(config, plan, 10**6)[0]
    assert learning_rate_warnings(config, plan, 10**6 + 1) == []
    assert large.now is not None
    assert small.now is not None
    assert large.now.learning_rate == 3e-4
    scale = 3e-4 / small.now.learning_rate
    assert large.best.learning_rate == pytest.approx(scale * small.best.learning_rate, rel=0.1)
    assert any("too many" in line for line in large.rests_on)
    assert not any("too many" in line for line in small.rests_on)


def test_a_rate_that_does_not_decay_is_half_of_one_that_does(private_tree):
    config = validate(private_tree)
    plan = PrivacyPlan.build(config.privacy, config.training)
    private_tree["training"]["schedule"] = "linear"
    ratio = recommended_learning_rate(validate(private_tree), plan, 10_000) / recommended_learning_rate(
        config, plan, 10_000
    )
    assert ratio == pytest.approx(2, rel=0.15)  # the noise of the run is not quite the same


def test_the_demo_has_a_learning_rate_that_fits_its_plan():
    """And the rate that it had before there was a law is warned about."""
    recipe = pathlib.Path(__file__).parents[2] / "launch" / "recipes" / "demo.yaml"
    config = load_config(recipe, ["privacy.accountant=tilted"])
    plan = PrivacyPlan.uncertified(config.privacy, config.training)
    assert learning_rate_warnings(config, plan, 230_400) == []
    old = config.training.model_copy(update={"learning_rate": 1e-3})
    assert "below" in learning_rate_warnings(config.model_copy(update={"training": old}), plan, 230_400)[0]
