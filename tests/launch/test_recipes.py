"""Recipes of real sizes: valid, and their headers say what ``privtrain plan`` says."""

from __future__ import annotations

import pytest

from privtrain.config import load_config
from tests.launch import recipe_plans


def test_every_recipe_is_a_valid_config():
    paths = sorted(p for p in recipe_plans.RECIPES.rglob("*.yaml") if "studies" not in p.parts)
    assert len(paths) >= 7
    for path in paths:
        config = load_config(path, [])
        assert f"train {path.relative_to(recipe_plans.RECIPES.parents[1])}" in path.read_text(encoding="utf-8")
        assert config.run.name == path.stem or path.parent != recipe_plans.RECIPES


@pytest.mark.slow
@pytest.mark.parametrize("name", recipe_plans.names())
def test_the_header_is_the_plan(name):
    text = (recipe_plans.RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    stands = text.split("# plan: begin\n")[1].split("# plan: end\n")[0].splitlines()
    assert stands == recipe_plans.header(name)
