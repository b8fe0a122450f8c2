"""What is released is what was proven: ``verify`` finds every edit of a finished run and names the file."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from privtrain.commands.verify import Anchors, verify_directory
from privtrain.errors import LedgerCorrupt, VerificationFailed
from privtrain.ledger.view import verify_run
from privtrain.run import bundle
from privtrain.run.bundle import digest_of
from tests.privtrain.forgeries import released_files


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
        file.write((b"\n", b" ", b"\0", b"{}")[rng.integers(4)])  # an array of bytes would lose the NUL
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
@pytest.mark.timeout(1200)
def test_three_hundred_single_edits_are_found_and_named(places, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(300):
        edit, place = EDITS[rng.integers(len(EDITS))], str(rng.choice(list(places)))
        check_edit(places, place, edit, seed=1000 + number, tmp=tmp_path)


def test_mutant_that_skips_unlisted_files_misses_an_added_one(finished, monkeypatch):
    (finished / "adapter" / "modeling.py").write_text("x")
    monkeypatch.setattr(bundle, "is_harmless", lambda path: True)
    assert verify_directory(finished).beside == ("adapter/modeling.py",)
    monkeypatch.undo()
    with pytest.raises(VerificationFailed, match=r"adapter/modeling.py is not part of the release"):
        verify_directory(finished)


def verifier_that_skips(monkeypatch: pytest.MonkeyPatch, is_skipped: Callable[[str], bool]) -> None:
    """A mutant of the verifier: files of a kind are compared with nothing."""
    compare = bundle.compare_files

    def compare_some(directory, expected, **named):
        faults, beside = compare(directory, expected, **named)
        return [fault for fault in faults if not is_skipped(fault.path)], beside

    monkeypatch.setattr(bundle, "compare_files", compare_some)


SKIPPED = {
    "weights": lambda path: path.endswith(".safetensors"),
    "JSON": lambda path: path.endswith(".json"),
    "cards": lambda path: path.endswith(".md"),
    "metrics": lambda path: path.endswith(".jsonl"),
    "configuration": lambda path: path.endswith(".yaml"),
    "the adapter": lambda path: path.startswith("adapter/"),
    "what is at the top": lambda path: "/" not in path,
}


@pytest.mark.parametrize("kind", SKIPPED)
def test_mutant_that_ignores_files_of_a_kind_is_seen(places, tmp_path, monkeypatch, kind):
    """Each file of the kind with one more blank: found and named, and by the mutant alone it is not."""
    directory = shutil.copytree(places["public"], tmp_path / "copy")
    names = [name for name in released_files(directory) if SKIPPED[kind](name) and not name.endswith("release.json")]
    assert names
    for name in names:
        content = (directory / name).read_bytes()
        # Where no reader of the content minds.
        blank = content.replace(b": ", b":  ", 1) if name.endswith(".jsonl") else b"\n" + content
        (directory / name).write_bytes(blank)
        with pytest.raises(VerificationFailed, match=re.escape(f"{name} differs")):
            verify_directory(directory)
        with monkeypatch.context() as patched:
            verifier_that_skips(patched, SKIPPED[kind])
            verify_directory(directory)
        (directory / name).write_bytes(content)


# Exports.


def test_merged_weights_are_made_again_from_the_released_ones(places, tmp_path):
    merged = shutil.copytree(places["merged"], tmp_path / "merged")
    anchors = Anchors(released=places["run"])
    assert any("made again" in item for item in verify_directory(merged, anchors).checked)
    assert any("--released" in item for item in verify_directory(merged).not_checked)
    path = merged / "model.safetensors"
    save_file({name: value * 2 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    made = json.loads((merged / "export.json").read_text())
    made["files"]["model.safetensors"] = bundle.sha256_of(path)
    with pytest.raises(VerificationFailed, match=r"model.safetensors differs"):
        verify_directory(merged)
    made["relation"] = digest_of({name: made[name] for name in made if name != "relation"})
    (merged / "export.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    verify_directory(merged)
    with pytest.raises(VerificationFailed, match=r"model.safetensors: tensor .* is not what the released weights give"):
        verify_directory(merged, anchors)


def test_export_that_names_another_release_is_refused(places, tmp_path):
    merged = shutil.copytree(places["merged"], tmp_path / "merged")
    made = json.loads((merged / "export.json").read_text())
    made["released"] = {"adapter/adapter_model.safetensors": "0" * 64}
    made["relation"] = digest_of({name: made[name] for name in made if name != "relation"})
    (merged / "export.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n")
    with pytest.raises(VerificationFailed, match=r"export.json names other released weights"):
        verify_directory(merged)


def test_another_base_model_is_named(places, tiny_llama, tmp_path):
    assert "the base model" in verify_directory(places["adapter"], Anchors(base_model=tiny_llama)).checked
    other = shutil.copytree(tiny_llama, tmp_path / "base")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(VerificationFailed, match=r"base/tokenizer.json is not the base model's file"):
        verify_directory(places["adapter"], Anchors(base_model=other))


# The command.


@pytest.mark.parametrize(
    ("arguments", "code", "shown"),
    [
        (["adapter"], 0, "is what was released (adapter)"),
        (["run", "--json"], 0, '"release_digest"'),
        (["nowhere"], 2, "is no directory"),
        (["empty"], 2, "has no release.json"),
        (["adapter", "--digest", "0" * 64], 3, "the release digest is"),
        (["adapter", "--base-model", "nowhere"], 2, "is no directory"),
    ],
)
def test_exit_codes_are_those_of_the_design(places, arguments, code, shown, monkeypatch, capsys):
    from privtrain.cli import main

    (places["run"].parent / "empty").mkdir(exist_ok=True)
    monkeypatch.chdir(places["run"].parent)
    monkeypatch.setattr("sys.argv", ["privtrain", "verify", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    output = capsys.readouterr()
    assert (caught.value.code or 0) == code, output
    assert shown in output.out + output.err
    (places["run"].parent / "empty").rmdir()
