"""Every method, task, precision and form of release: what is re-opened computes what was trained, or is refused.

Two comparisons, on fixed tokens: the model in memory at the release with what transformers and peft open from the
released directory alone; and that with the merged export.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from privtrain.commands.export import export_run
from privtrain.errors import ConfigError
from privtrain.job import train as job
from privtrain.models import merge
from tests.conftest import write_config
from tests.privtrain.bases import save_base

METHODS: dict[str, dict[str, Any]] = {
    "lora-all-linear": {"lora": {"target_modules": "all-linear"}},
    "lora-q-v": {"lora": {"target_modules": ["q_proj", "v_proj"]}},
    "dora": {"lora": {"target_modules": "all-linear", "use_dora": True}},
    "full": {"training": {"method": "full"}},
    "bias": {"training": {"method": "bias"}},
    "prompt": {"training": {"method": "prompt_tuning"}},
    "prefix": {"training": {"method": "prefix_tuning"}},
}
TASKS = ("causal", "classifier")
HELD_IN = ("fp32", "bf16", "nf4", "int8")
CELLS = list(itertools.product(METHODS, TASKS, HELD_IN))
#: One of each method, task and form, in the suite; all of them in the campaign.
SHORT = [
    ("lora-all-linear", "classifier", "fp32"),
    ("dora", "causal", "bf16"),
    ("bias", "classifier", "bf16"),
    ("prefix", "causal", "fp32"),
    ("lora-q-v", "causal", "nf4"),
    ("full", "causal", "int8"),
    ("prompt", "classifier", "fp32"),
]
LABELS = ["calm", "loud", "odd"]


def refused_before_training(method: str, task: str, held_in: str) -> str | None:
    """The key and words of the refusal, or None where the cell trains."""
    if method in ("full", "bias") and held_in in ("nf4", "int8"):
        return rf"training\.method: {method} trains weights that model\.quantization freezes"
    if method == "dora" and held_in == "int8":
        return r"lora\.use_dora .*model\.quantization: int8"
    if method in ("prompt", "prefix") and task == "classifier":
        return r"training\.method: \w+ does not train the head"
    return None


def unmergeable(method: str, held_in: str) -> str | None:
    if method in ("prompt", "prefix"):
        return "--merge: .* trains virtual tokens"
    return f"--merge: .*held in {held_in}" if held_in in ("nf4", "int8") else None


def configured(tree: dict[str, Any], folder: pathlib.Path, method: str, task: str, held_in: str) -> pathlib.Path:
    base = save_base(folder / "base", attention_bias=True)
    tree["model"] = {"name_or_path": str(base)}
    tree["lora"] = {"rank": 2, "alpha": 8, **METHODS[method].get("lora", {})}
    tree["training"] = {"learning_rate": 0.05, **METHODS[method].get("training", {})}
    tree["prompt"] = {"num_virtual_tokens": 3}
    if held_in in ("nf4", "int8"):
        tree["model"]["quantization"] = held_in
    else:
        tree["performance"]["precision"] = held_in
    tree["privacy"]["num_steps"] = 2
    if task == "classifier":
        rng = np.random.default_rng(0)
        rows = [
            {"user": f"u{number % 24:02d}", "text": f"text {number}", "label": str(rng.choice(LABELS))}
            for number in range(96)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = {"kind": "files", "paths": [str(folder / "rows.jsonl")]}
        tree["data"] |= {"source": source, "format": "classification", "labels": LABELS}
    return write_config(tree, folder / "c.yaml")


def quantized_as_others_do(held_in: str) -> dict[str, Any]:
    if held_in == "int8":
        settings = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    elif held_in == "nf4":
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    else:
        return {}
    return {"quantization_config": settings}


def opened_by_others(released: pathlib.Path, base: pathlib.Path, task: str, held_in: str) -> Any:
    """What somebody gets who has the base, the released directory and no privtrain."""
    auto: Any = (
        transformers.AutoModelForCausalLM if task == "causal" else transformers.AutoModelForSequenceClassification
    )
    if not (released / "adapter_config.json").exists():
        return auto.from_pretrained(released, dtype=torch.float32).eval()
    options = {} if task == "causal" else {"num_labels": len(LABELS), "pad_token_id": 0}
    model = auto.from_pretrained(base, dtype=torch.float32, **options, **quantized_as_others_do(held_in))
    return peft.PeftModel.from_pretrained(model, str(released)).eval()


def remembered(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the model in memory computes when it is released."""
    seen: list[torch.Tensor] = []

    def watched(write):
        def writing(directory, model, *rest):
            seen.append(merge.outputs(model.eval()))
            write(directory, model, *rest)

        return writing

    for name in ("write_adapter", "write_model"):
        monkeypatch.setattr(job, name, watched(getattr(job, name)))
    return seen


