"""Strategies of correlated noise: sensitivity by brute force, inverse, predicted error, and the plan."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pathlib

import dp_accounting
import hypothesis
import numpy as np
import pytest
from dp_accounting.pld import pld_privacy_accountant
from hypothesis import strategies as st

import privtrain
from privtrain.commands import plan as commands_plan
from privtrain.commands.plan import price_list
from privtrain.config import load_config, validate
from privtrain.config.training import TrainingSection
from privtrain.errors import ConfigError
from privtrain.privacy import banded
from privtrain.privacy.banded import (
    INDEPENDENT,
    Strategy,
    Workload,
    best_strategy,
    relative_error,
    square_root,
    tried_bands,
)
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.sampling import CyclicPoisson, Poisson

RECIPE = pathlib.Path(__file__).parents[2] / "launch" / "recipes" / "llama-3.1-8b-lora.yaml"

coefficients = st.integers(-6000, 6000).map(lambda n: n / 4096)
strategies = st.lists(coefficients, max_size=4).map(lambda rest: Strategy((1.0, *rest)))
workloads = st.builds(
    lambda n, momentum, decay, schedule: dataclasses.replace(
        Workload.of(n, TrainingSection(learning_rate=0.5, weight_decay=decay, schedule=schedule)), momentum=momentum
    ),
    st.integers(5, 12),
    st.sampled_from([0.0, 0.7]),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from(["constant", "cosine"]),
)


def patterns(num_steps: int, separation: int):
    """Every set of steps that are at least ``separation`` apart."""
    for size in range(1, num_steps + 1):
        for steps in itertools.combinations(range(num_steps), size):
            if all(b - a >= separation for a, b in itertools.pairwise(steps)):
                yield steps


def sensitivity_faults(strategy: Strategy, num_steps: int, separation: int, column_norm: float) -> list[str]:
    """Brute force over participations and the signs of one coordinate: the worst case of one unit in C S."""
    matrix, faults = strategy.matrix(num_steps), []
    rounds = -(-num_steps // separation)
    for steps in patterns(num_steps, separation):
        columns = matrix[:, steps]
        if (np.count_nonzero(columns, axis=1) > 1).any():
            faults.append("two steps of a unit move one row")
        # All directions in one line, with either sign, are the worst: rows that two steps share add up or cancel.
        signs = np.array(list(itertools.product([1], *[[1, -1]] * (len(steps) - 1)))).T
        worst = float(np.linalg.norm(columns @ signs, axis=0).max())
        if worst > math.sqrt(len(steps)) * column_norm * (1 + 1e-12):
            faults.append("the sum over a unit's steps is above the bound of its rounds")
        assert len(steps) <= rounds
    if column_norm > float(np.linalg.norm(matrix, axis=0).max()) * (1 + 1e-12):
        faults.append("the bound is not attained")
    return faults


@hypothesis.given(strategy=strategies, num_steps=st.integers(5, 9))
@hypothesis.settings(max_examples=40)
def test_sensitivity_is_the_column_norm_by_brute_force(strategy, num_steps):
    assert sensitivity_faults(strategy, num_steps, strategy.num_bands, strategy.column_norm) == []


MUTANTS = {
    "the last band is left out": lambda s: (s.num_bands, float(np.linalg.norm(s.coefficients[:-1]))),
    "the diagonal alone": lambda s: (s.num_bands, 1.0),
    "the sum in place of the norm": lambda s: (s.num_bands, float(np.abs(s.coefficients).sum())),
    "a group too few": lambda s: (s.num_bands - 1, s.column_norm),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_sensitivity_that_is_wrong_is_found(mutant):
    strategy = Strategy.rounded(square_root(3))
    separation, norm = MUTANTS[mutant](strategy)
    assert sensitivity_faults(strategy, 7, separation, norm)


@hypothesis.given(strategy=strategies, num_steps=st.integers(1, 12))
def test_strategy_times_its_inverse_is_the_identity(strategy, num_steps):
    inverse = banded._toeplitz(strategy.inverse_column(num_steps))
    size = max(1.0, float(np.abs(inverse).max()))
    np.testing.assert_allclose(strategy.matrix(num_steps) @ inverse, np.eye(num_steps), atol=1e-12 * size)


@hypothesis.given(strategy=strategies, workload=workloads)
def test_error_is_that_of_the_matrices(strategy, workload):
    """|A C⁻¹|_F / √T with a dense inverse, and A applied to noise as the optimizer would."""
    size = workload.num_steps
    whole = workload.matrix() @ np.linalg.inv(strategy.matrix(size))
    assert strategy.error(workload) == pytest.approx(np.linalg.norm(whole) / math.sqrt(size), rel=1e-9)
    steps_alone = np.linalg.norm(np.linalg.inv(strategy.matrix(size))) / math.sqrt(size)
    independent = np.linalg.norm(workload.matrix()) / math.sqrt(size)
    kept = np.linalg.norm(whole) / math.sqrt(size) / steps_alone / independent
    assert strategy.noise_kept(workload) == pytest.approx(kept, rel=1e-9)
    noise, velocity, weights = np.random.default_rng(0).standard_normal(size), 0.0, 0.0
    for t, step in enumerate(workload.step_sizes):
        velocity = workload.momentum * velocity + (1 - workload.momentum) * noise[t]
        weights = (1 - workload.decay * step) * weights + step * velocity
    assert (workload.matrix() @ noise)[-1] == pytest.approx(weights, abs=1e-12)


@hypothesis.given(strategy=strategies.filter(lambda s: s.num_bands > 1), workload=workloads)
@hypothesis.settings(max_examples=20)
def test_slope_of_the_loss_is_that_of_differences(strategy, workload):
    free, form = np.array(strategy.coefficients[1:]), workload.form
    value, slope = banded._loss(free, form)
    assert math.exp(value / 2) == pytest.approx(relative_error(strategy, workload), rel=1e-9)
    for k, move in enumerate(1e-6 * np.eye(len(free))):
        difference = (banded._loss(free + move, form)[0] - banded._loss(free - move, form)[0]) / 2e-6
        assert slope[k] == pytest.approx(difference, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("training", [None, TrainingSection(schedule="cosine")], ids=["sums", "cosine"])
def test_best_strategy_beats_every_square_root(training):
    workload = Workload.of(120, training)
    for num_bands in (2, 5, 12):
        best = best_strategy(num_bands, workload)
        roots = [Strategy.rounded(square_root(num_bands, a)) for a in (1.0, 0.97, 0.9, 0.7, 0.4)]
        assert best.num_bands == num_bands
        assert relative_error(best, workload) < min(relative_error(root, workload) for root in roots)
        assert np.abs(banded._loss(np.array(best.coefficients[1:]), workload.form)[1]).max() < 1e-2


def test_strategy_refuses_what_is_no_exact_matrix():
    for bad in ((), (2.0,), (1.0, 1 / 3), (1.0, 8.0), (1.0, math.nan), (1, 0.5), [1.0, 0.5], (1.0,) * 129):
        with pytest.raises(ValueError, match="coefficients"):
            Strategy(bad)  # pyright: ignore[reportArgumentType]


def test_tried_bands_divide_the_steps_and_fit_the_groups():
    assert tried_bands(1500, 0.005) == [1, 2, 4, 6, 15, 30, 60]
    assert tried_bands(40, 0.06) == [1, 2, 4, 8, 10]
    assert tried_bands(7919, 0.01) == [1]
    assert tried_bands(64, 0.9) == [1]


@pytest.fixture
def banded_tree(tree):
    tree["privacy"] |= {"noise": "banded", "target_epsilon": 4.0, "target_delta": 1e-6, "num_steps": 120}
    tree["privacy"] |= {"noise_multiplier": None, "sampling_prob": 0.01, "expected_batch_size": 200}
    tree["privacy"] |= {"accountant": "tilted"}
    return tree


def built(tree) -> PrivacyPlan:
    config = validate(tree)
    return PrivacyPlan.build(config.privacy, config.training)


def strategy_of(plan: PrivacyPlan) -> Strategy:
    assert plan.strategy is not None
    return plan.strategy


@pytest.mark.parametrize("num_bands", [1, 8])
def test_epsilon_is_that_of_an_independent_computation(banded_tree, num_bands):
    """⌈T/b⌉ Poisson(b·q) Gaussians, by dp-accounting's own accountant."""
    banded_tree["privacy"] |= {"num_bands": num_bands}
    plan = built(banded_tree)
    gaussian = dp_accounting.GaussianDpEvent(plan.noise_multiplier)
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(num_bands * 0.01, gaussian), 120 // num_bands
    )
    accountant = pld_privacy_accountant.PLDAccountant(value_discretization_interval=1e-4)
    assert plan.epsilon == pytest.approx(accountant.compose(event).get_epsilon(1e-6), rel=2e-3)
    sensitivity = strategy_of(plan).column_norm * plan.clipping_norm * (1 + 1e-5)
    assert plan.noise_stddev == pytest.approx(plan.noise_multiplier * sensitivity, rel=1e-12)
    assert plan.epsilon_after(1) == plan.epsilon_after(num_bands) < plan.epsilon, "a round counts whole"


