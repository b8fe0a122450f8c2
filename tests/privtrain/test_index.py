"""Records on disk: the same corpus, digest, units and adapter as in memory, made once, closed to others."""

from __future__ import annotations

import json
import pathlib
import stat

import hypothesis
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from safetensors.torch import load_file

from privtrain.config import load_config
from privtrain.config.data import DataSection
from privtrain.data import index
from privtrain.data.corpus import load_corpus, load_evaluation, without_users
from privtrain.data.encode import Encoder
from privtrain.data.index import IndexedRecords, open_or_build
from privtrain.data.index_files import ARRAYS
from privtrain.data.split import split_users
from privtrain.data.units import build_units
from privtrain.data.units_on_disk import units_on_disk
from privtrain.errors import EXIT_WRONG_INPUT, ConfigError, DamagedFile, UnsafePath
from privtrain.job.train import train
from privtrain.models.load import load_tokenizer
from privtrain.privacy.secret import SecretKey
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")

USERS = ["al", "bo", "7", "007", "é", "z" * 40, "\U0001f600", "￮", "", " "]


def shards(directory: pathlib.Path, rows, num_shards: int = 3) -> pathlib.Path:
    for number in range(num_shards):
        part = rows[number::num_shards]
        table = pyarrow.table({"user": [r[0] for r in part], "text": [r[1] for r in part]})
        pyarrow.parquet.write_table(table, directory / f"part-{number}.parquet")
    return directory / "*.parquet"


def section(path: pathlib.Path, **changes) -> DataSection:
    return DataSection.model_validate({"source": {"kind": "files", "paths": [str(path)]}, **changes})


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    deduplicate=st.sampled_from(["none", "within_user"]),
    rows=st.lists(st.tuples(st.sampled_from(USERS) | st.none(), st.text(max_size=8)), max_size=40),
)
def test_it_is_the_corpus_that_memory_would_hold(tmp_path_factory, rows, deduplicate):
    directory = tmp_path_factory.mktemp("rows")
    data = section(shards(directory, [*rows, ("al", "one"), ("al", "one")]), deduplicate=deduplicate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "_ROWS_AT_ONCE", 7)
        in_memory, on_disk = load_corpus(data), load_corpus(data, directory / "index")
    assert list(on_disk.records.items()) == list(in_memory.records.items())
    assert [*on_disk.records] == [*in_memory.records]
    assert list(on_disk.records.values()) == list(in_memory.records.values())
    assert {user: on_disk.records[user] for user in in_memory.records} == in_memory.records
    assert (on_disk.manifest_sha256, on_disk.counts) == (in_memory.manifest_sha256, in_memory.counts)
    assert on_disk.num_records == in_memory.num_records
    assert on_disk.records["al"][-1] == in_memory.records["al"][-1]
    assert on_disk.records["al"][:2] == in_memory.records["al"][:2]
    for nobody in ("nobody", "", "zz"):
        assert nobody not in on_disk.records


def test_half_surrogates_in_texts_hash_as_in_memory(tmp_path):
    lines = [{"user": user, "text": text} for user in ("￿", "a", "\U00010000") for text in ("\udfff x", "y")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = section(tmp_path / "a.jsonl")
    in_memory, on_disk = load_corpus(data), load_corpus(data, tmp_path / "index")
    assert list(on_disk.records.items()) == list(in_memory.records.items())
    assert on_disk.manifest_sha256 == in_memory.manifest_sha256


def some_rows(num_users: int = 40):
    return [
        (f"user-{user:03d}", f"text {user} {record}") for user in range(num_users) for record in range(1 + user % 6)
    ]


def test_it_is_made_once_and_again_when_a_file_or_a_rule_changes(tmp_path, monkeypatch):
    data, built = section(shards(tmp_path, some_rows())), []
    build = index._build
    monkeypatch.setattr(index, "_build", lambda *arguments: built.append(0) or build(*arguments))
    first = load_corpus(data, tmp_path / "index")
    assert load_corpus(data, tmp_path / "index").manifest_sha256 == first.manifest_sha256
    assert len(built) == 1
    load_corpus(data.model_copy(update={"text_column": "user"}), tmp_path / "index")
    assert len(built) == 2
    shards(tmp_path, [*some_rows(), ("user-000", "late")])
    assert load_corpus(data, tmp_path / "index").manifest_sha256 != first.manifest_sha256
    assert len(built) == 3


def test_nobody_else_may_read_it_and_the_sorted_rows_are_gone(tmp_path):
    load_corpus(section(shards(tmp_path, some_rows())), tmp_path / "index")
    (directory,) = (path for path in (tmp_path / "index").iterdir() if path.is_dir())
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in directory.iterdir()} == {0o600}
    assert sorted(file.name for file in directory.iterdir()) == sorted(FILES)


