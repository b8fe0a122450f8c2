"""Which records of a user are trained on: at most k, by that user's own records alone."""

from __future__ import annotations

import dataclasses
import itertools
import json

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from privtrain.backends import LocalBackend
from privtrain.config import validate
from privtrain.config.data import DataSection
from privtrain.config.model import ModelSection
from privtrain.data.corpus import deduplicated, group_by_user
from privtrain.data.encode import Encoder
from privtrain.data.selection import Selection, check_contributions
from privtrain.data.split import split_users
from privtrain.data.units import build_units
from privtrain.errors import ConfigError, GuaranteeLost
from privtrain.inputs import read_inputs
from privtrain.job.train import train
from privtrain.models.load import load_tokenizer
from privtrain.privacy.secret import SecretKey
from privtrain.training import network, selecting
from tests.conftest import write_config

KEY = SecretKey.insecure(0, "root")
RANKED = ("longest", "shortest", "highest_perplexity", "lowest_perplexity")
CPU = torch.device("cpu")


def section(**changes) -> DataSection:
    return DataSection(source={"kind": "files", "paths": ["x.jsonl"]}, **changes)


@hypothesis.given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    losses=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=8, max_size=8),
    skipped=st.sets(st.integers(0, 7)),
    k=st.integers(1, 5),
    strategy=st.sampled_from(RANKED),
)
def test_ranked_selections_are_the_best_subset_by_brute_force(lengths, losses, skipped, k, strategy):
    texts = ["x" * n for n in lengths]
    indices = [i for i in range(len(texts)) if i not in skipped] or [0]
    by_user = {("u", i): loss for i, loss in enumerate(losses)}
    chosen = Selection(strategy, k, KEY).of_user("u", indices, texts, by_user)
    value = {
        "longest": lambda i: len(texts[i]),
        "shortest": lambda i: -len(texts[i]),
        "highest_perplexity": lambda i: losses[i],
        "lowest_perplexity": lambda i: -losses[i],
    }[strategy]
    assert set(chosen) <= set(indices)
    assert list(chosen) == sorted(set(chosen))
    assert len(chosen) == min(k, len(indices))
    best = max(sum(map(value, subset)) for subset in itertools.combinations(indices, len(chosen)))
    assert sum(map(value, chosen)) == pytest.approx(best)


def test_random_selection_is_uniform_and_stays_the_same():
    counts = np.zeros(6)
    for user in range(3000):
        chosen = Selection("random", 2, KEY).of_user(f"u{user}", range(6), ["x"] * 6, {})
        assert chosen == Selection("random", 2, KEY).of_user(f"u{user}", range(6), ["x"] * 6, {})
        counts[list(chosen)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)


@pytest.mark.parametrize("strategy", ["random", *RANKED])
def test_a_users_selection_does_not_depend_on_other_users(strategy):
    rows = [(f"u{u}", f"{'word ' * (1 + (u * i) % 7)}{i}") for u in range(40) for i in range(1 + u % 9)]
    losses = {(f"u{u}", i): float((u * 7 + i * 3) % 5) for u in range(40) for i in range(9)}
    chosen = []
    for known in (rows, [row for row in rows if int(row[0][1:]) % 2]):
        corpus = group_by_user(known)
        split = split_users(corpus, section(held_out_fraction=0.3), KEY)
        chosen.append(Selection(strategy, 3, KEY).applied(corpus, split, losses).training)
    assert all(len(indices) <= 3 for indices in chosen[0].values())
    assert any(len(indices) == 3 for indices in chosen[1].values())
    assert all(chosen[0][user] == indices for user, indices in chosen[1].items())


@pytest.mark.parametrize("unit", ["user", "example"])
def test_chunks_keep_every_token_once_and_hold_one_user(tiny_llama, unit):
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    encoder = Encoder(section(max_length=8), tokenizer)
    corpus = group_by_user([("a", "first text of a"), ("a", "second"), ("b", "only text of b, which is long")])
    split = dataclasses.replace(
        split_users(corpus, section(held_out_fraction=0.0, attack_fraction=0.0), KEY), training={"a": (0, 1), "b": (0,)}
    )
    whole = build_units(corpus, split, encoder, unit=unit, cut=Selection("random_chunk", None, KEY))
    for user in ("a", "b"):
        records = [r for o, rs in zip(whole.owners, whole.records, strict=True) if o == user for r in rs]
        assert all(len(record) <= 8 and record.is_target[1:].all() for record in records)
        text = b"".join(bytes(tokenizer.decode(record.tokens[1:]), "utf-8") for record in records).decode()
        assert text == "".join(text + "<end>" for text in corpus.records[user])
    capped = build_units(corpus, split, encoder, unit="example", cut=Selection("random_chunk", 2, KEY))
    assert [capped.owners.count(user) for user in ("a", "b")] == [2, 2]
    assert len(set(capped.names)) == len(capped)
    known = {record.tokens.tobytes() for records in whole.records for record in records}
    assert {record.tokens.tobytes() for (record,) in capped.records} <= known


texts = st.lists(st.sampled_from(["a b", "a  b", " a b\n", "ab", "c", "a b c"]), min_size=1, max_size=8)