def test_auto_takes_the_best_number_of_bands(banded_tree):
    plan = built(banded_tree)
    training, found = validate(banded_tree).training, {}
    for num_bands in tried_bands(120, 0.01):
        banded_tree["privacy"]["num_bands"] = num_bands
        found[num_bands] = built(banded_tree).noise_of_run(training)
    assert plan.noise_of_run(training) <= min(found.values()) * (1 + 1e-3)
    assert strategy_of(plan).num_bands > 1
    few = banded_tree["privacy"] | {"num_bands": "auto", "num_steps": 4, "sampling_prob": 0.25, "target_epsilon": 0.2}
    alone = built(banded_tree | {"privacy": few})
    assert alone.strategy == INDEPENDENT
    plain = {k: v for k, v in few.items() if k not in ("noise", "num_bands")}
    same = built(banded_tree | {"privacy": plain})
    assert isinstance(same.scheme, Poisson)
    assert (alone.epsilon, alone.noise_stddev) == (same.epsilon, same.noise_stddev), "one band is plain DP-SGD"


def round_multiplier(plan: PrivacyPlan, gradient_noise: float) -> float:
    """Brute force: noise multiplier of all that a unit moves in a round, gradient rows and auxiliary sums.

    Args:
        plan: with correlated noise.
        gradient_noise: standard deviation of the fresh noise over the clipping norm.
    """
    size = strategy_of(plan).num_bands
    num_sums = len(plan.auxiliary_sums)
    whole = np.zeros((size * (1 + num_sums), size * (1 + num_sums)))
    whole[:size, :size] = strategy_of(plan).matrix(size) / gradient_noise
    for i, one in enumerate(plan.auxiliary_sums, start=1):
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = np.eye(size) * (0.5 / one.noise)
    moved = [whole[:, step::size].sum(axis=1) for step in range(size)]  # by a unit that joins this step
    return 1 / max(float(np.linalg.norm(column)) for column in moved)