def read_all(pattern: pathlib.Path, parent: pathlib.Path) -> None:
    """Open the index and read every user and record, as the split and the steps of a job do."""
    records = load_corpus(section(pattern), parent).records
    assert all(tuple(texts) for _, texts in records.items())


@pytest.fixture(scope="module")
def one_index(tmp_path_factory):
    """An index of a few users, which each test leaves as it was."""
    place = tmp_path_factory.mktemp("indexed")
    pattern = shards(place, [("al", "one"), ("bo", "two"), ("al", "three"), ("cy", "")])
    load_corpus(section(pattern), place / "index")
    (directory,) = (path for path in (place / "index").iterdir() if path.is_dir())
    return pattern, directory


FILES = ("index.json", "texts.bin", *ARRAYS)


@hypothesis.settings(max_examples=150)
@hypothesis.given(
    name=st.sampled_from(FILES),
    place=st.floats(0, 1),
    bits=st.integers(1, 255),
    how=st.sampled_from(["flip", "flip", "flip", "cut", "append", "swap", "remove", "link"]),
)
def test_an_index_with_any_other_byte_is_refused(one_index, name, place, bits, how):
    pattern, directory = one_index
    file, content = directory / name, (directory / name).read_bytes()
    index_of = int(place * (len(content) - 1))
    flipped = content[:index_of] + bytes([content[index_of] ^ bits]) + content[index_of + 1 :]
    swapped = content[index_of + 1 :] + content[: index_of + 1]
    changed = {"flip": flipped, "cut": content[:index_of], "append": content + b"\0", "swap": swapped}
    hypothesis.assume(changed.get(how) != content)
    try:
        if how in changed:
            file.write_bytes(changed[how])
        else:
            file.rename(directory.parent / "aside")
        if how == "link":
            file.symlink_to(directory.parent / "aside")
        with pytest.raises((DamagedFile, UnsafePath), match=name) as refused:
            read_all(pattern, directory.parent)
        assert refused.value.exit_code == EXIT_WRONG_INPUT
        assert "\n" not in str(refused.value)
        assert not any(value in str(refused.value) for value in ("one", "two", "three"))
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        file.chmod(0o600)
        (directory.parent / "aside").unlink(missing_ok=True)
    read_all(pattern, directory.parent)


