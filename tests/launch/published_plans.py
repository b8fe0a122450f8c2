"""What ``privtrain plan --optimize`` says of the recipes of published results: it stands in their headers.

``python -m tests.launch.published_plans`` writes the headers again. Models' configs are the published ones.
"""

from __future__ import annotations

import tempfile
from typing import Any

import yaml

from privtrain.commands.plan import PlanOptions, describe_plan
from tests.launch import recipe_plans
from tests.launch.study_models import PUBLISHED

RECIPES = recipe_plans.RECIPES / "published"
#: Recipe -> users of its data; rows where the row is the unit.
NUM_USERS = {
    "e2e-gpt2-lora": 46_733,
    "enron-gpt-neo-example": 82_000,
    "mnli-roberta-large-lora": 392_702,
    "reddit-gpt2-author": 304_279,
    "sst2-roberta-base-full": 67_349,
}


def planned(name: str) -> dict[str, Any]:
    """The plan of a recipe, with the best one for its own compute."""
    path = RECIPES / f"{name}.yaml"
    model = yaml.safe_load(path.read_text(encoding="utf-8"))["model"]["name_or_path"]
    with tempfile.TemporaryDirectory() as directory:
        PUBLISHED[model].save_pretrained(directory)
        options = PlanOptions(
            num_users=NUM_USERS[name],
            accelerate=recipe_plans.RECIPES.parent / "accelerate" / "ddp.yaml",
            prices=False,
            optimize=True,
        )
        return describe_plan(path, [f"model.name_or_path={directory}"], options)


def header(plan: dict[str, Any]) -> list[str]:
    """The paper's own settings and the optimised ones side by side, as comment lines."""
    optimum = plan["optimum"]
    now, best = optimum["now"], optimum["best"]
    gib = sum(plan["memory_bytes_per_rank"].values()) / 2**30
    gain = best["predicted_gain"] / now["predicted_gain"]
    lines = [
        f"# As published: ε {plan['epsilon']:.3f} at δ {plan['delta']:g}; {plan['num_steps']:,} steps of "
        f"{plan['expected_batch_size']:g}, noise multiplier {plan['noise_multiplier']:.4g}; "
        f"noise over signal of the run {now['relative_noise']:.3g}.",
        f"# {plan['num_trained_parameters']:,} trained weights; "
        f"at most {gib:.1f} GiB on one of {plan['num_ranks']} ranks.",
        f"# For the same compute `plan --optimize` recommends (noise over signal {best['relative_noise']:.3g}, "
        f"predicted gain x {gain:.2f}):",
    ]
    lines += [f"#   {key}={'null' if value is None else value}" for key, value in optimum["overrides"].items()]
    return lines


def write(name: str) -> None:
    """Write the plans into a recipe's header."""
    path = RECIPES / f"{name}.yaml"
    before, rest = path.read_text(encoding="utf-8").split("# plan: begin\n")
    _, after = rest.split("# plan: end\n")
    path.write_text(
        before + "\n".join(["# plan: begin", *header(planned(name)), "# plan: end\n"]) + after, encoding="utf-8"
    )


if __name__ == "__main__":
    for recipe in NUM_USERS:
        write(recipe)
        print(recipe)
