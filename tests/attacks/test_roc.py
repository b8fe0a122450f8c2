from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from attacks.analysis import statistics
from attacks.analysis.statistics import roc

scores = st.lists(st.integers(-9, 9), min_size=1, max_size=25).map(lambda values: np.array(values, dtype=np.float64))


@given(scores, scores)
def test_the_area_under_the_corners_is_the_auroc(held_in, held_out):
    fpr, tpr = statistics.roc_points(held_in, held_out)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert (np.diff(fpr) >= 0).all()
    assert (np.diff(tpr) >= 0).all()
    assert np.trapezoid(tpr, fpr) == pytest.approx(statistics.auroc(held_in, held_out), abs=1e-12)


@given(scores, scores)
def test_the_corners_are_those_of_sklearn(held_in, held_out):
    labels = np.repeat([1, 0], [held_in.size, held_out.size])
    fpr, tpr, _ = sklearn.metrics.roc_curve(labels, np.concatenate([held_in, held_out]), drop_intermediate=False)
    found = {(round(x, 9), round(y, 9)) for x, y in zip(*statistics.roc_points(held_in, held_out), strict=True)}
    assert found <= {(round(x, 9), round(y, 9)) for x, y in zip(fpr, tpr, strict=True)}


@given(scores, scores, st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.1, 0.29, 0.5, 0.99]))
def test_tpr_is_the_best_of_all_thresholds_within_the_target(held_in, held_out, target_fpr):
    best = (0, 0)
    for threshold in [-np.inf, *held_in, *held_out]:
        num_false, num_true = np.count_nonzero(held_out > threshold), np.count_nonzero(held_in > threshold)
        if num_false <= target_fpr * held_out.size + 1e-9:
            best = max(best, (num_true, num_false))
    point = statistics.tpr_at_fpr(held_in, held_out, target_fpr)
    assert point.num_true_positives == best[0]
    assert point.achieved_fpr <= target_fpr + 1e-12


def test_the_published_enron_counts():
    """68 + 68 users: "TPR 4.41 % at FPR 1 %" is 3 of 68 at no false positive at all, "27.94 % at 5 %" is 19 of 68."""
    held_out = np.arange(68.0)
    held_in = np.concatenate([np.full(3, 100.0), np.full(16, 64.5), np.full(49, -1.0)])
    at_one, at_five = (statistics.tpr_at_fpr(held_in, held_out, target) for target in (0.01, 0.05))
    assert (at_one.num_true_positives, at_one.num_false_positives, at_one.is_resolved) == (3, 0, False)
    assert round(100 * at_one.tpr, 2) == 4.41
    assert (at_five.num_true_positives, at_five.num_false_positives, at_five.is_resolved) == (19, 3, True)
    assert round(100 * at_five.tpr, 2) == 27.94
    assert at_one.tpr_interval.lower < statistics.clopper_pearson(3, 68).lower
    assert at_one.tpr_interval.upper > statistics.clopper_pearson(3, 68).upper


def test_ties_at_the_threshold_are_not_let_through():
    held_out = np.array([5.0, 5.0, 5.0, 1.0])
    point = statistics.tpr_at_fpr(np.array([6.0, 5.0, 5.0, 5.0]), held_out, 0.5)
    assert (point.num_false_positives_allowed, point.num_false_positives) == (2, 0)
    assert point.tpr == 0.25


@pytest.mark.parametrize(
    ("target", "num_held_out", "allowed"), [(0.29, 100, 29), (0.07, 100, 7), (0.01, 99, 0), (0.1, 10, 1)]
)
def test_whole_numbers_of_users_survive_floating_point(target, num_held_out, allowed):
    assert roc.num_false_positives_allowed(target, num_held_out) == allowed
