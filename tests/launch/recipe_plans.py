"""What ``privtrain plan`` says of the recipes of real sizes: it stands in their headers and is compared by a test.

Run ``python -m tests.launch.recipe_plans`` after changing a recipe to write the headers again. The models' configs are
the published ones, so that nothing has to be downloaded.
"""

from __future__ import annotations

import pathlib
import re
import tempfile

import transformers

from privtrain.commands.plan import PlanOptions, describe_plan

RECIPES = pathlib.Path(__file__).parents[2] / "launch" / "recipes"
NUM_USERS = 200_000

_QWEN3 = {"head_dim": 128, "vocab_size": 151_936, "num_key_value_heads": 8}
_LLAMA31 = {"vocab_size": 128_256, "num_key_value_heads": 8}
MODELS: dict[str, transformers.PreTrainedConfig] = {
    "meta-llama/Llama-3.1-8B": transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA31
    ),
    "meta-llama/Llama-3.1-70B": transformers.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA31
    ),
    "Qwen/Qwen3-8B": transformers.Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, **_QWEN3
    ),
    "Qwen/Qwen3-32B": transformers.Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, **_QWEN3
    ),
    "EleutherAI/pythia-1b": transformers.GPTNeoXConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8, vocab_size=50_304
    ),
    "google/gemma-2b": transformers.GemmaConfig(
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
        vocab_size=256_000,
    ),
    "FacebookAI/roberta-large": transformers.RobertaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=50_265,
        max_position_embeddings=514,
        type_vocab_size=1,
    ),
}


def names() -> list[str]:
    """Recipes whose header carries a plan."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if "# plan: begin" in path.read_text(encoding="utf-8"))


def header(name: str) -> list[str]:
    """The plan of a recipe, as the comment lines that stand in its header."""
    path = RECIPES / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    model = re.search(r"name_or_path: (\S+)", text)
    launcher = re.search(r"--config_file (\S+)", text)
    assert model
    assert launcher
    ranks = re.search(r"--num_processes (\d+)", text)
    with tempfile.TemporaryDirectory() as directory:
        MODELS[model[1]].save_pretrained(directory)
        options = PlanOptions(
            num_users=NUM_USERS,
            accelerate=RECIPES.parents[1] / launcher[1],
            num_ranks=int(ranks[1]) if ranks else None,
            prices=False,
        )
        plan = describe_plan(path, [f"model.name_or_path={directory}"], options)
    gib = {part: num_bytes / 2**30 for part, num_bytes in plan["memory_bytes_per_rank"].items()}
    largest = sorted(gib.items(), key=lambda item: -item[1])[:3]
    return [
        f"# {NUM_USERS:,} users: ε {plan['epsilon']:.3f} at δ {plan['delta']:g} for one user, add or remove; "
        f"{plan['num_steps']:,} steps",
        f"# of about {plan['expected_batch_size']:g} users, noise multiplier {plan['noise_multiplier']:g}, "
        f"{plan['num_trained_parameters']:,} trained parameters.",
        f"# Memory of one of {plan['num_ranks']} ranks: at most {sum(gib.values()):.1f} GiB ("
        + ", ".join(f"{part} {size:.1f}" for part, size in largest)
        + ").",
    ]


def write(name: str) -> None:
    """Write the plan into a recipe's header."""
    path = RECIPES / f"{name}.yaml"
    text = path.read_text(encoding="utf-8")
    before, rest = text.split("# plan: begin\n")
    _, after = rest.split("# plan: end\n")
    path.write_text(before + "\n".join(["# plan: begin", *header(name), "# plan: end\n"]) + after, encoding="utf-8")


if __name__ == "__main__":
    for recipe in names():
        write(recipe)
        print(recipe, *header(recipe), sep="\n")
