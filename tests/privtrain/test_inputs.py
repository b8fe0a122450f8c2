"""Bad input: one clear line each, exit 2, nothing written over."""

from __future__ import annotations

import copy
import json
import pathlib

import datasets
import pyarrow
import pytest
from datasets.exceptions import DatasetGenerationError

from privtrain import cli
from privtrain.commands.plan import PlanOptions, describe_plan
from privtrain.config import load_config, validate
from privtrain.config.data import DataSection
from privtrain.data.corpus import load_corpus
from privtrain.errors import ConfigError, LedgerCorrupt, PrivtrainError
from tests.conftest import write_config

pytestmark = pytest.mark.usefixtures("no_self_test")


def run_cli(monkeypatch, capsys, *arguments) -> tuple[int, str]:
    monkeypatch.setattr("sys.argv", ["privtrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr().err


BAD = {
    "no such file": (
        {"data": {"source": {"kind": "files", "paths": ["/nowhere/x.jsonl"]}}},
        "no such file: /nowhere/x.jsonl",
    ),
    "no such column": ({"data": {"user_column": "author"}}, "no column 'author'"),
    "no such model": ({"model": {"name_or_path": "/nowhere/model"}}, "no such model directory"),
    "k = 0": ({"privacy": {"records_per_user": 0}}, "privacy.records_per_user: given 0"),
    "negative epsilon": (
        {"privacy": {"target_epsilon": -1, "noise_multiplier": None}},
        "privacy.target_epsilon: given -1",
    ),
    "both targets": ({"privacy": {"target_epsilon": 1.0}}, "exactly one of privacy.target_epsilon"),
    "unknown key": ({"privacy": {"cliping_norm": 1}}, "did you mean privacy.clipping_norm?"),
    "unknown section": ({"privcy": {}}, "did you mean privacy?"),
    "tiny delta": ({"privacy": {"target_delta": 1e-12}}, "privacy.accountant: "),
    "hardly any noise": ({"privacy": {"noise_multiplier": 0.01}}, "must be 0 (no privacy) or at least 0.1"),
    "unreachable epsilon": (
        {"privacy": {"target_epsilon": 1e-9, "target_delta": 1e-10, "noise_multiplier": None}},
        "privacy.target_epsilon: target_epsilon=1e-09 needs a noise multiplier above",
    ),
    "no LoRA target": ({"lora": {"target_modules": ["nothing"]}}, "lora.target_modules"),
}


def merged(tree, changes):
    result = copy.deepcopy(tree)
    for section, values in changes.items():
        result.setdefault(section, {}).update(values)
    return result


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_is_one_clear_line_and_exit_2(tree, tmp_path, monkeypatch, capsys, case):
    changes, expected = BAD[case]
    path = write_config(merged(tree, changes), tmp_path / "bad.yaml")
    code, stderr = run_cli(monkeypatch, capsys, "train", path)
    assert code == 2
    (line,) = [line for line in stderr.splitlines() if line.startswith("privtrain: ")]
    assert expected in line
    assert "Traceback" not in stderr


def test_a_model_directory_that_is_none(tree, tmp_path, monkeypatch, capsys):
    (tmp_path / "not-a-model").mkdir()
    tree["model"]["name_or_path"] = str(tmp_path / "not-a-model")
    code, stderr = run_cli(monkeypatch, capsys, "train", write_config(tree, tmp_path / "c.yaml"))
    assert code == 2
    assert "is not a model directory: it has no config.json" in stderr


def test_all_faults_come_at_once(tree):
    tree["privacy"] |= {"records_per_user": 0, "sampling_prob": 2, "spare": 1}
    tree["training"] = {"learning_rate": -1}
    with pytest.raises(ConfigError) as error:
        validate(tree)
    assert {f.path for f in error.value.faults} == {
        "privacy.records_per_user",
        "privacy.sampling_prob",
        "privacy.spare",
        "training.learning_rate",
    }


def test_conflicts_come_at_once_with_faults_of_single_keys(tree):
    """A conflict is told beside a wrong value, unless it names the key at fault."""
    tree["privacy"] |= {
        "num_steps": 0,
        "expected_batch_size": 3e6,
        "max_batch_size": 4,
        "neighboring_relation": "zero_out",
        "sampling": "shuffle",
        "target_epsilon": 3.0,
        "clipping_style": "batch",
    }
    tree["canaries"] = {"user_fraction": 0.1}
    with pytest.raises(ConfigError) as error:
        validate(tree)
    assert sorted(map(str, error.value.faults)) == [
        "canaries: canaries.kind: template adds canaries.num_users; it has no canaries.user_fraction",
        "privacy.expected_batch_size: given 3e+06; integers hold the sum of 2,097,152 units: lower it",
        "privacy.num_steps: given 0; input should be greater than or equal to 1",
    ] + [
        f"privacy: {problem}"
        for problem in (
            "give exactly one of privacy.target_epsilon and privacy.noise_multiplier",
            "privacy.clipping_style: batch bounds no unit; it needs privacy.noise_multiplier: 0",
            "privacy.max_batch_size is not used by privacy.sampling=shuffle",
            "privacy.max_num_units is required by privacy.sampling=shuffle",
            "privacy.sampling_prob is not used by privacy.sampling=shuffle",
            "privacy.steps_per_epoch is required by privacy.sampling=shuffle",
        )
    ]


@pytest.mark.parametrize("noise", ["much", -1, 0.01])
def test_a_conflict_with_a_key_at_fault_is_not_told(tree, noise):
    tree["privacy"] |= {"noise_multiplier": noise, "clipping_style": "batch"}
    with pytest.raises(ConfigError) as error:
        validate(tree)
    assert {fault.path for fault in error.value.faults} == {"privacy.noise_multiplier"}


def test_data_and_model_faults_come_at_once(tree, tmp_path):
    tree = merged(tree, BAD["no such column"][0] | BAD["no such model"][0])
    with pytest.raises(ConfigError) as error:
        describe_plan(write_config(tree, tmp_path / "c.yaml"), [], PlanOptions(prices=False))
    assert {f.path for f in error.value.faults} == {"data.user_column", "model.name_or_path"}


def test_no_config_file_and_no_yaml(tmp_path, monkeypatch, capsys):
    code, stderr = run_cli(monkeypatch, capsys, "train", tmp_path / "none.yaml")
    assert (code, "no such file" in stderr) == (2, True)
    (tmp_path / "broken.yaml").write_text("a: [1,\n", encoding="utf-8")
    code, stderr = run_cli(monkeypatch, capsys, "plan", tmp_path / "broken.yaml")
    assert (code, "not a YAML file" in stderr) == (2, True)
    for content, words in (("a: ü".encode("utf-16"), "not UTF-8 (UTF-16)"), ("a: ü".encode("cp1252"), "at byte 3")):
        (tmp_path / "coded.yaml").write_bytes(content)
        code, stderr = run_cli(monkeypatch, capsys, "plan", tmp_path / "coded.yaml")
        assert (code, words in stderr, "save it as UTF-8" in stderr) == (2, True, True)


def test_delta_not_below_one_over_units_warns(tree, tmp_path):
    tree["privacy"]["target_delta"] = 0.2
    description = describe_plan(write_config(tree, tmp_path / "c.yaml"), [], PlanOptions(prices=False))
    assert any("privacy.target_delta=0.2 is not below 1/units" in w for w in description["warnings"])
    description = describe_plan(
        write_config(tree, tmp_path / "c.yaml"), ["privacy.target_delta=1e-6"], PlanOptions(prices=False)
    )
    assert not any("target_delta" in w for w in description["warnings"])


def snapshot(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_directory_of_another_plan_is_refused_untouched(tree, tmp_path, monkeypatch, capsys):
    from privtrain.job.train import train

    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    run = tmp_path / "runs" / "tiny"
    before = snapshot(run)
    code, stderr = run_cli(monkeypatch, capsys, "train", path, "privacy.clipping_norm=2.0")
    assert code == 2
    assert "belongs to another plan or data set" in stderr
    assert snapshot(run) == before
    train(path)  # the same plan: complete, and a second run of the same command changes nothing
    assert snapshot(run) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.rank", 4),
        ("data.max_length", 20),
        ("data.held_out_fraction", 0.4),
        ("training.num_averaged_steps", 1),
        ("tracking.private_metrics", "true"),
        ("tracking.release_held_out_metrics", "true"),
    ],
)
def test_fixed_keys_are_refused_on_resume_at_no_cost(tree, tmp_path, monkeypatch, capsys, key, value):
    from privtrain.job.train import train

    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    before = snapshot(tmp_path / "runs" / "tiny")
    code, stderr = run_cli(monkeypatch, capsys, "train", path, f"{key}={value}")
    assert code == 2
    assert f"was begun with another {key}" in stderr
    assert snapshot(tmp_path / "runs" / "tiny") == before


def test_a_second_job_on_a_busy_run_is_refused(tree, tmp_path, monkeypatch, capsys):
    from privtrain.job.train import train
    from privtrain.run.directory import RunDirectory

    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    with RunDirectory(tmp_path / "runs" / "tiny").locked():
        code, stderr = run_cli(monkeypatch, capsys, "train", path)
    assert code == 2
    assert "another job is running" in stderr


def test_run_without_its_ledger_is_not_restarted(tree, tmp_path):
    from privtrain.job.train import train

    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    run = tmp_path / "runs" / "tiny"
    (run / "secret" / "ledger.jsonl").unlink()
    (run / "privacy.json").unlink()
    with pytest.raises(LedgerCorrupt, match="is missing but the run started"):
        train(path)


def test_a_diverged_model_is_released_all_the_same(tree, tmp_path):
    from privtrain.job.train import train

    train(write_config(tree, tmp_path / "c.yaml"), ["training.learning_rate=1e30"])
    assert (tmp_path / "runs" / "tiny" / "privacy.json").exists()


def test_nobody_to_train_on_is_an_error(tree, tmp_path, monkeypatch, capsys):
    path = write_config(tree, tmp_path / "c.yaml")
    code, stderr = run_cli(monkeypatch, capsys, "train", path, "data.held_out_fraction=0.99999")
    assert code == 2
    assert "no user is left to train on" in stderr


def test_a_directory_of_something_else_is_not_written_into(tree, tmp_path, monkeypatch, capsys):
    other = tmp_path / "runs" / "tiny"
    other.mkdir(parents=True)
    (other / "thesis.tex").write_text("years of work", encoding="utf-8")
    code, stderr = run_cli(monkeypatch, capsys, "train", write_config(tree, tmp_path / "c.yaml"))
    assert code == 2
    assert "is not a run of privtrain" in stderr
    assert snapshot(other) == {"thesis.tex": b"years of work"}


def test_readable_secrets_are_refused(tree, tmp_path):
    from privtrain.job.train import train

    path = write_config(tree, tmp_path / "c.yaml")
    train(path)
    (tmp_path / "runs" / "tiny" / "secret").chmod(0o755)
    with pytest.raises(PrivtrainError, match="can be read by other users"):
        train(path)


def test_overrides_are_typed_and_checked(tree, tmp_path):
    path = write_config(tree, tmp_path / "c.yaml")
    config = load_config(
        path, ["privacy.target_delta=1e-6", "training.schedule=cosine", "performance.microbatch_size=9"]
    )
    assert (config.privacy.target_delta, config.training.schedule, config.performance.microbatch_size) == (
        1e-6,
        "cosine",
        9,
    )
    with pytest.raises(ConfigError, match="looks like"):
        load_config(path, ["privacy.target_delta"])
    with pytest.raises(ConfigError, match="no YAML value"):
        load_config(path, ["run.name=[a"])


def test_schema_is_json(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["privtrain", "schema"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert "privacy" in json.loads(capsys.readouterr().out)["properties"]


@pytest.mark.parametrize("error", [DatasetGenerationError, pyarrow.ArrowInvalid])
def test_unreadable_hub_files_are_named_without_a_value(monkeypatch, error):
    def load(*_: object, **__: object) -> None:
        raise error("cannot convert 'alice wrote this' to a number")

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = DataSection.model_validate({"source": {"kind": "hub", "name": "some/rows"}})
    with pytest.raises(ConfigError, match="cannot read the files of some/rows") as refused:
        load_corpus(data)
    assert "alice" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("data", {"source": "rows.jsonl"}, "data.source: given 'rows.jsonl'; input should be a section of keys"),
        ("data", {"source": {"paths": ["rows.jsonl"]}}, "data.source.kind: this key is required"),
        (
            "data",
            {"source": {"kind": "csv", "paths": ["rows.csv"]}},
            "data.source.kind: given 'csv'; allowed are 'files', 'hub', 'plays'",
        ),
        (
            "data",
            {"source": {"kind": "files", "paths": "rows.jsonl"}},
            "data.source.paths: given 'rows.jsonl'; input should be a list, e.g. [rows.jsonl]",
        ),
        ("model", "gpt2", "model: given 'gpt2'; input should be a section of keys"),
        (
            "data",
            {"format": "classification", "labels": ["a", " b"]},
            "a label is empty or has white space at its ends",
        ),
        ("data", {"format": "classification", "labels": ["a", ""]}, "a label is empty or has white space"),
        ("training", {"betas": [0.9]}, "training.betas.1: the list is too short"),
        ("privacy", {"noised_metrics": {"loss_range": [1]}}, "noised_metrics.loss_range.1: the list is too short"),
    ],
)
def test_values_of_another_form_say_which_form(tree, section, values, said):
    tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    with pytest.raises(ConfigError) as refused:
        validate(tree)
    (fault,) = refused.value.faults
    assert said in str(fault)


def test_label_at_fault_is_told_once(tree):
    """Not also that there are no labels."""
    tree["data"] |= {"format": "classification", "labels": [None, "a"]}
    with pytest.raises(ConfigError) as refused:
        validate(tree)
    (fault,) = refused.value.faults
    assert fault.path == "data.labels.0"