@pytest.mark.parametrize("noise", [None, 2.5])
def test_metrics_and_gradient_are_the_accounted_gaussian(banded_tree, noise):
    plain = built(banded_tree | {"privacy": banded_tree["privacy"] | {"num_bands": 8}})
    banded_tree["privacy"] |= {"num_bands": 8, "noised_metrics": {"noise": noise}}
    plan = built(banded_tree)
    assert (plan.noise_multiplier, plan.epsilon, plan.event_of_steps(120)) == (
        plain.noise_multiplier,
        plain.epsilon,
        plain.event_of_steps(120),
    )
    assert round_multiplier(plan, plan.fresh_noise_multiplier) == pytest.approx(plan.noise_multiplier, rel=1e-9)
    assert PrivacyPlan.from_body(plan.body()) == plan
    mutant = plan.noise_multiplier * plan.column_norm  # the gradient's noise without room for the sums
    assert round_multiplier(plan, mutant) < plan.noise_multiplier * (1 - 1e-4)


def test_bands_that_leave_no_room_for_metrics_are_not_chosen(banded_tree):
    """More bands need a larger noise multiplier, which metrics of little noise do not have."""
    free = built(banded_tree | {"privacy": banded_tree["privacy"] | {"noised_metrics": {}}})
    few = banded_tree["privacy"] | {"num_bands": 1}
    noise = 0.55 * built(banded_tree | {"privacy": few}).noise_multiplier
    banded_tree["privacy"]["noised_metrics"] = {"noise": noise, "release": ["loss"]}
    plan = built(banded_tree)
    assert noise < free.noise_multiplier / 2, "what is best without that limit has no room"
    assert plan.has_room
    assert strategy_of(plan).num_bands < strategy_of(free).num_bands
    banded_tree["privacy"]["num_bands"] = strategy_of(free).num_bands
    with pytest.raises(ConfigError, match=r"privacy.noised_metrics.noise: given .* must exceed half"):
        built(banded_tree)


def test_plan_of_the_api_is_the_runs(banded_tree):
    """The strategy is chosen for the optimizer's settings; without them it would be another."""
    banded_tree["privacy"] |= {"num_bands": 8}
    banded_tree["training"] |= {"schedule": "cosine", "weight_decay": 0.5, "learning_rate": 0.5}
    shown = privtrain.plan(banded_tree)
    assert shown.body() == built(banded_tree).body()
    assert strategy_of(shown) != strategy_of(PrivacyPlan.build(validate(banded_tree).privacy))


