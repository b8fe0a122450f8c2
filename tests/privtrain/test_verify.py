"""What is released is what was proven: ``verify`` finds every edit of a finished run and names the file."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from privtrain.commands.export import export_run
from privtrain.commands.verify import Anchors, verify_directory
from privtrain.errors import LedgerCorrupt, PrivtrainError, VerificationFailed
from privtrain.job.train import train
from privtrain.ledger.view import verify_run
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run import bundle, consistency
from privtrain.run.bundle import check_released, digest_of, read_manifest, render
from privtrain.run.release import card_section
from tests.conftest import write_config


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


# Forgeries that are sealed again: every digest fits, so only what the files say can give them away.


def reseal(directory: pathlib.Path) -> None:
    """Make ``release.json`` fit whatever lies in a run directory, as somebody would who may rewrite all of it."""
    old, _ = read_manifest(directory)
    statement = json.loads((directory / "privacy.json").read_text())
    (directory / "adapter" / "privacy.json").write_bytes((directory / "privacy.json").read_bytes())
    files = {name: bundle.sha256_of(directory / name) for name in old.files}
    values = {**old.body, "statement": digest_of(statement), "plan": statement["plan_fingerprint"], "files": files}
    manifest = bundle.ReleaseManifest.parse({**values, "tokenizer": bundle.tokenizer_digest(files)})
    (directory / "release.json").write_text(render(manifest, "run"))
    (directory / "adapter" / "release.json").write_text(render(manifest, "adapter"))


def forge(directory: pathlib.Path, edit: Callable[[dict], None], *, fingerprint: bool = False, card: bool = False):
    statement = json.loads((directory / "privacy.json").read_text())
    edit(statement)
    if fingerprint:
        statement["plan_fingerprint"] = PrivacyPlan.from_body(statement["plan"]).fingerprint()
    (directory / "privacy.json").write_text(json.dumps(statement, indent=2, ensure_ascii=False) + "\n")
    if card:
        text = (directory / "adapter" / "README.md").read_text()
        section = card_section(PrivacyPlan.from_body(statement["plan"]), statement)
        (directory / "adapter" / "README.md").write_text(text[: text.index("## Privacy statement")] + section)
    reseal(directory)


def less_noise_than_said(statement: dict) -> None:
    statement["plan"]["noise_multiplier"] = statement["mechanism"]["noise_multiplier"] = 20.0


def smaller_epsilon(statement: dict) -> None:
    for part in (statement["plan"], statement):
        part["epsilon"] = 0.1
    statement["accountants"][0]["upper"] = 0.1


FIELDS = {
    "mechanism.noise_multiplier": lambda s: s["mechanism"].update(noise_multiplier=20.0),
    "mechanism.clipping_norm": lambda s: s["mechanism"].update(clipping_norm=1e-3),
    "mechanism.expected_batch_size": lambda s: s["mechanism"].update(expected_batch_size=1.0),
    "sampling.sampling_prob": lambda s: s["sampling"].update(sampling_prob=1e-6),
    "neighboring_relation": lambda s: s.update(neighboring_relation="zero_out"),
    "unit": lambda s: s.update(unit="example"),
    "num_steps": lambda s: s.update(num_steps=1),
    "delta": lambda s: s.update(delta=1e-12),
    "epsilon": lambda s: s.update(epsilon=0.1),
    "accountants[0].method": lambda s: s["accountants"][0].update(method="x"),
    "accountants[0].upper": lambda s: s["accountants"][0].update(upper=0.1),
    "contribution_bound.records_per_unit_per_step": lambda s: s["contribution_bound"].update(
        records_per_unit_per_step=1
    ),
    "assumptions": lambda s: s.update(assumptions=[]),
    "steps_accounted": lambda s: s.update(steps_accounted=0),
    "extra": lambda s: s.update(extra=1),
    "not_covered": lambda s: s.update(not_covered=[]),
    "not_covered is": lambda s: s.update(not_covered={}),
    "steps_of_the_model": lambda s: s.update(steps_of_the_model=None),
    "ledger.num_commits": lambda s: s["ledger"].update(num_commits=9),
    "split_commitment": lambda s: s.update(split_commitment={}),
    "software": lambda s: s.update(software="x"),
    "plan": lambda s: s["plan"].update(extra=1),
    "plan_fingerprint": less_noise_than_said,
}


@pytest.mark.parametrize("field", FIELDS)
def test_resealed_field_that_the_plan_does_not_bear_out_is_named(finished, field):
    forge(finished, FIELDS[field])
    with pytest.raises(VerificationFailed) as caught:
        verify_directory(finished)
    assert any(problem.startswith(f"privacy.json: {field}") for problem in caught.value.problems), caught.value


@pytest.mark.parametrize("edit", [less_noise_than_said, smaller_epsilon])
def test_resealed_epsilon_that_contradicts_event_is_refused(finished, edit):
    """Plan, fingerprint, card and digests all rewritten to fit: the accountant is asked again."""
    forge(finished, edit, fingerprint=True, card=True)
    with pytest.raises(VerificationFailed, match=r"plan.epsilon is .* the accountant gives"):
        verify_directory(finished)


def test_plan_whose_fingerprint_is_not_rebuilt_would_pass(finished, monkeypatch):
    """A mutant of the verifier: without the rebuilt fingerprint the forged plan is only found by its ε."""
    forge(finished, less_noise_than_said)
    monkeypatch.setattr(PrivacyPlan, "fingerprint", lambda self, data=None: read_manifest(finished)[0].plan)
    with pytest.raises(VerificationFailed) as caught:
        verify_directory(finished)
    assert not any("plan_fingerprint" in problem for problem in caught.value.problems)


def test_file_left_out_of_a_resealed_manifest_is_named(finished):
    old, _ = read_manifest(finished)
    files = {name: digest for name, digest in old.files.items() if name != "adapter/adapter_model.safetensors"}
    manifest = bundle.ReleaseManifest.parse({**old.body, "files": files})
    (finished / "release.json").write_text(render(manifest, "run"))
    (finished / "adapter" / "release.json").write_text(render(manifest, "adapter"))
    with pytest.raises(VerificationFailed, match=r"adapter/adapter_model.safetensors is not part of the release"):
        verify_directory(finished)


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


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("adapter/README.md", "| ε | ", "| ε | 0."),
        ("adapter/README.md", "| Noise multiplier | ", "| Noise multiplier | 9"),
        ("metrics.jsonl", '"privacy/epsilon": ', '"privacy/epsilon": 1'),
        ("config.yaml", "num_steps: 4", "num_steps: 3"),
        ("config.yaml", "noise_multiplier: 1.0", "noise_multiplier: 99.0"),
        ("config.yaml", "sampling_prob: 0.4", "sampling_prob: 0.0001"),
        ("config.yaml", "records_per_user: 3", "records_per_user: 1"),
        ("config.yaml", "selection: random", "selection: longest"),
        ("config.yaml", "target_epsilon: null", "target_epsilon: 0.1"),
        ("config.yaml", "noised_metrics: null", "noised_metrics: {}"),
        ("config.yaml", "release_held_out_metrics: false", "release_held_out_metrics: true"),
        ("config.yaml", "clipping_norm: ", "clipping_norm: 9.0\n  clipping_norm: "),
        ("metrics.jsonl", '"privacy/epsilon": ', '"privacy/epsilon": "x", "was": '),
    ],
)
def test_resealed_file_that_contradicts_statement_is_named(finished, name, old, new):
    text = (finished / name).read_text()
    assert old in text
    (finished / name).write_text(text.replace(old, new))
    reseal(finished)
    with pytest.raises(VerificationFailed) as caught:
        verify_directory(finished)
    assert all(problem.startswith(f"{name}: ") for problem in caught.value.problems), caught.value


def test_consistent_forgery_is_for_ledger_digest_and_signature(finished, released_run):
    """Another plan with its own true ε, sealed again: right in itself, so only the ledger or an anchor refuses it."""

    def other_plan(statement: dict) -> None:
        less_noise_than_said(statement)
        body = statement["plan"]
        epsilon = PrivacyPlan.from_body(body).recomputed_epsilon()
        body["epsilon"] = epsilon
        remade = consistency.statement_of(
            PrivacyPlan.from_body(body),
            not_covered=statement["not_covered"],
            num_model_steps=4,
            num_charged=4,
            num_accounted=4,
            num_commits=4,
            ledger_head=statement["ledger"]["head"],
            split_commitment=statement["split_commitment"],
        )
        statement.update(json.loads(json.dumps(remade)))

    (finished / "metrics.jsonl").write_text("")
    config = (finished / "config.yaml").read_text().replace("noise_multiplier: 1.0", "noise_multiplier: 20.0")
    (finished / "config.yaml").write_text(config)
    forge(finished, other_plan, fingerprint=True, card=True)
    with pytest.raises(LedgerCorrupt, match=r"fingerprint of the plan"):
        verify_directory(finished)
    for private in ("secret", "checkpoints"):
        shutil.rmtree(finished / private)
    forged = verify_directory(finished)
    assert any("--digest" in item for item in forged.not_checked)
    with pytest.raises(VerificationFailed, match="the release digest is"):
        verify_directory(finished, Anchors(digest=read_manifest(released_run)[0].digest))


def test_seeded_run_edited_to_private_is_refused(tree, tmp_path):
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    assert "ledger verified" in verify_directory(run).checked[-1]
    plain = shutil.copytree(run, tmp_path / "plain")
    forge(plain, lambda s: s.update(private=True, not_private_reasons=[]))
    with pytest.raises(VerificationFailed, match=r"privacy.json: private is true, by the plan it is false"):
        verify_directory(plain)
    with pytest.raises(LedgerCorrupt, match=r"privacy.json: private is true"):
        verify_run(plain)

    def without_seed(statement: dict) -> None:
        statement.update(private=True, not_private_reasons=[])
        statement["plan"]["insecure_seed"] = None

    forge(run, without_seed, fingerprint=True, card=True)
    with pytest.raises(VerificationFailed, match=r"config.yaml: privacy.insecure_seed is 7"):
        verify_directory(run)
    with pytest.raises(LedgerCorrupt, match=r"fingerprint of the plan"):
        verify_run(run)


def test_missing_line_of_not_covered_is_found(finished):
    """The statement of a run that published raw losses, with the line about them taken out."""
    config = (finished / "config.yaml").read_text()
    (finished / "config.yaml").write_text(config.replace("private_metrics: false", "private_metrics: true"))
    reseal(finished)
    with pytest.raises(VerificationFailed, match=r"config.yaml: tracking publishes other things than not_covered"):
        verify_directory(finished)


# What a hostile directory could do to the verifier.


def places_in(value: Any, path: tuple = ()) -> list[tuple]:
    """Paths of every value inside."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [path, *(inner for key in keys for inner in places_in(value[key], (*path, key)))]


