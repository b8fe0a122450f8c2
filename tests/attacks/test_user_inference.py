from __future__ import annotations

import math

import numpy as np
import pytest

from attacks.analysis import user_inference
from attacks.signals import DocumentSignals


def row(user, document, side, gains):
    base = np.full(len(gains), -10.0)
    return DocumentSignals(user, document, side, base + np.array(gains), base)


def test_the_document_ratio_is_the_mean_and_the_sum_of_the_gains():
    found = user_inference.document_log_ratios(row("u", "d", "held_in", [1.0, 2.0, -0.5]))
    assert found == {"token_mean": pytest.approx(2.5 / 3), "sequence_sum": pytest.approx(2.5)}


def test_a_user_is_the_equal_weight_mean_of_its_documents():
    rows = [
        row("u", "1", "held_in", [1.0]),
        row("u", "2", "held_in", [0.0, 0.0, 0.0]),
        row("v", "1", "held_out", [2.0]),
    ]
    first, second = user_inference.user_statistics(rows)
    assert (first.user, first.side, first.num_documents, first.num_tokens) == ("u", "held_in", 2, 4)
    assert first.values == {"token_mean": 0.5, "sequence_sum": 0.5}
    assert (second.user, second.side) == ("v", "held_out")
    assert second.values == {"token_mean": 2.0, "sequence_sum": 2.0}


def test_the_two_statistics_rank_users_differently():
    rows = [row("brief", "1", "held_in", [1.0]), row("long", "1", "held_in", [0.5] * 8)]
    brief, long = user_inference.user_statistics(rows)
    assert brief.values["token_mean"] > long.values["token_mean"]
    assert brief.values["sequence_sum"] < long.values["sequence_sum"]


def test_the_order_of_the_rows_does_not_change_a_bit():
    rng = np.random.default_rng(0)
    rows = [row(f"u{n % 3}", f"d{n}", "held_in", rng.normal(size=7)) for n in range(12)]
    assert user_inference.user_statistics(rows) == user_inference.user_statistics(rows[::-1])


def test_a_model_scored_against_itself_gives_exact_zeros():
    logp = np.random.default_rng(0).normal(-3.0, 0.5, 1000).astype(np.float32)
    found = user_inference.document_log_ratios(DocumentSignals("u", "d", "held_in", logp, logp))
    assert found == {"token_mean": 0.0, "sequence_sum": 0.0}


def test_long_documents_do_not_lose_small_gains_to_float32():
    rng = np.random.default_rng(0)
    base = -rng.gamma(2.0, 1.5, 20_000).astype(np.float32)
    target = base - rng.random(20_000, np.float32) / 100
    exact = math.fsum(float(t) - float(b) for t, b in zip(target, base, strict=True))
    found = user_inference.document_log_ratios(DocumentSignals("u", "d", "held_in", target, base))
    assert found["sequence_sum"] == pytest.approx(exact, rel=1e-12)
    assert found["token_mean"] == pytest.approx(exact / 20_000, rel=1e-12)
