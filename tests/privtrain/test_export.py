"""What a finished run hands out: re-opened, with its statement, and never over something else."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from privtrain.commands.export import export_run
from privtrain.commands.verify import Anchors, verify_directory
from privtrain.errors import ConfigError, VerificationFailed
from privtrain.job.train import train
from privtrain.run import bundle
from tests.conftest import write_config

IDS = torch.arange(1, 13)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_adapter_and_merged_models_compute_what_the_run_released(finished, tiny_llama, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    untouched = logits(base)
    expected = logits(peft.PeftModel.from_pretrained(base, str(finished / "adapter")))
    assert not torch.allclose(untouched, expected, atol=1e-4)

    export_run(finished, tmp_path / "adapter", merge=False, dtype="bf16")
    again = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    assert torch.equal(expected, logits(peft.PeftModel.from_pretrained(again, str(tmp_path / "adapter"))))

    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 0.05)):
        message = export_run(finished, tmp_path / dtype, merge=True, dtype=dtype)
        assert f"merged model in {dtype}" in message
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype="auto")
        torch.testing.assert_close(logits(merged), expected, atol=tolerance, rtol=tolerance)
        assert AutoTokenizer.from_pretrained(tmp_path / dtype).eos_token == "<end>"
        card = (tmp_path / dtype / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert f"merged into its base model and stored in {dtype}" in card
        assert json.loads((tmp_path / dtype / "privacy.json").read_text()) == json.loads(
            (finished / "privacy.json").read_text()
        )
    assert merged.dtype == torch.bfloat16


def test_a_fully_trained_model_is_cast(tree, tmp_path, no_self_test):
    tree["training"]["method"] = "full"
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    export_run(run, tmp_path / "out", merge=False, dtype="bf16")
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    whole = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    assert cast.dtype == torch.bfloat16
    for name, value in whole.named_parameters():
        assert torch.equal(dict(cast.named_parameters())[name], value.bfloat16())
    found = verify_directory(tmp_path / "out", Anchors(released=run))
    assert any("made again" in item for item in found.checked)


def test_faults_come_at_once_and_nothing_is_written(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError) as caught:
        export_run(tmp_path / "no-run", tmp_path / "out", merge=True, dtype="int4")
    assert [fault.path for fault in caught.value.faults] == ["RUN", "OUTPUT", "--dtype"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_changed_weights_are_not_exported(finished, tmp_path):
    path = finished / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(VerificationFailed, match=r"adapter/adapter_model.safetensors differs"):
        export_run(finished, tmp_path / "out", merge=True, dtype="fp32")
    assert not (tmp_path / "out").exists()


def test_weights_that_overflow_the_dtype_are_not_handed_out(finished, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    damaged = tmp_path / "damaged"
    shutil.copytree(finished, damaged)
    path = damaged / "adapter" / "adapter_model.safetensors"
    save_file({name: value + 300.0 for name, value in load_file(path).items()}, path)
    monkeypatch.setattr(bundle, "check_released", lambda run: bundle.read_manifest(run)[0])
    with pytest.raises(RuntimeError, match="is not finite"):
        export_run(damaged, tmp_path / "out", merge=True, dtype="fp16")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
