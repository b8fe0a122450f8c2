"""The blind baseline finds a shifted split and stays quiet on a fair one."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import scipy.stats

from attacks.analysis import analyse, blind


def users(num, seed, *, shift=0.0, vocabulary=60):
    """Word counts of 2 · num users; the held-in ones use the first words more often."""
    rng = np.random.default_rng(seed)
    is_held_in = np.repeat([True, False], num)
    weights = np.ones((2 * num, vocabulary))
    weights[is_held_in, :5] *= 1.0 + shift
    rates = weights / weights.sum(axis=1, keepdims=True)
    return scipy.sparse.csr_matrix(np.array([rng.multinomial(80, rate) for rate in rates], dtype=float)), is_held_in


def test_a_shifted_vocabulary_is_found():
    counts, is_held_in = users(50, 0, shift=1.5)
    found = blind.cross_validate(blind._bag_of_words(counts), is_held_in, seed=0, level=0.95)
    assert found.auroc > 0.7
    assert found.separates


def test_fair_split_is_confounded_as_rarely_as_stated():
    num_false = sum(
        blind.cross_validate(blind._bag_of_words(counts), is_held_in, seed=seed, level=0.95).separates
        for seed in range(20)
        for counts, is_held_in in [users(25, seed)]
    )
    assert num_false <= scipy.stats.binom.ppf(0.9995, 20, 0.025)


def few_traits(num, seed):
    """A handful of numbers a user: fits on overlapping users err together most where there are few columns."""
    rng = np.random.default_rng(seed)
    return scipy.sparse.csr_matrix(rng.normal(size=(2 * num, 4))), rng.permutation(2 * num) < num


@pytest.mark.campaign
@pytest.mark.parametrize("kind", ["words", "traits"])
def test_null_calibration_of_the_blind_interval(kind):
    covered, above, areas, num = 0, 0, [], 600
    for seed in range(num):
        features, is_held_in = few_traits(25, seed) if kind == "traits" else users(25, 10_000 + seed)
        features = features if kind == "traits" else blind._bag_of_words(features)
        found = blind.cross_validate(features, is_held_in, seed=seed, level=0.95)
        covered += found.interval.lower <= 0.5 <= found.interval.upper
        above += found.separates
        areas.append(found.auroc)
    print(f"blind, {kind}, 25 + 25: mean {np.mean(areas):.4f}, covers {covered / num:.4f}, above {above / num:.4f}")
    assert above <= scipy.stats.binom.ppf(0.9995, num, 0.025)
    assert abs(np.mean(areas) - 0.5) < 0.02


def test_a_shifted_split_confounds_every_verdict(make_run):
    facts = analyse.analyse_run(make_run(40, rich=True))
    assert {name: result["separates"] for name, result in facts["blind"].items()} == {
        "length_date_language": False,
        "bag_of_words": False,
    }
    assert facts["verdict"] != "confounded"
    shifted = analyse.analyse_run(make_run(40, name="shifted", rich=True, shifted=True, shift=0.5, epsilon=1.0))
    assert shifted["blind"]["bag_of_words"]["separates"]
    assert {result["verdict"] for result in shifted["results"].values()} == {"confounded"}


def test_too_few_users_to_fold_are_not_judged(make_run):
    assert analyse.analyse_run(make_run(8))["blind"] == {}
