"""Canaries drawn from the base model: a file once, then like any canary, with the rest of the file to rank among."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from attacks.cli import app
from attacks.errors import AttackInputError
from attacks.scoring.canaries import POOL, plan_canaries
from privtrain.config.canaries import CanariesSection
from privtrain.config.model import ModelSection
from privtrain.data.canaries import draw_canaries
from privtrain.models.load import load_tokenizer
from privtrain.privacy.secret import SecretKey
from tests.conftest import write_config
from tests.privtrain.test_data import corpus_of

KEY = SecretKey.insecure(3, "root")


def sampled(config, path, *options):
    arguments = ["--count", "40", "--tokens", "6", *options]
    return CliRunner().invoke(app, ["sample-canaries", str(config), "--out", str(path), *arguments])


def test_samples_survive_as_text_and_follow_the_seed(tree, tmp_path, tiny_llama):
    config = write_config(tree, tmp_path / "c.yaml")
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, ("0", "0", "1"), strict=True):
        done = sampled(config, path, "--seed", seed)
        assert done.exit_code == 0, done.output
    contents = [path.read_text() for path in paths]
    assert contents[0] == contents[1] != contents[2]
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_llama)))
    texts = [json.loads(line) for line in contents[0].splitlines()]
    assert len(set(texts)) == 40
    assert {len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts} == {6}


def test_planted_samples_rank_among_the_rest_of_their_file(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(f"text {number}") + "\n" for number in range(12)))
    section = CanariesSection(kind="samples", num_users=5, samples_file=path, num_gradient_users=2)
    canaries = draw_canaries(corpus_of(2), section, None, KEY)
    manifest = {"canaries": [canary.to_json() for canary in canaries], "attacker": {}}
    documents = plan_canaries(manifest, section, None, KEY, 4)
    planted = [document.text for document in documents if document.kind == "canary"]
    compared = [document.text for document in documents if document.user == POOL]
    assert planted == [canary.secret for canary in canaries if canary.is_text]
    assert (len(planted), len(compared)) == (5, 4)
    assert not set(planted) & set(compared)


def test_a_file_of_samples_is_never_replaced(tree, tmp_path):
    config, path = write_config(tree, tmp_path / "c.yaml"), tmp_path / "a"
    path.write_text("kept")
    assert isinstance(sampled(config, path).exception, AttackInputError)
    assert path.read_text() == "kept"


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"training": {"method": "full"}}, "kind: new_tokens"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "kind: new_tokens"),
        ({"lora": {"target_modules": ["q_proj"]}}, "kind: samples"),
        ({"training": {"method": "bias"}}, "kind: template"),
    ],
)
def test_audit_plan_names_canaries_for_what_is_released(tree, tmp_path, changes, kind):
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    shown = CliRunner().invoke(app, ["audit-plan", str(write_config(tree, tmp_path / "c.yaml"))])
    assert shown.exit_code == 0, shown.output
    assert f"canaries.{kind}" in " ".join(shown.stdout.split())
