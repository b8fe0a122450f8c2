"""The study of plans at equal ε: what is compared, what is concluded from invented losses, and the arm of Opacus."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
from typing import Any

import pytest

from privtrain.config import load_config
from privtrain.job.train import train
from privtrain.studies import more_per_epsilon
from privtrain.studies.findings import Claim, Verdict
from privtrain.studies.recipe import RECIPES, Cell, expand, read_recipe, recipe_path
from privtrain.studies.results import CellResult, Results
from tests.conftest import write_config

PLANS = {
    False: {"privacy.num_steps": 256, "privacy.expected_batch_size": 16, "training.learning_rate": 0.01},
    True: {"privacy.num_steps": 256, "privacy.expected_batch_size": 16, "privacy.noise": "banded",
           "privacy.sampling": "cyclic_poisson", "privacy.num_bands": 8, "training.learning_rate": 0.05},
}  # fmt: skip


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    """The grid. Any plan does where only what becomes of it is looked at."""

    def found(tree: str, num_users: int, num_trained: int, can_be_banded: bool) -> dict[str, Any]:
        assert "insecure_seed" not in tree  # one plan for all seeds
        assert (num_users, num_trained) in ((1600, 7936), (2910, 7936))
        return {"overrides": PLANS[can_be_banded], "rate_now": 0.02, "rate_without_noise": 0.03}

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(more_per_epsilon, "recommended", found)
        return expand(read_recipe(recipe_path("more-per-epsilon", "small")), more_per_epsilon.settle)


def test_plans_differ_in_what_the_study_compares_alone(cells):
    trees = {c.values["plan"]: c.tree for c in cells if c.name.startswith("customers-8-") and c.seed == 0}
    rates = {plan: tree["training"]["learning_rate"] for plan, tree in trees.items()}
    assert rates == {"old": 2e-3, "rate": 0.02, "optimised": 0.01, "banded": 0.05, "none": 0.03,
                     "opacus": 2e-3, "opacus-example": 2e-3}  # fmt: skip
    none, banded = trees["none"]["privacy"], trees["banded"]["privacy"]
    assert (none["noise_multiplier"], none["target_epsilon"], none["num_steps"]) == (0.0, None, 256)
    assert (banded["noise"], banded["num_bands"], banded["target_epsilon"]) == ("banded", 8, 8.0)
    for section in ("model", "lora", "data"):
        assert len({json.dumps(tree[section], sort_keys=True) for tree in trees.values()}) == 1
    draws = {tree["privacy"]["num_steps"] * tree["privacy"]["expected_batch_size"] for tree in trees.values()}
    assert draws == {4096}
    commands = next(c.commands for c in cells if c.values["plan"] == "opacus")
    assert commands == ("python {recipe}/opacus_arm.py {config}",)


@pytest.mark.slow
def test_what_is_recommended_is_kept_for_this_version(tmp_path, monkeypatch):
    """And without noise the plan is that of independent noise."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    more_per_epsilon.recommended.cache_clear()
    recipe = read_recipe(recipe_path("more-per-epsilon", "small"))
    axes = {**recipe.axes, "epsilon": {"8": recipe.axes["epsilon"]["8"]}}
    recipe = recipe.model_copy(update={"axes": {**axes, "corpus": {"customers": axes["corpus"]["customers"]}}})
    cells = {c.values["plan"]: c.tree for c in expand(recipe, more_per_epsilon.settle) if c.seed == 0}
    optimised, banded, none = (cells[plan]["privacy"] for plan in ("optimised", "banded", "none"))
    assert (optimised["noise"], banded["noise"]) == ("independent", "banded")
    assert optimised["num_steps"] == none["num_steps"]
    for section in (optimised, banded, none):
        assert 0.9 * 4096 < section["num_steps"] * section["expected_batch_size"] * section["records_per_user"] <= 4096
    kept = sorted((tmp_path / "privtrain" / "plans").iterdir())
    assert len(kept) == 2
    more_per_epsilon.recommended.cache_clear()
    monkeypatch.setattr(more_per_epsilon, "_optimized", None)
    assert {c.digest for c in expand(recipe, more_per_epsilon.settle)}
    monkeypatch.setattr(more_per_epsilon, "_code_version", lambda: "another")
    more_per_epsilon.recommended.cache_clear()
    with pytest.raises(TypeError):
        expand(recipe, more_per_epsilon.settle)


def _results(
    cells: list[Cell], tmp_path: pathlib.Path, losses: dict[str, float], plans: tuple[str, ...] = ()
) -> Results:
    """Every cell of one seed and another complete, with invented losses that seeds shift alike."""
    found = []
    for cell in cells:
        plan = cell.values["plan"]
        if cell.seed > 1 or (plans and plan not in plans):
            continue
        run = tmp_path / cell.name
        run.mkdir()
        loss = losses[plan] + cell.seed / 10 + (cell.seed / 100 if plan == "banded" else 0)
        rows = [{"train/step": 0, "eval/held_out_loss": 6.0 + cell.seed / 10, "eval/held_out_perplexity": 403.0},
                {"train/step": 9, "eval/held_out_loss": loss, "eval/held_out_perplexity": math.exp(loss)}]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        statement = {"mechanism": {"noise_multiplier": 0.5}, "split_commitment": f"split {cell.seed}"}
        (run / "privacy.json").write_text(json.dumps(statement))
        found.append(CellResult(cell, run))
    return Results(read_recipe(recipe_path("more-per-epsilon", "small")), found, cells)