class Anything:
    """A digest that fits whatever is there."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("name", "digest", "before", "after"),
    [
        ("texts.bin", "privtrain.data.index.text_digest", b"two", b"owt"),
        ("users.bin", "privtrain.files.reading.sha256_of", b"bo", b"bp"),
        ("index.json", "privtrain.data.index_files._digest_of", b'"num_rows": 4', b'"num_rows": 5'),
    ],
)
def test_mutant_without_a_digest_reads_a_changed_file(one_index, monkeypatch, name, digest, before, after):
    pattern, directory = one_index
    file, content = directory / name, (directory / name).read_bytes()
    assert content.count(before) == 1
    try:
        file.write_bytes(content.replace(before, after))
        with pytest.raises(DamagedFile, match=name):
            read_all(pattern, directory.parent)
        monkeypatch.setattr(digest, lambda *_: Anything())
        read_all(pattern, directory.parent)
    finally:
        file.write_bytes(content)


def test_a_job_whose_index_is_damaged_ends_in_one_line(tree, tmp_path):
    """Also where the damage is met when a step draws the text, long after the index was opened."""
    tree["performance"] |= {"index_dir": str(tmp_path / "index")}
    path = write_config(tree, tmp_path / "c.yaml")
    load_corpus(load_config(path).data, tmp_path / "index")
    (texts,) = (tmp_path / "index").rglob("texts.bin")
    texts.write_bytes(bytes(byte ^ 1 for byte in texts.read_bytes()))
    with pytest.raises(DamagedFile, match=r"texts\.bin holds a text that is not as it was written.*is made again"):
        train(path)


def test_a_pass_that_fails_leaves_no_index(tmp_path):
    def rows(counts):
        yield "al", "one"
        raise ConfigError([])

    with pytest.raises(ConfigError):
        open_or_build(tmp_path, {}, rows)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    records = open_or_build(tmp_path, {}, lambda counts: [("al", "one")]).records
    assert {user: tuple(texts) for user, texts in records.items()} == {"al": ("one",)}


def test_users_who_opted_out_are_gone(tmp_path):
    data = section(shards(tmp_path, some_rows()))
    in_memory, on_disk = load_corpus(data), load_corpus(data, tmp_path / "index")
    dropped = ["user-000", "user-039", "user-017", "nobody"]
    left = without_users(on_disk, dropped)
    assert isinstance(left.records, IndexedRecords)
    assert list(left.records.items()) == list(without_users(in_memory, dropped).records.items())
    assert left.counts.num_users_opted_out == 3
    assert "user-017" not in left.records
    assert left.num_records == without_users(in_memory, dropped).num_records


@pytest.mark.parametrize("unit", ["user", "example"])
def test_units_on_disk_are_the_units_in_memory(tree, tmp_path, unit):
    data = section(shards(tmp_path, some_rows()), max_length=12)
    config = load_config(write_config(tree, tmp_path / "c.yaml"))
    encoder = Encoder(data, load_tokenizer(config.model))
    in_memory, on_disk = load_corpus(data), load_corpus(data, tmp_path / "index")
    key = SecretKey.insecure(0, "root")
    split = split_users(in_memory, data, key)
    assert split_users(on_disk, data, key) == split
    expected = build_units(in_memory, split, encoder, unit=unit)
    units = units_on_disk(on_disk, split, encoder, unit=unit)
    assert tuple(units.names) == expected.names
    assert tuple(units.indices) == expected.indices
    assert tuple(units.owners) == expected.owners
    assert units.num_records.tolist() == expected.num_records.tolist()
    drawn = [(u, range(count)) for u, count in enumerate(units.num_records.tolist())][::-2]
    for mine, theirs in zip(units.fetch(drawn), expected.fetch(drawn), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.is_target, b.is_target)
    assert units.sha256() == units_on_disk(on_disk, split, encoder, unit=unit).sha256()
    shorter = Encoder(data.model_copy(update={"max_length": 11}), load_tokenizer(config.model))
    assert units_on_disk(on_disk, split, shorter, unit=unit).sha256() != units.sha256()
    other = split_users(on_disk, data, SecretKey.insecure(1, "root"))
    assert units_on_disk(on_disk, other, encoder, unit=unit).sha256() != units.sha256()


def test_the_adapter_is_the_one_that_memory_gives(tree, tmp_path):
    for name, changes in (("memory", {}), ("disk", {"index_dir": str(tmp_path / "index")})):
        tree["run"]["name"] = name
        tree["performance"] |= changes
        train(write_config(tree, tmp_path / f"{name}.yaml"))
    runs = tmp_path / "runs"
    memory, disk = (load_file(runs / name / "adapter" / "adapter_model.safetensors") for name in ("memory", "disk"))
    assert all((value == disk[name]).all() for name, value in memory.items())
    identities = [json.loads((runs / name / "secret" / "identity.json").read_text()) for name in ("memory", "disk")]
    assert len({identity["fingerprint"] for identity in identities}) == 1
    assert "index" not in (runs / "disk" / "config.yaml").read_text()


@pytest.mark.parametrize("num_private", [0, 1, 3])
def test_private_evaluation_rows_are_found_on_disk(tmp_path, monkeypatch, num_private):
    """Also those of users who opted out, and wherever the digests are cut into chunks."""
    monkeypatch.setattr(index, "_DIGESTS_AT_ONCE", 7)
    rows = some_rows()
    public = ["public é", *(text for _, text in rows[:num_private])]
    pyarrow.parquet.write_table(pyarrow.table({"text": public}), tmp_path / "public.parquet")
    (tmp_path / "private").mkdir()
    evaluation = {"kind": "files", "paths": [str(tmp_path / "public.parquet")]}
    data = section(shards(tmp_path / "private", rows), evaluation=evaluation)
    on_disk = load_corpus(data, tmp_path / "index")
    without = without_users(on_disk, [user for user, _ in rows[:num_private]])
    found = []
    for corpus in (load_corpus(data), on_disk, without):
        try:
            assert load_evaluation(data, corpus) == tuple(public)
            found.append("")
        except ConfigError as error:
            found.append(str(error))
    assert found[0] == found[1] == found[2]
    assert ("records of data.source are among its rows" in found[0]) is (num_private > 0)


def test_sources_that_are_no_files_stay_in_memory(tmp_path):
    with pytest.raises(ConfigError, match=r"performance\.index_dir"):
        load_corpus(DataSection.model_validate({"source": {"kind": "plays"}}), tmp_path)
