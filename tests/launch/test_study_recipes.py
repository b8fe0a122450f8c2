"""Paper-scale studies offline: axis values pass ``privtrain plan`` and two steps of a tiny model of their kind."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
import yaml

from privtrain.commands.plan import PlanOptions, describe_plan
from privtrain.job.train import train
from privtrain.studies.recipe import RECIPES, Cell, expand, module_of, read_recipe
from tests.conftest import write_config
from tests.launch import recipe_plans
from tests.launch.study_models import PUBLISHED, dummy_rows, save_tiny

RECOMMENDED = {"overrides": {"training.learning_rate": 0.01}, "rate_now": 0.02, "rate_without_noise": 0.03}

STUDIES = sorted(path.parent.name for path in RECIPES.glob("*/paper.yaml"))


def _cells(study: str) -> list[Cell]:
    recipe = read_recipe(RECIPES / study / "paper.yaml")
    return expand(recipe, getattr(module_of(recipe), "settle", None))


def _covering(cells: list[Cell]) -> list[Cell]:
    """Few cells that together have every value of every axis."""
    left = {item for cell in cells for item in cell.values.items()}
    chosen = []
    while left:
        best = max(cells, key=lambda cell: len(left & set(cell.values.items())))
        chosen.append(best)
        left -= set(best.values.items())
    return chosen


@pytest.fixture(autouse=True)
def _noise_for_nothing(monkeypatch):
    """Accountants take a minute to say how much noise EW-Tune's settings take, or which plan is best; here any do."""
    monkeypatch.setattr("privtrain.studies.noise.Setting.noise", lambda setting, name: 0.8)
    monkeypatch.setattr("privtrain.studies.more_per_epsilon.recommended", lambda *given, **named: RECOMMENDED)


def test_there_are_paper_scale_studies_and_each_has_a_small_one():
    assert {"ew-tune", "user-level-dp"} <= set(STUDIES)
    assert all((RECIPES / study / "small.yaml").is_file() for study in STUDIES)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_expands_and_names_its_command(path):
    recipe = read_recipe(path)
    assert recipe.study == path.parent.name
    assert expand(recipe, getattr(module_of(recipe), "settle", None))
    assert f"privtrain study {recipe.study}" in path.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.campaign)])
@pytest.mark.parametrize("study", STUDIES)
def test_every_value_of_a_paper_recipe_passes_plan(study, stride, tmp_path, tiny_llama, no_self_test):
    """And two steps, every fourth of the chosen cells; in the campaign each of them."""
    for number, cell in enumerate(_covering(_cells(study))):
        directory = tmp_path / str(number)
        directory.mkdir()
        tree = yaml.safe_load(cell.config_yaml(directory, directory))
        _plan(cell, tree, directory)
        if number % stride == 0:
            _two_steps(cell, tree, directory, tiny_llama)


def _plan(cell: Cell, tree: dict[str, Any], directory: pathlib.Path) -> None:
    name = tree["model"]["name_or_path"]
    (directory / "published").mkdir()
    PUBLISHED[name].save_pretrained(directory / "published")
    options = PlanOptions(
        num_users=100_000, accelerate=recipe_plans.RECIPES.parent / "accelerate" / "ddp.yaml", prices=False
    )
    config = write_config(tree, directory / "plan.yaml")
    plan = describe_plan(config, [f"model.name_or_path={directory / 'published'}"], options)
    assert plan["memory_unknown_because"] == "", cell.name
    assert sum(plan["memory_bytes_per_rank"].values()) > 1e8, cell.name
    target = tree["privacy"]["target_epsilon"]
    if target is not None:
        assert 0 < plan["epsilon"] <= target, cell.name


def _two_steps(cell: Cell, tree: dict[str, Any], directory: pathlib.Path, tiny_llama: pathlib.Path) -> None:
    data, privacy = tree["data"], tree["privacy"]
    tree["model"]["name_or_path"] = str(save_tiny(tree["model"]["name_or_path"], directory / "tiny", tiny_llama))
    data["source"] = {"kind": "files", "paths": [str(dummy_rows(data, directory / "rows.jsonl"))]}
    max_length = 64 if tree["canaries"]["num_users"] else 32  # a canary must not be cut
    data |= {"held_out_fraction": 0.3, "num_evaluation_records": 4, "max_length": min(data["max_length"], max_length)}
    if privacy["sampling"] == "poisson":
        privacy |= {"sampling_prob": 0.3, "num_steps": 2}
    privacy |= {"expected_batch_size": 8, "target_delta": 1e-3}
    tree["performance"] |= {"microbatch_size": 8, "precision": "fp32", "num_threads": 1}
    tree["tracking"] |= {"wandb": False, "tensorboard": False}
    train(write_config(tree, directory / "config.yaml"))
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows if "train/lr" in row][-1] == 2, cell.name
    assert all(math.isfinite(row["eval/held_out_loss"]) for row in rows if "eval/held_out_loss" in row), cell.name
    assert json.loads((directory / "run" / "privacy.json").read_text())["steps_accounted"] == 2, cell.name
