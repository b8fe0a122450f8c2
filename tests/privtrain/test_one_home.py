"""One home for each fact: the statement's model, what a backend must have, rank 0's bytes, a rank without a ledger."""

from __future__ import annotations

import json

import pytest
import torch

from privtrain.backends.base import Backend, ReplicatedBackend
from privtrain.backends.local import LocalBackend
from privtrain.config import validate
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.log import NullLedger
from privtrain.privacy.plan import PrivacyPlan
from privtrain.run.statement import PrivacyStatement, privacy_statement

FACTS = {
    "num_model_steps": 2,
    "num_charged": 3,
    "num_accounted": 3,
    "num_commits": 2,
    "ledger_head": "ab" * 32,
    "split_commitment": "cd" * 32,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"unit": "example", "user_accounting": "mixture"},
        {"noise_multiplier": 0},
        {"clipping_style": "adaptive", "noised_metrics": {}},
    ],
    ids=["plain", "user", "no noise", "auxiliary sums"],
)
def test_a_written_statement_read_and_written_again_is_the_same_bytes(tree, changes):
    tree["privacy"] |= changes
    config = validate(tree)
    written = json.dumps(privacy_statement(config, PrivacyPlan.build(config.privacy), **FACTS))
    read = PrivacyStatement.model_validate(json.loads(written))
    assert json.dumps(read.model_dump(by_alias=True)) == written
    assert not read.model_extra, "every key that is written has its place in the model"


def test_a_statement_of_another_type_is_not_written(tree):
    """The mutant: a caller that counts in floats."""
    config = validate(tree)
    with pytest.raises(ValueError, match="steps_released"):
        privacy_statement(config, PrivacyPlan.build(config.privacy), **FACTS | {"num_charged": 3.5})


@pytest.mark.parametrize("name", sorted(Backend.__abstractmethods__))
def test_a_backend_without_one_of_its_methods_cannot_be_made(name):
    LocalBackend(torch.device("cpu"))
    lacking = type("Lacking", (LocalBackend,), {name: vars(Backend)[name]})
    with pytest.raises(TypeError, match=name):
        lacking(torch.device("cpu"))


class SecondRank(ReplicatedBackend):
    is_main = False

    def _broadcast(self, value: bytes | None) -> bytes:
        assert value is None, "rank 0 alone has a value"
        return b"rank 0's"


def test_only_rank_0_makes_what_it_sends():
    SecondRank.__abstractmethods__ = frozenset()
    assert SecondRank().from_main(lambda: pytest.fail("called on another rank")) == b"rank 0's"
    assert LocalBackend(torch.device("cpu")).from_main(lambda: b"mine") == b"mine"


def test_a_null_ledger_keeps_nothing_and_can_do_nothing_of_rank_0s():
    ledger = NullLedger()
    ledger.intend(0, 1, [("user", 1)])
    ledger.commit(0, 1, "00" * 32, ["user"])
    ledger.close()
    assert ledger.state == LedgerState()
    for call in (ledger.prepare_release, lambda: ledger.blinded("environment", "00")):
        with pytest.raises(AttributeError):
            call()
