"""Recipes of published results, offline: their plans stand in their headers, and two steps run at tiny size."""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import pytest
import yaml

from privtrain.config.dotted import place_of
from privtrain.job.train import train
from tests.conftest import write_config
from tests.launch import published_plans
from tests.launch.study_models import dummy_rows, save_tiny

NAMES = sorted(published_plans.NUM_USERS)
#: Records share lines here; a classifier reads each in a row of its own, and GPT-Neo's attention is not transformers'.
IN_LINES = {"e2e-gpt2-lora", "reddit-gpt2-author"}


def _text(name: str) -> str:
    return (published_plans.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def _optimised(name: str) -> dict[str, Any]:
    """The settings that the header recommends."""
    plan = _text(name).split("# plan: begin\n")[1].split("# plan: end\n")[0]
    lines = [line.removeprefix("#   ") for line in plan.splitlines() if line.startswith("#   ")]
    return {key: yaml.safe_load(value) for key, _, value in (line.partition("=") for line in lines)}


def test_published_recipes_have_source_figures_and_both_plans():
    assert sorted(path.stem for path in published_plans.RECIPES.glob("*.yaml")) == NAMES
    for name in NAMES:
        text = _text(name)
        assert "\n# published" in text, name
        assert "# As published: ε " in text, name
        assert {"privacy.num_steps", "privacy.expected_batch_size", "training.learning_rate"} <= set(_optimised(name))
        assert yaml.safe_load(text)["performance"]["packing"] == "auto", name


@pytest.mark.campaign
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", NAMES)
def test_the_header_holds_both_plans(name):
    stands = _text(name).split("# plan: begin\n")[1].split("# plan: end\n")[0].splitlines()
    assert stands == published_plans.header(published_plans.planned(name))


@pytest.mark.slow
@pytest.mark.parametrize("settings", ["published", "optimised"])
@pytest.mark.parametrize(
    "name", [n if n == "reddit-gpt2-author" else pytest.param(n, marks=pytest.mark.campaign) for n in NAMES]
)
def test_two_steps_of_a_tiny_model_packed(name, settings, tmp_path, tiny_llama):
    """With the start-up self-test, which decides whether records share lines."""
    tree = yaml.safe_load(_text(name))
    if settings == "optimised":
        for key, value in _optimised(name).items():
            node, leaf = place_of(tree, key)
            node[leaf] = value
    if name in IN_LINES:
        tree["performance"]["packing"] = "lines"  # in place of auto: refused where they are not possible
    is_banded = tree["privacy"].get("noise") == "banded"
    _make_tiny(tree, tmp_path, tiny_llama)
    train(write_config(tree, tmp_path / "config.yaml"))
    statement = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert statement["steps_accounted"] == 2
    assert ("banded" in json.dumps(statement)) is is_banded
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["eval/held_out_loss"] for row in rows if "eval/held_out_loss" in row]
    assert losses
    assert all(map(math.isfinite, losses))


def _make_tiny(tree: dict[str, Any], directory: pathlib.Path, tokenizer_of: pathlib.Path) -> None:
    """Same kinds of model, data, unit, noise and sampling; two steps of few short rows."""
    data, privacy = tree["data"], tree["privacy"]
    tree["run"] = {"name": "run", "output_dir": str(directory)}
    tree["model"]["name_or_path"] = str(save_tiny(tree["model"]["name_or_path"], directory / "tiny", tokenizer_of))
    rows = {"text_column": "text", "label_column": "label", "labels": None, **data}
    data["source"] = {"kind": "files", "paths": [str(dummy_rows(rows, directory / "rows.jsonl"))]}
    data |= {"held_out_fraction": 0.3, "num_evaluation_records": 4, "max_length": 32}
    privacy |= {"sampling_prob": 0.3, "expected_batch_size": 8, "target_delta": 1e-3, "num_steps": 2}
    if "num_bands" in privacy and privacy["num_bands"] is not None:
        privacy["num_bands"] = 2
    tree["performance"] |= {"microbatch_size": 8, "precision": "fp32", "num_threads": 1}
    tree["tracking"] |= {"wandb": False}
