"""A unit whose gradient is not finite counts as zero, and the ledger says which one, whatever rank clipped it."""

from __future__ import annotations

import functools
import json

import pytest
import torch

import privtrain.models.losses
from privtrain.job.train import train
from privtrain.ledger.log import verify
from privtrain.ledger.query import opened_contributions
from privtrain.ledger.view import pseudonym_of
from privtrain.models.losses import row_losses, token_losses
from privtrain.run.directory import RunDirectory
from tests import jobs
from tests.conftest import write_config

#: Two users say this word, which nobody else says.
POISON = "zzzzzz"
#: As long as any record: these users, the last to be drawn, are then not the last to be clipped.
LONG = f"{POISON} alder birch cedar elm"
POISONED = {"user-900", "user-901"}


def poisoned_row_losses(model, input_ids, target_mask):
    """NaN for every row that begins with the word; the byte tokenizer gives "z" one token."""
    losses = row_losses(model, input_ids, target_mask)
    holds = (input_ids[:, 1 : 1 + len(POISON)] == _TOKEN[0]).sum(dim=1) == len(POISON)
    return losses * torch.where(holds, torch.nan, 1.0)


def poisoned_token_losses(model, line, head=None):
    """The same for every such record of a line."""
    losses = token_losses(model, line, head)
    factor = torch.ones_like(losses)
    for first, stop in line.records:
        own = line.input_ids[0, first + 1 : stop][: len(POISON)]
        if len(own) == len(POISON) and bool((own == _TOKEN[0]).all()):
            factor[:, first:stop] = torch.nan
    return losses * factor


_TOKEN = [0]


def poison(tree, tmp_path):
    """Add the two users to the data, and draw everybody often."""
    from transformers import AutoTokenizer

    (source,) = tree["data"]["source"]["paths"]
    rows = [json.dumps({"user": user, "text": text}) for user in sorted(POISONED) for text in ("alder", LONG)]
    with open(source, encoding="utf-8") as file:
        content = file.read() + "\n".join(rows) + "\n"
    target = tmp_path / "poisoned.jsonl"
    target.write_text(content, encoding="utf-8")
    _TOKEN[0] = AutoTokenizer.from_pretrained(tree["model"]["name_or_path"])("z").input_ids[0]
    tree["data"] |= {"source": {"kind": "files", "paths": [str(target)]}, "held_out_fraction": 0, "attack_fraction": 0}
    tree["privacy"] |= {"sampling_prob": 0.7, "num_steps": 4}
    return write_config(tree, tmp_path / "c.yaml")


def check_ledger(run_path):
    run = RunDirectory(run_path)
    state = verify(run.ledger)
    zeroed = {}
    with opened_contributions(run.ledger) as contributions:
        for user in [f"user-{u:03d}" for u in range(24)] + sorted(POISONED):
            rows = contributions.user(pseudonym_of(run, user))
            zeroed[user] = ([r["step"] for r in rows if r["zeroed"]], [r["step"] for r in rows])
    assert sum(map(len, state.zeroed.values())) > 2
    for user, (steps, drawn) in zeroed.items():
        # k = 3 covers both of a poisoned user's records, so each draw of it is poisoned.
        assert steps == (drawn if user in POISONED else []), user
    assert all(zeroed[user][1] for user in POISONED), "nobody was drawn; choose another seed"


@pytest.mark.parametrize(("route", "packing"), [("batched", "rows"), ("one_unit", "rows"), ("batched", "lines")])
def test_the_ledger_names_the_units_that_counted_as_zero(tree, tmp_path, monkeypatch, route, packing):
    path = poison(tree, tmp_path)
    monkeypatch.setattr(privtrain.models.losses, "row_losses", poisoned_row_losses)
    monkeypatch.setattr(privtrain.models.losses, "token_losses", poisoned_token_losses)
    performance = {"clipping_route": route, "packing": packing, "microbatch_size": 3}
    train(path, [f"performance.{key}={value}" for key, value in performance.items()])
    check_ledger(tmp_path / "runs" / "tiny")


def poison_rank(token: int, rank: int) -> None:
    _TOKEN[0] = token
    privtrain.models.losses.row_losses = poisoned_row_losses
    privtrain.models.losses.token_losses = poisoned_token_losses


@pytest.mark.dist
def test_flags_reach_the_ledger_from_the_rank_that_clipped(tree, tmp_path):
    path = poison(tree, tmp_path)
    done = jobs.run("privtrain", "train", path, before=functools.partial(poison_rank, _TOKEN[0]))
    assert done.returncode == 0, done.output[-3000:]
    check_ledger(tmp_path / "runs" / "tiny")
