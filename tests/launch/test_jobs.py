"""Whole jobs on two gloo ranks: release, resume after SIGKILL, empty draws, world size."""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from privtrain.ledger.chain import read_records
from privtrain.ledger.log import verify
from privtrain.ledger.view import verify_run
from tests import jobs
from tests.conftest import save_tiny_llama, tiny_tree, write_config, write_users
from tests.privtrain.ledgers import contents, drop_records

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.usefixtures("no_self_test")]

NUM_STEPS = 12


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """One directory for the module: jobs are compared with each other."""
    directory = tmp_path_factory.mktemp("jobs")
    save_tiny_llama(directory / "model", num_layers=1)
    write_users(directory / "users.jsonl")
    return directory


def config(place: pathlib.Path, name: str, **privacy) -> pathlib.Path:
    tree = tiny_tree(place / "model", place / "users.jsonl", place / "runs")
    tree["run"]["name"] = name
    tree["privacy"] |= {"num_steps": NUM_STEPS, "insecure_seed": 11, **privacy}
    tree["performance"]["checkpoint_interval_steps"] = 4
    return write_config(tree, place / f"{name}.yaml")


def adapter(place: pathlib.Path, name: str) -> bytes:
    return (place / "runs" / name / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(place):
    """With the self-test, which leaves nothing behind: jobs without it end in the same adapter."""
    done = jobs.run("privtrain", "train", config(place, "uninterrupted"))
    assert done.returncode == 0, done.output[-3000:]
    return place / "runs" / "uninterrupted"


def test_a_run_ends_with_an_adapter_a_card_and_a_statement(uninterrupted):
    statement = json.loads((uninterrupted / "privacy.json").read_text())
    state = verify(uninterrupted / "secret" / "ledger.jsonl")
    assert statement["steps_released"] == state.num_charged == len(state.commits) == NUM_STEPS
    records = list(read_records(uninterrupted / "secret" / "ledger.jsonl"))
    assert [record["kind"] for record in records].index("release") == len(records) - 1
    assert statement["ledger"]["head"] == records[-1]["prev"], "what the release record follows"
    assert statement["unit"] == "user"
    assert statement["private"] is False, "the test seed voids the guarantee"
    assert "NOT PRIVATE" in (uninterrupted / "adapter" / "README.md").read_text()
    assert "matches privacy.json" in verify_run(uninterrupted)


@pytest.mark.parametrize("num_kills", [4, pytest.param(20, marks=pytest.mark.campaign)])
def test_killed_at_random_moments_it_ends_in_the_same_adapter(place, uninterrupted, num_kills):
    """SIGKILL of a random rank; the same command goes on; bitwise the same result, every step charged once."""
    name = f"killed-{num_kills}"
    path = config(place, name)
    run = place / "runs" / name
    ledger = run / "secret" / "ledger.jsonl"
    size = (uninterrupted / "secret" / "ledger.jsonl").stat().st_size
    rng = np.random.default_rng(0)
    moments = np.sort(rng.uniform(0, size, num_kills))
    num_killed = 0
    for moment in moments:
        with jobs.started("privtrain", "train", path) as job:
            if jobs.wait_for_ledger(job, ledger, int(moment)):
                num_killed += 1
                jobs.kill_rank(job, int(rng.integers(2)))
            else:
                job.wait()
    assert num_killed >= 0.75 * num_kills, "the kills must hit running jobs"
    done = jobs.run("privtrain", "train", path)
    assert done.returncode == 0, done.output[-3000:]
    assert adapter(place, name) == adapter(place, "uninterrupted")
    state = verify(ledger)
    assert len(state.commits) == state.num_charged == NUM_STEPS
    assert state.generation == 0
    statement = json.loads((run / "privacy.json").read_text())
    assert statement["steps_released"] == NUM_STEPS
    assert "matches privacy.json" in verify_run(run)
    steps = [json.loads(line)["train/step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s for s in steps if s] == sorted(s for s in steps if s)


def test_one_rank_gives_the_same_model_as_two(place, uninterrupted):
    """Without noise, which is another one as soon as two sums differ in the last bit."""
    from privtrain.job.train import train

    done = jobs.run("privtrain", "train", config(place, "two", noise_multiplier=0))
    assert done.returncode == 0, done.output[-3000:]
    train(config(place, "alone", noise_multiplier=0))
    alone, two = (load_file(place / "runs" / n / "adapter" / "adapter_model.safetensors") for n in ("alone", "two"))
    for name, value in alone.items():
        assert np.abs(value - two[name]).max() < 1e-5, name
    intents = [contents(place / "runs" / n / "secret" / "ledger.jsonl") for n in ("alone", "uninterrupted")]
    assert intents[0] == intents[1], "the sample depends on the world size"


def test_empty_steps_and_ranks_without_users_finish(place):
    path = config(place, "sparse", sampling_prob=0.06, num_steps=16)
    done = jobs.run("privtrain", "train", path)
    assert done.returncode == 0, done.output[-3000:]
    run = place / "runs" / "sparse"
    sizes = [r["num_units"] for r in read_records(run / "secret" / "ledger.jsonl") if r["kind"] == "intent"]
    assert 0 in sizes, "no step drew nobody; choose another seed"
    assert 1 in sizes, "no rank went without a user; choose another seed"
    assert len(sizes) == 16
    assert "16 committed" in verify_run(run)


def test_allocation_survives_a_kill_and_another_world_size(place):
    """Killed inside an epoch and resumed on two ranks, or alone: the same draw, every user once an epoch."""
    from privtrain.job.train import train

    settings = {"sampling": "random_allocation", "sampling_prob": None, "steps_per_epoch": 6, "num_steps": 12}
    path = config(place, "allocated", **settings)
    run = place / "runs" / "allocated"
    with jobs.started("privtrain", "train", path) as job:
        assert jobs.wait_for_checkpoint(job, run, 4)
        jobs.kill_rank(job, 1)
    done = jobs.run("privtrain", "train", path)
    assert done.returncode == 0, done.output[-3000:]
    train(config(place, "allocated-alone", **settings))
    drawn = []
    for name in ("allocated", "allocated-alone"):
        steps = contents(place / "runs" / name / "secret" / "ledger.jsonl")
        drawn.append([set(steps[key]) for key in sorted(steps)])
    assert drawn[0] == drawn[1], "the sample depends on the world size or on what was drawn before"
    assert len(drawn[0]) == 12
    first, second = (sorted(itertools.chain(*drawn[0][i : i + 6])) for i in (0, 6))
    assert first == second
    assert len(first) == len(set(first)) > 10
    statement = json.loads((run / "privacy.json").read_text())
    assert statement["sampling"]["scheme"] == "random_allocation"
    assert statement["steps_accounted"] == 12
    assert statement["accountants"][0]["method"] == "allocation"


def test_changed_environment_past_a_checkpoint_is_new(place, uninterrupted):
    """Another learning rate must not reuse the noise of steps that were begun; they stay charged."""
    source, run = place / "runs" / "uninterrupted", place / "runs" / "rewound"
    shutil.copytree(source, run)
    for released in ("privacy.json", "metrics.jsonl"):
        (run / released).unlink()
    shutil.rmtree(run / "adapter")
    ledger = run / "secret" / "ledger.jsonl"
    drop_records(ledger, "release")
    newest = sorted((run / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    kept = json.loads((sorted((run / "checkpoints").iterdir())[-1] / "summary.json").read_text())["step"]
    path = config(place, "rewound")
    done = jobs.run("privtrain", "train", path, "training.learning_rate=0.02")
    assert done.returncode == 0, done.output[-3000:]
    state = verify(ledger)
    assert state.generation == 1
    assert state.num_charged == NUM_STEPS, "the budget is spent, so nothing more may be drawn"
    assert len(state.path) == kept
    assert (run / "secret" / "generation-0001.key").read_text() != (run / "secret" / "generation-0000.key").read_text()


def test_copy_under_other_settings_never_shares_noise(place):
    """Kill at a checkpoint, copy the directory, resume one as it is and one with another learning rate."""
    path = config(place, "forked")
    run = place / "runs" / "forked"
    with jobs.started("privtrain", "train", path) as job:
        assert jobs.wait_for_checkpoint(job, run, 8)
        jobs.kill_rank(job, 0)
    copy = place / "runs" / "copy"
    shutil.copytree(run, copy)
    same = jobs.run("privtrain", "train", path)
    other = jobs.run("privtrain", "train", config(place, "copy"), "training.learning_rate=0.02")
    assert (same.returncode, other.returncode) == (0, 0), same.output[-2000:] + other.output[-2000:]
    assert verify(run / "secret" / "ledger.jsonl").generation == 0
    assert verify(copy / "secret" / "ledger.jsonl").generation == 1


def data_by_rank(data: pathlib.Path, rank: int) -> None:
    sys.argv.append(f"data.source.paths=[{data}/{rank}.jsonl]")


def no_data_on_rank_1(rank: int) -> None:
    sys.argv += ["data.source.paths=[/nowhere.jsonl]"] * rank


def test_a_rank_with_other_data_stops_the_job(place):
    """Units are drawn by index: with other rows on one rank, one user could enter a step twice."""
    path = config(place, "mixed")
    data = place / "by-rank"
    data.mkdir()
    rows = (place / "users.jsonl").read_text().splitlines(keepends=True)
    (data / "0.jsonl").write_text("".join(rows))
    (data / "1.jsonl").write_text("".join(rows[3:]))
    done = jobs.run("privtrain", "train", path, before=functools.partial(data_by_rank, data))
    assert done.returncode != 0
    assert "rank 1 has another plan or data set than rank 0" in done.output
    assert not (place / "runs" / "mixed" / "privacy.json").exists()


def test_a_mistake_of_one_rank_alone_is_told(place):
    path = config(place, "lonely")
    done = jobs.run("privtrain", "train", path, before=no_data_on_rank_1)
    assert done.returncode != 0
    assert "rank 1: privtrain: data.source.paths: no such file: /nowhere.jsonl" in done.output
