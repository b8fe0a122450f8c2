"""Record attacks: exact values by hand, and the edges where public implementations go wrong."""

from __future__ import annotations

import json
import math
import zlib

import numpy as np
import pytest
import scipy.stats

from attacks import signals
from attacks.analysis import analyse, features, registry
from attacks.analysis.membership import (
    calibrated,
    ez_mia,
    lira,
    loss,
    lowercase,
    min_k,
    min_k_plus_plus,
    neighbourhood,
    ratio,
    recall,
    rmia,
    wbc,
    zlib_ratio,
)
from attacks.analysis.protocol import DocumentAttack, UnderOtherModels
from attacks.signals import FRESH, TRAINING, DocumentSignals
from tests.attacks.conftest import put_signals
from tests.attacks.signal_files import read_signals


def row(target, base=None, *, user="u", document="d", side="held_in", **more):
    base = [-1.0] * len(target) if base is None else base
    return DocumentSignals(user, document, side, np.array(target), np.array(base), **more)


def test_loss_ratio_and_zlib_by_hand():
    found = row([-1.0, -3.0], [-2.0, -2.5], zlib_bytes=len(zlib.compress(b"a text")))
    assert loss.score(found) == -2.0
    assert ratio.score(found) == pytest.approx(0.25)
    assert zlib_ratio.score(found) == pytest.approx(-2.0 / len(zlib.compress(b"a text")))


def test_min_k_takes_the_floor_but_never_nothing():
    values = [-float(n) for n in range(1, 13)]
    assert min_k.score(row(values)) == pytest.approx((-12 - 11) / 2)
    assert min_k.score(row(values[:4])) == -4.0
    assert min_k.mean_of_lowest(np.array([-1.0, -2.0]), 0.05) == -2.0


def test_min_k_plus_plus_survives_certainty():
    # Vocabulary of two with p = (3/4, 1/4): moments of log p under p, not over the vocabulary.
    logs = np.log([0.75, 0.25])
    mean = 0.75 * logs[0] + 0.25 * logs[1]
    variance = 0.75 * logs[0] ** 2 + 0.25 * logs[1] ** 2 - mean**2
    found = row([logs[1]], [-1.0], target_mean=[mean], target_variance=[variance])
    assert min_k_plus_plus.score(found) == pytest.approx((logs[1] - mean) / math.sqrt(variance), rel=1e-5)
    assert min_k_plus_plus.score(found) == pytest.approx(-math.sqrt(3.0), rel=1e-5)
    assert min_k_plus_plus.score(row([0.0], [-1.0], target_mean=[0.0], target_variance=[0.0])) == 0.0


def test_variants_are_differences_and_recall_a_quotient():
    found = row([-1.0, -2.0], variants={"lowercase": -2.5, "neighbour_0": -2.0, "neighbour_1": -3.0})
    assert lowercase.score(found) == pytest.approx(1.0)
    assert neighbourhood.score(found) == pytest.approx(1.0)
    assert recall.score(row([-1.0], variants={"recall": -3.0, "recall_plain": -2.0})) == pytest.approx(1.5)
    assert recall.score(row([-1.0], variants={"recall": -3.0, "recall_plain": 0.0})) == 1.0


def test_ez_mia_ranks_the_best_memorised_records_first():
    wrong = np.array([False, False, True])
    mixed = row([-1.0, -3.0, -0.1], [-2.0, -2.5, -5.0], target_correct=wrong)
    assert ez_mia.score(mixed) == pytest.approx(1.0 / 1.5)
    no_errors = row([-0.1, -0.2], [-3.0, -3.0], target_correct=[True, True])
    no_losses = row([-1.0, -1.0], [-2.0, -2.0], target_correct=[False, False])
    assert ez_mia.score(no_errors) == ez_mia.score(no_losses) == 1.0 > ez_mia.score(mixed)
    assert ez_mia.score(row([-1.0], [-1.0], target_correct=[False])) == 0.5


def test_wbc_counts_windows_and_clamps_them_to_the_text():
    gains = np.array([1.0, -2.0, 3.0])
    found = row(-5.0 + gains, [-5.0] * 3)
    widths = [min(width, 3) for width in wbc.WIDTHS]
    expected = [np.mean([gains[i : i + w].sum() > 0 for i in range(3 - w + 1)]) for w in widths]
    assert wbc.score(found) == pytest.approx(np.mean(expected))


def shadows():
    rng = np.random.default_rng(0)
    is_in = np.array([[True, True, False, False]] * 3)
    return UnderOtherModels(np.array([-1.0, -2.0, -9.0]), rng.normal(-2.0, 0.3, (3, 4)), is_in)


def test_lira_is_the_likelihood_ratio_with_pooled_variances():
    models = shadows()
    inside, outside = models.shadows[:, :2], models.shadows[:, 2:]
    spread_in, spread_out = (np.sqrt(part.var(axis=1, ddof=1).mean()) for part in (inside, outside))
    expected = scipy.stats.norm.logpdf(models.target, inside.mean(axis=1), spread_in) - scipy.stats.norm.logpdf(
        models.target, outside.mean(axis=1), spread_out
    )
    np.testing.assert_allclose(lira.score(models), expected)
    np.testing.assert_allclose(calibrated.score(models), models.target - outside.mean(axis=1))


def test_offline_lira_rejects_units_far_below_out_mean():
    models = shadows()
    found = lira.score(UnderOtherModels(models.target, models.shadows, np.zeros_like(models.is_in)))
    assert found[0] > found[1] > found[2]


