"""What somebody who came first can leave where a run keeps its secrets: nothing of it is used or followed."""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
from collections.abc import Callable

import pytest
import torch

from attacks.coins.prepare import prepare
from privtrain.backends.local import LocalBackend
from privtrain.data import index
from privtrain.errors import GuaranteeLost, PrivtrainError, UnsafePath
from privtrain.files import private as private_paths
from privtrain.files.atomic import write_atomically
from privtrain.files.private import check_private_directory, make_private_directory
from privtrain.inputs import load_checked, read_inputs
from privtrain.job import train as job
from privtrain.job.claim import claimed
from privtrain.job.train import train
from privtrain.privacy.secret import load_key_file
from privtrain.registry.database import KEY_VARIABLE
from privtrain.registry.store import Registry
from privtrain.run.directory import RunDirectory
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")

#: Of directories that others may write: everybody, everybody but with the sticky bit, members of the group.
OPEN_MODES = [pytest.param(mode, id=f"{mode:04o}") for mode in (0o777, 0o1777, 0o775, 0o770)]

Leave = Callable[[pathlib.Path], object]


def link_to_folder(path: pathlib.Path) -> None:
    evil = path.parents[2] / "evil"
    evil.mkdir()
    evil.chmod(0o777)
    path.symlink_to(evil)


def link_to_closed_folder(path: pathlib.Path) -> None:
    closed = path.parents[2] / "closed"
    closed.mkdir(mode=0o700)
    path.symlink_to(closed)


