"""Recipes for shadow models: the same data without the attacker's documents, another split, the ordinary trainer.

The attacks LiRA and RMIA compare the attacked model with models of which it is known whom they were trained on. Each
shadow is one more run. Its own key decides who is held in, each user with chance 1/2, so about half of the shadows are
trained on any given user.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence

import yaml

from attacks import evidence
from attacks.errors import AttackInputError
from attacks.reporting.record import read_scoring
from attacks.scoring.documents import read_manifest
from attacks.signals import SIGNALS_PATH
from privtrain.files.atomic import write_atomically
from privtrain.files.private import make_private_directory
from privtrain.run.directory import RunDirectory

SHADOWS_PATH = pathlib.Path("secret/attack/shadows")


def write_recipes(run_path: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Write a data file and ``count`` configurations under ``secret/attack/shadows``.

    Returns:
        The configurations, to be given to ``privtrain train`` one by one.

    Raises:
        AttackInputError: if the run is not finished, its records are no plain texts, or its data changed since
            training.
    """
    run = RunDirectory(run_path)
    manifest, config = read_manifest(run), evidence.read_config(run)
    if config.data.format != "text":
        raise AttackInputError(
            f"shadows are written for data.format 'text' only and this run has {config.data.format!r}; "
            "score it without shadows"
        )
    corpus = evidence.read_corpus(config)
    if corpus.manifest_sha256 != manifest["data_sha256"]:
        raise AttackInputError("the data changed since the split was sealed; restore the files named in config.yaml")
    run.check_private()
    for private in (run_path / SHADOWS_PATH.parent, run_path / SHADOWS_PATH):
        make_private_directory(private)
    folder = (run_path / SHADOWS_PATH).resolve()
    # Users who opted out are on neither side of the manifest.
    allowed = {*manifest["held_in"], *manifest["held_out"]}
    lines = []
    for user, texts in corpus.records.items():
        if user not in allowed:
            continue
        # No shadow may train on what the attacker holds: fresh documents are fresh to every model.
        fresh = set(manifest["attacker"].get(user, ()))
        kept = [text for index, text in enumerate(texts) if index not in fresh]
        lines += [json.dumps({"user": user, "text": text}, ensure_ascii=False) for text in kept]
    data = folder / "records.jsonl"
    write_atomically(data, "\n".join(lines) + "\n", mode=0o600)
    recipes = []
    for number in range(count):
        tree = config.model_dump(mode="json", exclude_unset=True)  # the attacked run's, with what must differ replaced
        tree["run"] = {"name": f"{run_path.resolve().name}-shadow-{number}", "output_dir": str(folder / "runs")}
        tree["data"] |= {
            "source": {"kind": "files", "paths": [str(data)]},
            "user_column": "user",
            "text_column": "text",
            "held_out_fraction": 0.5,
            "attack_fraction": 0.0,
            "num_evaluation_records": 0,
        }
        tree.pop("canaries", None)
        tree.pop("audit", None)
        tree.pop("release", None)  # nobody publishes a shadow
        tree["tracking"] = {**tree.get("tracking", {}), "wandb": False}
        if tree["privacy"].get("insecure_seed") is not None:
            # A shadow with the same seed would flip the same coins.
            tree["privacy"]["insecure_seed"] += number + 1
        path = folder / f"shadow-{number}.yaml"
        write_atomically(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), mode=0o600)
        recipes.append(path)
    return recipes


def commands(run_path: pathlib.Path, recipes: Sequence[pathlib.Path]) -> list[str]:
    """Return a shell command for each shadow: train it, then score the attacked run's documents under it.

    Args:
        run_path: the attacked run.
        recipes: configurations of its shadows.
    """
    options = ""
    if (run_path / SIGNALS_PATH).exists():
        scored = read_scoring(RunDirectory(run_path)).facts["options"]
        options = f" --training-records {scored['num_training_records']}"
    name = run_path.resolve().name
    return [
        f"privtrain train {path} && "
        f"attacks score {path.parent / 'runs' / f'{name}-{path.stem}'} --documents-of {run_path}{options}"
        for path in recipes
    ]