def test_rmia_is_the_share_of_the_others_that_a_unit_beats():
    models = shadows()
    reference = (np.exp(models.shadows[:, :2]).mean(axis=1) + np.exp(models.shadows[:, 2:]).mean(axis=1)) / 2
    ratios = np.exp(models.target) / reference
    expected = [np.mean([ratios[i] > ratios[j] for j in range(3) if j != i]) for i in range(3)]
    np.testing.assert_allclose(rmia.score(models), expected)


def full_row(user, document, side, kind, seed):
    rng = np.random.default_rng(seed)
    size = int(rng.integers(4, 20))
    logs = {name: -rng.random(size) for name in ("target_logp", "base_logp", "target_mean", "base_mean")}
    return DocumentSignals(
        user, document, side, logs["target_logp"], logs["base_logp"], kind=kind,
        target_correct=rng.random(size) < 0.5, base_correct=rng.random(size) < 0.5,
        target_mean=logs["target_mean"], base_mean=logs["base_mean"],
        target_variance=rng.random(size), base_variance=rng.random(size), token_ids=rng.integers(0, 50, size),
        num_bytes=100, zlib_bytes=50, user_num_records=int(rng.integers(3, 30)), user_num_bytes=1000, language="en",
        variants={"lowercase": -1.0, "recall": -1.2, "recall_plain": -1.0, "neighbour_0": -1.1},
    )  # fmt: skip


@pytest.fixture
def complete_run(make_run):
    """A run with every signal, and three shadows."""
    run = make_run(0)
    kinds = [("0", FRESH), ("1", FRESH), ("2", TRAINING)]
    rows = [
        full_row(f"{side}-{number}", document, side, kind, 1000 * number + int(document) + 7 * (side == "held_in"))
        for side in signals.SIDES
        for number in range(25)
        for document, kind in kinds
    ]
    put_signals(run, rows)
    for shadow in range(6):
        changed = [
            full_row(
                item.user, item.document,
                signals.SIDES[(int(item.user.split("-")[1]) + shadow) % 2], item.kind, 99 + number + 1000 * shadow,
            )
            for number, item in enumerate(rows)
        ]  # fmt: skip
        put_signals(run, changed, shadow=shadow)
    return run


def test_every_attack_runs_where_its_signals_are_there(complete_run):
    facts = analyse.analyse_run(complete_run)
    assert facts["not_run"] == []
    names = set(facts["results"])
    for name in registry.ATTACKS:
        assert {f"{name}_training", f"{name}_records"} <= names
        assert name in names or name == "ratio"
    record = facts["results"]["loss_records"]
    assert (record["unit"], record["num_held_in"], record["documents"]) == ("record", 25, TRAINING)
    assert all(result["p_holm"] >= result["p_value"] for result in facts["results"].values() if "p_holm" in result)
    assert "p_holm" not in facts["results"]["token_mean"]
    records = [complete_run / signals.REFERENCES_PATH / f"shadow-{shadow}.json" for shadow in range(6)]
    assert facts["shadows"] == {"num": 6, "seals": [json.loads(path.read_text())["seal"] for path in records]}
    for name in ("sequence_sum", "loss", "lira"):
        paired = facts["results"][name]["less_headline"]
        difference = facts["results"][name]["auroc"] - facts["results"]["token_mean"]["auroc"]
        assert paired["difference"] == pytest.approx(difference)
        assert paired["interval"][0] <= difference <= paired["interval"][1]


def test_new_attack_is_one_registration(complete_run, monkeypatch):
    before = (complete_run / signals.SIGNALS_PATH).stat().st_mtime_ns
    monkeypatch.setattr(registry, "ATTACKS", dict(registry.ATTACKS))
    attack = DocumentAttack(
        "surprise", "share of tokens below one nat", lambda row: float((row.target_logp > -1).mean())
    )
    registry.register(attack)
    facts = analyse.analyse_run(complete_run)
    assert {"surprise", "surprise_training", "surprise_records"} < set(facts["results"])
    assert facts["results"]["surprise"]["definition"] == attack.definition
    assert (complete_run / signals.SIGNALS_PATH).stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="registered already"):
        registry.register(attack)


def test_an_attack_without_its_signals_says_what_it_lacks(make_run):
    facts = analyse.analyse_run(make_run(20))
    reasons = {item["attack"]: item["reason"] for item in facts["not_run"]}
    assert reasons["lowercase"] == "the signals lack variants.lowercase; score with --variants lowercase"
    assert "attacks shadows" in reasons["lira"]


def test_shadows_of_other_documents_are_refused(complete_run):
    path = complete_run / signals.REFERENCES_PATH / "shadow-0.parquet"
    put_signals(complete_run, read_signals(path)[1:], shadow=0)
    with pytest.raises(analyse.AttackInputError, match="other documents"):
        analyse.analyse_run(complete_run)


def test_the_order_of_the_rows_does_not_change_the_features(complete_run):
    rows = read_signals(complete_run / signals.SIGNALS_PATH)
    attacks = [attack for attack in registry.ATTACKS.values() if isinstance(attack, DocumentAttack)]
    one, other = (features.collect(given, attacks) for given in (rows, rows[::-1]))
    assert one.users == other.users
    assert one.documents[FRESH].keys == other.documents[FRESH].keys
    for name, values in one.documents[FRESH].scores.items():
        np.testing.assert_array_equal(values, other.documents[FRESH].scores[name])