def test_recipe_of_8b_has_at_most_60_percent_of_the_noise():
    """Issue 20, 2: at equal certified ε, for sums over steps and for the recipe's own optimizer."""
    override = "privacy.accountant=tilted"
    config, correlated = load_config(RECIPE, [override]), load_config(RECIPE, [override, "privacy.noise=banded"])
    plain = PrivacyPlan.build(config.privacy)
    assert PrivacyPlan.build(correlated.privacy).noise_of_run() <= 0.55 * plain.noise_of_run()
    plan = PrivacyPlan.build(correlated.privacy, correlated.training)
    assert plan.noise_of_run(config.training) <= 0.6 * plain.noise_of_run(config.training)
    assert max(plan.epsilon, plain.epsilon) <= 4 < plain.epsilon * 1.001


def test_plan_is_rebuilt_from_body_false_one_refused(banded_tree):
    plan = built(banded_tree)
    assert PrivacyPlan.from_body(plan.body()) == plan
    for change in (
        {"strategy": None},
        {"strategy": {"coefficients": [1.0, 0.5]}},
        {"strategy": {"coefficients": [0.5] * strategy_of(plan).num_bands}},
        {"scheme": plan.body()["scheme"] | {"num_bands": 2}},
        {"scheme": Poisson(0.01).parameters()},
        {"clipping_style": "adaptive"},
    ):
        with pytest.raises(ValueError, match="it"):
            PrivacyPlan.from_body(plan.body() | change)
    with pytest.raises(ValueError, match="do not go together"):
        dataclasses.replace(plan, scheme=CyclicPoisson(0.01, strategy_of(plan).num_bands + 1))
    other = Strategy((*strategy_of(plan).coefficients[:-1], 0.25))
    assert dataclasses.replace(plan, strategy=other).fingerprint() != plan.fingerprint()


FAULTS = {
    "scheme": ({"sampling": "poisson", "num_bands": None}, "noise: banded needs privacy.sampling: cyclic_poisson"),
    "independent": (
        {"noise": "independent", "sampling": "cyclic_poisson", "num_bands": 2},
        "needs privacy.noise: banded",
    ),
    "steps": ({"num_bands": 7}, "num_steps=120 must be a multiple of privacy.num_bands=7"),
    "groups": ({"num_bands": 120, "sampling_prob": 0.01}, "num_bands [*] sampling_prob = 1.2 a step; at most 1"),
    "no noise": ({"noise_multiplier": 0, "target_epsilon": None, "num_bands": 2}, "needs noise"),
    "auto": ({"noise_multiplier": 1, "target_epsilon": None}, "num_bands: auto needs privacy.target_epsilon"),
    "adaptive": ({"clipping_style": "adaptive"}, "needs one clipping norm for all steps"),
    "not used": ({"noise": "independent", "num_bands": 2}, "num_bands is not used by privacy.sampling=poisson"),
    "user accounting": (
        {"unit": "example", "records_per_user": 3, "user_accounting": "mixture"},
        "needs privacy.sampling: poisson",
    ),
    "none": ({"num_bands": 0}, "num_bands"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_banded_noise_are_named(banded_tree, case):
    changes, message = FAULTS[case]
    banded_tree["privacy"] |= changes
    with pytest.raises(ConfigError, match=message):
        validate(banded_tree)


def test_noised_sums_are_not_kept_of_banded_noise(banded_tree):
    with pytest.raises(ConfigError, match=r"audit.keep_noised_sums scores steps whose noise is independent"):
        validate(banded_tree | {"audit": {"keep_noised_sums": True}})


def test_prices_of_bands_are_certified_plans(banded_tree, monkeypatch):
    changes = commands_plan._changes
    monkeypatch.setattr(
        commands_plan,
        "_changes",
        lambda *given: {change: values for change, values in changes(*given).items() if "num_bands" in values},
    )
    del banded_tree["privacy"]["noise"]
    config = validate(banded_tree)
    plan = PrivacyPlan.build(config.privacy, config.training)
    prices = {price.change: price for price in price_list(config.privacy, plan, config.training)}
    rows = {change: price for change, price in prices.items() if "bands" in change}
    assert list(rows) == [
        "noise of 4 bands, same ε and compute",
        "noise of 15 bands, same ε and compute",
        "noise of 60 bands, same ε and compute",
    ]
    assert all(price.epsilon <= plan.epsilon for price in rows.values())
    assert min(price.relative_noise_of_run for price in rows.values()) < 0.7
    banded_tree["privacy"] |= {"noise": "banded", "num_bands": 15}
    config = validate(banded_tree)
    plan = PrivacyPlan.build(config.privacy, config.training)
    back = {p.change: p for p in price_list(config.privacy, plan, config.training)}[
        "independent noise, same ε and compute"
    ]
    assert back.relative_noise_of_run == pytest.approx(
        1 / rows["noise of 15 bands, same ε and compute"].relative_noise_of_run, rel=2e-3
    )
