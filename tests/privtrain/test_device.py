"""A step belongs on the device that the model is on: nothing is mixed, nothing waits or is copied without a budget.

On a device that is simulated on the CPU, in a process of its own that has made no backward pass yet, since autograd
starts a thread for each kind of device that it knows at its first one.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from tests.cluster import fork_server
from tests.privtrain import device_work

#: How often the host may wait for the device in a microbatch, the model's own waits included. Lower it when it falls.
MOST_WAITS = {"lora batched": 1, "lora one_unit": 5, "full two_pass": 1}
#: Tensors copied to the host in a microbatch.
MOST_COPIES = {"lora batched": 1, "lora one_unit": 1, "full two_pass": 3}
#: And to the device, beside the microbatch itself.
MOST_COPIES_THERE = {"lora batched": 6, "lora one_unit": 12, "full two_pass": 40}


def work(base: pathlib.Path, out: pathlib.Path, with_self_test: bool = False) -> dict[str, Any]:
    process = fork_server().Process(target=device_work.main, args=(base, out, with_self_test))
    process.start()
    process.join()
    assert process.exitcode == 0, out.with_suffix(".log").read_text()[-3000:]
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
    assert set(work(tiny_llama, tmp_path / "found.json", with_self_test=True)["cells"]) == set(MOST_WAITS)


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