OTHER_VALUES = [None, [], {}, "x", "", "\0", "é", "0" * 64, 0, -1, 0.5, 1e308, 10**30, 10**299, True, False]
OTHER_VALUES += [[1], {"a": 1}, [[[]]]]


def is_for_the_ledger_to_tell(path: tuple, value: Any) -> bool:
    """Whether nothing but the ledger, or another version's name, speaks against the value."""
    if path[-1] in ("version", "privtrain"):
        return isinstance(value, str)
    return (path, value) in [(("steps_of_the_model",), 0), (("split_commitment",), "0" * 64)] and value is not False


def check_resealed(copy: pathlib.Path, whole: dict[str, bytes], path: tuple, value: Any) -> None:
    """Put the value there, make every digest anew, verify, and put back what was there."""
    statement = json.loads(whole["privacy.json"])
    parent = statement
    for key in path[:-1]:
        parent = parent[key]
    if parent[path[-1]] == value and type(parent[path[-1]]) is type(value):
        return
    parent[path[-1]] = value
    try:
        (copy / "privacy.json").write_text(json.dumps(statement, indent=2, ensure_ascii=False) + "\n")
        if path != ("plan_fingerprint",):
            reseal(copy)
        if is_for_the_ledger_to_tell(path, value):
            verify_directory(copy)
        else:
            with pytest.raises(VerificationFailed, match=r"privacy\.json"):
                verify_directory(copy)
    finally:
        for name, content in whole.items():
            (copy / name).write_bytes(content)


