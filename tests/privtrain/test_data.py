"""Rows to users: what is kept, what is dropped and counted, and sealed coins."""

from __future__ import annotations

import csv

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from scipy import stats

from privtrain.config.data import DataSection
from privtrain.config.model import ModelSection
from privtrain.data.corpus import group_by_user, load_corpus
from privtrain.data.encode import Encoder
from privtrain.data.manifest import used_facts
from privtrain.data.plays import parse_play, read_plays
from privtrain.data.split import seal, split_users
from privtrain.data.units import UnitData, build_units
from privtrain.errors import ConfigError
from privtrain.models.load import load_tokenizer
from privtrain.privacy.secret import SecretKey

ROWS = [
    ("bo", "one"),
    ("al", "two "),
    (None, "lost"),
    ("", "lost"),
    ("bo", "  "),
    ("bo", None),
    (float("nan"), "lost"),
    (7, "x"),
]


def test_unusable_rows_are_dropped_and_counted():
    corpus = group_by_user(ROWS)
    assert corpus.records == {"7": ("x",), "al": ("two",), "bo": ("one",)}
    assert (corpus.counts.num_rows, corpus.counts.num_without_user, corpus.counts.num_empty) == (8, 3, 2)


def test_no_usable_row_is_an_error():
    with pytest.raises(ConfigError, match="no usable row among 1"):
        group_by_user([("", "x")])


def section(path, **changes) -> DataSection:
    return DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}, **changes})


def test_csv_jsonl_and_parquet_give_the_same_corpus(tmp_path):
    rows = [("al", "one, two"), ("bo", 'say "hi"\nthere'), ("al", "three")]
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("user", "text"), *rows])
    (tmp_path / "a.jsonl").write_text(
        "".join(__import__("json").dumps({"user": u, "text": t}) + "\n" for u, t in rows), encoding="utf-8"
    )
    pa.parquet.write_table(
        pa.table({"user": [u for u, _ in rows], "text": [t for _, t in rows]}), tmp_path / "a.parquet"
    )
    digests = {load_corpus(section(tmp_path / f"a.{kind}")).manifest_sha256 for kind in ("csv", "jsonl", "parquet")}
    assert len(digests) == 1
    assert load_corpus(section(tmp_path / "*.csv")).num_records == 3


def test_a_damaged_file_is_a_clear_error(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"not parquet")
    with pytest.raises(ConfigError, match="cannot read"):
        load_corpus(section(tmp_path / "x.parquet"))


def test_the_digest_sees_every_record_and_owner():
    base = group_by_user([("a", "x"), ("b", "y")]).manifest_sha256
    for rows in (
        [("a", "xy"), ("b", "")],
        [("ab", "x"), ("b", "y")],
        [("a", "x"), ("a", "y")],
        [("a", "y"), ("b", "x")],
    ):
        assert group_by_user(rows).manifest_sha256 != base


def corpus_of(num_users: int):
    return group_by_user((f"u{u}", f"text {u} {i}") for u in range(num_users) for i in range(1 + u % 12))


def test_coins_are_fair_independent_and_sealed():
    corpus, key = corpus_of(2000), SecretKey.insecure(0, "root")
    data = section("x", held_out_fraction=0.5, attack_min_records=5, attack_fraction=0.2, attack_max_records=2)
    split = split_users(corpus, data, key)
    assert stats.binomtest(len(split.held_out), 2000, 0.5).pvalue > 1e-3
    assert set(split.training) | set(split.held_out) == set(corpus.records)
    assert not set(split.training) & set(split.held_out)
    assert split_users(corpus, data, key) == split
    for user, indices in split.attacker.items():
        assert len(corpus.records[user]) >= 5
        assert 1 <= len(indices) <= 2
        assert not set(indices) & set(split.training.get(user, ()))
    assert all(len(indices) >= 1 for indices in split.training.values())
    assert all(i not in split.attacker.get(u, ()) and u in split.held_out for u, i in split.evaluation)
    manifest = split.manifest(corpus)
    assert manifest["sha256"] == seal({k: v for k, v in manifest.items() if k != "sha256"})


def test_one_users_coin_does_not_depend_on_the_others():
    key, data = SecretKey.insecure(0, "root"), section("x", held_out_fraction=0.5)
    few, many = (split_users(corpus_of(n), data, key) for n in (50, 100))
    assert {u for u in many.held_out if int(u[1:]) < 50} == set(few.held_out)


def test_units_are_users_or_examples(tiny_llama):
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    corpus = corpus_of(30)
    split = split_users(corpus, section("x", held_out_fraction=0.3), SecretKey.insecure(0, "root"))
    encoder = Encoder(section("x", max_length=64), tokenizer)
    users = build_units(corpus, split, encoder, unit="user")
    assert list(users.names) == list(split.training)
    examples = build_units(corpus, split, encoder, unit="example")
    assert len(examples) == sum(map(len, users.records))
    assert all(len(records) == 1 for records in examples.records)


