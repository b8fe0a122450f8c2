"""Canaries and sealed coins: training uses exactly what was sealed, and nobody's coin depends on anybody else."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from scipy import stats

from privtrain.config import load_config
from privtrain.config.canaries import CanariesSection
from privtrain.config.load import validate
from privtrain.config.model import ModelSection
from privtrain.data.canaries import canaries_of, digits_of, draw_canaries, draw_secret, plant, shuffled_samples
from privtrain.data.corpus import group_by_user
from privtrain.data.encode import Encoder
from privtrain.data.manifest import draw_split, needs_tokenizer, read_sealed
from privtrain.data.split import split_users
from privtrain.data.units import build_units
from privtrain.errors import ConfigError, PlanMismatch
from privtrain.models.load import load_tokenizer
from privtrain.privacy.secret import SecretKey
from tests.conftest import write_config
from tests.privtrain.test_data import corpus_of, section


@pytest.fixture(scope="module")
def tokenizer(tiny_llama):
    return load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))


KEY = SecretKey.insecure(3, "root")


def split_with(corpus, canaries, tokenizer=None, key=KEY, **data):
    drawn = draw_canaries(corpus, canaries, tokenizer, key)
    return split_users(corpus, section("x", **data), key, drawn)


def test_canary_coins_are_fair_independent_and_their_own():
    corpus, planted = corpus_of(20), CanariesSection(num_users=2000)
    split = split_with(corpus, planted, held_out_fraction=0.1)
    is_out = np.array([canary.user in set(split.held_out) for canary in split.canaries])
    assert stats.binomtest(int(is_out.sum()), 2000, 0.5).pvalue > 1e-3
    # Independent: neighbours in number agree half of the time, and another key flips other coins.
    assert stats.binomtest(int((is_out[1:] == is_out[:-1]).sum()), 1999, 0.5).pvalue > 1e-3
    other = split_with(corpus, planted, key=SecretKey.insecure(4, "root"))
    assert not {canary.user for canary in other.canaries} & {canary.user for canary in split.canaries}
    assert not {canary.secret for canary in other.canaries} & {canary.secret for canary in split.canaries}
    # Nobody else's coin moves because of them.
    plain = split_users(corpus, section("x", held_out_fraction=0.1), KEY)
    names = {canary.user for canary in split.canaries}
    assert set(plain.held_out) == set(split.held_out) - names
    assert dict(plain.training) == {user: i for user, i in split.training.items() if user not in names}
    assert (plain.attacker, plain.evaluation) == (split.attacker, split.evaluation)


def test_template_canaries_repeat_uniform_digits_by_tier():
    canaries = draw_canaries(corpus_of(2), CanariesSection(num_users=600, repetitions=[1, 4, 16]), None, KEY)
    for number, canary in enumerate(canaries):
        assert canary.repetitions == len(canary.records) == (1, 4, 16)[number % 3]
        assert set(canary.records) == {canary.prefix + canary.secret}
        assert re.fullmatch(r"The code of [A-Z][a-z]{5} [A-Z][a-z]{5} is \d{4} \d{4}", canary.records[0])
    digits = [int(letter) for canary in canaries for letter in canary.secret.replace(" ", "")]
    assert stats.chisquare(np.bincount(digits, minlength=10)).pvalue > 1e-3
    assert len({canary.prefix for canary in canaries}) == 600
    assert digits_of(7, 6) == "0000 07"


def test_random_tokens_survive_as_text(tokenizer):
    (canary,) = draw_canaries(
        corpus_of(2), CanariesSection(kind="random_tokens", num_users=1, num_tokens=12), tokenizer, KEY
    )
    assert tokenizer.decode(tokenizer(canary.secret, add_special_tokens=False)["input_ids"]) == canary.secret
    assert len(canary.secret) == 12  # one token a byte
    assert draw_secret(CanariesSection(kind="random_tokens"), tokenizer, KEY.stream("x")) != canary.secret


SHARED = CanariesSection(kind="shared_substring", user_fraction=0.5, num_tokens=4)


def test_a_shared_substring_is_the_users_own_and_in_every_record(tokenizer):
    corpus = corpus_of(200)
    canaries = draw_canaries(corpus, SHARED, tokenizer, KEY)
    assert stats.binomtest(len(canaries), 200, 0.5).pvalue > 1e-3
    planted = plant(corpus, canaries)
    assert len(planted.records) == len(corpus.records)
    assert planted.manifest_sha256 == corpus.manifest_sha256
    for canary in canaries:
        texts = corpus.records[canary.user]
        assert any(canary.secret in text for text in texts)
        assert len(canary.records) == len(texts) == canary.repetitions
        for was, now in zip(texts, canary.records, strict=True):
            assert sorted(now.split(" ")) == sorted([*was.split(" "), *canary.secret.split(" ")])
    untouched = set(corpus.records) - {canary.user for canary in canaries}
    assert all(planted.records[user] == corpus.records[user] for user in untouched)


def test_one_user_more_changes_no_other_users_records(tokenizer):
    """What keeps neighbouring data sets neighbours: choice, substring and places are functions of one user."""
    for number in (150, 200):
        found = {canary.user: canary for canary in draw_canaries(corpus_of(number), SHARED, tokenizer, KEY)}
        if number == 150:
            fewer = found
    assert {user: canary for user, canary in found.items() if int(user[1:]) < 150} == fewer


def test_canary_records_reach_the_units_as_written(tokenizer):
    corpus, encoder = corpus_of(20), Encoder(section("x", max_length=80), tokenizer)
    for planted in (CanariesSection(num_users=30), SHARED):
        split = split_with(corpus, planted, tokenizer)
        units = build_units(plant(corpus, split.canaries), split, encoder, unit="user")
        texts = {
            name: [tokenizer.decode(record.tokens[1:-1]) for record in records]
            for name, records in zip(units.names, units.records, strict=True)
        }
        held_in = [canary for canary in split.canaries if canary.user in split.training]
        assert 0 < len(held_in) < len(split.canaries)
        for canary in held_in:
            assert texts[canary.user] == [canary.records[i] for i in split.training[canary.user]]
        absent = [canary for canary in split.canaries if canary.user not in split.training]
        everything = " ".join(text for found in texts.values() for text in found)
        assert not any(canary.user in texts for canary in absent)
        if planted is not SHARED:
            assert not any(canary.secret in everything for canary in absent)


def test_a_canary_that_would_be_cut_is_refused(tree, tokenizer):
    tree["canaries"] = {"num_users": 3}
    config = validate(tree)
    with pytest.raises(ConfigError, match=r"data\.max_length: given 24, which cuts 3 canaries"):
        draw_split(config, corpus_of(5), tokenizer, KEY)
    assert not needs_tokenizer(config)


@pytest.mark.parametrize(
    ("canaries", "rest", "message"),
    [
        ({"kind": "shared_substring", "num_users": 3}, {}, "give canaries.user_fraction"),
        ({"num_users": 3, "user_fraction": 0.1}, {}, "has no canaries.user_fraction"),
        ({"kind": "shared_substring", "user_fraction": 0.1}, {"privacy.unit": "example"}, "does not cover"),
        ({"num_users": 3}, {"data.format": "chat"}, "need data.format: text"),
        ({"num_users": 3, "repetitions": [0]}, {}, "canaries.repetitions"),
    ],
)
def test_what_canaries_cannot_be_is_said(tree, canaries, rest, message):
    tree["canaries"] = canaries
    for key, value in rest.items():
        part, name = key.split(".")
        tree[part][name] = value
    with pytest.raises(ConfigError, match=message):
        validate(tree)


def test_the_public_config_names_numbers_only(tree, tmp_path):
    tree["canaries"] = {"num_users": 3, "repetitions": [2]}
    config = load_config(write_config(tree, tmp_path / "c.yaml"))
    assert set(config.canaries.model_dump()) == set(CanariesSection.model_fields)


def test_a_sealed_file_that_was_altered_is_refused(tmp_path):
    corpus = corpus_of(4)
    manifest = split_with(corpus, CanariesSection(num_users=2)).manifest(corpus)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(manifest))
    assert canaries_of(read_sealed(path)) == canaries_of(manifest)
    for text in (json.dumps(manifest | {"held_out": []}), "{}", "no json", "[]"):
        path.write_text(text)
        with pytest.raises(PlanMismatch, match="does not match its seal"):
            read_sealed(path)


def test_an_id_like_a_canarys_is_refused():
    (canary,) = draw_canaries(corpus_of(1), CanariesSection(num_users=1), None, KEY)
    with pytest.raises(ConfigError, match="must not start with 'canary-'"):
        draw_canaries(group_by_user([(canary.user, "x")]), CanariesSection(num_users=1), None, KEY)


def test_deduplication_treats_canaries_as_users(tree):
    tree["canaries"] = {"num_users": 40, "repetitions": [4]}
    tree["data"] |= {"max_length": 64, "deduplicate": "within_user"}
    split = draw_split(validate(tree), corpus_of(5), None, KEY)
    assert {len(canary.records) for canary in split.canaries} == {1}
    assert {len(split.training[c.user]) for c in split.canaries if c.user in split.training} == {1}


def word_tokenizer(num_words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0, **{f"w{number}": number + 1 for number in range(num_words)}}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>")


NEW = CanariesSection(kind="new_tokens", num_users=20, num_tokens=3)


def test_new_tokens_are_rare_and_each_canarys_own():
    """Data decide nothing of them: a canary that depended on somebody's words would be no independent user."""
    words = word_tokenizer(200)
    canaries = draw_canaries(corpus_of(2), NEW, words, KEY)
    assert canaries == draw_canaries(corpus_of(30), NEW, words, KEY)
    ids = [token for canary in canaries for token in words(canary.secret)["input_ids"]]
    assert sorted(ids) == list(range(141, 201))
    assert all(len(words(canary.records[0])["input_ids"]) == 3 for canary in canaries)
    other = draw_canaries(corpus_of(2), NEW, words, SecretKey.insecure(4, "root"))
    assert {canary.secret for canary in other} != {canary.secret for canary in canaries}


