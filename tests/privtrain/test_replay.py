"""A resumed job: the same sum is the same release, another sum is never released about the same sample."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from privtrain.backends import LocalBackend
from privtrain.errors import GuaranteeLost, LedgerCorrupt
from privtrain.job.train import train
from privtrain.ledger.log import verify_chain
from privtrain.training.trainer import Trainer
from tests.conftest import write_config
from tests.privtrain.interrupted import Killed, die, train_until_killed
from tests.privtrain.ledgers import opened

pytestmark = pytest.mark.usefixtures("no_self_test")

NUM_STEPS = 8


@pytest.fixture
def config(tree, tmp_path):
    tree["privacy"] |= {"num_steps": NUM_STEPS}
    tree["performance"] = tree.get("performance", {}) | {"checkpoint_interval_steps": 4}
    return write_config(tree, tmp_path / "run.yaml")


def nudge_sums_from(step: int, monkeypatch) -> list[tuple[int, int]]:
    """As on a device that rounds differently from then on; says which (generation, step) drew noise."""
    now, drawn = [], []
    original_step, original_reduce, original_noise = (
        Trainer.train_step,
        LocalBackend.reduce_total,
        LocalBackend.add_noise,
    )

    def train_step(self, number):
        now[:] = [self.generation, number]
        original_step(self, number)
        now.clear()

    def reduce_total(self, total):
        total = original_reduce(self, total)
        return total + 1 if now and now[1] >= step else total

    def add_noise(self, *arguments, **named):
        if now:
            drawn.append(tuple(now))
        return original_noise(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    monkeypatch.setattr(LocalBackend, "reduce_total", reduce_total)
    monkeypatch.setattr(LocalBackend, "add_noise", add_noise)
    return drawn


def state_of(tmp_path, name):
    return verify_chain(tmp_path / "runs" / name / "secret" / "ledger.jsonl")


def test_a_replay_with_another_sum_goes_on_in_a_new_generation(config, tree, tmp_path, monkeypatch):
    """Killed after six steps, two past the checkpoint; the second of them gives another sum."""
    train_until_killed(config, 5)
    drawn = nudge_sums_from(5, monkeypatch)
    train(config)
    state = state_of(tmp_path, tree["run"]["name"])
    assert (0, 5) not in drawn, "no noise is drawn over the second sum of a sample"
    assert drawn == [(0, 4), (1, 5), (1, 6)]
    assert [(e.generation, e.step) for e in state.path] == [*[(0, s) for s in range(5)], (1, 5), (1, 6)]
    assert state.num_charged == NUM_STEPS, "the abandoned step stays charged, so the model has one less"
    statement = json.loads((tmp_path / "runs" / tree["run"]["name"] / "privacy.json").read_text())
    assert (statement["steps_released"], statement["steps_of_the_model"]) == (NUM_STEPS, NUM_STEPS - 1)


def test_diverging_replay_and_a_crash_right_after(config, tree, tmp_path, monkeypatch):
    train_until_killed(config, 6)
    with monkeypatch.context() as patch:
        nudge_sums_from(4, patch)
        train_until_killed(config, 4)
    train(config)
    state = state_of(tmp_path, tree["run"]["name"])
    assert (state.generation, state.num_charged) == (2, NUM_STEPS), "the sum without the nudge is another one again"
    assert [(e.generation, e.step) for e in state.path] == [(0, s) for s in range(4)]


def test_uncommitted_step_is_retaken_with_its_new_sum(config, tree, tmp_path, monkeypatch):
    """Nothing of it left the job: it is charged once, and the generation goes on."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_commit", lambda *_: die())
        with pytest.raises(Killed):
            train(config)
    nudge_sums_from(0, monkeypatch)
    train(config)
    state = state_of(tmp_path, tree["run"]["name"])
    assert (state.generation, state.num_charged, len(state.path)) == (0, NUM_STEPS, NUM_STEPS)


def test_an_undisturbed_replay_is_free_and_bitwise(config, tree, tmp_path, monkeypatch):
    run = tmp_path / "runs" / tree["run"]["name"]
    train_until_killed(config, 5)
    before = dict(verify_chain(run / "secret" / "ledger.jsonl").commits)
    train(config)
    state = state_of(tmp_path, run.name)
    assert (state.generation, state.num_charged) == (0, NUM_STEPS)
    assert before.items() <= state.commits.items()
    whole = write_config({**tree, "run": {**tree["run"], "name": "whole"}}, tmp_path / "whole.yaml")
    train(whole)
    one, other = (
        load_file(tmp_path / "runs" / n / "adapter" / "adapter_model.safetensors") for n in (run.name, "whole")
    )
    if tree["privacy"].get("insecure_seed") is not None:
        assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_ledger_refuses_another_sum_of_a_committed_step(tmp_path):
    with opened(tmp_path / "l.jsonl") as ledger:
        ledger.begin_session(generation=0, from_step=0, environment="e")
        ledger.intend(0, 0, [("user", 1)])
        ledger.commit(0, 0, "a" * 64)
        ledger.intend(0, 0, [("user", 1)])
        ledger.commit(0, 0, "a" * 64)
        with pytest.raises(GuaranteeLost, match="another sum"):
            ledger.commit(0, 0, "b" * 64)


@pytest.mark.parametrize("is_old", [False, True])
def test_another_runs_checkpoint_is_refused(tree, tmp_path, is_old):
    """Its weights hold steps of another secret, which this run's ledger does not charge."""
    del tree["privacy"]["insecure_seed"]
    configs, checkpoints = [], []
    for name in ("one", "other"):
        tree["run"]["name"] = name
        configs.append(write_config(tree, tmp_path / f"{name}.yaml"))
        train_until_killed(configs[-1], last=2)
        checkpoints.append(tmp_path / "runs" / name / "checkpoints" / "step-00000002")
    own = shutil.copytree(checkpoints[0], tmp_path / "own")
    shutil.rmtree(checkpoints[0])
    shutil.copytree(own if is_old else checkpoints[1], checkpoints[0])
    if is_old:  # an earlier version wrote no commitment
        summary = json.loads((own / "summary.json").read_text())
        del summary["commitment"]
        (checkpoints[0] / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(LedgerCorrupt, match="copied from another run, or an earlier version"):
        train(configs[0])
    shutil.rmtree(checkpoints[0])
    shutil.copytree(own, checkpoints[0])
    train(configs[0])
    assert len(verify_chain(tmp_path / "runs" / "one" / "secret" / "ledger.jsonl").intents) == 4
