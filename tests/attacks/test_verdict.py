from __future__ import annotations

import math

import pytest

import accountants
from attacks.analysis import statistics
from attacks.analysis.statistics import Interval
from attacks.analysis.verdict import Cap, Verdict, _tabulate, judge
from privtrain.privacy.sampling import Poisson

STRONG = Cap(statistics.DpBound(1.0, 0.0), "")
WEAK = Cap(statistics.DpBound(8.0, 0.0), "")


def verdict(cap, lower, num_units=100, *, is_constant=False):
    return judge(cap, Interval(lower, 1.0), num_units, num_units, is_constant=is_constant)[0]


def test_an_interval_above_the_cap_falsifies():
    allowed = STRONG.auroc(100)
    assert allowed == statistics.auroc_cap(STRONG.bound, 100)
    assert verdict(STRONG, allowed + 1e-9) is Verdict.FALSIFIED
    assert verdict(STRONG, allowed) is Verdict.CONSISTENT
    assert verdict(STRONG, 0.4) is Verdict.CONSISTENT


def test_a_sample_that_could_not_have_contradicted_says_nothing():
    assert verdict(WEAK, 0.4) is Verdict.UNINFORMATIVE
    assert verdict(STRONG, 0.1, num_units=5) is Verdict.UNINFORMATIVE
    assert "even perfect separation" in judge(WEAK, Interval(0.4, 0.6), 100, 100, is_constant=False)[1]


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 2.0, 4.0])
def test_perfect_separation_falsifies_where_informative(epsilon):
    cap = Cap(statistics.DpBound(epsilon, 1e-5), "")
    for num_units in (3, 10, 30, 100, 300, 1000):
        ceiling = statistics.perfect_separation(num_units, num_units)
        at_best = judge(cap, ceiling, num_units, num_units, is_constant=False)[0]
        at_worst = judge(cap, Interval(0.4, 0.6), num_units, num_units, is_constant=False)[0]
        assert (at_best, at_worst) in {
            (Verdict.FALSIFIED, Verdict.CONSISTENT),
            (Verdict.UNINFORMATIVE, Verdict.UNINFORMATIVE),
        }


def test_no_cap_and_no_spread_say_nothing():
    assert verdict(Cap(None, "epsilon protects one example"), 0.99) is Verdict.UNINFORMATIVE
    assert verdict(Cap(statistics.DpBound(math.inf, 0.0), "the run is not private"), 0.99) is Verdict.NO_CLAIM
    assert verdict(STRONG, 0.4, is_constant=True) is Verdict.UNINFORMATIVE


def test_the_curve_falls_back_where_the_first_accountant_refuses(monkeypatch):
    real = accountants.delta

    def without_pld(event, epsilon, *, accountant, relation):
        if accountant == "pld":
            raise ValueError("cannot resolve this event")
        return real(event, epsilon, accountant=accountant, relation=relation)

    monkeypatch.setattr(accountants, "delta", without_pld)
    setting = (Poisson(0.1), "add_or_remove_one", 1.0, 100, 7.3)
    curve = _tabulate.__wrapped__(*setting)
    assert curve.source == "tilted"
    event = accountants.dp_sgd_event(noise_multiplier=1.0, sampling_prob=0.1, num_steps=100)
    for point in curve.points:
        assert point.delta >= real(event, point.epsilon, accountant="pld").lower