@hypothesis.given(by_user=st.dictionaries(st.sampled_from("xyz"), texts, min_size=1))
def test_deduplication_keeps_first_of_each_within_user(by_user):
    corpus = group_by_user((user, text) for user, found in by_user.items() for text in found)
    kept = deduplicated(corpus)
    for user, found in corpus.records.items():
        expected = []
        for text in found:
            if " ".join(text.split()) not in [" ".join(t.split()) for t in expected]:
                expected.append(text)
        assert kept.records[user] == tuple(expected)
        assert deduplicated(group_by_user((user, text) for text in found)).records[user] == kept.records[user]
    assert kept.counts.num_duplicates == corpus.num_records - kept.num_records
    assert kept.manifest_sha256 == corpus.manifest_sha256


def test_a_user_above_the_bound_is_refused_whatever_made_it(tmp_path, tree, monkeypatch, no_self_test):
    check_contributions(["a", "b", "a"], 2)
    with pytest.raises(GuaranteeLost, match=r"2 records in the training set, privacy\.records_per_user allows 1"):
        check_contributions(["a", "b", "a"], 1)
    tree["privacy"] |= {"unit": "example", "records_per_user": 2, "user_accounting": "mixture"}
    monkeypatch.setattr(Selection, "applied", lambda self, corpus, split, losses: split)  # a selection that forgets k
    with pytest.raises(GuaranteeLost, match="allows 2"):
        train(write_config(tree, tmp_path / "c.yaml"))


def _network_and_inputs(tree):
    config = validate(tree)
    inputs, backend = read_inputs(config), LocalBackend(CPU)
    return inputs, backend, network.load_network(config, backend)


def test_perplexity_is_of_base_model_and_record_alone(tree):
    inputs, backend, network = _network_and_inputs(tree)
    user = next(user for user, found in inputs.corpus.records.items() if len(found) > 5)
    wanted = [(user, index) for index in range(5)]
    found = selecting._scored(wanted, inputs.corpus, backend, network)
    for (_, index), loss in zip(wanted, found, strict=True):
        tokens = torch.from_numpy(network.encoder.encode([inputs.corpus.records[user][index]]).records[0].tokens)
        with torch.no_grad(), network.model.disable_adapter():
            expected = network.model(input_ids=tokens[None], labels=tokens[None]).loss
        assert loss == pytest.approx(float(expected), rel=1e-5)
    assert selecting._scored(wanted[3:4], inputs.corpus, backend, network) == found[3:4]


@pytest.mark.parametrize("unit", ["user", "example"])
def test_every_selection_bounds_every_user_in_a_run(tree, unit):
    how = "mixture" if unit == "example" else "none"
    tree["privacy"] |= {"unit": unit, "records_per_user": 2, "user_accounting": how}
    inputs, backend, network = _network_and_inputs(tree)
    split = split_users(inputs.corpus, inputs.config.data, KEY)
    sizes = {user: len(indices) for user, indices in split.training.items()}
    for strategy in ("random", "random_chunk", *RANKED):
        plan = dataclasses.replace(inputs.plan, selection=strategy)
        chosen = dataclasses.replace(inputs, plan=plan)
        units = selecting.select_units(chosen, backend, network, split, KEY, cache=None)
        assert set(units.owners) == set(sizes)
        if unit == "example":
            assert max(map(units.owners.count, units.owners)) == 2
        elif strategy in RANKED:
            assert max(map(len, units.records)) == 2
        else:
            assert max(map(len, units.records)) > 2, "k of them are drawn afresh in every step"
        if strategy != "random_chunk":
            kept = {
                user: sum(map(len, (i for o, i in zip(units.owners, units.indices, strict=True) if o == user)))
                for user in sizes
            }
            bound = None if unit == "user" and strategy == "random" else 2
            assert kept == {user: min(size, bound or size) for user, size in sizes.items()}


def test_a_resumed_run_keeps_the_records_that_it_began_with(tree, tmp_path):
    tree["privacy"] |= {"unit": "example", "records_per_user": 2, "user_accounting": "mixture"}
    tree["privacy"]["selection"] = "lowest_perplexity"
    inputs, backend, network = _network_and_inputs(tree)
    split = split_users(inputs.corpus, inputs.config.data, KEY)
    cache = tmp_path / "base_losses.json"
    units = selecting.select_units(inputs, backend, network, split, KEY, cache=cache)
    values = json.loads(cache.read_text())["losses"]
    assert cache.stat().st_mode & 0o777 == 0o600
    cache.write_text(json.dumps({"losses": [[u, i, -loss] for u, i, loss in values]}))
    other = selecting.select_units(inputs, backend, network, split, KEY, cache=cache, has_begun=True)
    assert units.names != other.names, "the kept losses decide"
    cache.unlink()
    with pytest.raises(GuaranteeLost, match="is gone"):
        selecting.select_units(inputs, backend, network, split, KEY, cache=cache, has_begun=True)


@pytest.mark.parametrize(
    ("privacy", "data", "message"),
    [
        ({"selection": "random_chunk"}, {"format": "chat"}, "needs data.format: text"),
        ({"selection": "lowest_perplexity"}, {"format": "classification", "labels": [0, 1]}, "has no perplexity"),
        ({"selection": "longest", "unit": "example", "records_per_user": None}, {}, "selects privacy.records_per_user"),
    ],
)
def test_selections_that_make_no_sense_are_refused(tree, privacy, data, message):
    tree["privacy"] |= privacy
    tree["data"] |= data
    with pytest.raises(ConfigError, match=message):
        validate(tree)
