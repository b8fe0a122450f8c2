"""Recipes for shadow models: the same data without the attacker's documents, another split, the ordinary trainer.

The attacks LiRA and RMIA compare the attacked model with models of which it is known whom they were trained on. Each
shadow is one more run. Its own key decides who is held in, each user with chance 1/2, so about half of the shadows are
trained on any given user.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from attacks import evidence
from attacks.errors import AttackInputError
from attacks.reporting.record import read_scoring
from attacks.scoring.documents import read_manifest
from attacks.signals import SIGNALS_PATH
from privtrain.config import Config
from privtrain.data.corpus import Corpus
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
    data = folder / "records.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in _rows_of_shadows(corpus, manifest)]
    write_atomically(data, "\n".join(lines) + "\n", mode=0o600)
    recipes = []
    for number in range(count):
        tree = _recipe(config, data, number)
        tree["run"] = {"name": f"{run_path.resolve().name}-shadow-{number}", "output_dir": str(folder / "runs")}
        path = folder / f"shadow-{number}.yaml"
        write_atomically(path, yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), mode=0o600)
        recipes.append(path)
    return recipes


def _rows_of_shadows(corpus: Corpus, manifest: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the records that shadows are trained on, as rows with ``user`` and ``text``."""
    # Users who opted out are on neither side of the manifest.
    allowed = {*manifest["held_in"], *manifest["held_out"]}
    for user, texts in corpus.records.items():
        if user not in allowed:
            continue
        # No shadow may train on what the attacker holds: fresh documents are fresh to every model.
        fresh = set(manifest["attacker"].get(user, ()))
        yield from ({"user": user, "text": text} for index, text in enumerate(texts) if index not in fresh)


def _recipe(config: Config, data: pathlib.Path, number: int) -> dict[str, Any]:
    """Return the configuration of shadow ``number``: the attacked run's, with what must differ replaced.

    Args:
        config: of the attacked run.
        data: the file of the shadows' records.
        number: of the shadow, from 0.
    """
    tree = config.model_dump(mode="json", exclude_unset=True)
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
    return tree


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