def open_folder(path: pathlib.Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def folder_of_the_group(path: pathlib.Path) -> None:
    path.mkdir()
    path.chmod(0o770)


def foreign_folder(path: pathlib.Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, NOBODY, -1)


FOLDERS = [
    pytest.param(link_to_folder, "is a link", id="link"),
    pytest.param(link_to_closed_folder, "is a link", id="link-to-closed"),
    pytest.param(open_folder, "chmod 700", id="open"),
    pytest.param(folder_of_the_group, "chmod 700", id="group"),
    pytest.param(lambda path: path.write_text(""), "not a directory", id="file"),
    pytest.param(os.mkfifo, "not a directory", id="pipe"),
    pytest.param(foreign_folder, "belongs to user 65534", id="foreign", marks=as_root),
]


def key_file(path: pathlib.Path) -> pathlib.Path:
    path.write_text("ab" * 32 + "\n")
    path.chmod(0o600)
    return path


def foreign_key(path: pathlib.Path) -> None:
    os.chown(key_file(path), NOBODY, -1)


KEYS = [
    pytest.param(lambda p: p.symlink_to(key_file(p.with_name("elsewhere"))), UnsafePath, "is a link", id="link"),
    pytest.param(os.mkfifo, UnsafePath, "no regular file", id="pipe"),
    pytest.param(lambda p: p.mkdir(mode=0o700), UnsafePath, "no regular file", id="folder"),
    pytest.param(lambda p: os.link(key_file(p.with_name("own")), p), UnsafePath, "2 names", id="hard-link"),
    pytest.param(lambda p: key_file(p).chmod(0o640), UnsafePath, "chmod 600", id="open"),
    pytest.param(foreign_key, UnsafePath, "belongs to user 65534", id="foreign", marks=as_root),
    pytest.param(lambda p: key_file(p).write_text("ab" * 31 + "\n"), GuaranteeLost, "damaged", id="short"),
    pytest.param(lambda p: key_file(p).write_text("ab" * 32 + "\n" * 9), GuaranteeLost, "damaged", id="long"),
    pytest.param(lambda p: None, GuaranteeLost, "missing", id="none"),
]


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    made = RunDirectory(tmp_path / "runs" / "run")
    made.create()
    return made


def test_a_directory_that_is_made_is_closed(tmp_path):
    make_private_directory(tmp_path / "a" / "b")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
    make_private_directory(tmp_path / "a" / "b")


@pytest.mark.parametrize(("leave", "why"), FOLDERS)
@pytest.mark.parametrize("name", ["secret", "checkpoints"])
def test_a_planted_directory_is_refused_before_every_use(run, name, leave: Leave, why):
    run.create_key("root")
    private = run.root / name
    private.rename(run.root.with_name("away"))
    leave(private)
    for use in (run.check_private, run.check_permissions, run.create, lambda: run.load_key("root")):
        with pytest.raises(UnsafePath, match=why):
            use()
    with pytest.raises(UnsafePath, match=why), run.locked():
        pass


@pytest.mark.parametrize(("leave", "error", "why"), KEYS)
def test_a_planted_key_is_refused(run, leave: Leave, error, why):
    leave(run.secret / "root.key")
    with pytest.raises(error, match=why):
        run.load_key("root")
    if error is UnsafePath:
        with pytest.raises(error, match=why):
            run.keep_key("root")


def test_a_key_in_its_place_is_read(run):
    assert load_key_file(key_file(run.secret / "root.key")).reveal() == bytes.fromhex("ab" * 32)


@pytest.mark.parametrize(
    ("leave", "why"),
    [
        pytest.param(lambda path: path.symlink_to("/etc/passwd"), "is a link", id="link"),
        pytest.param(os.mkfifo, "neither a file nor a directory", id="pipe"),
        pytest.param(foreign_key, "belongs to user 65534", id="foreign", marks=as_root),
    ],
)
def test_nothing_below_a_private_directory_is_a_link_or_anothers(run, leave: Leave, why):
    below = run.secret / "attack" / "references"
    make_private_directory(below)
    leave(below / "x")
    with pytest.raises(UnsafePath, match=why):
        run.check_permissions()


def test_a_lock_that_is_a_link_is_not_followed(run, tmp_path):
    (run.secret / "lock").symlink_to(tmp_path / "made by a link")
    with pytest.raises(UnsafePath, match="is a link"), run.locked():
        pass
    assert not (tmp_path / "made by a link").exists()


def test_a_temporary_file_that_is_a_link_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("whole")
    (tmp_path / ".new.tmp").symlink_to(victim)
    write_atomically(tmp_path / "new", "content")
    assert (victim.read_text(), (tmp_path / "new").read_text()) == ("whole", "content")
    assert not (tmp_path / "new").is_symlink()


@pytest.mark.parametrize("planted", ["root.key", "generation-0000.key", "manifest.json", "ledger.jsonl"])
def test_a_new_run_takes_over_nothing(tree, tmp_path, monkeypatch, planted):
    monkeypatch.setattr(job, "load_network", lambda *_: pytest.fail("the model was loaded"))
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.create()
    key_file(run.secret / planted)
    path = write_config(tree, tmp_path / "c.yaml")
    with pytest.raises(UnsafePath, match=f"has not begun, but holds {planted}"):
        train(path)
    with pytest.raises(PrivtrainError, match=r"has not begun, but holds|training has begun"):
        prepare(path)
    assert not run.exists()


def test_a_new_run_takes_over_no_checkpoint(run):
    (run.checkpoints / "step-00000004").mkdir(mode=0o700)
    with pytest.raises(UnsafePath, match="step-00000004"):
        run.check_new()


@pytest.mark.parametrize("leave", [link_to_folder, open_folder])
def test_planted_directory_stops_training_and_prepare(tree, tmp_path, monkeypatch, leave: Leave):
    monkeypatch.setattr(job, "load_network", lambda *_: pytest.fail("the model was loaded"))
    run = RunDirectory(tmp_path / "runs" / "tiny")
    run.root.mkdir(parents=True)
    leave(run.secret)
    path = write_config(tree, tmp_path / "c.yaml")
    for begin in (train, prepare):
        with pytest.raises(UnsafePath):
            begin(path)
    assert list(run.secret.iterdir()) == []


def make_index(parent: pathlib.Path) -> index.IndexedRecords:
    rows = [("alice", "a text"), ("bob", "another")]
    return index.open_or_build(parent, {"made": "of this"}, lambda _tally: iter(rows))[0]


@pytest.mark.parametrize(("leave", "why"), FOLDERS)
def test_an_index_lies_in_no_planted_directory(tmp_path, leave: Leave, why):
    place = tmp_path / "local" / "planted" / "index"
    place.parent.mkdir(parents=True)
    leave(place)
    with pytest.raises(UnsafePath, match=why):
        make_index(place)


@pytest.mark.parametrize(("leave", "why"), FOLDERS)
def test_an_index_is_no_planted_directory(tmp_path, leave: Leave, why):
    made = tmp_path / "local" / "own"
    assert set(make_index(made)) == {"alice", "bob"}
    (directory,) = (path for path in made.iterdir() if path.is_dir())
    directory.rename(made / "away")
    leave(directory)
    with pytest.raises(UnsafePath, match=why):
        make_index(made)


def test_an_index_has_no_linked_file(tmp_path):
    make_index(tmp_path / "own")
    (texts,) = (tmp_path / "own").glob("*/texts.bin")
    texts.rename(tmp_path / "texts.bin")
    texts.symlink_to(tmp_path / "texts.bin")
    with pytest.raises(UnsafePath, match="is a link"):
        make_index(tmp_path / "own")


@pytest.mark.parametrize("mode", OPEN_MODES)
def test_registry_in_writable_directory_is_refused(tmp_path, mode):
    """In a sticky one, others could still add a journal, which SQLite would play back."""
    place = tmp_path / "shared"
    place.mkdir()
    Registry(str(place / "registry.db"))
    place.chmod(mode)
    with pytest.raises(UnsafePath, match="chmod go-w"):
        Registry(str(place / "registry.db"))
    place.chmod(0o755)
    Registry(str(place / "registry.db"))
    (tmp_path / "linked.db").symlink_to(place / "registry.db")
    with pytest.raises(UnsafePath, match="is a link"):
        Registry(str(tmp_path / "linked.db"))


def foreign_file(path: pathlib.Path) -> None:
    path.write_bytes(b"pages")
    os.chown(path, 65534, 65534)


@pytest.mark.parametrize(
    ("leave", "why"),
    [
        pytest.param(lambda path: path.symlink_to("/etc/passwd"), "is a link", id="link"),
        pytest.param(foreign_file, "belongs to user 65534", id="foreign", marks=as_root),
    ],
)
@pytest.mark.parametrize("suffix", ["-journal", "-wal", "-shm"])
def test_a_registry_plays_back_nobody_elses_journal(tmp_path, suffix, leave: Leave, why):
    Registry(str(tmp_path / "registry.db"))
    leave(tmp_path / f"registry.db{suffix}")
    with pytest.raises(UnsafePath, match=why):
        Registry(str(tmp_path / "registry.db"))


@pytest.mark.parametrize("planted", [".registry.db.lock", ".registry.db.key.{pid}"])
def test_making_a_registry_writes_through_no_link(tmp_path, planted):
    planted = planted.format(pid=os.getpid())
    victim = tmp_path / "victim"
    victim.write_text("whole")
    place = tmp_path / "place"
    place.mkdir()
    (place / planted).symlink_to(victim)
    with contextlib.suppress(UnsafePath):
        Registry(str(place / "registry.db"))
    assert victim.read_text() == "whole"


@pytest.mark.parametrize("mode", OPEN_MODES)
def test_a_run_directory_that_others_may_write_is_refused(run, mode):
    """Whoever may write there can put another ``secret/`` in the place of this one."""
    run.create_key("root")
    run.root.chmod(mode)
    for use in (run.check_private, run.check_permissions, run.create, lambda: run.load_key("root")):
        with pytest.raises(UnsafePath, match="chmod go-w"):
            use()
    run.root.chmod(0o755)
    run.load_key("root")


def test_a_run_directory_is_closed_until_it_is_released(run):
    """The size and time of ``metrics.jsonl``, which others could see, tell how long each step took."""
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700
    run.root.chmod(0o755)
    run.create()
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o700


def test_without_its_rule_a_run_directory_stays_open(run, monkeypatch):
    """The mutant."""
    run.root.chmod(0o755)
    monkeypatch.setattr(RunDirectory, "hide", lambda _: None)
    run.create()
    assert stat.S_IMODE(run.root.stat().st_mode) == 0o755


def test_a_run_directory_that_stays_open_is_refused(run, monkeypatch):
    """As on a file system that keeps no modes."""
    run.root.chmod(0o755)
    monkeypatch.setattr(pathlib.Path, "chmod", lambda *_: None)
    with pytest.raises(UnsafePath, match="stays open"):
        run.hide()


@as_root
def test_a_run_directory_behind_anothers_link_is_refused(run, tmp_path):
    (tmp_path / "linked").symlink_to(run.root)
    RunDirectory(tmp_path / "linked").check_private()
    os.chown(tmp_path / "linked", NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(UnsafePath, match="belongs to user 65534"):
        RunDirectory(tmp_path / "linked").check_private()


@as_root
def test_a_run_directory_of_another_user_is_refused(run):
    run.create_key("root")
    os.chown(run.root, 65534, 65534)
    with pytest.raises(UnsafePath, match="belongs to user 65534"):
        run.load_key("root")


def test_a_registrys_key_is_no_link_unless_it_was_named(tmp_path, monkeypatch):
    """A mounted secret is a link to a file of root's."""
    opened = Registry(str(tmp_path / "registry.db"))
    key = tmp_path / "registry.db.key"
    pseudonym = opened.pseudonym("alice")
    key.rename(tmp_path / "mounted.key")
    key.symlink_to(tmp_path / "mounted.key")
    with pytest.raises(UnsafePath, match="is a link"):
        Registry(str(tmp_path / "registry.db")).pseudonym("alice")
    monkeypatch.setenv(KEY_VARIABLE, str(key))
    assert Registry(str(tmp_path / "registry.db")).pseudonym("alice") == pseudonym


MUTANTS = {
    "links are followed": ("O_NOFOLLOW", lambda p: p.symlink_to(key_file(p.with_name("elsewhere")))),
    "open files are read": ("_OTHERS", lambda p: key_file(p).chmod(0o644)),
    "anybody's files are read": ("_check_owner", foreign_key),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_without_its_check_each_planted_key_is_read(run, monkeypatch, mutant):
    name, leave = MUTANTS[mutant]
    if name == "_check_owner" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    leave(run.secret / "root.key")
    with pytest.raises(UnsafePath):
        run.load_key("root")
    if name == "O_NOFOLLOW":
        monkeypatch.setattr(os, name, 0)
    else:
        monkeypatch.setattr(private_paths, name, 0 if name == "_OTHERS" else lambda *_: None)
    assert run.load_key("root").reveal() == bytes.fromhex("ab" * 32)


@pytest.mark.parametrize("leave", [open_folder, pytest.param(foreign_folder, marks=as_root)])
def test_without_its_check_each_planted_directory_is_used(tmp_path, monkeypatch, leave: Leave):
    leave(tmp_path / "secret")
    with pytest.raises(UnsafePath):
        check_private_directory(tmp_path / "secret")
    monkeypatch.setattr(private_paths, "_OTHERS", 0)
    monkeypatch.setattr(private_paths, "_check_owner", lambda *_: None)
    check_private_directory(tmp_path / "secret")


def test_a_run_that_lay_open_is_closed_when_it_goes_on(tree, tmp_path, monkeypatch):
    """As an earlier version left it: others could see when ``metrics.jsonl`` grows."""
    inputs = read_inputs(load_checked(write_config(tree, tmp_path / "c.yaml")))
    for is_mutant in (False, True):
        with claimed(inputs, LocalBackend(torch.device("cpu"))):
            pass
        inputs.run.root.chmod(0o755)
        if is_mutant:
            monkeypatch.setattr(RunDirectory, "hide", lambda _: None)
        with claimed(inputs, LocalBackend(torch.device("cpu"))):
            assert (inputs.run.root.stat().st_mode & 0o077 == 0) is not is_mutant
