"""Design invariant 12: what is measured is private; nothing that a run publishes names a user, a row or a moment."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest
import wandb

from privtrain.commands.export import export_run
from privtrain.config import validate
from privtrain.job.train import train
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import not_covered
from privtrain.tracking import watched_mirrors
from privtrain.tracking.mirrors import BlockedMirror
from tests.conftest import save_tiny_llama, tiny_tree, write_config, write_users
from tests.privtrain.published import (
    MEASURED,
    Private,
    num_moments,
    published_texts,
    times_told,
    wandb_records,
    wandb_rows,
)
from tests.privtrain.test_tracking import Shown as Listener

WORDS = ["alder", "birch", "cedar", "gorse", "hazel", "larch", "maple"]
NUM_STEPS, BLOCK = 6, 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with both mirrors, and its export."""
    directory = tmp_path_factory.mktemp("published")
    patch = pytest.MonkeyPatch()
    patch.setenv("WANDB_MODE", "offline")
    users = write_users(directory / "users.jsonl")
    tree = tiny_tree(save_tiny_llama(directory / "model"), users, directory / "runs")
    del tree["privacy"]["insecure_seed"]
    tree["privacy"] |= {"num_steps": NUM_STEPS, "noised_metrics": {}}
    tree["tracking"] = {"wandb": True, "tensorboard": True, "mirror_block_steps": BLOCK}
    train(write_config(tree, directory / "config.yaml"))
    wandb.teardown()  # waits until the file is written
    patch.undo()
    run = directory / "runs" / "tiny"
    export_run(run, directory / "exported", merge=False, dtype="fp32")
    places = [str(directory), str(pathlib.Path.home()) + "/", str(pathlib.Path.cwd())]
    return run, published_texts(run, directory / "exported"), Private.of(run, WORDS, places)


def test_nothing_private_is_in_any_published_byte(finished):
    _, texts, private = finished
    kinds = {pathlib.Path(name).suffix for name in texts}
    assert {".wandb", ".yaml", ".json", ".jsonl", ".safetensors", ".md"} <= kinds
    assert any("tfevents" in name for name in texts)
    assert sum("noised/loss" in text for text in texts.values()) >= 3, "rows are decoded"
    assert private.found_in(texts) == []


def test_no_row_tells_when_its_step_was_done(finished):
    """The attack: the seconds of a step, or when its row arrived, tell whether somebody with long records was in it."""
    run, texts, _ = finished
    assert not [name for name in MEASURED for text in texts.values() if name in text]
    assert num_moments(run) == {"wandb": 1, "tensorboard": 1}
    assert times_told(run) == []
    private = [json.loads(line) for line in (run / "secret" / "private_metrics.jsonl").read_text().splitlines()]
    assert sum("perf/step_seconds" in row for row in private) == NUM_STEPS, "the operator has them"


def open_at_once(opened, run, name):
    """A mutant of W&B offline: opened as the job begins, shown a block at a time."""
    return BlockedMirror(opened(), run, name, num_steps=BLOCK, from_step=-1)


def log_with_time(tracker, rows):
    for step, values in rows:
        for name, value in values.items():
            if value is not None:
                tracker._writer.add_scalar(name, value, step)


@pytest.mark.parametrize(
    ("target", "mutant", "told"),
    [
        ("privtrain.tracking.open.MirrorAtTheEnd", open_at_once, "wandb knows a moment of training"),
        (
            "privtrain.tracking.tensorboard_tracker.TensorBoardTracker.log_rows",
            log_with_time,
            "tensorboard knows more than when it was opened",
        ),
        ("privtrain.job.publish.set_file_times", lambda *_: None, "released files bear times of their own"),
    ],
)
def test_mutant_that_tells_a_time_is_seen(tree, tmp_path, monkeypatch, target, mutant, told, no_self_test):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(target, mutant)
    tree["tracking"] = {"wandb": True, "tensorboard": True, "mirror_block_steps": BLOCK}
    train(write_config(tree, tmp_path / "c.yaml"))
    wandb.teardown()
    assert told in times_told(tmp_path / "runs" / "tiny")


