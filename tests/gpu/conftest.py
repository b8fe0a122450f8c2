"""The device that is tested."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch

from privtrain.training.repeatable import demand_repeatable, prefer_repeatable
from tests.conftest import save_tiny_llama


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU; ``PRIVTRAIN_GPU_TESTS=cpu`` tries the tests themselves on a machine without one."""
    name = os.environ.get("PRIVTRAIN_GPU_TESTS", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    device = torch.device(name)
    prefer_repeatable(device)
    demand_repeatable(device, lambda: None, print)  # as a job does from its self-test on
    return device


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save_tiny_llama(tmp_path_factory.mktemp("gpu-base"))
