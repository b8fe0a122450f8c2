"""A step belongs on the device that the model is on: nothing is mixed, nothing waits or is copied without a budget.

On a device that is simulated on the CPU, in a process of its own, since autograd starts a thread for each kind of
device that it knows at its first backward pass.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.jobs import REPOSITORY

#: How often the host may wait for the device in a microbatch, the model's own waits included. Lower it when it falls.
MOST_WAITS = {"lora batched": 1, "lora one_unit": 5, "full two_pass": 1}
#: Tensors copied to the host in a microbatch.
MOST_COPIES = {"lora batched": 1, "lora one_unit": 1, "full two_pass": 3}
#: And to the device, beside the microbatch itself.
MOST_COPIES_THERE = {"lora batched": 6, "lora one_unit": 12, "full two_pass": 40}


def work(base: pathlib.Path, out: pathlib.Path, *options: str) -> dict[str, Any]:
    work = [sys.executable, "-m", "tests.privtrain.device_work", str(base), str(out), *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(work, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def found(tiny_llama: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return work(tiny_llama, tmp_path_factory.mktemp("device") / "found.json")


def waits(counts: dict[str, Any]) -> float:
    return sum(counts["waits"].values()) / counts["num_batches"]


def copies(counts: dict[str, Any], direction: str) -> float:
    return sum(number for where, number in counts["copies"].items() if direction in where) / counts["num_batches"]


@pytest.mark.parametrize("cell", MOST_WAITS)
def test_whole_steps_on_device_equal_cpu(found, cell):
    result = found["cells"][cell]
    assert result["worst"] < 1e-5 * result["moved"]
    assert result["comes_back"], "a checkpoint"


@pytest.mark.parametrize("cell", MOST_WAITS)
def test_microbatches_stay_within_their_waits_and_copies(found, cell):
    assert 0 < waits(found["cells"][cell]) <= MOST_WAITS[cell], found["cells"][cell]["waits"]
    assert copies(found["cells"][cell], "to host") <= MOST_COPIES[cell], found["cells"][cell]["copies"]
    assert copies(found["cells"][cell], "to device") <= MOST_COPIES_THERE[cell], found["cells"][cell]["copies"]


@pytest.mark.campaign
def test_self_test_passes_on_the_device(tiny_llama, tmp_path):
    assert set(work(tiny_llama, tmp_path / "found.json", "--self-test")["cells"]) == set(MOST_WAITS)


def test_planted_tensor_of_the_cpu_is_refused(found):
    assert "takes a tensor of the CPU" in found["planted"]["cpu_tensor"]


def test_planted_item_in_a_loop_breaks_the_budget(found):
    assert waits(found["planted"]["item_in_a_loop"]) > MOST_WAITS["lora batched"]


def test_planted_copy_to_the_host_breaks_the_budget(found):
    assert copies(found["planted"]["copy_to_the_host"], "to host") > MOST_COPIES["lora batched"]


def test_planted_pinned_copy_each_microbatch_breaks_the_budget(found):
    assert copies(found["planted"]["pinned_copy"], "to device") > MOST_COPIES_THERE["lora batched"]


def test_noise_is_drawn_on_the_device(found):
    """Keys go there, and nothing of the length of the vector."""
    places = {where for where in found["planted"]["noise"] if "to device" in where}
    assert places
    assert all("digits.py" in where or "chacha.py" in where for where in places)
    assert set(found["planted"]["noise_of_the_host"]) - places, "the mutant"
