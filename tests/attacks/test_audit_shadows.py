"""Which score an audit reads where shadow models exist: the strongest on the shadows, whatever the run's own coins."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.analysis import analyse, registry, shadow_models
from attacks.analysis.audit import panel
from attacks.analysis.audit.evaluate import Claim, audit
from attacks.analysis.audit.guesses import Coins
from attacks.analysis.protocol import ReferenceAttack, UnderOtherModels
from attacks.analysis.statistics import DpBound
from attacks.signals import HELD_IN, REFERENCES_PATH
from tests.attacks.conftest import build_rows, put_signals

HARDNESS = 3.0
"""How much more users differ in how predictable they are than training on them changes that."""


def drawn_models(num_users, num_shadows, gain, seed):
    """Users of very different predictability, which the base does not know and the shadows do."""
    rng = np.random.default_rng(seed)
    hardness = rng.normal(-10.0, HARDNESS, num_users)
    is_in = rng.random((num_users, num_shadows + 1)) < 0.5
    logp = hardness[:, None] + gain * is_in + rng.normal(0.0, 0.3, is_in.shape)
    base = rng.normal(-12.0, 1.0, num_users)
    return UnderOtherModels(logp[:, 0], logp[:, 1:], is_in[:, 1:]), base, is_in[:, 0]


def chosen_coins(models, base, is_in):
    chosen = shadow_models.strongest(models, base, registry.reference_attacks())
    return Coins(chosen.values, is_in, 0.5, "user", "users", score=str(chosen))


def test_shadows_show_what_the_base_alone_cannot():
    models, base, is_in = drawn_models(110, 16, 1.0, seed=1)
    claim = Claim(DpBound(1.0, 1e-5), None, "")
    by_gain = audit(Coins(models.target - base, is_in, 0.5, "user", "users"), claim, 1e-5, seed=0)
    by_shadows = audit(chosen_coins(models, base, is_in), claim, 1e-5, seed=0)
    assert by_gain.epsilon < 0.5
    assert by_shadows.epsilon > 1.5
    assert by_shadows.verdict == "falsified"
    assert "tells best whom each shadow model was trained on" in by_shadows.score


def test_choice_is_a_function_of_the_shadows_alone():
    """Whom the attacked run held in is no argument; another order of its coins leaves score and choice alone."""
    models, base, _ = drawn_models(40, 6, 0.5, seed=2)
    other = UnderOtherModels(np.random.default_rng(0).permutation(models.target), models.shadows, models.is_in)
    first, second = (shadow_models.strongest(m, base, registry.reference_attacks()) for m in (models, other))
    assert (first.name, first.shadow_auroc, first.compared) == (second.name, second.shadow_auroc, second.compared)


def test_too_few_shadows_leave_the_gain_over_the_base():
    models, base, _ = drawn_models(20, 1, 0.5, seed=3)
    chosen = shadow_models.strongest(models, base, registry.reference_attacks())
    assert chosen.name == shadow_models.GAIN
    np.testing.assert_array_equal(chosen.values, models.target - base)


def _best_after_looking(models, base, is_in):
    """The mutant: the score that tells the run's own coins best."""
    attacks = registry.reference_attacks()
    candidates = [models.target - base, *(a.score(models) for a in attacks if not shadow_models.lacking(a, models))]
    return max((Coins(s, is_in, 0.5, "user", "users") for s in candidates), key=_epsilon)


def _epsilon(coins):
    return audit(coins, Claim(None, None, ""), 1e-5, seed=0).epsilon


@pytest.mark.parametrize("attack", ["rmia", "lira", "calibrated"])
def test_every_candidate_can_win(attack):
    """A candidate that tells the shadows' coins best is read, whichever it is."""
    models, base, _ = drawn_models(30, 16, 0.0, seed=4)

    def oracle(found: UnderOtherModels):
        # The column that is missing among the shadows is the stand-in's own.
        missing = [j for j in range(16) if not (models.shadows[:, j][:, None] == found.shadows).all(axis=0).any()]
        return models.is_in[:, missing[0]].astype(float) if missing else found.target

    attacks = [
        ReferenceAttack(a.name, "", oracle if a.name == attack else a.score) for a in registry.reference_attacks()
    ]
    assert shadow_models.strongest(models, base, attacks).name == attack


def null_rate(coins_of, num_runs):
    """Share of runs without any leak whose bound exceeds 0."""
    exceeded = 0
    for seed in range(num_runs):
        models, base, is_in = drawn_models(60, 12, 0.0, seed=100 + seed)
        exceeded += _epsilon(coins_of(models, base, is_in)) > 0.0
    return exceeded / num_runs


def test_null_runs_are_not_accused_by_shadows():
    """Of 60 at 5 % shared by two tests: more than 6 happens once in ten thousand."""
    assert null_rate(chosen_coins, 60) <= 0.1


@pytest.mark.campaign
def test_null_rate_of_chosen_scores_stays_nominal():
    honest, looking = null_rate(chosen_coins, 1000), null_rate(_best_after_looking, 1000)
    print(f"chosen by shadows {honest:.3f}, chosen after looking {looking:.3f}")
    assert honest <= 0.025 + 2 * np.sqrt(0.025 * 0.975 / 1000)
    assert looking > honest


def test_run_with_shadows_reads_and_names_the_chosen_score(make_run):
    run = make_run(0)
    rng = np.random.default_rng(0)

    def rows(shadow):
        found = build_rows(15, shift=0.0, seed=0, num_documents=1)
        if shadow is None:
            return found
        held_in = {user: bool(rng.random() < 0.5) for user in sorted({row.user for row in found})}
        changed = []
        for row in found:
            side = HELD_IN if held_in[row.user] else "held_out"
            target = np.minimum(row.target_logp + 0.3 * held_in[row.user], 0.0)
            changed.append(type(row)(row.user, row.document, side, target, row.base_logp, kind=row.kind))
        return changed

    put_signals(run, rows(None))
    for shadow in range(6):
        put_signals(run, rows(shadow), shadow=shadow)
    notes = " ".join(analyse.analyse_run(run)["panels"]["audit"]["notes"])
    assert f"The score of {panel.NATURAL}:" in notes
    assert "the coins of this run had no say" in notes
    assert (run / REFERENCES_PATH).is_dir()