def test_tokens_are_marked_cut_and_counted(tiny_llama):
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    encoded = Encoder(section("x", max_length=10), tokenizer).encode(["ab", "x" * 50])
    short, long = (record.tokens for record in encoded.records)
    assert (encoded.num_truncated, encoded.num_without_target) == (1, 0)
    assert (len(short), len(long)) == (4, 10)
    assert short[0] == short[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(short[1:-1]) == "ab"


PLAY = """# The Test

## ACT I

### SCENE I. A heath.

_Enter two KINGS_

**KING  ONE**  
Speak,  
my friend.

_They fight_

**SECOND KING**  
_\\[Aside]_  
I will not.

### SCENE II. The same.

_Enter nobody_

**KING  ONE**  
*Exeunt*
"""


def test_speeches_are_records_without_stage_directions():
    assert list(parse_play("test", PLAY)) == [
        ("test/KING ONE", "Speak,\nmy friend."),
        ("test/SECOND KING", "I will not."),
        ("test/KING ONE", ""),
    ]


def test_the_plays_have_over_a_thousand_users_with_a_heavy_tail():
    corpus = group_by_user(read_plays())
    sizes = np.sort([len(texts) for texts in corpus.records.values()])
    assert len(sizes) > 1000
    assert sizes[-1] > 20 * np.median(sizes)
    assert "hamlet/HORATIO" in corpus.records


def test_user_ids_are_taken_as_written(tmp_path):
    """Guessed types would read 001 as 1 in one file and as text in another: two units, twice the sensitivity."""
    (tmp_path / "a.csv").write_text("user,text\n001,11\n002,22\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text("user,text\n001,33\nX1,44\n", encoding="utf-8")
    corpus = load_corpus(section(tmp_path / "*.csv"))
    assert corpus.records == {"001": ("11", "33"), "002": ("22",), "X1": ("44",)}


@pytest.mark.parametrize("bad", [7.0, True, ["a"]])
def test_ids_that_could_be_written_in_two_ways_are_refused(bad):
    with pytest.raises(ConfigError, match="neither text nor a whole number"):
        group_by_user([(bad, "x")])


def test_an_id_that_no_file_can_hold_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"user": "b\\ud800", "text": "x"}\n', encoding="utf-8")
    for index in (None, tmp_path / "index"):
        with pytest.raises(ConfigError, match="half of a surrogate pair") as refusal:
            load_corpus(section(tmp_path / "a.jsonl"), index)
        str(refusal.value).encode()


NAME, TEXT = "zaphod-42", "my own secret words"

#: File name, content, and what the error must say.
BAD_FILES = {
    "a number as id": (
        "a.jsonl",
        f'{{"user": "a", "text": "x"}}\n{{"user": 3.25, "text": "{TEXT}"}}',
        "row 2",
    ),
    "a list as id": ("a.jsonl", f'{{"user": ["{NAME}"], "text": "{TEXT}"}}', "row 1"),
    "half a surrogate": ("a.jsonl", f'{{"user": "{NAME}\\ud800", "text": "{TEXT}"}}', "row 1"),
    "no JSON": ("a.jsonl", f'{{"user": "a", "text": "x"}}\n{{"user": "{NAME}", "text": "{TEXT}"', "line 2"),
    "two values in a line": ("a.jsonl", f'{{"user": "a", "text": "x"}}\n{{"user": "{NAME}"}} {{}}', "line 2"),
    "a line that is no object": ("a.jsonl", f'{{"user": "a", "text": "x"}}\n["{NAME}", "{TEXT}"]', "line 2"),
    "first line no object": ("a.jsonl", f'["{NAME}", "{TEXT}"]', "line 1"),
    "no header": ("a.csv", f"{NAME},{TEXT}\n", "first line, which must name the columns"),
    "an open quote": ("a.csv", f'user,text\na,x\n{NAME},"{TEXT}', "row 2"),
    "other bytes": ("a.csv", b"user,text\na,x\n" + NAME.encode() + b",\xe9" + TEXT.encode(), "UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.parametrize("is_indexed", [False, True])
def test_an_error_names_file_and_row_and_never_a_value(tmp_path, kind, is_indexed):
    name, content, says = BAD_FILES[kind]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as refusal:
        load_corpus(section(tmp_path / name), tmp_path / "index" if is_indexed else None)
    said = str(refusal.value)
    assert str(tmp_path / name) in said
    assert says in said
    assert not any(value in said for value in (NAME, TEXT, "3.25"))


def test_a_row_that_arrow_cannot_convert_is_not_shown(tmp_path):
    """Its own message quotes the value."""
    import pyarrow
    import pyarrow.parquet

    value = 2**55 + 12345  # a time past the year 9999
    column = pyarrow.array([value], pyarrow.timestamp("ms"))
    pyarrow.parquet.write_table(pyarrow.table({"user": ["a"], "text": column}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="in or after row 1") as refusal:
        load_corpus(section(tmp_path / "a.parquet"))
    assert str(value)[:6] not in str(refusal.value)


def test_a_column_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("user,text,user\n1,x,2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="stands twice"):
        load_corpus(section(tmp_path / "a.csv"))


def test_left_out_records_are_named_for_users_with_none_left():
    corpus = group_by_user([("a", "1"), ("a", "2"), ("b", "3"), ("c", "4")])
    split = split_users(corpus, section("x", held_out_fraction=0.0, attack_fraction=0.0), SecretKey.insecure(0, "root"))

    def units(*owners: tuple[str, tuple[int, ...]]) -> UnitData:
        names = tuple(owner for owner, _ in owners)
        return UnitData(names, ((),) * len(names), 0, indices=tuple(i for _, i in owners), owners=names)

    def left_out(*owners: tuple[str, tuple[int, ...]]):
        return used_facts(corpus, split, units(*owners), manifest_sha256="", records_per_unit=1)["left_out"]

    assert left_out(("a", (0, 1)), ("b", (0,)), ("c", (0,))) == {}
    assert left_out(("a", (1,)), ("c", (0,))) == {"a": [0], "b": [0]}
    assert left_out(("a", (1,)), ("a", (0,)), ("b", (0,))) == {"c": [0]}  # examples: two units of one user
    assert left_out() == {"a": [0, 1], "b": [0], "c": [0]}
    with pytest.raises(AssertionError, match="another order"):
        left_out(("c", (0,)), ("a", (0,)))
