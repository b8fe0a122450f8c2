"""``privtrain from``: every key of another stack is translated, left out for a reason, or refused by name."""

from __future__ import annotations

import pytest
import yaml

from privtrain import cli
from privtrain.commands.stacks import axolotl, llamafactory, rules, trl
from privtrain.commands.stacks.translate import check_translation, translate, write_translation
from privtrain.config import load_config
from privtrain.config.schema import Config
from privtrain.errors import ConfigError
from privtrain.files import strict_yaml
from tests.privtrain.foreign_configurations import CONFIGURATIONS


def test_there_are_twenty_configurations():
    assert len(CONFIGURATIONS) == 20


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_configuration_is_translated_or_refused_key_by_key(name, tmp_path):
    stack, text, expected, refused = CONFIGURATIONS[name]
    foreign = strict_yaml.parse(text).value
    found = translate(stack, foreign, num_users=5000, user_column="author")  # pyright: ignore[reportArgumentType]
    assert set(found.refused) == refused
    assert all(found.refused.values())
    for key in foreign:
        assert (key in found.translated) + (key in found.left_out) + (key in found.refused) == 1, key
    for dotted, value in expected.items():
        section, key = dotted.split(".")
        assert found.tree[section][key] == value, dotted
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    output = tmp_path / "ours.yaml"
    if refused:
        with pytest.raises(ConfigError) as caught:
            write_translation(stack, path, output)  # pyright: ignore[reportArgumentType]
        assert refused <= {fault.path for fault in caught.value.faults}
        assert not output.exists()
    else:
        check_translation(found)
        write_translation(stack, path, output, num_users=5000, user_column="author")  # pyright: ignore[reportArgumentType]
        if "data.source" in found.needs:  # names of another file
            return
        config = load_config(output)
        assert config.data.user_column == "author"
        assert config.data.source.kind == found.tree["data"]["source"]["kind"]


def test_missing_plan_keys_are_named_and_start_refused(tmp_path, capsys):
    stack, text, _, _ = CONFIGURATIONS["axolotl qlora"]
    (tmp_path / "theirs.yml").write_text(text)
    write_translation(stack, tmp_path / "theirs.yml", tmp_path / "ours.yaml")  # pyright: ignore[reportArgumentType]
    shown = capsys.readouterr().out
    for key in ("data.user_column", "privacy.target_epsilon", "privacy.sampling_prob", "privacy.num_steps"):
        assert f"needed {key}" in shown
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "ours.yaml")
    assert "privacy" in str(caught.value)


def test_a_refused_key_can_be_left_out_knowingly(tmp_path):
    stack, text, _, refused = CONFIGURATIONS["trl neftune"]
    foreign = strict_yaml.parse(text).value
    found = translate(stack, foreign, without=sorted(refused))  # pyright: ignore[reportArgumentType]
    assert not found.refused
    assert refused <= set(found.left_out)


def test_a_refusal_names_the_line_and_a_near_key(tmp_path):
    (tmp_path / "t.yaml").write_text(CONFIGURATIONS["trl unknown"][1])
    with pytest.raises(ConfigError, match=r"line 4: learning_rte: is not known here; is it learning_rate\?"):
        write_translation("trl", tmp_path / "t.yaml", tmp_path / "o.yaml")


@pytest.mark.parametrize(
    ("stack", "key", "near"),
    [
        ("trl", "max_seq_len", "max_seq_length"),
        ("trl", "torchdtype", "torch_dtype"),
        ("trl", "num_train_epoch", "num_train_epochs"),
        ("axolotl", "lora_rank", "lora_r"),
        ("axolotl", "seq_len", "sequence_len"),
        ("axolotl", "learningrate", "learning_rate"),
        ("llamafactory", "cutoff_length", "cutoff_len"),
        *[("trl", key, None) for key in ("use_cpu", "use_lora", "jit_mode_eval", "parallelism_config", "label_names")],
        *[("axolotl", key, None) for key in ("kd_alpha", "dpo_beta", "torchao", "lora_on_cpu", "train_on_eos", "")],
        *[("llamafactory", key, None) for key in ("pissa_iter", "export_dir", "video_fps", "lora_plus")],
    ],
)
def test_an_unknown_key_is_shown_a_near_one_or_none(stack, key, near):
    found = translate(stack, {key: 1})
    assert found.refused[key] == f"is not known here{f'; is it {near}?' if near else ''}"


@pytest.mark.parametrize("module", [trl, axolotl, llamafactory])
def test_rules_name_keys_that_exist(module):
    """Mutant-proof: a rule that gives a value to a key that we do not have is seen, whatever configuration is tried."""
    known = {
        f"{name}.{key}" for name, field in Config.model_fields.items() for key in field.annotation.model_fields
    } | {"warmup_ratio", "beta1", "beta2"}
    for key, rule in (*module.RULES.items(), *rules.PREFIXES.items()):
        for value in (True, False, 1, 4, 8, 0.1, "lora", "cosine", "sft", "none", [], {}, ["a"]):
            try:
                outcome = rule(value, {})
            except (TypeError, ValueError, AttributeError):  # not a value of this key
                continue
            assert set(outcome.values) <= known, key
            assert set(outcome.needs) <= known, key


def test_mutant_key_without_a_rule_is_lost(monkeypatch):
    """Plant: an unknown key is left out in silence."""
    stack, text, _, _ = CONFIGURATIONS["trl unknown"]
    monkeypatch.setattr(rules, "refused", lambda reason: rules.Outcome(reason=reason))
    found = translate(stack, yaml.safe_load(text))  # pyright: ignore[reportArgumentType]
    assert "learning_rte" not in found.refused


@pytest.mark.parametrize(
    ("stack", "key", "value"),
    [
        ("trl", "learning_rate", "fast"),
        ("trl", "learning_rate", True),
        ("trl", "max_steps", True),
        ("trl", "max_steps", 10.5),
        ("trl", "lora_target_modules", 5),
        ("trl", "bf16", [True]),
        ("axolotl", "datasets", ["a.jsonl"]),
        ("axolotl", "datasets", 5),
        ("axolotl", "datasets", [{"type": "completion"}]),
        ("axolotl", "val_set_size", "10%"),
        ("axolotl", "special_tokens", 7),
        ("axolotl", "lora_alpha", {"a": 1}),
        ("llamafactory", "quantization_bit", [4]),
        ("llamafactory", "lora_rank", "many"),
        ("llamafactory", "ddp_timeout", "long"),
    ],
)
def test_a_value_of_another_form_is_refused_by_its_key(tmp_path, monkeypatch, capsys, stack, key, value):
    path = tmp_path / "theirs.yml"
    path.write_text(yaml.safe_dump({key: value}))
    monkeypatch.setattr("sys.argv", ["privtrain", "from", stack, str(path), "--output", str(tmp_path / "mine.yaml")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert key.partition("_")[0] in capsys.readouterr().err
    assert not (tmp_path / "mine.yaml").exists()


def test_keys_that_are_no_names_are_refused(tmp_path):
    path = tmp_path / "theirs.yml"
    path.write_text("3: x\ntrue: y\n")
    with pytest.raises(ConfigError) as refused:
        write_translation("trl", path, tmp_path / "mine.yaml")
    assert {fault.path for fault in refused.value.faults} == {"3", "True"}


def test_files_of_a_data_set_without_a_path_are_its_source():
    """Not the data set of the hub that is called None."""
    entry = {"data_files": ["a.jsonl"], "type": "completion"}
    found = translate("axolotl", {"base_model": "m", "datasets": [entry]})
    assert found.tree["data"]["source"] == {"kind": "files", "paths": ["a.jsonl"]}
