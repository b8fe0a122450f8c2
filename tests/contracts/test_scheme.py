"""Each sampling scheme draws what its event says, and is accounted by that event alone."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
from typing import get_args

import dp_accounting
import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

import accountants
from accountants.events import RandomAllocationDpEvent, ShuffledBatchesDpEvent
from privtrain.config import validate
from privtrain.config.schemes import (
    SCHEME_RULES,
    USER_ACCOUNTING_RULES,
    Relation,
    SchemeName,
    UserAccountingName,
)
from privtrain.errors import ConfigError
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.sampling import (
    RELATIONS,
    SCHEMES,
    CyclicPoisson,
    Poisson,
    RandomAllocation,
    Shuffle,
    TruncatedPoisson,
    check_step_size,
    scheme_from_statement,
)
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.user_level import USER_ACCOUNTING
from privtrain.run.statement import Sampling
from tests.privtrain.test_sampling import sampler_of

KEY = SecretKey.insecure(0, "schemes")
EXAMPLES = [
    Poisson(0.3),
    CyclicPoisson(0.2, 4),
    TruncatedPoisson(0.3, 9, 30),
    RandomAllocation(5, 2),
    RandomAllocation(6),
    Shuffle(5, 30),
]
NAMES = [f"{scheme.name}-{scheme.period}" for scheme in EXAMPLES]

PRIVACY = {
    "poisson": {"sampling_prob": 0.4},
    "cyclic_poisson": {"sampling_prob": 0.4, "noise": "banded", "num_bands": 2},
    "truncated_poisson": {
        "sampling_prob": 0.4,
        "max_batch_size": 20,
        "max_num_units": 24,
        "neighboring_relation": "zero_out",
    },
    "random_allocation": {"steps_per_epoch": 2},
    "shuffle": {"steps_per_epoch": 2, "max_num_units": 24, "neighboring_relation": "zero_out"},
}


def plan_of(tree, name, **changes) -> PrivacyPlan:
    privacy = {k: v for k, v in tree["privacy"].items() if k != "sampling_prob"}
    tree["privacy"] = privacy | {"sampling": name} | PRIVACY[name] | changes
    return PrivacyPlan.build(validate(tree).privacy)


def test_schemes_have_the_names_and_keys_of_their_rules():
    assert set(SCHEME_RULES) == set(SCHEMES) == set(get_args(SchemeName))
    assert set(RELATIONS) == set(get_args(Relation))
    assert set(USER_ACCOUNTING_RULES) == set(USER_ACCOUNTING) == set(get_args(UserAccountingName))
    for name, rules in SCHEME_RULES.items():
        fields = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(SCHEMES[name])}
        assert fields == {key: True for key in rules.needs} | {key: False for key in rules.takes}


def test_the_event_has_the_constants_that_the_draw_has():
    poisson, cyclic, truncated, allocation, _, shuffle = (scheme.event(1.5, 3) for scheme in EXAMPLES)
    gaussian = dp_accounting.GaussianDpEvent(1.5)
    assert poisson == dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(0.3, gaussian), 3)
    assert cyclic == dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(0.8, gaussian), 3)
    inner = dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(30, 0.3, 9, 1.5)
    assert truncated == dp_accounting.SelfComposedDpEvent(inner, 3)
    assert allocation == RandomAllocationDpEvent(1.5, num_steps=5, num_selected=2, num_epochs=3)
    assert shuffle == ShuffledBatchesDpEvent(1.5, num_batches=5, num_epochs=3)


@pytest.mark.parametrize("scheme", EXAMPLES, ids=NAMES)
@hypothesis.given(num_units=st.integers(0, 29), epoch=st.integers(0, 50))
def test_one_more_unit_moves_nobody_else(scheme, num_units, epoch):
    """The neighbouring relation, exactly: with one unit more, the others are drawn as before."""
    fewer, more = (scheme.epoch(KEY, epoch, n) for n in (num_units, num_units + 1))
    assert len(fewer) == len(more) == scheme.period
    for before, after in zip(fewer, more, strict=True):
        assert before.tolist() == [unit for unit in after.tolist() if unit != num_units]
        assert before.tolist() == sorted(set(before.tolist()))


@hypothesis.given(epoch=st.integers(0, 99), steps=st.integers(1, 9), data=st.data(), num_units=st.integers(0, 12))
def test_allocation_gives_a_unit_its_number_of_distinct_steps(epoch, steps, data, num_units):
    scheme = RandomAllocation(steps, data.draw(st.integers(1, steps)))
    counts = np.zeros(num_units, int)
    for members in scheme.epoch(KEY, epoch, num_units):
        counts[members] += 1  # members are distinct, so a unit counts once a step
    assert (counts == scheme.steps_per_unit).all()


def test_allocation_chooses_subsets_evenly_for_each_unit_alone():
    subsets = np.zeros((200_000, 5), dtype=bool)
    for step, members in enumerate(RandomAllocation(5, 2).epoch(KEY, 0, len(subsets))):
        subsets[members, step] = True
    codes = subsets @ (1 << np.arange(5))
    kinds = [sum(1 << i for i in pair) for pair in itertools.combinations(range(5), 2)]
    counts = [int(np.count_nonzero(codes == kind)) for kind in kinds]
    assert sum(counts) == len(codes)
    assert stats.chisquare(counts).pvalue > 1e-3
    index = np.searchsorted(np.sort(kinds), codes)
    joint = np.bincount(index[::2] * 10 + index[1::2], minlength=100)
    assert stats.chisquare(joint).pvalue > 1e-3
    again = np.zeros_like(subsets)
    for step, members in enumerate(RandomAllocation(5, 2).epoch(KEY, 1, len(subsets))):
        again[members, step] = True
    both = index * 10 + np.searchsorted(np.sort(kinds), again @ (1 << np.arange(5)))
    assert stats.chisquare(np.bincount(both, minlength=100)).pvalue > 1e-3, "epochs are independent"


@hypothesis.given(num_bands=st.integers(1, 9), num_units=st.integers(0, 40), seed=st.integers(0, 99))
def test_cyclic_poisson_steps_of_a_unit_are_num_bands_apart(num_bands, num_units, seed):
    scheme, key = CyclicPoisson(1 / num_bands, num_bands), SecretKey.insecure(seed, "cyclic")
    steps = [members for epoch in range(3) for members in scheme.epoch(key, epoch, num_units)]
    for unit in range(num_units):
        joined = [step for step, members in enumerate(steps) if unit in members]
        assert np.diff(joined).tolist() == [num_bands] * 2, "of probability 1 in its group: every round, one group"


def test_cyclic_poisson_law_and_independent_groups():
    scheme, num_units = CyclicPoisson(0.15, 4), 100_000
    groups = np.stack([np.isin(np.arange(num_units), m) for m in CyclicPoisson(0.25, 4).epoch(KEY, 0, num_units)])
    assert (groups.sum(axis=0) == 1).all()
    group = groups.argmax(axis=0)
    assert stats.chisquare(np.bincount(group, minlength=4)).pvalue > 1e-3
    assert stats.chisquare(np.bincount(4 * group[::2] + group[1::2], minlength=16)).pvalue > 1e-3
    first, second = (
        sum(np.isin(np.arange(num_units), members) for members in scheme.epoch(KEY, epoch, num_units))
        for epoch in (0, 1)
    )
    counts = np.bincount(2 * first + second, minlength=4)
    law = np.array([0.4 * 0.4, 0.4 * 0.6, 0.6 * 0.4, 0.6 * 0.6])
    assert stats.chisquare(counts, law * num_units).pvalue > 1e-3, "coins of rounds are independent"
    for step, members in enumerate(scheme.epoch(KEY, 5, num_units)):
        assert set(group[members]) == {step}, "the same group in every round of a key"


def test_shuffling_gives_a_unit_one_uniform_step_in_even_batches():
    positions = np.zeros(5)
    for epoch in range(2000):
        batches = Shuffle(5, 33).epoch(KEY, epoch, 33)
        assert sorted(np.concatenate(batches).tolist()) == list(range(33))
        assert {len(batch) for batch in batches} <= {6, 7}
        positions[[i for i, batch in enumerate(batches) if 4 in batch]] += 1
    assert stats.chisquare(positions, 2000 * np.array([7, 7, 7, 6, 6]) / 33).pvalue > 1e-3


def test_truncated_poisson_has_its_law():
    """Batch sizes are a binomial cut at the largest batch; a unit's chance is its fair share of them."""
    scheme = TruncatedPoisson(0.3, 9, 30)
    batches = [scheme.epoch(KEY, epoch, 30)[0] for epoch in range(20_000)]
    sizes = np.bincount([len(batch) for batch in batches], minlength=10)
    assert len(sizes) == 10
    law = stats.binom(30, 0.3).pmf(np.arange(10))
    law[9] = stats.binom(30, 0.3).sf(8)
    few = law * len(batches) < 5
    observed = np.append(sizes[~few], sizes[few].sum())
    assert stats.chisquare(observed, len(batches) * np.append(law[~few], law[few].sum())).pvalue > 1e-3
    chance = float(law @ np.arange(10)) / 30
    joined = sum(7 in batch for batch in batches)
    assert stats.binomtest(joined, len(batches), chance).pvalue > 1e-3
    # Among full batches the displaced are uniform too.
    full = np.bincount(np.concatenate([b for b in batches if len(b) == 9]), minlength=30)
    assert stats.chisquare(full).pvalue > 1e-3


