"""Files that are damaged, replaced or hostile: one line that names the file, whatever the fault and wherever it is."""

from __future__ import annotations

import json
import os
import pathlib
import stat

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtrain.errors import EXIT_WRONG_INPUT, DamagedFile, PrivtrainError
from privtrain.files import reading
from privtrain.files.atomic import write_json
from privtrain.files.private import make_private_directory
from privtrain.run import sealing
from privtrain.run.directory import RunDirectory

PRIVATE = "margaret-hamilton"
BODY = {"schema": "s/1", "name": PRIVATE, "numbers": [1, 2.5, -0.0], "nested": {"ü": None, "empty": []}}


def said(read, path: pathlib.Path) -> str:
    """What reading a bad file says: one line, exit code 2, the file in it and no value of it."""
    with pytest.raises(PrivtrainError) as caught:
        read(path)
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_WRONG_INPUT
    assert "\n" not in message
    assert path.name in message
    assert PRIVATE not in message
    return message


READERS = {
    "json": reading.read_json,
    "json lines": lambda path: list(reading.read_json_lines(path)),
    "yaml": reading.read_yaml,
}


@pytest.mark.parametrize("kind", READERS)
def test_what_is_no_file_is_named(tmp_path, kind):
    path = tmp_path / "evidence"
    assert "is missing" in said(READERS[kind], path)
    path.mkdir()
    assert "is a directory" in said(READERS[kind], path)
    path.rmdir()
    path.touch()
    assert "is empty" in said(READERS[kind], path)
    path.unlink()
    (tmp_path / "other").write_text("{}")
    path.symlink_to(tmp_path / "other")
    assert "is a link" in said(READERS[kind], path)
    path.unlink()
    path.symlink_to(path)
    said(READERS[kind], path)
    path.unlink()
    os.mkfifo(path)
    assert "is a pipe" in said(READERS[kind], path)
    assert "is missing" in said(READERS[kind], tmp_path / "other" / "evidence")


def test_permissions_and_size_are_named(tmp_path, monkeypatch):
    path = tmp_path / "evidence"
    path.write_text(json.dumps(BODY))
    assert "has 120 bytes; expected at most 100" in said(lambda p: reading.read_bytes(p, max_bytes=100), pad(path, 120))
    with open(path, "wb") as file:
        file.truncate(1 << 42)  # a file with a hole
    assert "expected at most" in said(reading.read_json, path)

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(reading.os, "open", refuse)  # the tests may run as root, whom nothing is refused
    assert "may not be read" in said(reading.read_json, path)


