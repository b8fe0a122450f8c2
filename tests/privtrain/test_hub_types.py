"""A row more of one user changes nothing of how others' rows are read, also of a data set by name."""

from __future__ import annotations

import json
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from privtrain.config.data import DataSection
from privtrain.data import rows
from privtrain.data.corpus import load_corpus
from privtrain.errors import ConfigError

_NEW = "a new user"


def turns(user: str, paid: float, day: str) -> str:
    talk = [{"role": "assistant", "content": "ok", "paid": paid, "day": day}]
    return json.dumps({"user": user, "messages": talk}) + "\n"


_CSV = "user,text\n007,bond\n7,seven\n"
_CHATS = turns("a", 5, "2020-01-01") + turns("b", 7, "2020-01-02")

#: File → its rows, and those of a new user.
_GUESSED = [
    ("rows.csv", _CSV, f"{_NEW},words\n"),
    ("rows.jsonl", _CHATS, turns(_NEW, 5.5, "2020-01-01")),
    ("rows.jsonl", _CHATS, turns(_NEW, 5, "soon")),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def read(directory: pathlib.Path, file: str, content: str, kind: str) -> dict[str, list[str]]:
    directory.mkdir()
    (directory / file).write_text(content)
    places = {"hub": {"name": str(directory)}, "files": {"paths": [str(directory / file)]}}
    form = {} if file.endswith(".csv") else {"format": "chat"}
    data = DataSection.model_validate({"source": {"kind": kind, **places[kind]}, **form})
    return {user: list(texts) for user, texts in load_corpus(data).records.items() if user != _NEW}


def others_stay(tmp_path: pathlib.Path, case: tuple[str, str, str], kind: str) -> bool:
    file, content, more = case
    return read(tmp_path / "d", file, content, kind) == read(tmp_path / "d1", file, content + more, kind)


@pytest.mark.parametrize("case", _GUESSED)
def test_a_row_more_changes_no_others_of_files(tmp_path, case):
    assert others_stay(tmp_path, case, "files")


@pytest.mark.parametrize("case", _GUESSED)
def test_types_guessed_from_all_rows_are_refused(tmp_path, case):
    with pytest.raises(ConfigError, match="files, which guesses nothing") as refused:
        others_stay(tmp_path, case, "hub")
    assert "bond" not in str(refused.value)


@pytest.mark.parametrize("case", _GUESSED)
def test_mutant_guessed_types_change_others(tmp_path, case, monkeypatch):
    monkeypatch.setattr(rows, "_TYPED_BUILDERS", ("csv", "json"))
    assert not others_stay(tmp_path, case, "hub")


def test_typed_columns_are_read_as_written(tmp_path):
    table = pyarrow.table({"user": ["007", "7"], "text": ["bond", "seven"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    data = DataSection.model_validate({"source": {"kind": "hub", "name": str(tmp_path)}})
    assert dict(load_corpus(data).records) == {"007": ("bond",), "7": ("seven",)}
