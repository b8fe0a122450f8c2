"""The planning tool against simulation and against the bounds that it is about."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from accountants.methods import gdp
from attacks.analysis.audit import Coins, Guess, correct_guesses, one_run, planning, power, telling_guesses
from attacks.cli import app
from attacks.errors import AttackInputError
from tests.conftest import write_config


@pytest.mark.parametrize(("mu", "share"), [(1.0, 1.0), (1.0, 0.2), (2.0, 0.5), (0.3, 0.2)])
def test_the_modelled_accuracy_is_that_of_drawn_scores(mu, share):
    rng = np.random.default_rng(0)
    is_in = rng.random(40_000) < 0.5
    coins = Coins(rng.normal(size=40_000) + mu * is_in, is_in, 0.5, "user", "drawn")
    count = int(share * 40_000)
    error = 0.5 / math.sqrt(count)
    assert correct_guesses(coins, Guess(count), 0) / count == pytest.approx(power.accuracy(mu, share), abs=5 * error)


def test_mu_goes_through_the_claim():
    for epsilon, delta in ((0.5, 1e-6), (4.0, 1e-5), (20.0, 1e-8)):
        assert gdp.gdp_epsilon(power.mu_of(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-6)


def test_the_coins_needed_do_and_fewer_do_not():
    found = power.plan(1.0, 1e-6, num_coins=(400,))
    assert found.needed[math.inf] is not None
    for failure, count in found.needed.items():
        if count is None:
            continue
        mu = failure * found.mu
        assert power.reached(count, mu, 1e-6, found.significance, found.power) > 1.0
        assert power.reached(int(0.8 * count), mu, 1e-6, found.significance, found.power) < 1.0
    assert found.needed[1.0] is None
    row = found.rows[0]
    share = found.significance / len(telling_guesses(400, 1e-6, found.significance))
    assert one_run.epsilon_lower_bound(400, 400, row.correct_needed, 1e-6, share) > 1.0
    assert one_run.epsilon_lower_bound(400, 400, row.correct_needed - 1, 1e-6, share) <= 1.0
    assert list(row.bounds.values()) == sorted(row.bounds.values())
    assert row.bounds[math.inf] == row.ceiling


def test_the_power_is_reached_in_simulation():
    found, reached = power.reached(200, 2.0, 1e-6, 0.05, 0.8), 0
    guesses = telling_guesses(200, 1e-6, 0.05)
    share = 0.05 / len(guesses)
    for seed in range(80):
        rng = np.random.default_rng(seed)
        is_in = rng.random(200) < 0.5
        coins = Coins(rng.normal(size=200) + 2.0 * is_in, is_in, 0.5, "user", "drawn")
        right = {guess: correct_guesses(coins, guess, seed) for guess in guesses}
        best = max(one_run.epsilon_lower_bound(200, guess.num, value, 1e-6, share) for guess, value in right.items())
        reached += best >= found
    assert reached >= 0.66 * 80


def test_the_command_reads_the_claim_of_a_configuration(tree, tmp_path):
    config = write_config(tree, tmp_path / "c.yaml")
    found = CliRunner().invoke(app, ["audit-plan", str(config), "--json"])
    assert found.exit_code == 0, found.output
    facts = json.loads(found.stdout)
    assert facts["schema"] == "privtrain/audit-plan/1"
    assert facts["delta"] == 1e-3
    assert facts["target_epsilon"] == facts["epsilon"] > 0
    assert set(facts["needed"]) == {"1", "2", "4", "8", "none at all"}
    shown = CliRunner().invoke(app, ["audit-plan", "--epsilon", "1", "--target", "0.5"])
    assert shown.exit_code == 0, shown.output
    assert "canaries" in shown.stdout
    assert "ceiling" in shown.stdout
    assert "by the delta of the audit" in shown.stdout


def test_every_kind_of_coins_counts_as_a_source(tree, tmp_path):
    """The split's users, canaries of texts and gradient canaries share the error."""
    tree["canaries"], tree["audit"] = {"num_users": 4, "num_gradient_users": 4}, {"keep_noised_sums": True}
    found = planning.plan_of(write_config(tree, tmp_path / "c.yaml"), None, 1e-5)
    assert found.significance == pytest.approx(0.05 / (3 * 2))


def test_the_plan_says_that_delta_decides_the_ceiling():
    """Two sources: at delta 1e-3 half the claim is out of reach, there and at 1e-4 more coins show less."""
    found = power.plan(4.0, 1e-3, num_sources=2)
    assert found.ceilings[1e-3][-1] < max(found.ceilings[1e-3]) < 2.2
    assert found.ceilings[1e-4][-1] < max(found.ceilings[1e-4]) < 4.0
    assert list(found.ceilings[1e-6]) == sorted(found.ceilings[1e-6])
    assert found.ceilings[1e-6][-1] > 4.0
    assert [row.ceiling for row in found.rows] == list(found.ceilings[1e-3])


@pytest.mark.parametrize(
    "arguments", [[], ["--epsilon", "inf"], ["--epsilon", "0"], ["--epsilon", "1", "--delta", "0"]]
)
def test_without_a_claim_there_is_nothing_to_plan(arguments):
    assert isinstance(CliRunner().invoke(app, ["audit-plan", *arguments]).exception, AttackInputError)