def check_cell(tree, folder, monkeypatch, method: str, task: str, held_in: str) -> None:
    if held_in in ("nf4", "int8"):
        bits = pytest.importorskip("bitsandbytes.nn.modules", reason="bitsandbytes is optional")
        # For others: its kernel for CPUs with AVX512-BF16 fails for models narrower than 64, as this one is.
        monkeypatch.setattr(bits, "has_avx512bf16", lambda: False)
    config = configured(tree, folder, method, task, held_in)
    run, base = folder / "runs" / "tiny", folder / "base"
    if refusal := refused_before_training(method, task, held_in):
        with pytest.raises(ConfigError, match=refusal):
            job.train(config)
        assert not run.exists()
        return
    seen = remembered(monkeypatch)
    job.train(config)
    (expected,) = seen
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    released = run / ("model" if method in ("full", "bias") else "adapter")
    torch.testing.assert_close(merge.outputs(opened_by_others(released, base, task, held_in)), expected, **tolerance)
    if method not in ("full", "bias"):  # of these the base's head is new, and the prefix changes the width
        plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        assert task == "classifier" or not torch.allclose(merge.outputs(plain), expected[:, -16:], atol=1e-4)
    export_run(run, folder / "copied", merge=False, dtype="fp32")
    again = opened_by_others(folder / "copied", base, task, held_in)
    torch.testing.assert_close(merge.outputs(again), expected, **tolerance)
    if refusal := unmergeable(method, held_in):
        with pytest.raises(ConfigError, match=refusal):
            export_run(run, folder / "merged", merge=True, dtype="fp32")
        assert not (folder / "merged").exists()
        return
    export_run(run, folder / "merged", merge=True, dtype="fp32")
    merged = opened_by_others(folder / "merged", base, task, "fp32")
    torch.testing.assert_close(merge.outputs(merged), expected, rtol=1e-3, atol=1e-4)
    if task == "classifier":
        assert list(merged.config.id2label.values()) == LABELS


@pytest.mark.parametrize(("method", "task", "held_in"), SHORT)
def test_cell_is_right_or_refused_by_name(tree, tmp_path, monkeypatch, method, task, held_in):
    check_cell(tree, tmp_path, monkeypatch, method, task, held_in)


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("method", "task", "held_in"), [cell for cell in CELLS if cell not in SHORT])
def test_every_cell_is_right_or_refused_by_name(tree, tmp_path, monkeypatch, method, task, held_in):
    check_cell(tree, tmp_path, monkeypatch, method, task, held_in)


def test_mutant_that_saves_another_tensor_is_caught(tree, tmp_path, monkeypatch):
    """The comparison sees a released file that is not what was in memory."""
    from safetensors.torch import load_file, save_file

    write = job.write_adapter

    def changed(directory, *rest):
        write(directory, *rest)
        path = directory / "adapter_model.safetensors"
        save_file({name: value * 1.5 for name, value in load_file(path).items()}, path)

    monkeypatch.setattr(job, "write_adapter", changed)
    with pytest.raises(AssertionError, match="not close"):
        check_cell(tree, tmp_path, monkeypatch, "lora-q-v", "causal", "fp32")