def test_too_small_a_vocabulary_for_new_tokens_is_refused():
    with pytest.raises(ConfigError, match=r"60 tokens .* has 50"):
        draw_canaries(corpus_of(2), NEW, word_tokenizer(50), KEY)


def samples_section(path, num_users=5):
    return CanariesSection(kind="samples", num_users=num_users, samples_file=path)


def test_samples_are_planted_once_each_and_the_rest_compared(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(f"text {number}") + "\n" for number in [*range(12), 3]))
    section = samples_section(path)
    canaries = draw_canaries(corpus_of(2), section, None, KEY)
    planted = [canary.secret for canary in canaries]
    assert len(set(planted)) == 5
    assert shuffled_samples(section, KEY)[:5] == planted
    assert sorted(shuffled_samples(section, KEY)) == sorted(f"text {number}" for number in range(12))
    assert all(set(canary.records) == {canary.secret} for canary in canaries)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('"a"\n"b"\n', "holds 2 different texts; expected at least num_users = 5"),
        ("a\n", "one JSON string a line"),
        ('{"text": "a"}\n', "no text"),
        ('" "\n', "no text"),
    ],
)
def test_faulty_sample_files_are_refused_by_key(tmp_path, content, problem):
    path = tmp_path / "samples.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        draw_canaries(corpus_of(2), samples_section(path), None, KEY)
    with pytest.raises(ConfigError, match="cannot be read"):
        draw_canaries(corpus_of(2), samples_section(tmp_path / "missing"), None, KEY)


