"""Releases that were forged and sealed again, and directories that mean harm: ``verify`` refuses and names why."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privtrain.commands.verify import Anchors, verify_directory
from privtrain.errors import LedgerCorrupt, PrivtrainError, VerificationFailed
from privtrain.job.train import train
from privtrain.ledger.view import verify_run
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run import bundle, consistency
from privtrain.run.bundle import check_released, read_manifest, render
from tests.conftest import write_config
from tests.privtrain.forgeries import forge, released_files, reseal


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
