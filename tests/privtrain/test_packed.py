"""Ids and indices in flat arrays: what the dictionaries and lists that they stand for would say; and the same coins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtrain.config.data import DataSection
from privtrain.data.canaries import Canary
from privtrain.data.corpus import group_by_user
from privtrain.data.packed import LazySequence, Names, UserIndices
from privtrain.data.selection import check_contributions
from privtrain.data.split import CANARY_COIN, split_users
from privtrain.errors import GuaranteeLost
from privtrain.privacy.secret import SecretKey

KEY = SecretKey.insecure(0, "root")
IDS = st.text(st.characters(), max_size=4) | st.sampled_from(["", "\ud800", "é", "￮", "\U0001f600"])


def partly_ordered(names: list[str], num_ordered: int) -> list[str]:
    """Some in order, as a corpus gives them, then others in none, as canaries come after it."""
    head = sorted(names, key=lambda name: name.encode("utf-8", "surrogatepass"))[:num_ordered]
    return head + [name for name in names if name not in head]


NAMES = st.builds(partly_ordered, st.lists(IDS, unique=True), st.integers(0, 20))


@given(names=NAMES)
def test_names_are_the_list_that_they_stand_for(names):
    packed = Names(names)
    assert list(packed) == names == [packed[i] for i in range(len(packed))]
    assert packed == tuple(names) == packed[:]
    assert [packed.place(name) for name in names] == list(range(len(names)))
    assert all(name in packed for name in names)
    assert packed.place("".join(names) + "x") is None
    assert packed[-1:] == tuple(names[-1:])
    with pytest.raises(IndexError):
        packed[len(names)]


@given(names=NAMES, data=st.data())
def test_indices_are_the_dictionary_that_they_stand_for(names, data):
    tuples = st.lists(st.integers(0, 2**40), max_size=4).map(tuple)
    plain = {name: data.draw(tuples) for name in names}
    packed = UserIndices(plain.items())
    assert packed == plain
    assert list(packed.items()) == list(plain.items())
    assert list(packed.values()) == [packed[name] for name in names] == [packed.at(i) for i in range(len(names))]
    assert packed.counts().tolist() == list(map(len, plain.values()))
    flat = [(place, index) for place, indices in enumerate(plain.values()) for index in indices]
    assert [packed.owner(number) for number in range(packed.num_indices)] == flat
    assert "".join(names) + "x" not in packed
    with pytest.raises(KeyError):
        packed["".join(names) + "x"]
    with pytest.raises(IndexError):
        packed.owner(packed.num_indices)
    assert UserIndices.of(packed) is packed


def test_a_property_of_each_is_found_when_it_is_asked_for():
    each = LazySequence(4, lambda number: number * number)
    assert (list(each), each[-1], each[1:3]) == ([0, 1, 4, 9], 9, (1, 4))
    with pytest.raises(IndexError):
        each[4]


def plain_split(corpus, data: DataSection, key: SecretKey, canaries):
    """The definition of the coins, written with dictionaries: every run so far was split by it."""
    training, held_out, attacker = {}, [], {}
    changed = {canary.user for canary in canaries if not canary.is_invented}
    for user, texts in corpus.records.items():
        stream = key.stream("split", user)
        is_held_out = stream.uniform(1)[0] < (CANARY_COIN if user in changed else data.held_out_fraction)
        taken = set()
        if data.attack_fraction > 0 and len(texts) >= data.attack_min_records:
            wanted = max(1, round(data.attack_fraction * len(texts)))
            taken = set(stream.choose(len(texts), min(wanted, data.attack_max_records, len(texts) - 1)))
        if taken:
            attacker[user] = tuple(sorted(taken))
        if is_held_out:
            held_out.append(user)
        else:
            training[user] = tuple(i for i in range(len(texts)) if i not in taken)
    open_users = [user for user in held_out if user not in changed]
    candidates = [(u, i) for u in open_users for i in range(len(corpus.records[u])) if i not in attacker.get(u, ())]
    chosen = key.stream("evaluation").choose(len(candidates), data.num_evaluation_records)
    for canary in canaries:
        if canary.is_invented and key.stream("split", canary.user).uniform(1)[0] < CANARY_COIN:
            held_out.append(canary.user)
        elif canary.is_invented:
            training[canary.user] = tuple(range(len(canary.records)))
    return training, held_out, attacker, tuple(candidates[i] for i in chosen)


@pytest.mark.parametrize("num_evaluation_records", [7, 10_000])
def test_the_split_is_the_one_that_earlier_runs_have(num_evaluation_records):
    rows = ((f"user-{user}", f"text {user} {i}") for user in range(500) for i in range(1 + user % 12))
    corpus = group_by_user(rows)
    data = DataSection.model_validate(
        {
            "source": {"kind": "files", "paths": ["x.jsonl"]},
            "held_out_fraction": 0.3,
            "num_evaluation_records": num_evaluation_records,
        }
    )
    invented = [Canary(f"canary-{9 - i}", "template", "", "1", 2, ("1", "1")) for i in range(10)]
    changed = [Canary(f"user-{i}", "shared_substring", "", "1", 2, ("1", "1")) for i in range(5)]
    for canaries in ((), (*invented, *changed)):
        split = split_users(corpus, data, KEY, canaries)
        training, held_out, attacker, evaluation = plain_split(corpus, data, KEY, canaries)
        assert list(split.training.items()) == list(training.items())
        assert list(split.held_out) == held_out
        assert list(split.attacker.items()) == list(attacker.items())
        assert split.evaluation == evaluation


def test_the_seal_of_a_split_is_pinned():
    """A manifest of a run that began with an earlier version must still be the one that its key gives."""
    corpus = group_by_user((f"u{user}", f"text {user} {i}") for user in range(40) for i in range(1 + user % 9))
    data = DataSection.model_validate({"source": {"kind": "files", "paths": ["x.jsonl"]}, "held_out_fraction": 0.5})
    assert (
        split_users(corpus, data, KEY).manifest(corpus)["sha256"]
        == "a9da30fd9c7cbf86e7f524ab7ee81aa3f266e53c9d65c71258cbc8fe1884abd4"
    )


@given(owners=st.lists(st.sampled_from("abcd"), max_size=12), most=st.integers(1, 5))
def test_who_owns_too_many_units_is_found_in_any_order(owners, most):
    counts = {owner: owners.count(owner) for owner in owners}
    if max(counts.values(), default=0) > most:
        with pytest.raises(GuaranteeLost, match=f"has {max(counts.values())} records"):
            check_contributions(owners, most)
    else:
        check_contributions(owners, most)


def test_ids_whose_hashes_clash_are_counted_apart():
    class Clashing(str):
        __slots__ = ()

        def __hash__(self) -> int:
            return 7

    check_contributions([Clashing(name) for name in "abcdef"], 1)
    with pytest.raises(GuaranteeLost, match="has 2 records"):
        check_contributions([Clashing(name) for name in "aabcdef"], 1)