@pytest.mark.parametrize("fields", [{"kind": "samples", "num_users": 2}, {"samples_file": "x"}])
def test_samples_and_their_file_come_together(fields):
    assert any("samples_file" in text for text in CanariesSection.model_construct(**fields).conflicts())


def test_gradient_canaries_own_records_unless_each_is_a_unit():
    section = CanariesSection(num_gradient_users=6, repetitions=[1, 4, 16])
    of_users, of_examples = (draw_canaries(corpus_of(2), section, None, KEY, unit) for unit in ("user", "example"))
    assert [len(canary.records) for canary in of_users] == [1, 4, 16, 1, 4, 16]
    assert [len(canary.records) for canary in of_examples] == [1] * 6
    assert [canary.user for canary in of_users] == [canary.user for canary in of_examples]


def test_gradient_canaries_have_coins_of_their_own_beside_others():
    plain, both = (CanariesSection(num_users=4, num_gradient_users=n) for n in (0, 300))
    split = split_with(corpus_of(20), both)
    directions = [canary for canary in split.canaries if not canary.is_text]
    assert split.canaries[:4] == draw_canaries(corpus_of(20), plain, None, KEY)
    assert len(directions) == len({canary.user for canary in split.canaries}) - 4 == 300
    num_out = sum(canary.user in set(split.held_out) for canary in directions)
    assert stats.binomtest(num_out, 300, 0.5).pvalue > 1e-3