def pad(path: pathlib.Path, size: int) -> pathlib.Path:
    path.write_bytes(path.read_bytes().ljust(size)[:size])
    return path


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "1",
        "null",
        '{"a": NaN}',
        '{"a": -Infinity}',
        '{"a": 1e999}',
        '{"a": 1, "a": 2}',
        '{"a": ' + "9" * 5000 + "}",
        "[" * 100_000,
        '{"a": ' * 100_000,
        '{"a": 1} {}',
        '\ufeff{"a": 1}',
    ],
)
def test_json_of_no_or_two_meanings_is_refused(tmp_path, text):
    path = tmp_path / "evidence.json"
    path.write_text(text, encoding="utf-8")
    said(reading.read_json, path)
    said(READERS["json lines"], path)


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "- a",
        "a",
        "1: b",
        '!!int ""',
        "!!bool x",
        "a: !!timestamp 2024-99-99",
        "? {}",
        "a: !!binary é",
        "[" * 1500,
        "a: !!python/object/apply:os.getcwd []",
        "a: &x [*x]\nb: *y",
        "\x00",
        "a: !!float _",
    ],
)
def test_yaml_that_is_no_mapping_is_refused(tmp_path, text):
    path = tmp_path / "evidence.yaml"
    path.write_text(text, encoding="utf-8")
    said(reading.read_yaml, path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any-bytes"
    path.write_bytes(content)
    for read in READERS.values():
        problem = ""
        try:
            read(path)
        except DamagedFile as error:
            problem = str(error)
        assert "\n" not in problem
        assert not problem or path.name in problem


def test_a_broken_line_is_named_by_its_number(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2\n')
    assert "line 3" in said(READERS["json lines"], path)
    for value in ("[]", '"x"', "true", "1e400"):
        path.write_text('{"a": 1}\n{"a": ' + value + "}\n")

        def read(path: pathlib.Path) -> list[float | None]:
            return [reading.finite_number(row, "a", path, line=n) for n, row in reading.read_json_lines(path)]

        assert "line 2" in said(read, path)


def test_a_file_name_with_a_line_break_stays_one_line():
    assert "\n" not in str(DamagedFile(pathlib.Path("a\nb"), "is missing"))


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    make_private_directory(directory.secret)
    directory.create_key("root")
    return directory


def test_a_sealed_file_is_read_back_and_is_private(run):
    path = run.secret / "facts.json"
    assert sealing.write_sealed(run, path, BODY) == sealing.read_sealed_file(run, path, schema="s/1")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_any_flip_or_cut_of_sealed_file_is_found(run):
    path = run.secret / "facts.json"
    sealing.write_sealed(run, path, BODY)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= int(rng.integers(1, 256))
        path.write_bytes(flipped)
        said(lambda p: sealing.read_sealed_file(run, p), path)
        path.write_bytes(content[:place])
        said(lambda p: sealing.read_sealed_file(run, p), path)
    path.write_bytes(content + b"\n")
    said(lambda p: sealing.read_sealed_file(run, p), path)
    path.write_bytes(content)
    sealing.read_sealed_file(run, path)


@given(st.dictionaries(st.text(max_size=3), st.one_of(st.floats(), st.text(max_size=3), st.integers()), max_size=4))
def test_a_body_of_another_content_has_another_seal(tmp_path_factory, body):
    run = RunDirectory(tmp_path_factory.getbasetemp() / "sealed-run")
    make_private_directory(run.secret)
    run.keep_key("root")
    path = run.secret / "facts.json"
    try:
        json.dumps(body, allow_nan=False)
    except ValueError:
        return
    seal = sealing.seal_of(run, path, body)
    assert sealing.seal_of(run, path, {**body, "more": 1}) != seal
    assert sealing.seal_of(run, path, {**body, sealing.SEAL: "x"}) == seal


def test_a_seal_holds_for_its_place_and_its_run_alone(run, tmp_path):
    path, other = run.secret / "facts.json", RunDirectory(tmp_path / "other")
    sealing.write_sealed(run, path, BODY)
    elsewhere = run.secret / "other.json"
    elsewhere.write_bytes(path.read_bytes())
    assert "seal" in said(lambda p: sealing.read_sealed_file(run, p), elsewhere)
    make_private_directory(other.secret)
    other.create_key("root")
    (other.secret / "facts.json").write_bytes(path.read_bytes())
    assert "seal" in said(lambda p: sealing.read_sealed_file(other, p), other.secret / "facts.json")
    write_json(path, BODY)
    assert "seal" in said(lambda p: sealing.read_sealed_file(run, p), path)
    write_json(path, {**BODY, sealing.SEAL: 5})
    assert "seal" in said(lambda p: sealing.read_sealed_file(run, p), path)


def test_a_reader_without_the_seals_check_would_believe_an_edit(run, monkeypatch):
    """The mutant: nothing but the comparison stands between an edit and its reader."""
    path = run.secret / "facts.json"
    sealed = sealing.write_sealed(run, path, BODY)
    write_json(path, {**sealed, "name": "somebody else"})
    said(lambda p: sealing.read_sealed_file(run, p), path)
    monkeypatch.setattr(sealing.hmac, "compare_digest", lambda *_: True)
    assert sealing.read_sealed_file(run, path)["name"] == "somebody else"
