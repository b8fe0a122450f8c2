"""Configurations that would be read as something else than people wrote: each is refused, with file, line and key."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from attacks.reporting.policy import read_policy
from privtrain.config import load_config, to_yaml, validate
from privtrain.errors import ConfigError, PrivtrainError
from privtrain.files import reading, strict_yaml
from privtrain.models.memory import LaunchLayout
from privtrain.studies.recipe import read_recipe
from tests.conftest import write_config

TEXT = """\
run: {name: r}
model: {name_or_path: m}
data:
  source: {kind: files, paths: [d.jsonl]}
privacy:
  sampling_prob: 0.5
  expected_batch_size: 8
  noise_multiplier: 1.0
  target_delta: 1e-5
  num_steps: 3
training:
  learning_rate: 1e-3
"""


def refusal(tmp_path: pathlib.Path, text: str, *overrides: str) -> ConfigError:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value


def test_the_text_itself_is_read(tmp_path):
    (tmp_path / "run.yaml").write_text(TEXT)
    config = load_config(tmp_path / "run.yaml")
    assert (config.privacy.target_delta, config.training.learning_rate) == (1e-5, 1e-3)


SILENT = {  # what the line became; the line; what is refused
    "a true number of steps": ("  num_steps: 3", "  num_steps: true", "privacy.num_steps: given True"),
    "yes": ("  noise_multiplier: 1.0", "  noise_multiplier: yes", "privacy.noise_multiplier: given True"),
    "off": ("  expected_batch_size: 8", "  expected_batch_size: off", "privacy.expected_batch_size: given False"),
    "infinite": ("  learning_rate: 1e-3", "  learning_rate: .inf", "training.learning_rate: given .inf"),
    "no number": ("  learning_rate: 1e-3", "  learning_rate: .NaN", "training.learning_rate: given .NaN"),
    "overflow": ("  learning_rate: 1e-3", "  learning_rate: 1e999", "training.learning_rate: given 1e999"),
    "quoted": ("  num_steps: 3", '  num_steps: "3"', "privacy.num_steps: given '3'"),
    "octal": ("  num_steps: 3", "  num_steps: 010", "privacy.num_steps: YAML reads 010 as an octal number; write 10"),
    "sexagesimal": ("  num_steps: 3", "  num_steps: 1:30", "privacy.num_steps: YAML reads 1:30 as minutes"),
    "half a step": ("  num_steps: 3", "  num_steps: 2.5", "privacy.num_steps: given 2.5"),
    "no steps": ("  num_steps: 3", "  num_steps: 0", "privacy.num_steps: given 0"),
    "a rate below zero": ("  learning_rate: 1e-3", "  learning_rate: -1e-3", "training.learning_rate: given -0.001"),
    "betas": ("  learning_rate: 1e-3", "  betas: [0.9, 1.0]", "training.betas.1: given 1"),
    "a name that is a boolean": ("run: {name: r}", "run: {name: on}", "run.name: given True"),
    "a number for a switch": ("run: {name: r}", "run: {name: r}\ntracking: {wandb: 0}", "tracking.wandb: given 0"),
    "twice": ("  num_steps: 3", "  num_steps: 3\n  num_steps: 30", "privacy.num_steps: this key stands twice"),
    "a section twice": (
        "run: {name: r}",
        "run: {name: r}\ntraining: {method: bias}",
        "training: this key stands twice",
    ),
    "twice in a line": ("run: {name: r}", "run: {name: r, name: s}", "run.name: this key stands twice"),
    "twice, once quoted": ("  num_steps: 3", '  num_steps: 3\n  "num_steps": 3', "privacy.num_steps: this key stands"),
    "beyond doubles": ("  num_steps: 3", f"  num_steps: {'9' * 5000}", "privacy.num_steps: a whole number beyond"),
}


@pytest.mark.parametrize("case", SILENT)
def test_what_yaml_changes_in_silence_is_refused_with_its_line(tmp_path, case):
    before, after, expected = SILENT[case]
    text = TEXT.replace(before, after)
    error = refusal(tmp_path, text)
    assert expected in str(error)
    (fault,) = error.faults
    written = text.splitlines()[(fault.line or 0) - 1]
    assert fault.path.split(".")[-1 if not fault.path[-1].isdigit() else -2] in written
    assert str(tmp_path / "run.yaml") in str(error)


def test_labels_that_yaml_reads_as_booleans_are_refused(tmp_path):
    text = TEXT.replace("data:\n", "data:\n  format: classification\n  labels: [no, yes]\n")
    error = refusal(tmp_path, text)
    assert [fault.path for fault in error.faults] == ["data.labels.0", "data.labels.1"]
    assert "put quotes around a text" in str(error)


def test_faults_of_file_and_schema_come_in_order_of_lines(tmp_path):
    text = TEXT.replace("  num_steps: 3", "  num_steps: 3\n  num_steps: 4").replace("1e-3", ".inf")
    text = text.replace("expected_batch_size: 8", "expected_batch_size: yes").replace("name: r", "nam: r")
    error = refusal(tmp_path, text)
    assert [fault.path for fault in error.faults] == [
        "run.name",
        "run.nam",
        "privacy.expected_batch_size",
        "privacy.num_steps",
        "training.learning_rate",
    ]
    assert [fault.line for fault in error.faults] == [1, 1, 7, 11, 13]


def test_overrides_are_as_strict_and_have_no_line(tmp_path):
    for override in ("privacy.num_steps=true", "privacy.num_steps='3'", "training.learning_rate=.inf"):
        (fault,) = refusal(tmp_path, TEXT, override).faults
        assert (fault.path, fault.line) == (override.partition("=")[0], None)
    (fault,) = refusal(tmp_path, TEXT, "lora={rank: 1, rank: 2}").faults
    assert fault.path == "lora.rank"
    (tmp_path / "run.yaml").write_text(TEXT)
    config = load_config(tmp_path / "run.yaml", ["privacy.num_steps=1e2", "training.learning_rate=1e-5"])
    assert (config.privacy.num_steps, config.training.learning_rate) == (100, 1e-5)


def test_a_merge_is_no_duplicate(tmp_path):
    text = "base: &base {a: 1, b: 2}\nused:\n  <<: *base\n  b: 3\n"
    document = strict_yaml.parse(text)
    assert document.faults == ()
    assert document.value["used"] == {"a": 1, "b": 3}


@pytest.mark.parametrize("text", ["a: &a [*a]", "run: &r {name: *r}", "? [1]\n: 2", "a: [" * 5000])
def test_hostile_documents_are_refused_in_words(tmp_path, text):
    refusal(tmp_path, text)


def test_a_text_like_a_number_survives_being_written_and_read():
    tree = {"labels": ["1e5", "007", "yes", "1:30", "1"], "number": 1e-5}
    document = strict_yaml.parse(to_yaml(tree))
    assert document.value == tree
    assert document.faults == ()


def test_a_resolved_configuration_reads_back(tree, tmp_path):
    config = validate(tree)
    path = tmp_path / "resolved.yaml"
    path.write_text(to_yaml(config.model_dump(mode="json")))
    assert load_config(path) == config


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab1e-", max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, max_size=4))
def test_whatever_is_written_is_read_back_without_a_fault(tree):
    document = strict_yaml.parse(strict_yaml.dump(tree))
    assert document.value == tree
    assert document.faults == ()


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), plain, min_size=1, max_size=3), st.data())
def test_a_repeated_key_is_found_at_every_depth(tree, data):
    """Whatever stands around it: one line of a mapping is written again, deeper by deeper."""
    depth = data.draw(st.integers(0, 4))
    key = data.draw(st.sampled_from(sorted(tree)))
    body = strict_yaml.dump(tree) + strict_yaml.dump({key: None})
    for _ in range(depth):
        body = "outer:\n" + "".join(f"  {line}\n" for line in body.splitlines())
    (fault,) = strict_yaml.parse(body).faults
    assert fault.path == (*["outer"] * depth, key)


READERS: dict[str, Any] = {
    "policy": (read_policy, "statistics: headline\nstatistics: all\n"),
    "launch": (LaunchLayout.from_accelerate, "distributed_type: NO\nnum_processes: 1\nnum_processes: 2\n"),
    "recipe": (read_recipe, "study: x\nstudy: y\nbase: {}\naxes: {}\n"),
    "yaml": (reading.read_yaml, "a: {b: 1, b: 2}\n"),
}


@pytest.mark.parametrize("kind", READERS)
def test_every_file_that_people_write_is_read_so(tmp_path, kind):
    read, text = READERS[kind]
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(PrivtrainError, match="stands twice") as caught:
        read(tmp_path / "file.yaml")
    assert caught.value.exit_code == 2
    assert "file.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["max_auroc_lower: yes\n", "max_auroc_lower: .inf\n", 'max_auroc_lower: "0.7"\n'])
def test_a_policys_number_is_a_number(tmp_path, text):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(PrivtrainError, match="max_auroc_lower"):
        read_policy(tmp_path / "policy.yaml")


def test_mutant_the_plain_loader_lets_the_last_key_win(tmp_path, monkeypatch, tree):
    """Plant: PyYAML's own loader in place of ours. The check must see it."""

    def lenient(text: str) -> strict_yaml.Document:
        return strict_yaml.Document(yaml.safe_load(text), (), {})

    path = write_config(tree, tmp_path / "run.yaml")
    path.write_text(path.read_text() + "\nrun: {name: other}\n")
    with pytest.raises(ConfigError, match="stands twice"):
        load_config(path)
    monkeypatch.setattr(strict_yaml, "parse", lenient)
    assert load_config(path).run.name == "other"
