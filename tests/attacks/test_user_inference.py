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


def test_the_two_statistics_rank_users_differently():
    brief, long = (user_inference.document_log_ratios(row("u", "1", "held_in", gains)) for gains in ([1.0], [0.5] * 8))
    assert brief["token_mean"] > long["token_mean"]
    assert brief["sequence_sum"] < long["sequence_sum"]


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
