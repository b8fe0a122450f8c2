"""The studies' base of public text: trained once, the same weights after an interruption, refused if it changed."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import sys
from typing import Any

import pytest
import torch

from privtrain.errors import ConfigError
from privtrain.studies.recipe import RECIPES


@pytest.fixture(scope="module")
def base() -> Any:
    spec = importlib.util.spec_from_file_location("public_base", RECIPES / "public_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for it
    spec.loader.exec_module(module)
    return module


TEXTS = [f"a sentence about number {n} and its neighbour {n + 1}" for n in range(60)]


def _tiny(base: Any) -> Any:
    sizes = {"vocabulary": 300, "width": 16, "hidden": 24, "layers": 1, "heads": 2, "length": 16, "batch": 4}
    return base.Size(**sizes, num_steps=6, checkpoint_interval=2)


def test_base_is_trained_once_resumes_exactly_and_is_checked(base, tmp_path, monkeypatch):
    whole = base.make(TEXTS, _tiny(base), tmp_path / "whole")
    facts = json.loads((whole / "base.json").read_text())
    assert not (whole / "state.pt").exists()

    save, saved = base._save, []

    def stop_after_second(path: pathlib.Path, step: int, *parts: Any) -> None:
        save(path, step, *parts)
        saved.append(step)
        if saved == [2, 4]:
            raise KeyboardInterrupt

    monkeypatch.setattr(base, "_save", stop_after_second)
    with pytest.raises(KeyboardInterrupt):
        base.make(TEXTS, _tiny(base), tmp_path / "cut")
    monkeypatch.setattr(base, "_save", save)
    torch.manual_seed(99)
    resumed = base.make(TEXTS, _tiny(base), tmp_path / "cut")
    assert resumed.name == whole.name
    assert json.loads((resumed / "base.json").read_text()) == facts

    monkeypatch.setattr(base, "_train", None)  # it is kept: nothing is trained
    assert base.make(TEXTS, _tiny(base), tmp_path / "whole") == whole
    weights = bytearray((whole / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (whole / "model.safetensors").write_bytes(weights)
    with pytest.raises(ConfigError, match="another SHA-256"):
        base.make(TEXTS, _tiny(base), tmp_path / "whole")


def test_another_text_or_size_is_another_base(base, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_train", lambda *_: (_ for _ in ()).throw(InterruptedError))
    size = _tiny(base)
    for texts, other in ((TEXTS, size), (TEXTS[1:], size), (TEXTS, dataclasses.replace(size, layers=2))):
        with pytest.raises(InterruptedError):
            base.make(texts, other, tmp_path)
    assert len(list(tmp_path.glob(".*"))) == 3


def test_an_unknown_kind_of_text_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="given poems; there are plays, fortunes"):
        base.main(tmp_path, ["plays", "poems"])
