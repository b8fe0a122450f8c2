from __future__ import annotations

import json
import math

import pytest

from attacks import rundir
from attacks.errors import AttackInputError
from privtrain.errors import DamagedFile, PrivtrainError


def test_a_private_statement_stands_by_its_epsilon(make_run):
    statement = rundir.read_statement(make_run(0))
    assert statement.effective_epsilon == 7.99
    assert statement.mechanism.noise_multiplier == 0.8


@pytest.mark.parametrize("epsilon", [None, 2.0])
def test_a_statement_that_is_not_private_stands_by_nothing(make_run, epsilon):
    statement = rundir.read_statement(make_run(0, private=False, not_private_reasons=["fixed seed"], epsilon=epsilon))
    assert math.isinf(statement.effective_epsilon)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "privtrain/privacy/2"}, "has schema 'privtrain/privacy/2'"),
        ({"epsilon": -1.0}, "epsilon: "),
        ({"epsilon": math.nan}, "NaN and infinity"),
        ({"split_commitment": ""}, "split_commitment: "),
        ({"epsilon": None}, "private is true and epsilon is null"),
        ({"delta": 2.0}, "delta: "),
        ({"private": "false"}, "private: "),
        ({"mechanism": {"kind": "gaussian"}}, r"mechanism\.noise_multiplier: "),
        ({"steps_released": 59}, "released 59 of 60 steps: expected a finished run"),
    ],
)
def test_a_statement_that_cannot_be_relied_on_is_refused(make_run, changes, message):
    with pytest.raises(PrivtrainError, match=message):
        rundir.read_statement(make_run(0, **changes))


def test_steps_replayed_after_a_crash_are_no_reason_to_refuse(make_run):
    assert rundir.read_statement(make_run(0, steps_released=75)).steps_released == 75


def test_a_new_generation_within_an_epoch_is_no_reason_to_refuse(make_run):
    """Random allocation and shuffling account for whole epochs: 56 steps were released, 60 are accounted."""
    assert rundir.read_statement(make_run(0, steps_released=56, steps_accounted=60)).steps_released == 56
    with pytest.raises(AttackInputError, match="released 56 of 60"):
        rundir.read_statement(make_run(1, steps_released=56, steps_accounted=56, name="short"))


def test_perplexity_is_the_first_and_the_last_released(make_run):
    run = make_run(0)
    assert rundir.held_out_perplexity(run) == (31.4, 22.05)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"eval/held_out_perplexity": None}) + "\n")
        file.write(json.dumps({"eval/held_out_perplexity": 20.5}) + "\n")
    assert rundir.held_out_perplexity(run) == (31.4, 20.5)


def test_perplexity_that_was_not_released_is_not_made_up(make_run):
    run = make_run(0, perplexity=False)
    assert rundir.held_out_perplexity(run) is None
    (run / "metrics.jsonl").write_text('{"eval/held_out_perplexity": 30.0}\n')
    assert rundir.held_out_perplexity(run) is None
    (run / "metrics.jsonl").unlink()
    assert rundir.held_out_perplexity(run) is None


def test_a_broken_metrics_line_is_named(make_run):
    run = make_run(0)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": \n')
    with pytest.raises(DamagedFile, match=r"metrics\.jsonl line 4"):
        rundir.held_out_perplexity(run)