@pytest.mark.parametrize("name", PRIVACY)
def test_draws_do_not_depend_on_what_was_drawn_before(tree, name):
    """A resumed run, and every rank of any world, draws the same; a generation begins with a whole epoch."""
    plan, sizes = plan_of(tree, name), [3] * 20
    forward = [sampler_of(plan, KEY, sizes).draw(step) for step in range(4)]
    sampler = sampler_of(plan, KEY, sizes)
    assert [sampler.draw(step) for step in (3, 0, 2, 1)] == [forward[step] for step in (3, 0, 2, 1)]
    other = sampler_of(plan, SecretKey.insecure(1, "schemes"), sizes)
    assert [other.draw(step) for step in range(4)] != forward
    later = sampler_of(plan, KEY, sizes, first_step=3)
    assert [[d.unit for d in later.draw(step)] for step in range(3, 7)] == [[d.unit for d in s] for s in forward]


@pytest.mark.parametrize("name", ["truncated_poisson", "shuffle"])
def test_more_units_than_places_are_refused(tree, name):
    with pytest.raises(ConfigError, match=r"privacy.max_num_units: given 24, but there are 25"):
        sampler_of(plan_of(tree, name), KEY, [1] * 25)


@pytest.mark.parametrize("name", PRIVACY)
def test_scheme_is_calibrated_and_its_epsilon_grows_by_epochs(tree, name):
    plan = plan_of(tree, name, target_epsilon=3.0, noise_multiplier=None)
    assert 2.9 <= plan.epsilon <= 3.0
    curve = [plan.epsilon_after(n) for n in range(plan.num_steps + 1)]
    assert curve[0] == 0
    assert curve == sorted(curve)
    assert curve[plan.num_steps] == plan.epsilon
    for n, value in enumerate(curve):
        assert value == curve[plan.scheme.whole_steps(n)]
    assert plan.accounted_steps([(0, 0), (0, 1), (0, 2), (1, 2)]) == {1: 4, 2: 6}[plan.scheme.period]


