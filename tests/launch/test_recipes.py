"""Every shipped YAML is valid, its header command is the one that runs it, and the packages say what they need."""

from __future__ import annotations

import pytest
import yaml

from privtrain.config import load_config
from tests.jobs import REPOSITORY

RECIPES = sorted((REPOSITORY / "launch" / "recipes").rglob("*.yaml"))
ACCELERATE = sorted((REPOSITORY / "launch" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_is_valid_and_begins_with_its_launch_command(path):
    load_config(path)
    first = path.read_text().splitlines()[0]
    assert first.startswith("# accelerate launch --config_file launch/accelerate/")
    assert first.endswith(f"-m privtrain train {path.relative_to(REPOSITORY)}")
    assert (REPOSITORY / first.split()[4]).is_file()


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda p: p.stem)
def test_an_accelerate_config_leaves_gradients_to_us(path):
    tree = yaml.safe_load(path.read_text())
    assert tree["mixed_precision"] == "no", "precision is the recipe's, and only in forward and backward"
    assert "gradient_clipping" not in path.read_text()
