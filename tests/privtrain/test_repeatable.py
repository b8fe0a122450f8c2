"""Kernels on CUDA give the same bits each time: torch's settings, with a stand-in for what they do."""

from __future__ import annotations

import os

import pytest
import torch

from privtrain.errors import UnsupportedLayer
from privtrain.training import repeatable

_CPU = torch.device("cpu")


class Settings:
    """torch's settings, as they would be told."""

    def __init__(self, monkeypatch) -> None:
        self.strict: bool | None = None
        self.attention: dict[str, bool] = {}
        monkeypatch.setattr(
            torch, "use_deterministic_algorithms", lambda _mode, warn_only=False: setattr(self, "strict", not warn_only)
        )
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
        for kind in ("cudnn", "flash", "mem_efficient"):
            name = f"enable_{kind}_sdp"
            monkeypatch.setattr(torch.backends.cuda, name, lambda on, kind=kind: self.attention.update({kind: on}))


@pytest.fixture
def settings(monkeypatch) -> Settings:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    return Settings(monkeypatch)


_CUDA = torch.device("cuda")


def test_passes_on_cuda_run_under_the_strict_setting(settings):
    """torch's flash attention adds up in any order where torch was only told to warn."""
    repeatable.prefer_repeatable(_CUDA)
    assert settings.strict is False
    assert settings.attention == {"cudnn": False}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert repeatable.demand_repeatable(_CUDA, lambda: settings.strict, pytest.fail) is True


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_an_operation_without_a_kernel_takes_plain_attention(settings, is_wrapped):
    said = []

    def work() -> str:
        if settings.strict:
            try:
                raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set")
            except RuntimeError as error:
                if is_wrapped:
                    raise UnsupportedLayer("a pass failed") from error
                raise
        return "done"

    assert repeatable.demand_repeatable(_CUDA, work, said.append) == "done"
    assert settings.attention == {"flash": False, "mem_efficient": False}
    assert "cumsum_cuda_kernel" in said[0]


def test_other_failures_are_not_tried_again(settings):
    tries = []

    def work() -> None:
        tries.append(1)
        raise UnsupportedLayer("something else")

    with pytest.raises(UnsupportedLayer, match="something else"):
        repeatable.demand_repeatable(_CUDA, work, pytest.fail)
    assert tries == [1]


def test_a_cpu_keeps_its_settings(settings):
    repeatable.prefer_repeatable(_CPU)
    assert repeatable.demand_repeatable(_CPU, lambda: "done", pytest.fail) == "done"
    assert settings.strict is None