@settings(max_examples=80)
@given(data=st.data())
def test_resealed_statement_with_any_other_value_is_refused(places, data, tmp_path):
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(places["public"], copy)
    whole = {name: (copy / name).read_bytes() for name in released_files(copy)}
    path = data.draw(st.sampled_from(places_in(json.loads(whole["privacy.json"]))[1:]))
    check_resealed(copy, whole, path, data.draw(st.sampled_from(OTHER_VALUES)))


@pytest.mark.campaign
def test_resealed_statement_with_every_other_value_is_refused(places, tmp_path):
    copy = shutil.copytree(places["public"], tmp_path / "copy")
    whole = {name: (copy / name).read_bytes() for name in released_files(copy)}
    for path in places_in(json.loads(whole["privacy.json"]))[1:]:
        for value in OTHER_VALUES:
            check_resealed(copy, whole, path, value)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"delta": ', '"delta": 1e999, "was": '),
        ('"unit": "user"', '"unit": "user", "unit": "user"'),
        ('"unit": "user"', '"unit": NaN'),
        ('"unit": "user"', '"unit": ' + "[" * 100_000),
        ('"num_steps": ', '"num_steps": ' + "1" * 5000),
        ('"unit": "user"', '"unit": "\\ud800"'),
    ],
)
def test_statement_that_is_no_json_with_one_meaning_is_one_error(finished, old, new):
    text = (finished / "privacy.json").read_text()
    assert old in text
    (finished / "privacy.json").write_text(text.replace(old, new, 1))
    for check in (verify_directory, verify_run):
        with pytest.raises((VerificationFailed, LedgerCorrupt), match=r"privacy\.json"):
            check(finished)


