"""Public texts by author in packages: who a row's user is, and that other packages than the known are refused."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
from typing import Any

import pytest

from privtrain.config.data import DataSection
from privtrain.data import corpus, packaged
from privtrain.data.fortunes import fortune_files, parse_fortunes, read_fortunes
from privtrain.data.packaged import PACKAGED
from privtrain.data.poems import VERSION, poem_files, read_poems
from privtrain.errors import ConfigError

SAYINGS = """\
A classic is something that everyone wants to have read
and nobody wants to read.
\t\t-- Mark Twain, "The Disappearance of Literature"
%
Nobody said this.
%
One.
\t\t-- Mark Twain

Two.
\t\t-- Jane Austen
%
Cafe\x08' and _\x08x.
\t\t-- H.  L. Mencken (1920),
\t\t   in a long note
%
First.
\t\t-- Jane Austen
and then more of it
%
Whoever.
\t\t-- Anonymous
%
"""


def test_a_saying_belongs_to_its_one_attribution():
    """Two attributions would make two people's words one person's record."""
    assert list(parse_fortunes(SAYINGS)) == [
        ("Mark Twain", "A classic is something that everyone wants to have read\nand nobody wants to read."),
        ("", "Nobody said this."),
        ("", "One.\n\t\t-- Mark Twain\n\nTwo.\n\t\t-- Jane Austen"),
        ("H. L. Mencken", "Cafe and x."),
        ("", "First.\n\t\t-- Jane Austen\nand then more of it"),
        ("", "Whoever."),
    ]


@pytest.fixture
def debian(tmp_path: pathlib.Path) -> pathlib.Path:
    """A root with the two packages, and a file of another package in the same directory."""
    directory = tmp_path / "usr/share/games/fortunes"
    directory.mkdir(parents=True)
    for name in ("literature", "literature.dat", "off-topic"):
        (directory / name).write_text(SAYINGS)
    lists = tmp_path / "var/lib/dpkg/info"
    lists.mkdir(parents=True)
    (lists / "fortunes.list").write_text("/.\n/usr/share/games/fortunes/literature\n")
    (lists / "fortunes-min.list").write_text("/usr/share/games/fortunes/literature.dat\n/usr/share/doc/fortunes-min\n")
    return tmp_path


def test_only_files_of_the_two_debian_packages_are_read(debian):
    assert [file.name for file in fortune_files(debian)] == ["literature"]
    assert len(list(read_fortunes(debian))) == 6


def test_missing_debian_packages_and_files_are_named(debian):
    (debian / "usr/share/games/fortunes/literature").unlink()
    with pytest.raises(ConfigError, match=r"literature; reinstall them"):
        fortune_files(debian)
    (debian / "var/lib/dpkg/info/fortunes.list").unlink()
    with pytest.raises(ConfigError, match=r"needs the Debian packages fortunes: apt-get install fortunes"):
        fortune_files(debian)


@pytest.fixture
def node(tmp_path: pathlib.Path) -> pathlib.Path:
    package = tmp_path / "node_modules" / "chinese-poetry"
    poems = package / "dist" / "quantangshi"
    poems.mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": VERSION}))
    rows: dict[str, list[dict[str, Any]]] = {
        "poet.tang.1000.json": [{"author": "無名氏", "title": "c", "paragraphs": ["3。"]}],
        "poet.tang.0.json": [{"author": " 李白", "title": "a", "paragraphs": ["1。", "2。"]}],
        "poet.song.0.json": [{"author": "李白", "title": "b", "paragraphs": []}],
        "authors.tang.json": [{"name": "李白", "desc": "no poem"}],
    }
    for name, poems_of_file in rows.items():
        (poems / name).write_text(json.dumps(poems_of_file), encoding="utf-8")
    return tmp_path / "node_modules"


def test_a_poet_is_a_user_and_nobody_is_none(node):
    assert list(read_poems([node])) == [("李白", "b"), ("李白", "a\n1。\n2。"), ("", "c\n3。")]


def test_missing_and_other_npm_packages_are_named(node, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=rf"npm install chinese-poetry@{VERSION}; looked in .*empty"):
        poem_files([tmp_path / "empty"])
    monkeypatch.setenv("NODE_PATH", str(node))
    assert len(poem_files()) == 3
    (node / "chinese-poetry" / "package.json").write_text(json.dumps({"version": "1.0.0"}))
    with pytest.raises(ConfigError, match=r"is 1\.0\.0"):
        poem_files([node])


@pytest.mark.parametrize("kind", PACKAGED)
def test_an_installed_package_gives_the_known_rows(kind):
    data_set = PACKAGED[kind]
    try:
        data_set.find()
    except ConfigError as error:
        pytest.skip(str(error))
    sizes = collections.Counter(user for user, text in data_set.rows() if user and text)
    assert (len(sizes), sizes.total()) == {
        "plays": (1_426, 31_354),
        "fortunes": (3_638, 7_309),
        "poems": (12_365, 309_833),
    }[kind]


def test_a_package_with_one_row_more_less_or_changed_is_refused(monkeypatch):
    """Each is a mutant of the installed package that a check of the number alone, or of a part, lets pass."""
    rows = [("al", "one"), ("bo", "two"), ("bo", "three")]
    digest = hashlib.sha256("".join(f"{field}\0" for field in itertools.chain(*rows)).encode()).hexdigest()
    known = dataclasses.replace(PACKAGED["plays"], find=list, read=lambda: iter(rows), num_rows=3, sha256=digest)
    assert list(known.rows()) == rows
    moved = [("al", "one"), ("bot", "wo"), ("bo", "three")]
    swapped = [rows[1], rows[0], rows[2]]
    for other in (rows[:2], [*rows, rows[0]], moved, swapped):
        installed = dataclasses.replace(known, read=lambda other=other: iter(other))
        with pytest.raises(ConfigError, match="Install that version"):
            list(installed.rows())
    monkeypatch.setitem(packaged.PACKAGED, "plays", dataclasses.replace(known, read=lambda: iter(moved)))
    with pytest.raises(ConfigError, match="Install that version"):
        corpus.load_corpus(DataSection.model_validate({"source": {"kind": "plays"}}))


def test_packaged_texts_that_name_nobody_are_left_out(monkeypatch):
    """Of Debian's fortunes they are more than half, and as unusable rows they would end the job."""
    rows = [("", "Nobody's."), ("al", "one"), ("", "Whoever's."), ("bo", ""), ("bo", "two")]
    digest = hashlib.sha256("".join(f"{field}\0" for field in itertools.chain(*rows)).encode()).hexdigest()
    known = dataclasses.replace(PACKAGED["plays"], find=list, read=lambda: iter(rows), num_rows=5, sha256=digest)
    monkeypatch.setitem(packaged.PACKAGED, "plays", known)
    loaded = corpus.load_corpus(DataSection.model_validate({"source": {"kind": "plays"}}))
    assert loaded.num_records == 2


@pytest.mark.parametrize("kind", ["fortunes", "poems"])
def test_a_missing_package_is_found_before_anything_starts(kind, monkeypatch):
    def absent() -> None:
        raise ConfigError([packaged.Fault("data.source.kind", "not there")])

    monkeypatch.setitem(packaged.PACKAGED, kind, dataclasses.replace(PACKAGED[kind], find=absent))
    (fault,) = corpus.check_source(DataSection.model_validate({"source": {"kind": kind}}))
    assert fault.problem == "not there"
    with pytest.raises(ValueError, match=f"{kind} needs data.format: text"):
        DataSection.model_validate({"source": {"kind": kind}, "format": "chat"})
