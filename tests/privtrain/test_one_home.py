"""One home for each fact.

The statement's model, what a backend must have, rank 0's bytes and any rank's flag, a rank without a ledger, JSON with
one meaning, a pseudonym that somebody gives, weighted quantiles.
"""

from __future__ import annotations

import ast
import graphlib
import json

import numpy as np
import pytest
import torch

from privtrain.backends.base import Backend, ReplicatedBackend
from privtrain.backends.local import LocalBackend
from privtrain.config import validate
from privtrain.errors import DamagedFile, PrivtrainError
from privtrain.files import reading, strict_json
from privtrain.ledger import query
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.log import NullLedger
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import which_pseudonym
from privtrain.run.statement import PrivacyStatement, privacy_statement
from tests.jobs import REPOSITORY

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
def test_statement_round_trip_keeps_bytes(tree, changes):
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


def test_other_ranks_take_the_json_of_rank_0_and_make_none():
    SecondRank.__abstractmethods__ = frozenset()
    other = SecondRank()
    other._broadcast = lambda value: b"[1.5, null, true]"  # type: ignore[method-assign]
    assert other.json_from_main(lambda: pytest.fail("called on another rank")) == [1.5, None, True]
    assert LocalBackend(torch.device("cpu")).json_from_main(lambda: {"a": 1e-300}) == {"a": 1e-300}


@pytest.mark.parametrize(("total", "expected"), [(0.0, False), (1.0, True), (3.0, True), (float("nan"), True)])
def test_flag_of_any_rank_counts_and_nan_too(total, expected, monkeypatch):
    monkeypatch.setattr(LocalBackend, "reduce", lambda self, vector: vector.fill_(total))
    assert LocalBackend(torch.device("cpu")).any_rank(False) is expected


TWO_MEANINGS = ['{"a": 1, "a": 2}', '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}', '{"a": ' + "9" * 400 + "}"]


@pytest.mark.parametrize("text", [*TWO_MEANINGS, "[" * 100_000])
def test_ambiguous_json_is_refused_by_both_readers(text, tmp_path):
    with pytest.raises(ValueError, match=r"twice|no numbers|range|deeply"):
        strict_json.loads(text)
    with pytest.raises(DamagedFile) as caught:
        reading.parse_json(text.encode(), tmp_path / "f.json")
    assert '"a"' not in str(caught.value)


@pytest.mark.parametrize("text", TWO_MEANINGS)
def test_the_mutant_of_a_lax_reader_is_lax_in_both(text, tmp_path, monkeypatch):
    """That the refusals above are of one function: without it, none is left."""
    monkeypatch.setattr(strict_json, "loads", json.loads)
    reading.parse_json(text.encode(), tmp_path / "f.json")


def test_a_pseudonym_is_one_that_was_given_or_the_users():
    made = "ab" * 16
    assert which_pseudonym("ann", None, lambda user: made) == made
    assert which_pseudonym(None, made, lambda user: pytest.fail("nobody was named")) == made
    for user, given in (("ann", made), (None, None), (None, "ann"), (None, made.upper()), (None, made + "\n")):
        with pytest.raises(PrivtrainError, match="--pseudonym"):
            which_pseudonym(user, given, lambda user: made)


def test_weighted_quantiles_equal_repeated_values():
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = int(rng.integers(1, 9))
        values, weights = rng.integers(0, 9, size), rng.integers(1, 6, size)
        plain = np.sort(np.repeat(values, weights))
        found = query._quantiles(values, weights)
        assert found["min"] == plain[0]
        assert found["max"] == plain[-1]
        for name, share in (("p25", 0.25), ("median", 0.5), ("p75", 0.75)):
            assert found[name] == plain[int(np.ceil(share * len(plain))) - 1]


def test_null_ledger_keeps_nothing():
    ledger = NullLedger()
    ledger.intend(0, 1, [("user", 1)])
    ledger.commit(0, 1, "00" * 32, ["user"])
    ledger.close()
    assert ledger.state == LedgerState()
    for call in (ledger.prepare_release, lambda: ledger.blinded("environment", "00")):
        with pytest.raises(AttributeError):
            call()


def imports_by_module() -> dict[str, set[str]]:
    """Every import of a module, also those inside functions and under TYPE_CHECKING."""
    files = [path for top in ("privtrain", "attacks", "accountants") for path in (REPOSITORY / top).rglob("*.py")]
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in files}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        names = {(node.module or "", alias.name) for node in imports for alias in node.names}
        found[module] = {f"{a}.{b}" if f"{a}.{b}" in modules else a for a, b in names} & (modules.keys() - {module})
    return found


def test_no_module_imports_itself_by_way_of_others():
    imports = imports_by_module()
    assert len(imports) > 300
    graphlib.TopologicalSorter(imports).prepare()
    imports["privtrain.errors"].add("privtrain.cli")
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(imports).prepare()


def test_top_level_holds_what_every_room_needs_and_no_more():
    names = {path.name for path in (REPOSITORY / "privtrain").iterdir() if path.is_file()}
    assert names <= {
        *("__init__.py", "__init__.pyi", "__main__.py", "py.typed", "README.md"),
        *("api.py", "cli.py", "errors.py", "inputs.py"),
    }
