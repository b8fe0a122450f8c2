"""Invented customers: the spans are exact, the seed decides everything, the tail is heavy."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest

from privtrain.data.invented_customers import SENSITIVE_SLOTS, customer_records, write_customers
from privtrain.errors import ConfigError


def test_spans_are_exactly_the_profile_values():
    profiles = collections.defaultdict(lambda: collections.defaultdict(set))
    for record in customer_records(40, seed=3):
        ends = [0]
        for span in record.spans:
            assert span.label in SENSITIVE_SLOTS
            assert ends[-1] <= span.start < span.end <= len(record.text)
            ends.append(span.end)
            profiles[record.user][span.label].add(record.text[span.start : span.end])
        outside = record.text
        for span in reversed(record.spans):
            outside = outside[: span.start] + outside[span.end :]
        assert not any(value in outside for values in profiles[record.user].values() for value in values)
        assert "{" not in record.text
    assert all(len(values) == 1 for profile in profiles.values() for values in profile.values())
    assert len(profiles) == 40


def test_the_seed_decides_everything():
    first, again, other = (list(customer_records(10, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_number_of_messages_has_a_heavy_tail():
    counts = np.array(sorted(collections.Counter(r.user for r in customer_records(800, seed=0)).values()))
    assert 8 < counts.mean() < 16
    assert counts[-8:].sum() > 4 * 8 * counts.mean()  # the top one per cent
    assert counts.max() <= 200


def test_files_are_written_once_and_never_over_another(tmp_path):
    path = tmp_path / "customers.jsonl"
    num_records = write_customers(path, customer_records(5, seed=0))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == num_records
    assert rows[0].keys() == {"user", "text", "spans"}
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        write_customers(path, customer_records(5, seed=1))
    assert path.read_bytes() == before


def test_all_faults_of_the_arguments_at_once():
    with pytest.raises(ConfigError) as caught:
        list(customer_records(0, seed=0, tail=1.0))
    assert [fault.path for fault in caught.value.faults] == ["num_users", "tail"]