LOSSES = {"old": 5.0, "rate": 4.5, "optimised": 4.4, "banded": 3.6, "none": 3.0, "opacus": 5.0, "opacus-example": 5.5}


def _claims(claims: Any, words: str) -> list[Claim]:
    found = [claim for claim in claims if words in claim.statement]
    assert found
    return found


def test_targets_that_are_met_are_found_met(cells, tmp_path):
    findings = more_per_epsilon.find(_results(cells, tmp_path, LOSSES))
    assert {claim.verdict for claim in findings.claims} == {Verdict.REPRODUCED}
    (half,) = _claims(findings.claims, "50% of what noise costs the plan by hand on customers at ε = 8")
    assert "69.8" in half.ours  # (5 - 3.6) / 2, and half a percent less at the second seed
    assert half.numbers is not None
    assert half.numbers["same_split"] is True
    assert "4 at ε" not in "".join(c.statement for c in findings.claims if "not worse" in c.statement)
    first = findings.tables[0]
    assert first.columns[3] == "perplexity"
    assert [row[:2] for row in first.rows][:2] == [["1", "by hand"], ["1", "by hand, learning rate of the law"]]
    assert first.rows[0][4].startswith("33.3")  # of 6.0 to 3.0
    assert first.rows[3][2] == "256 x 16 x 1, 8, 0.05, 0.5"
    assert [figure.name for figure in findings.figures] == ["epsilon-customers", "epsilon-fortunes"]
    assert len(findings.numbers["fortunes"]) == 28


def test_targets_that_are_missed_are_found_missed(cells, tmp_path):
    findings = more_per_epsilon.find(_results(cells, tmp_path, {**LOSSES, "banded": 5.6}))
    assert {claim.verdict for claim in findings.claims} == {Verdict.CONTRADICTED}


def test_without_noiseless_runs_no_share_is_given(cells, tmp_path):
    findings = more_per_epsilon.find(_results(cells, tmp_path, LOSSES, plans=("old", "banded")))
    assert all(c.verdict is Verdict.NOT_MEASURED for c in _claims(findings.claims, "win back"))
    assert {row[4] for row in findings.tables[0].rows} == {""}


def test_nothing_complete_measures_nothing(cells):
    findings = more_per_epsilon.find(Results(read_recipe(recipe_path("more-per-epsilon", "small")), [], cells))
    assert {claim.verdict for claim in findings.claims} == {Verdict.NOT_MEASURED}
    assert findings.figures == []


@pytest.fixture(scope="module")
def arm() -> Any:
    spec = importlib.util.spec_from_file_location("opacus_arm", RECIPES / "more-per-epsilon" / "opacus_arm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_group_privacy_gives_the_user_back_its_guarantee(arm, tree, tmp_path):
    del tree["privacy"]["noise_multiplier"]
    tree["privacy"] |= {"unit": "example", "user_accounting": "group", "records_per_user": 4, "target_epsilon": 2.0}
    config = load_config(write_config(tree, tmp_path / "c.yaml"))
    epsilon, delta = arm.target_of_record(config)
    assert 4 * epsilon == pytest.approx(2.0)
    assert sum(delta * math.exp(i * epsilon) for i in range(4)) == pytest.approx(1e-3)
    tree["privacy"] |= {"unit": "user", "user_accounting": "none"}
    assert arm.target_of_record(load_config(write_config(tree, tmp_path / "d.yaml"))) == (2.0, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["user", "example"])
def test_opacus_has_the_split_and_base_of_privtrain(unit, arm, tree, tmp_path, no_self_test):
    del tree["privacy"]["noise_multiplier"]
    tree["privacy"] |= {"target_epsilon": 30.0, "records_per_user": 2}
    tree["data"]["attack_fraction"] = 0.0
    if unit == "example":
        tree["privacy"] |= {"unit": "example", "user_accounting": "group"}
    tree["tracking"]["release_held_out_metrics"] = True
    train(write_config(tree, tmp_path / "ours.yaml"))
    tree["run"]["name"] = "theirs"
    arm.main(write_config(tree, tmp_path / "theirs.yaml"))
    cell = dataclasses.replace(_fake_cell(), tree=tree)
    ours, theirs = (CellResult(cell, tmp_path / "runs" / name) for name in ("tiny", "theirs"))
    assert ours.split_commitment == theirs.split_commitment
    assert ours.first("eval/held_out_loss") == theirs.first("eval/held_out_loss")
    assert theirs.metric("eval/held_out_loss") != theirs.first("eval/held_out_loss")
    statement = theirs.json("privacy.json")
    assert 0 < statement["epsilon"] <= 30.0
    assert statement["private"] is False


def _fake_cell() -> Cell:
    return Cell("x", {}, 0, {}, (), "")
