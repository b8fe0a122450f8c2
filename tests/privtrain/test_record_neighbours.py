"""Where ε is for one record, a record more changes nothing of what is trained on of its user but itself."""

from __future__ import annotations

import pytest
from scipy import stats

from privtrain.config.load import validate
from privtrain.data import manifest
from privtrain.data.corpus import Corpus, group_by_user
from privtrain.data.manifest import draw_split
from privtrain.errors import ConfigError
from privtrain.privacy.secret import SecretKey

KEY = SecretKey.insecure(0, "root")


def records_config(tree, privacy=None, **data):
    """A configuration whose ε is for one record."""
    section = {"unit": "example", "records_per_user": None, "target_epsilon": 2.0} | (privacy or {})
    kept = {key: value for key, value in tree["privacy"].items() if key not in (*section, "noise_multiplier")}
    return validate({**tree, "privacy": kept | section, "data": tree["data"] | {"held_out_fraction": 0.3} | data})


def corpus_of(sizes) -> Corpus:
    return group_by_user((f"u{user:03}", f"text {user} {i}") for user, n in enumerate(sizes) for i in range(n))


def trained(config, corpus: Corpus) -> set[tuple[str, int]]:
    return {(user, i) for user, indices in draw_split(config, corpus, None, KEY).training.items() for i in indices}


def num_changed_beside(config) -> int:
    """How many other records are trained on, or no longer, as each of some users gets one record more."""
    sizes = [1 + user % 9 for user in range(60)]
    before = trained(config, corpus_of(sizes))
    after = trained(config, corpus_of([n + 1 for n in sizes]))
    new = {(f"u{user:03}", n) for user, n in enumerate(sizes)}
    assert after & new
    return len((before ^ after) - new)


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.7])
def test_a_record_more_changes_no_other_one(tree, fraction):
    assert num_changed_beside(records_config(tree, attack_fraction=fraction, attack_min_records=2)) == 0


def test_mutant_the_attackers_records_are_chosen_together(tree, monkeypatch):
    right = manifest.split_users
    monkeypatch.setattr(manifest, "split_users", lambda *arguments, **_: right(*arguments))
    assert num_changed_beside(records_config(tree, attack_fraction=0.2, attack_min_records=2)) > 0


def test_each_record_is_set_aside_by_a_fair_coin(tree):
    config, corpus = records_config(tree, attack_fraction=0.3), corpus_of([1, 2, 3, 8] * 200)
    split = draw_split(config, corpus, None, KEY)
    kept = sum(map(len, split.training.values()))
    of_held_in = sum(len(texts) for user, texts in corpus.records.items() if user not in split.held_out)
    assert stats.binomtest(kept, of_held_in, 0.7).pvalue > 1e-3
    assert all(split.training.values())
    nowhere = set(corpus.records) - set(split.training) - set(split.held_out)
    assert nowhere
    assert not nowhere & set(split.attacker)
    for user, indices in split.attacker.items():
        assert 0 < len(indices) < len(corpus.records[user])
        assert not set(indices) & set(split.training.get(user, ()))


@pytest.mark.parametrize("how", ["none", "mixture"])
def test_users_keep_the_rule_of_users(tree, how):
    """ε for a user covers all that is made of the user's records together."""
    privacy = {"unit": "user"} if how == "none" else {"user_accounting": how, "records_per_user": 9}
    assert num_changed_beside(records_config(tree, privacy, attack_fraction=0.2, attack_min_records=2)) > 0


@pytest.mark.parametrize(
    ("privacy", "data", "message"),
    [
        ({"records_per_user": 3}, {}, "push another one out"),
        ({"records_per_user": 3, "selection": "longest"}, {}, "push another one out"),
        ({"records_per_user": 3, "selection": "random_chunk"}, {}, "push another one out"),
        ({}, {"deduplicate": "within_user"}, "take another one's place"),
    ],
)
def test_records_that_decide_on_one_another_are_refused(tree, privacy, data, message):
    with pytest.raises(ConfigError, match=message):
        records_config(tree, privacy, **data)
    without_noise = {"target_epsilon": None, "noise_multiplier": 0}
    of_users = {"user_accounting": "mixture", "records_per_user": 3}
    for accepted in (without_noise, of_users, {"unit": "user"}):
        records_config(tree, privacy | accepted, **data)