def test_files_outside_the_directory_are_never_read(finished):
    old, _ = read_manifest(finished)
    for path in ("../outside", "/etc/hostname", "adapter/../../x", "a//b", "./a", "a\\b", "", "a\0b", "\ud800"):
        content = json.loads(render(old, "run"))
        content["files"][path] = "0" * 64
        (finished / "release.json").write_text(json.dumps(content, indent=2) + "\n")
        with pytest.raises(VerificationFailed, match=r"leaves the directory|release_digest is not"):
            verify_directory(finished)
        with pytest.raises(ValueError, match="leaves the directory"):
            bundle.ReleaseManifest.parse({**old.body, "files": {path: "0" * 64}})


def test_pipe_link_and_directory_in_place_of_a_file_are_named(finished):
    path = finished / "adapter" / "README.md"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(VerificationFailed, match=r"adapter/README.md cannot be read: is not a regular file"):
        check_released(finished)
    path.unlink()
    path.mkdir()
    with pytest.raises(VerificationFailed, match=r"adapter/README.md cannot be read"):
        check_released(finished)
    path.rmdir()
    path.symlink_to(finished / "nowhere")
    with pytest.raises(VerificationFailed, match=r"adapter/README.md is missing"):
        check_released(finished)
    (finished / "adapter" / "more").symlink_to("/usr")
    with pytest.raises(VerificationFailed, match=r"adapter/more is not part of the release"):
        check_released(finished)


PUBLISHED = ["release.json", "privacy.json", "metrics.jsonl", "config.yaml", "adapter/README.md"]


