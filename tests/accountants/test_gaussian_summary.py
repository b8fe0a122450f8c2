"""Mu of Gaussian differential privacy from a table of a privacy curve: never too small, hardly too large."""

from __future__ import annotations

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants.gaussian_summary import gaussian_summary
from accountants.methods.gdp import gdp_delta, gdp_epsilon
from accountants.registry import get_accountant
from accountants.tradeoff import PrivacyCurve, privacy_curve


def curve_of(mu: float, points: int = 400) -> PrivacyCurve:
    epsilons = np.linspace(0, gdp_epsilon(mu, 1e-7), points)
    deltas = np.array([gdp_delta(mu, float(epsilon)) for epsilon in epsilons])
    return PrivacyCurve(epsilons, deltas, certified=True, method="exact")


@settings(max_examples=8)
@given(mu=st.floats(0.1, 6.0))
def test_a_gaussians_own_mu_is_found_from_above(mu):
    found = gaussian_summary(curve_of(mu))
    assert found is not None
    assert mu * (1 - 1e-6) <= found.mu <= 1.05 * mu
    assert found.regret < 0.03
    assert found.certified


def test_a_finer_table_gives_a_smaller_mu():
    coarse, fine = gaussian_summary(curve_of(1.0, 25)), gaussian_summary(curve_of(1.0, 800))
    assert coarse is not None
    assert fine is not None
    assert 1.0 <= fine.mu < coarse.mu


def test_between_the_points_of_the_table_the_bound_holds():
    """The claim is for every epsilon; a curve of sampled steps is asked where the table is silent."""
    event = dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(0.05, dp_accounting.GaussianDpEvent(1.0)), 100
    )
    accountant = get_accountant("tilted")
    table = privacy_curve(event, accountant, largest_epsilon=5.0, points=20)
    found = gaussian_summary(table)
    assert found is not None
    for epsilon in np.linspace(0.01, 6.0, 9):
        assert accountant.delta(event, float(epsilon)).upper <= gdp_delta(found.mu, float(epsilon)) + found.slack


def test_mutant_mu_fitted_at_points_is_too_small_between():
    """Plant: left values compared with the Gaussian's at the same point. A step function is the worst curve that the
    table allows, and it is above that Gaussian's."""
    table = curve_of(1.0, 25)
    found = gaussian_summary(table)
    assert found is not None
    between = float(table.epsilons[1]) * 0.999
    assert gdp_delta(1.0, between) < table.deltas[0]  # what the mutant would claim is not shown by the table
    assert gdp_delta(found.mu, between) + found.slack >= table.deltas[0]


def test_no_privacy_has_no_mu():
    assert gaussian_summary(PrivacyCurve(np.array([0.0, 1e6]), np.array([1.0, 0.0]), False, "none")) is None


def test_without_certified_deltas_nothing_is_certified():
    table = curve_of(1.0)
    found = gaussian_summary(PrivacyCurve(table.epsilons, table.deltas, certified=False, method="estimate"))
    assert found is not None
    assert not found.certified


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_regret_is_zero_where_the_curve_allows_as_much(mu):
    found = gaussian_summary(curve_of(mu, 800))
    assert found is not None
    assert found.regret == pytest.approx(0, abs=0.01)
