"""A release that is interrupted at any moment: nothing is released, or the next start completes it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import stat
from collections.abc import Callable

import pytest

from privtrain.config import validate
from privtrain.errors import GuaranteeLost, VerificationFailed
from privtrain.job.publish import complete_release, publish
from privtrain.job.train import train
from privtrain.ledger.log import verify_chain
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run import bundle
from privtrain.run.directory import RunDirectory
from tests.conftest import write_config
from tests.privtrain.ledgers import opened, write_steps

pytestmark = pytest.mark.usefixtures("no_self_test")

CRASHED = 9


@pytest.fixture
def plan(tree) -> PrivacyPlan:
    return PrivacyPlan.build(validate(tree).privacy)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run that has taken its steps and not released."""
    run = RunDirectory(tmp_path / "run")
    run.create()
    run.identity.write_text("{}")
    run.config.write_text("privacy: {}\n")
    run.metrics.write_text('{"train/step": 3}\n')
    write_steps(run.ledger, 3)
    return run


def release(run: RunDirectory, plan: PrivacyPlan) -> None:
    """What a job does at its end, started again or not."""
    if complete_release(run) or run.is_complete():
        return
    with opened(run.ledger) as ledger:
        statement = {"epsilon": 1.0, "ledger": {"head": ledger.prepare_release()}}

        def write_weights(directory: pathlib.Path) -> None:
            (directory / "adapter_model.safetensors").write_bytes(b"weights")
            (directory / "tokenizer.json").write_text("{}")
            (directory / "README.md").write_text("card")

        publish(run, ledger, plan, statement, write_weights, name="adapter", base_model={})


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o027, 0o750), (0o077, 0o700)])
def test_a_released_run_is_as_readable_as_the_umask_lets_it_be(run, plan, umask, mode):
    before = os.umask(umask)
    try:
        release(run, plan)
    finally:
        os.umask(before)
    assert stat.S_IMODE(run.root.stat().st_mode) == mode
    assert stat.S_IMODE(run.secret.stat().st_mode) == 0o700


def crash_at(call: int, action: Callable[[], None]) -> bool:
    """Run ``action`` in a process that dies at its ``call``-th change of a file; whether it died."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            left = [call]
            for owner, name in (
                (os, "replace"),
                (os, "fsync"),
                (os, "write"),
                (os, "mkdir"),
                (os, "rmdir"),
                (os, "unlink"),
            ):
                _die_in(owner, name, left)
            action()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, CRASHED), code
    return code == CRASHED


def _die_in(owner: object, name: str, left: list[int]) -> None:
    original = getattr(owner, name)

    def wrapped(*arguments, **named):
        left[0] -= 1
        if left[0] < 0:
            os._exit(CRASHED)
        return original(*arguments, **named)

    setattr(owner, name, wrapped)


def test_release_killed_at_any_write_is_nothing_or_completed(run, plan, tmp_path):
    moments, recorded = 0, 0
    while True:
        place = tmp_path / "again"
        shutil.rmtree(place, ignore_errors=True)
        again = RunDirectory(shutil.copytree(run.root, place))
        died = crash_at(moments, lambda again=again: release(again, plan))
        state = verify_chain(again.ledger, allow_torn=True)
        recorded += state.is_released
        if not state.is_released:
            assert not any(path.exists() for path in (again.adapter, again.privacy, again.release)), moments
        release(again, plan)
        manifest = check_complete(again)
        release(again, plan)
        assert check_complete(again) == manifest, "a released run was changed by a second start"
        if not died:
            break
        moments += 1
    assert moments > 20
    assert 5 < recorded < moments, "crashes on both sides of the release record"


def check_complete(run: RunDirectory) -> bundle.ReleaseManifest:
    manifest = bundle.check_released(run.root)
    release = verify_chain(run.ledger).release
    assert release is not None
    assert release.manifest == manifest
    assert not run.staged.exists()
    assert not list(run.root.glob("*.tmp"))
    return manifest


def test_recorded_release_with_a_lost_part_is_refused(run, plan):
    release(run, plan)
    run.release.unlink()
    (run.adapter / "README.md").unlink()
    with pytest.raises(GuaranteeLost, match=r"adapter/README.md is not what the release record"):
        complete_release(run)


def test_files_changed_before_completion_are_refused(run, plan):
    """A crash after the record leaves the release to be completed from what was recorded, and from nothing else."""
    for changed in ("metrics.jsonl", "config.yaml", "privacy.json", "adapter/adapter_model.safetensors"):
        copy = RunDirectory(shutil.copytree(run.root, run.root.with_name(changed.replace("/", "-"))))
        release(copy, plan)
        copy.release.unlink()
        with open(copy.root / changed, "ab") as file:
            file.write(b" ")
        with pytest.raises(GuaranteeLost, match=changed):
            complete_release(copy)
        assert not copy.is_complete()


def test_released_run_started_again_is_unchanged(tree, tmp_path):
    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    run = tmp_path / "runs" / "tiny"
    before = {name: (run / name).read_bytes() for name in bundle.files_under(run)}
    train(path)
    assert {name: (run / name).read_bytes() for name in bundle.files_under(run)} == before


def test_job_killed_after_the_release_record_is_completed(tree, tmp_path, monkeypatch):
    """The same command completes the release without loading a model, and the bundle verifies."""
    from privtrain.job import publish as publishing
    from privtrain.job import train as job
    from privtrain.ledger.view import verify_run

    path = write_config(tree, tmp_path / "c.yaml")
    monkeypatch.setattr(publishing, "install", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(path)
    monkeypatch.undo()
    run = RunDirectory(tmp_path / "runs" / "tiny")
    assert not run.is_complete()
    monkeypatch.setattr(job, "load_network", lambda *_: pytest.fail("the model was loaded"))
    train(path)
    assert run.is_complete()
    assert "matches privacy.json" in verify_run(run.root)


def test_released_digests_and_check_are_what_the_attack_job_asks(released_run, tmp_path):
    digests = bundle.released_digests(released_run)
    weights = released_run / "adapter" / "adapter_model.safetensors"
    assert digests["adapter/adapter_model.safetensors"] == bundle.sha256_of(weights)
    assert bundle.check_released(released_run).files == digests
    copy = shutil.copytree(released_run, tmp_path / "copy")
    ledger = copy / "secret" / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(digests["privacy.json"].encode(), b"0" * 64))
    with pytest.raises(VerificationFailed, match="not what the last record"):
        bundle.check_released(copy)


def test_release_record_holds_what_the_files_are(released_run):
    """The ledger's last record alone names every file, the statement, the base model and the tokenizer."""
    record = json.loads((released_run / "secret" / "ledger.jsonl").read_text().splitlines()[-1])
    held = record["manifest"]
    files = {
        name for name in bundle.files_under(released_run, bundle.NOT_RELEASED) if not name.endswith("release.json")
    }
    assert record["kind"] == "release"
    assert set(held["files"]) == files
    assert held["statement"] == bundle.digest_of(json.loads((released_run / "privacy.json").read_text()))
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(held["base_model"])
    assert held["tokenizer"] == bundle.tokenizer_digest(held["files"])
