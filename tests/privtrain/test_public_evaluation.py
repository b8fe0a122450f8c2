"""Measurements on ``data.evaluation``: public, the same in every run, compared with the base, and acted upon."""

from __future__ import annotations

import json
import math
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from privtrain.config import validate
from privtrain.data.microbatch import Packer
from privtrain.data.records import Record
from privtrain.errors import ConfigError, PlanMismatch, Preempted, WorseThanBase
from privtrain.inputs import load_checked
from privtrain.job import evaluation
from privtrain.job.train import train
from privtrain.training.evaluate import Scores, difference, evaluate
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")


@pytest.fixture
def evaluated(tree, tmp_path):
    """A run that is measured on thirty public texts every second step."""
    rows = [{"text": f"public words number {number}"} for number in range(30)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["evaluation"] = {"kind": "files", "paths": [str(tmp_path / "public.jsonl")]}
    tree["tracking"]["evaluation_interval_steps"] = 2
    return tree


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_public_rows_are_measured_before_during_and_after(evaluated, tmp_path, capsys):
    train(write_config(evaluated, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    found = {row["train/step"]: row for row in rows_of(run) if "eval/loss" in row}
    assert sorted(found) == [0, 2, 4]
    rise = found[4]["eval/loss"] - found[0]["eval/loss"]
    assert found[4]["eval/loss_difference"] == pytest.approx(rise, abs=1e-6)
    assert found[4]["eval/loss_difference_low"] < rise < found[4]["eval/loss_difference_high"]
    assert found[4]["eval/perplexity"] == pytest.approx(math.exp(found[4]["eval/loss"]))
    assert "loss per token on data.evaluation" in capsys.readouterr().out
    assert str(tmp_path) not in (run / "config.yaml").read_text()
    assert "public.jsonl" in (run / "config.yaml").read_text()


def test_worse_model_follows_release_policy(evaluated, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "difference", lambda before, after: (0.5, 0.4, 0.6))
    evaluated["release"] = {"if_worse": "refuse"}
    path, run = write_config(evaluated, tmp_path / "c.yaml"), tmp_path / "runs" / "tiny"
    with pytest.raises(WorseThanBase, match=r"worse than its base: .*Nothing is released") as caught:
        train(path)
    assert caught.value.exit_code == 3
    assert not (run / "release.json").exists()
    assert not (run / "adapter").exists()
    capsys.readouterr()
    train(path, ["release.if_worse=warn"])
    assert (run / "release.json").exists()
    assert "warning: the model is worse than its base" in " ".join(capsys.readouterr().out.split())


def test_a_signal_before_an_evaluation_saves_the_step(evaluated, tmp_path):
    """The job says that it goes on from there: no step behind the last checkpoint is lost."""
    evaluated["performance"] = evaluated.get("performance", {}) | {"checkpoint_interval_steps": 1000}

    def signal_after_step_two(step, values):
        if step == 2 and "privacy/epsilon" in values:  # logged once the ranks have looked for signals of the step
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.5)  # the thread that notes signals needs a moment

    with pytest.raises(Preempted, match="saved after step 2 of 4"):
        train(write_config(evaluated, tmp_path / "c.yaml"), on_step=signal_after_step_two)
    checkpoints = tmp_path / "runs" / "tiny" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]


def test_a_decision_on_private_rows_cannot_be_asked_for(tree):
    tree["release"] = {"if_worse": "refuse"}
    with pytest.raises(ConfigError, match=r"release\.if_worse: refuse needs data\.evaluation"):
        validate(tree)


def test_private_or_unusable_evaluation_rows_are_refused(evaluated, tmp_path, users_file):
    path = write_config(evaluated, tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"data\.evaluation\.paths: .*is a file of data\.source"):
        load_checked(path, [f"data.evaluation.paths=[{users_file}]"])
    (tmp_path / "public.jsonl").write_text('{"words": "x"}\n')
    with pytest.raises(ConfigError, match=r"data\.text_column: no column 'text' in .*public\.jsonl"):
        load_checked(path)
    (tmp_path / "public.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(ConfigError, match=r"data\.evaluation: no row of it can be used"):
        train(path)
    (tmp_path / "public.jsonl").write_text(users_file.read_text().splitlines()[3])
    with pytest.raises(ConfigError, match=r"data\.evaluation: \d+ records of data\.source are among its rows"):
        train(path)


def test_a_resumed_run_is_compared_on_the_same_records(evaluated, tmp_path, monkeypatch):
    evaluated["release"] = {"if_worse": "refuse"}
    path = write_config(evaluated, tmp_path / "c.yaml")

    def worse(inputs, before, after):
        raise WorseThanBase("stopped here")

    with monkeypatch.context() as patched:
        patched.setattr(evaluation, "_compare", worse)
        with pytest.raises(WorseThanBase):
            train(path)
    public = tmp_path / "public.jsonl"
    content = public.read_text()
    public.write_text(content.replace("number 1", "number 9"))
    with pytest.raises(PlanMismatch, match=r"begun with other records in data\.evaluation"):
        train(path)
    (tmp_path / "elsewhere.jsonl").write_text(content)
    # Whether noise made this tiny model worse is not what is asked here.
    train(path, [f"data.evaluation.paths=[{tmp_path / 'elsewhere.jsonl'}]", "release.if_worse=warn"])
    assert (tmp_path / "runs" / "tiny" / "release.json").exists()
    measured = [row["train/step"] for row in rows_of(tmp_path / "runs" / "tiny") if "eval/loss" in row]
    assert sorted(set(measured)) == [0, 2, 4]


def scores(losses):
    return Scores(np.asarray(losses), np.asarray([2.0, 3.0, 5.0]), 0.0)


def test_the_difference_has_the_interval_of_a_ratio_estimator():
    before, after = scores([4.0, 6.0, 10.0]), scores([4.0, 6.0, 10.0])
    assert difference(before, after) == (0.0, 0.0, 0.0)
    # One nat more on each token of every record is known exactly; on one record alone it is not.
    rise, low, high = difference(before, scores([6.0, 9.0, 15.0]))
    assert (rise, low, high) == pytest.approx((1.0, 1.0, 1.0))
    rise, low, high = difference(before, scores([14.0, 6.0, 10.0]))
    assert low < 0 < rise < high
    assert rise == pytest.approx(1.0)
    assert difference(before, scores([math.nan, 6.0, 10.0]))[1:] == (-math.inf, math.inf)


def test_ranks_with_fewer_records_add_zeros():
    """Two ranks' shares add up to what one rank measures; the second of them has no record for its last batch."""
    records = [Record.of(np.arange(1, 4 + number)) for number in range(3)]

    def measured(rank: int, world_size: int) -> Scores:
        backend = SimpleNamespace(
            rank=rank, world_size=world_size, device=torch.device("cpu"), reduce=lambda sums: None
        )
        objective = SimpleNamespace(
            losses=lambda model, ids, mask: (ids * mask).sum(dim=1).float(), num_correct=lambda *_: torch.zeros(())
        )
        found = evaluate(
            torch.nn.Identity(),
            records,
            backend,  # pyright: ignore[reportArgumentType]
            objective=objective,  # pyright: ignore[reportArgumentType]
            packer=Packer(1, 16, 0),
            autocast=torch.autocast("cpu", enabled=False),
        )
        assert found is not None
        return found

    whole = measured(0, 1)
    assert whole.losses.tolist() == [5.0, 9.0, 14.0]
    assert whole.num_targets.tolist() == [2.0, 3.0, 4.0]
    np.testing.assert_array_equal(sum(measured(rank, 2).losses for rank in range(2)), whole.losses)
    np.testing.assert_array_equal(sum(measured(rank, 4).losses for rank in range(4)), whole.losses)


@pytest.mark.campaign
def test_the_interval_covers_the_truth_as_often_as_it_says():
    """1,000 draws of 40 records with a mean rise of 0.1 nats a token."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        num = rng.integers(2, 30, 40).astype(float)
        rises = num * rng.normal(0.1, 0.3, 40)
        _, low, high = difference(Scores(0 * num, num, 0.0), Scores(rises, num, 0.0))
        covered += low <= 0.1 <= high
    assert 920 <= covered <= 980
