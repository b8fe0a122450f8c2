"""A merged model computes what base and adapter compute; what cannot be merged is refused by name."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import peft
import pytest
import torch
import transformers

from privtrain.commands import export
from privtrain.commands.export import export_run
from privtrain.config import load_config, to_yaml, validate
from privtrain.errors import ConfigError, VerificationFailed
from privtrain.models import merge
from privtrain.models.load import load_base, load_classifier
from privtrain.models.trainable import INIT_SEED, make_trainable
from privtrain.run.directory import RunDirectory
from tests.privtrain.bases import change_config, save_base

LORA: dict[str, dict[str, Any]] = {
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"]},
    "head whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
}


def released(tmp_path: pathlib.Path, tree: dict[str, Any], base: pathlib.Path, lora: dict[str, Any]) -> RunDirectory:
    """A run directory with an adapter away from its starting point, as far as merging reads it."""
    tree["model"]["name_or_path"] = str(base)
    tree["lora"] = {"rank": 2, "alpha": 8, **lora}
    config = validate(tree)
    run = RunDirectory(tmp_path / "run")
    run.secret.mkdir(parents=True, mode=0o700)
    run.resolved_config.write_text(to_yaml(config.model_dump(mode="json")))
    labels = config.data.labels
    section = config.model
    frozen = (
        load_base(section)
        if labels is None
        else load_classifier(section, torch.float32, labels=labels, init_seed=INIT_SEED)
    )
    model: Any = make_trainable(frozen, config, INIT_SEED)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(str(run.adapter), save_embedding_layers=False)
    return run


def opened_by_others(run: RunDirectory, base: pathlib.Path, kind: Any, **options: Any) -> torch.Tensor:
    """Logits of the base with the released adapter, by peft alone."""
    model = kind.from_pretrained(base, dtype=torch.float32, **options)
    return merge.outputs(peft.PeftModel.from_pretrained(model, str(run.adapter)).eval())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", LORA)
def test_a_merged_language_model_computes_what_was_released(tree, tmp_path, case, tied):
    base = save_base(tmp_path / "m", tie_word_embeddings=tied)
    run = released(tmp_path, tree, base, LORA[case])
    expected = opened_by_others(run, base, transformers.AutoModelForCausalLM)
    merged = merge.whole_model(run, None)
    merge.save_weights(merged, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(merge.outputs(again), expected, atol=1e-5, rtol=1e-4)
    untouched = merge.outputs(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    assert not torch.allclose(untouched, expected, atol=1e-3)


@pytest.mark.parametrize("case", ["q and v", "all-linear", "dora", "embedding"])
def test_a_merged_classifier_keeps_its_head_labels_and_class(tree, tmp_path, case):
    base = save_base(tmp_path / "m")
    tree["data"] |= {"format": "classification", "labels": ["no", "yes", "perhaps"]}
    run = released(tmp_path, tree, base, LORA[case])
    expected = opened_by_others(run, base, transformers.AutoModelForSequenceClassification, num_labels=3)
    merge.save_weights(merge.whole_model(run, None), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype=torch.float32)
    # Without a padding id of its own the last token decides, for one row: the same as here.
    torch.testing.assert_close(merge.outputs(again.eval()), expected, atol=1e-5, rtol=1e-4)


def test_mutant_merging_a_tied_head_with_its_embedding_is_caught(tree, tmp_path, monkeypatch):
    """Plant: nobody unties. The outputs on fixed tokens must tell."""
    run = released(tmp_path, tree, save_base(tmp_path / "m"), LORA["embedding"])
    monkeypatch.setattr(merge, "_untie", lambda *_: None)
    with pytest.raises(VerificationFailed, match="outputs on fixed tokens differ by"):
        merge.whole_model(run, None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_mutant_weights_changed_on_the_way_are_caught(tree, tmp_path, monkeypatch, dtype):
    run = released(tmp_path, tree, save_base(tmp_path / "m"), LORA["q and v"])
    place = tmp_path / "out"
    model = merge.rounded(merge.whole_model(run, None), export._type_of(dtype))
    expected = merge.outputs(model)
    merge.save_weights(model.to(export._type_of(dtype)), place)
    merge.check_outputs(expected, merge.outputs(merge.reopened(model, place)), place)
    config = json.loads((place / "config.json").read_text())
    config["rms_norm_eps"] = 0.5  # not a tensor, and the model is another all the same
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationFailed, match="outputs on fixed tokens differ"):
        merge.check_outputs(expected, merge.outputs(merge.reopened(model, place)), place)


@pytest.mark.parametrize("value", [True, False])
def test_use_cache_is_released_as_the_base_had_it(tree, tmp_path, value):
    base = save_base(tmp_path / "m", use_cache=value)
    merge.save_weights(merge.whole_model(released(tmp_path, tree, base, LORA["q and v"]), None), tmp_path / "out")
    for place in (base, tmp_path / "out"):
        assert json.loads((place / "config.json").read_text())["use_cache"] is value


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training": {"method": "prompt_tuning"}}, "prompt_tuning trains virtual tokens"),
        ({"training": {"method": "prefix_tuning"}}, "prefix_tuning trains virtual tokens"),
        ({"model": {"quantization": "nf4"}}, "a base held in nf4"),
        ({"model": {"quantization": "int8"}}, "a base held in int8"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name_before_loading(tree, tmp_path, monkeypatch, changes, said):
    run = released(tmp_path, tree, save_base(tmp_path / "m"), LORA["q and v"])
    config = load_config(run.resolved_config).model_dump(mode="json")
    for name, values in changes.items():
        config[name] |= values
    run.resolved_config.write_text(to_yaml(config))
    for path in (run.release, run.privacy):
        path.write_text("{}")
    monkeypatch.setattr(merge, "whole_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match=said):
        export_run(run.root, tmp_path / "out", merge=True, dtype="bf16")
    assert not (tmp_path / "out").exists()


def test_base_quantised_by_own_config_is_not_merged(tree, tmp_path, monkeypatch):
    base = save_base(tmp_path / "m")
    run = released(tmp_path, tree, base, LORA["q and v"])
    change_config(base, quantization_config={"quant_method": "gptq"})
    for path in (run.release, run.privacy):
        path.write_text("{}")
    monkeypatch.setattr(merge, "whole_model", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ConfigError, match="a base held in gptq"):
        export_run(run.root, tmp_path / "out", merge=True, dtype="bf16")
