"""What is released is what was proven: ``verify`` finds every edit of a finished run and names the file."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import pytest

from privtrain import bundle
from privtrain.errors import LedgerCorrupt, VerificationFailed
from privtrain.export import export_run
from privtrain.ledger.view import verify_run
from privtrain.verify import verify_directory


@pytest.fixture
def finished(released_run, tmp_path):
    return shutil.copytree(released_run, tmp_path / "run")


@pytest.fixture(scope="module")
def places(released_run, tmp_path_factory) -> dict[str, pathlib.Path]:
    """Every kind of directory that may be handed on: the run with and without ``secret/``, its adapter, exports."""
    place = tmp_path_factory.mktemp("places")
    shutil.copytree(released_run, place / "run")
    shutil.copytree(released_run, place / "public", ignore=shutil.ignore_patterns("secret", "checkpoints"))
    shutil.copytree(released_run / "adapter", place / "adapter")
    export_run(released_run, place / "copied", merge=False, dtype="bf16")
    export_run(released_run, place / "merged", merge=True, dtype="bf16")
    return {path.name: path for path in place.iterdir()}


def released_files(directory: pathlib.Path) -> list[str]:
    return list(bundle.files_under(directory, bundle.NOT_RELEASED))


def test_an_untouched_release_verifies_wherever_it_lies(places):
    digests = {name: verify_directory(path).release_digest for name, path in places.items()}
    assert set(digests) == {"run", "public", "adapter", "copied", "merged"}
    assert len(set(digests.values())) == 1
    assert "ledger verified" in verify_directory(places["run"]).checked[-1]
    assert any("secret/" in item for item in verify_directory(places["public"]).not_checked)


# Single edits. Each returns the files of which one must be named.

Edit = Callable[[pathlib.Path, np.random.Generator], set[str]]


def flip_bit(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    name = str(rng.choice(released_files(directory)))
    content = bytearray((directory / name).read_bytes())
    content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    (directory / name).write_bytes(content)
    return {name}


def truncate(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    name = str(rng.choice(released_files(directory)))
    os.truncate(directory / name, int(rng.integers((directory / name).stat().st_size)))
    return {name}


def append(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    name = str(rng.choice(released_files(directory)))
    with open(directory / name, "ab") as file:
        file.write(rng.choice([b"\n", b" ", b"\0", b"{}"]))
    return {name}


def remove(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    name = str(rng.choice(released_files(directory)))
    (directory / name).unlink()
    return {name}


def rename(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    name = str(rng.choice(released_files(directory)))
    (directory / name).rename(directory / f"{name}.moved")
    return {name}


def swap(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    files = {name: (directory / name).read_bytes() for name in released_files(directory)}
    one, other = rng.choice(list(files), 2, replace=False)
    while files[one] == files[other]:
        one, other = rng.choice(list(files), 2, replace=False)
    (directory / one).write_bytes(files[other])
    (directory / other).write_bytes(files[one])
    return {str(one), str(other)}


def add(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    name = str(rng.choice(["modeling.py", "adapter_model.bin", ".hidden", "model.safetensors", "tokenizer.py", "x y"]))
    if rng.random() < 0.5:
        (directory / "nested").mkdir()
        name = f"nested/{name}"
    (directory / name).write_bytes(b"x")
    return {name}


def edit_field(directory: pathlib.Path, rng: np.random.Generator) -> set[str]:
    """Change one value anywhere in a JSON file, and write it as it was written."""
    names = [name for name in released_files(directory) if name.endswith("json") and "tokenizer" not in name]
    name = str(rng.choice(names))
    content = json.loads((directory / name).read_text())
    parents = [content]
    leaves = []
    while parents:
        parent = parents.pop()
        for key in parent if isinstance(parent, dict) else range(len(parent)):
            if isinstance(parent[key], (dict, list)) and parent[key]:
                parents.append(parent[key])
            else:
                leaves.append((parent, key))
    parent, key = leaves[rng.integers(len(leaves))]
    parent[key] = changed(parent[key], rng)
    (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return {name}


def changed(value: object, rng: np.random.Generator) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + int(rng.integers(1, 5))
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return 1


EDITS: list[Edit] = [flip_bit, truncate, append, remove, rename, swap, add, edit_field]


def check_edit(places: dict[str, pathlib.Path], place: str, edit: Edit, seed: int, tmp: pathlib.Path) -> None:
    shutil.rmtree(tmp / "edited", ignore_errors=True)
    directory = shutil.copytree(places[place], tmp / "edited")
    expected = edit(directory, np.random.default_rng(seed))
    with pytest.raises((VerificationFailed, LedgerCorrupt)) as caught:
        verify_directory(directory)
    named = str(caught.value)
    assert any(name in named for name in expected), f"{edit.__name__} of {expected} in {place}: {named}"
    if place == "run":
        with pytest.raises(LedgerCorrupt) as caught:
            verify_run(directory)
        assert any(name in str(caught.value) for name in expected)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_every_single_edit_is_found_and_named(places, tmp_path, edit):
    for number, place in enumerate(places):
        check_edit(places, place, edit, seed=100 + number, tmp=tmp_path)


@pytest.mark.campaign
def test_three_hundred_single_edits_are_found_and_named(places, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(300):
        edit, place = EDITS[rng.integers(len(EDITS))], str(rng.choice(list(places)))
        check_edit(places, place, edit, seed=1000 + number, tmp=tmp_path)