def test_allocation_undercuts_poisson_and_shuffling_is_plain(tree):
    epsilon = {
        name: plan_of(tree, name, **rate).epsilon
        for name, rate in {"poisson": {"sampling_prob": 0.5}, "random_allocation": {}, "shuffle": {}}.items()
    }
    assert epsilon["random_allocation"] < epsilon["poisson"] < epsilon["shuffle"]
    plain = accountants.dp_sgd_event(noise_multiplier=1.0, sampling_prob=1.0, num_steps=2)
    exact = accountants.epsilon(plain, 1e-3, accountant="tilted").upper
    assert epsilon["shuffle"] == pytest.approx(exact, rel=1e-3)


FAULTS = {
    "no rate": ({"sampling": "poisson"}, "privacy.sampling_prob is required by privacy.sampling=poisson"),
    "a key of another scheme": (
        {"sampling": "random_allocation", "steps_per_epoch": 2, "max_batch_size": 3},
        "privacy.max_batch_size is not used by privacy.sampling=random_allocation",
    ),
    "relation": (
        PRIVACY["shuffle"] | {"sampling": "shuffle", "neighboring_relation": "add_or_remove_one"},
        "privacy.neighboring_relation must be zero_out for privacy.sampling=shuffle",
    ),
    "accountant": (
        {"sampling": "random_allocation", "steps_per_epoch": 2, "accountant": "pld"},
        "privacy.accountant must be allocation for privacy.sampling=random_allocation",
    ),
    "a broken epoch": (
        {"sampling": "random_allocation", "steps_per_epoch": 3},
        "privacy.num_steps=4 must be a multiple of privacy.steps_per_epoch",
    ),
    "too many turns": (
        {"sampling": "random_allocation", "steps_per_epoch": 2, "steps_per_unit": 3},
        "privacy.steps_per_unit must not exceed privacy.steps_per_epoch",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_sampling_keys_are_named(tree, case):
    changes, message = FAULTS[case]
    del tree["privacy"]["sampling_prob"]
    tree["privacy"] |= changes
    with pytest.raises(ConfigError, match=message):
        validate(tree)


def test_random_allocation_without_its_package_is_refused(tree, monkeypatch):
    whole = importlib.import_module

    def without(name):
        if name == "PLD_accounting":
            raise ModuleNotFoundError(name)
        return whole(name)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ConfigError, match=r"pip install 'privtrain\[allocation\]'"):
        plan_of(tree, "random_allocation")


def allocation_losses(scheme, num_epochs, noise, num_samples, generator, *, add):
    """Privacy losses of ``num_samples`` runs whose unit was placed by the trainer's own scheme."""
    mu, total = 1 / noise, np.zeros(num_samples)
    for epoch in range(num_epochs):
        z = generator.standard_normal((num_samples, scheme.steps_per_epoch))
        if not add:
            key = SecretKey.insecure(int(generator.integers(1 << 40)), "run")
            for step, members in enumerate(scheme.epoch(key, epoch, num_samples)):
                z[members, step] += mu
        ratio = np.exp(mu * z - mu * mu / 2)
        subsets = list(itertools.combinations(range(scheme.steps_per_epoch), scheme.steps_per_unit))
        mean = sum(np.prod(ratio[:, list(subset)], axis=1) for subset in subsets) / len(subsets)
        total += np.log(mean)
    return -total if add else total


def check_allocation(scheme, num_epochs, noise, epsilon, num_samples):
    event = scheme.event(noise, num_epochs)
    answer = accountants.delta(event, epsilon, accountant="allocation")
    generator, worst = np.random.default_rng(17), (0.0, 0.0)
    for add in (False, True):
        means, variances = [], []
        for _ in range(num_samples // 500_000):
            losses = allocation_losses(scheme, num_epochs, noise, 500_000, generator, add=add)
            values = np.maximum(-np.expm1(epsilon - losses), 0.0)
            means.append(values.mean())
            variances.append(values.var() / len(values))
        worst = max(worst, (float(np.mean(means)), math.sqrt(float(np.mean(variances)) / len(means))))
    mean, error = worst
    assert error <= 0.05 * mean
    assert answer.lower - 5 * error <= mean <= answer.upper + 5 * error
    # A lower end is certified only where a unit joins one step of an epoch or all; the upper end is near in any case.
    assert answer.upper <= 1.3 * (answer.lower or mean)


@pytest.mark.parametrize(("scheme", "num_epochs", "noise", "epsilon"), [(RandomAllocation(5), 2, 1.0, 1.0)])
def test_simulated_sampled_losses_lie_in_the_interval(scheme, num_epochs, noise, epsilon):
    check_allocation(scheme, num_epochs, noise, epsilon, 500_000)


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("scheme", "num_epochs", "noise", "epsilon"),
    [(RandomAllocation(5), 2, 1.0, 1.0), (RandomAllocation(10), 1, 0.8, 1.5), (RandomAllocation(6, 2), 1, 1.0, 1.0)],
    ids=["5-of-1-twice", "10-of-1", "6-of-2"],
)
def test_ten_million_sampled_losses_lie_in_the_interval(scheme, num_epochs, noise, epsilon):
    check_allocation(scheme, num_epochs, noise, epsilon, 10_000_000)


@pytest.mark.parametrize("scheme", EXAMPLES, ids=NAMES)
def test_the_event_of_the_attacks_cap_is_the_plans(scheme):
    """One definition: what the statement says of the sampling is all that the attack job needs to account for it."""
    read = Sampling.model_validate(json.loads(json.dumps(scheme.parameters())))
    again = scheme_from_statement(read.model_dump())
    assert again == scheme
    assert again.event_of_steps(1.1, 7) == scheme.event_of_steps(1.1, 7)


@pytest.mark.parametrize("change", [{"num_bands": 9}, {"num_bands": "4"}, {"num_bands": 0}, {"sampling_prob": "1"}])
def test_a_cyclic_scheme_that_cannot_be_drawn_gives_no_cap(change):
    assert scheme_from_statement(CyclicPoisson(0.2, 4).parameters() | change) is None


@pytest.mark.parametrize("change", [{"scheme": "other"}, {"scheme": None}, {"sampling_prob": None}])
def test_a_statement_without_a_known_scheme_gives_no_cap(change):
    assert scheme_from_statement(Poisson(0.3).parameters() | change) is None


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (Poisson(0.5), "privacy.sampling_prob: given 0.5; .*lower it"),
        (TruncatedPoisson(0.5, 3_000_000, 6_000_000), r"privacy.max_batch_size: given 3e\+06; .*lower it"),
        (RandomAllocation(2), "privacy.steps_per_epoch: given 2; .*raise it"),
        (Shuffle(2, 6_000_000), "privacy.steps_per_epoch: given 2; .*raise it"),
    ],
)
def test_more_units_a_step_than_integers_hold_are_refused(scheme, message):
    """The key that decides differs by scheme; a truncated batch is no larger than it is cut to."""
    check_step_size(scheme, 4_000_000)
    with pytest.raises(ConfigError, match=message):
        check_step_size(scheme, 5_000_000)
    check_step_size(TruncatedPoisson(0.5, 1000, 6_000_000), 5_000_000)