def test_not_covered_has_a_line_for_all_published(tree, monkeypatch):
    """At most three lines where nothing was asked for; another for each key that publishes something, and no more."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    always = not_covered(validate(tree).tracking)
    assert len(always) == 3
    assert not any("tracking." in line or "time" in line.lower() for line in always)
    for key in ("release_held_out_metrics", "release_measurements", "system_metrics", "private_metrics"):
        tree["tracking"] = {key: True}
        (line,) = (line for line in not_covered(validate(tree).tracking) if line not in always)
        assert f"tracking.{key}" in line
    tree["tracking"] = {}
    for mirror in ("wandb", "tensorboard"):
        (line,) = (line for line in not_covered(validate(tree).tracking, [mirror]) if line not in always)
        assert "each block of 25 steps (tracking.mirror_block_steps)" in line


def test_a_mirror_that_was_ever_watched_is_in_the_statement(tree, tmp_path, monkeypatch):
    """Also if the job that releases shows rows to nobody: an earlier one did."""
    run = RunDirectory(tmp_path)
    run.secret.mkdir(mode=0o700)
    tree["tracking"] = {}
    config = validate(tree)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert watched_mirrors(config, run) == ()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert watched_mirrors(config, run) == ("wandb",)
    BlockedMirror(Listener(), run, "wandb", num_steps=3, from_step=-1, is_live=True)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert watched_mirrors(config, run) == ("wandb",)


def test_the_number_of_units_is_nowhere(finished):
    """With the exact number beside it, adding one user would be seen with certainty, whatever ε says."""
    run, _, _ = finished
    statement = json.loads((run / "privacy.json").read_text())
    num_users = len(json.loads((run / "secret" / "manifest.json").read_text())["held_in"])
    assert num_users not in _numbers(statement)
    assert "Training units" not in (run / "adapter" / "README.md").read_text()


def _numbers(value):
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in _numbers(item)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_random_ids_of_runs_are_no_leak(finished):
    """The id that W&B gets is random: on a machine called ``vm`` it may hold these letters, and nothing leaked."""
    _, texts, private = finished
    rng = np.random.default_rng(0)
    (name,) = (name for name in texts if name.endswith(".wandb"))
    for _ in range(200):
        run_id = "tiny-" + "".join(rng.choice(list("0123456789abcdefghijklmnopqrstuvwxyz"), size=8))
        first = int(rng.integers(5, 12))
        machine = run_id[first : first + int(rng.integers(1, 9))].strip("-") or "vm"
        text = texts[name].replace(private.run_id, run_id)
        assert run_id in text
        other = dataclasses.replace(private, words=frozenset([f"{machine}q7x", f"x{machine}y{machine}"]), run_id=run_id)
        assert other.found_in({name: text}) == []
        alone = dataclasses.replace(private, words=frozenset([machine]), strings=frozenset(), run_id=run_id)
        only_the_id = {name: f"run-{run_id}.wandb files/{run_id}/output"}
        assert alone.found_in(only_the_id) == []
        assert alone.found_in({name: f"{only_the_id} host: {machine}"})


@pytest.mark.parametrize(
    ("file", "leak"),
    [
        ("config.yaml", "user"),
        ("adapter/README.md", "pseudonym"),
        ("metrics.jsonl", "perf/step_seconds"),
        ("privacy.json", "word"),
        ("wandb/metadata.json", "host"),
        ("adapter/tokenizer_config.json", "key"),
    ],
)
def test_a_planted_leak_is_found(finished, tmp_path, file, leak):
    run, _, private = finished
    users = json.loads((run / "secret" / "manifest.json").read_text())["held_in"]
    is_pseudonym = lambda s: len(s) == 32 and set(s) <= set("0123456789abcdef")  # noqa: E731
    planted = {
        "user": users[0],
        "pseudonym": next(filter(is_pseudonym, sorted(private.strings))),
        "perf/step_seconds": '{"train/step": 1, "perf/step_seconds": 0.5}',
        "word": "she wrote: maple, larch",
        "host": f'"host": "{sorted(private.words - set(WORDS))[0]}"',
        "key": (run / "secret" / "root.key").read_text().strip(),
    }[leak]
    copy = tmp_path / "run"
    shutil.copytree(run, copy, symlinks=True, ignore=shutil.ignore_patterns("secret", "checkpoints"))
    with open(copy / file, "a", encoding="utf-8") as out:
        out.write(planted)
    found = private.found_in(published_texts(copy))
    assert found
    assert all(line.startswith(f"run/{file}: ") for line in found)


def test_measurements_are_published_when_asked_for(tree, tmp_path, monkeypatch, no_self_test):
    monkeypatch.setenv("WANDB_MODE", "offline")
    tree["tracking"] = {"wandb": True, "release_measurements": True}
    train(write_config(tree, tmp_path / "c.yaml"))
    wandb.teardown()
    run = tmp_path / "runs" / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("perf/step_seconds" in row for row in rows) == 4
    (file,) = run.rglob("*.wandb")
    moments = {row["_timestamp"] for row in wandb_rows(wandb_records(file), with_internal=True)}
    assert len(moments) >= 4
    (item,) = (item for item in json.loads((run / "privacy.json").read_text())["not_covered"] if "Seconds" in item)
    assert "tracking.release_measurements" in item