def put_in_place(path: pathlib.Path, kind: str) -> None:
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 1 << 40)  # sparse: a terabyte that takes no room


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_pipe_or_device_holds_no_verification_up(finished, name, kind):
    put_in_place(finished / name, kind)
    with pytest.raises(VerificationFailed, match=rf"{name} (cannot be used|cannot be read).*is not a regular file"):
        verify_directory(finished)


def test_sparse_manifest_does_not_fill_the_memory(finished, monkeypatch):
    monkeypatch.setattr(bundle, "MAX_BYTES", 1 << 20)
    put_in_place(finished / "release.json", "sparse")
    with pytest.raises(VerificationFailed, match="has more than 1048576 bytes"):
        verify_directory(finished)


def test_mutant_that_opens_whatever_is_there_reads_a_device(finished, monkeypatch):
    put_in_place(finished / "release.json", "pipe")
    (finished / "release.json").unlink()
    (finished / "release.json").symlink_to("/dev/null")
    monkeypatch.setattr(bundle, "text_of", lambda path: path.read_text())
    with pytest.raises(VerificationFailed) as caught:
        verify_directory(finished)
    assert "regular file" not in str(caught.value)


@pytest.mark.parametrize("kind", [os.link, os.symlink])
def test_run_whose_released_directory_lies_elsewhere_is_told(finished, tmp_path, kind):
    """The weights could be changed after they were verified, by whoever owns the place that the link leads to."""
    if kind is os.symlink:
        (finished / "adapter").rename(tmp_path / "elsewhere")
        (finished / "adapter").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(VerificationFailed, match="adapter is not part of the release"):
            verify_directory(finished)
    else:
        os.link(finished / "adapter" / "README.md", tmp_path / "second name")
        verify_directory(finished)  # the content is what counts


@pytest.mark.parametrize(
    "name",
    [
        *("adapter/pytorch_model.bin", "adapter/modeling_x.py", "adapter/ADAPTER_CONFIG.json", "adapter/.cache/x.py"),
        *("adapter/readme.md", "adapter/re\u0301lease.json", "adapter/run/release.json", "model.safetensors"),
        *("LICENSE/evil.py", ".git", "adapter/.gitignore/x.bin", "adapter/adapter_model.safetensors.index.json"),
    ],
)
def test_file_a_library_might_load_is_named_anywhere(finished, name):
    (finished / name).parent.mkdir(parents=True, exist_ok=True)
    (finished / name).write_bytes(b"x")
    with pytest.raises(VerificationFailed, match=f"{re.escape(bundle.printable(name))} is not part of the release"):
        verify_directory(finished)


def test_release_of_links_to_its_files_verifies(places, tmp_path):
    """A hub's cache keeps a model as links to blobs."""
    for name in bundle.files_under(places["adapter"]):
        (tmp_path / name).symlink_to(places["adapter"] / name)
    assert verify_directory(tmp_path).place == "adapter"


def test_harmless_files_are_named_and_do_not_fail(places, tmp_path):
    copy = shutil.copytree(places["adapter"], tmp_path / "hub")
    for name in (".gitattributes", "LICENSE", ".cache/huggingface/download/x.metadata"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    found = verify_directory(copy).beside
    assert found == (".cache/huggingface/download/x.metadata", ".gitattributes", "LICENSE")


@settings(max_examples=40)
@given(text=st.text(max_size=200), name=st.sampled_from(["release.json", "privacy.json", "adapter/release.json"]))
def test_any_text_in_place_of_the_evidence_is_refused(released_run, tmp_path, text, name):
    """No content of the files that are parsed ends in a traceback."""
    copy = tmp_path / "copy"
    if not copy.exists():
        shutil.copytree(released_run, copy)
    whole = (copy / name).read_bytes()
    try:
        (copy / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        with pytest.raises(PrivtrainError, match=name):
            verify_directory(copy)
    finally:
        (copy / name).write_bytes(whole)


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
