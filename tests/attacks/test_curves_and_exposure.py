"""What the headline depends on, and whom it accuses."""

from __future__ import annotations

import numpy as np
import pytest

from attacks.analysis import curves, features
from attacks.signals import FRESH, HELD_IN, HELD_OUT, DocumentSignals


def scored_users(num=40, num_documents=8, seed=0):
    """Held-in users gain .05 a document on average, with noise of .2 from document to document."""
    rng = np.random.default_rng(seed)
    rows = []
    for side, gain in ((HELD_IN, 0.05), (HELD_OUT, 0.0)):
        for user in range(num):
            common = rng.integers(0, 5, 30)
            own = np.full(10 * (user % 4), 100 + user + 1000 * (side == HELD_IN))
            for document in range(num_documents if user % 2 else 2):
                target = np.full(common.size + own.size, -3.0 + gain + rng.normal(0, 0.2))
                facts = {"user_num_records": 2 + user, "user_num_bytes": 100 * (user + 1)}
                words = np.concatenate([common, own])
                name = f"{side}-{user:03d}"
                rows.append(
                    DocumentSignals(name, str(document), side, target, target * 0 - 3.0, token_ids=words, **facts)
                )
    return features.collect(rows, [])


def test_more_documents_tell_more():
    scored = scored_users()
    table = scored.documents[FRESH]
    points = curves.by_num_documents(scored, table, table.scores["token_mean"], seed=0)
    assert [point["num_documents"] for point in points] == [1, 2, 4, 8]
    assert [point["num_held_in"] for point in points] == [40, 40, 20, 20]
    assert points[-1]["auroc"] > points[0]["auroc"]
    everything = curves.by_num_documents(scored, table, table.scores["token_mean"], seed=1)[-1]
    assert everything["auroc"] == points[-1]["auroc"]


def test_buckets_hold_every_user_once_and_hide_the_small_ones():
    rng = np.random.default_rng(0)
    is_held_in = np.arange(80) < 40
    values, statistic = rng.integers(2, 30, 80).astype(float), rng.normal(size=80)
    points = curves.by_bucket(values, statistic, is_held_in)
    assert sum(point["num_held_in"] + point["num_held_out"] for point in points) == 80
    assert curves.by_bucket(np.ones(80), statistic, is_held_in) == []
    few = np.where(np.arange(80) < 4, 100.0, np.arange(80) % 3.0)
    assert all(point["num_held_in"] >= curves.MIN_USERS for point in curves.by_bucket(few, statistic, is_held_in))


def test_distinctness_grows_with_own_words():
    found = curves.distinctness(scored_users())
    by_kind = [found[np.arange(80) % 4 == kind].mean() for kind in range(4)]
    assert by_kind == sorted(by_kind)


def test_shares_are_of_the_text_that_was_trained_on():
    scored = scored_users()
    found = curves.shares(scored)
    assert found[scored.is_held_in].sum() == pytest.approx(1.0)


def test_the_most_exposed_are_the_top_of_all_users():
    scored = scored_users()
    statistic = np.where(scored.is_held_in, 1.0, 0.0) + np.arange(80) / 1000
    found = curves.most_exposed(scored, statistic, share=0.05)
    assert (found["num_users"], found["num_held_in"], found["num_held_in_by_chance"]) == (4, 4, 2.0)
