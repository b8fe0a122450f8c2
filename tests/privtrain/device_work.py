"""Whole steps on the simulated device, in a process of their own.

Writes one JSON object: for each route, how far its trained tensors are from the CPU's, what the host waited for and
what was copied in the microbatches of a step; for each planted mistake, what was found.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch

from privtrain.backends import LocalBackend
from privtrain.clipping.clipper import PerUnitClipper
from privtrain.data.microbatch import Microbatch
from privtrain.job import checkpoint
from privtrain.privacy import digits
from privtrain.training.trainer import Trainer
from tests.privtrain import simulated_device
from tests.privtrain.cells import CPU, NUM_STEPS, Cell, key_noise_by_step_alone, make_trainer, self_test, trained

_AUXILIARY_SUMS = ("within_norm", "loss")
CELLS = {
    "lora batched": Cell(route="batched", noised_metrics=True),
    "lora one_unit": Cell(route="one_unit", style="per_layer"),
    "full two_pass": Cell(method="full", route="two_pass", style="adaptive"),
}


class Sim(LocalBackend):
    """One process whose model is on the simulated device."""

    def load_base(self, source: Any) -> torch.nn.Module:
        return source.whole()

    def place(self, model: torch.nn.Module) -> Any:
        simulated_device.move(model)
        return super().place(model)


def on_cpu(base: pathlib.Path, cell: Cell) -> dict[str, np.ndarray]:
    """The trained tensors of a run on the CPU."""
    return trained(run(make_trainer(LocalBackend(CPU), base, cell)))


def run(trainer: Trainer) -> Trainer:
    """Two steps, with noise that depends on the step alone."""
    key_noise_by_step_alone(trainer)
    for step in range(NUM_STEPS - 1):
        trainer.train_step(step)
    return trainer


def counted(trainer: Trainer, device: simulated_device.Device) -> dict[str, Any]:
    """What the microbatches of one step cost, each, beside the transfer of the microbatch itself."""
    drawn = trainer.sampler.draw(NUM_STEPS - 1)
    batches = list(trainer.microbatches(drawn))
    trainer.clipper.reset()
    device.restart()
    for batch in batches:
        trainer.clipper.accumulate(batch)
    return {
        "num_batches": len(batches),
        "waits": dict(device.waits),
        "copies": dict(device.copies),
        "num_kernels": device.num_kernels,
    }


def compared(base: pathlib.Path, cell: Cell, scratch: pathlib.Path, with_self_test: bool) -> dict[str, Any]:
    """Self-test, steps and a checkpoint there and back on the device, against the CPU."""
    expected = on_cpu(base, cell)
    with simulated_device.simulated() as device:
        trainer = make_trainer(Sim(torch.device("sim:0")), base, cell)
        if with_self_test:
            self_test(trainer)
        run(trainer)
        found = trained(trainer)
        scratch.mkdir()
        state = {"layout": trainer.layout, "optimizer": trainer.optimizer, "backend": trainer.backend}
        checkpoint.save(scratch, step=NUM_STEPS, generation=0, commitment="", clipping_norm=0.5, num_kept=1, **state)
        with torch.no_grad():
            for parameter in trainer.layout.parameters.values():
                parameter.zero_()
        saved = checkpoint.load_newest(scratch)
        assert saved is not None
        checkpoint.restore(saved.state, *state.values())
        again = trained(trainer)
        counts = counted(trainer, device)
    worst = max(float(np.abs(found[name] - value).max()) for name, value in expected.items())
    return {
        "worst": worst,
        "moved": max(float(np.abs(value).max()) for value in expected.values()),
        "comes_back": all(np.array_equal(found[name], again[name]) for name in found),
        **counts,
    }


def noise_copies(trainer: Trainer, device: simulated_device.Device) -> dict[str, int]:
    """Copies between host and device while a vector's noise is drawn."""
    total = torch.zeros(trainer.layout.num_coordinates, dtype=torch.int64, device=trainer.backend.device)
    key = trainer.bound_sum(trainer.clipper, total, dict.fromkeys(_AUXILIARY_SUMS, 0), trainer._key, 0).noise
    kind: dict[str, Any] = {"exponent": trainer.clipper.grid_exponent, "stddev": 0.5}
    trainer.backend.add_noise(total, trainer.layout, key, **kind)  # checks the device's arithmetic once
    device.restart()
    trainer.backend.add_noise(total, trainer.layout, key, **kind)
    return dict(device.copies)


def drawn_on_the_host(key: Any, purpose: str, chunk: Any, there: torch.device) -> torch.Tensor:
    """The mistake of a noise whose digits come from the CPU, number by number."""
    return digits._from_openssl(key, purpose, chunk).to(there)


@contextlib.contextmanager
def in_accumulate(mistake: Callable[[PerUnitClipper, Microbatch], None]) -> Iterator[None]:
    """The clipper makes this mistake at each microbatch."""
    accumulate = PerUnitClipper.accumulate

    def mistaken(self: PerUnitClipper, batch: Microbatch) -> None:
        mistake(self, batch)
        accumulate(self, batch)

    with mock.patch.object(PerUnitClipper, "accumulate", mistaken):
        yield


def cpu_tensor(clipper: PerUnitClipper, batch: Microbatch) -> None:
    """Made without the device."""
    batch.row_weight.mul_(torch.ones(len(batch.row_weight)))


def item_in_a_loop(clipper: PerUnitClipper, batch: Microbatch) -> None:
    """One wait a row."""
    for row in range(len(batch.row_weight)):
        float(batch.row_weight[row])


def copy_to_the_host(clipper: PerUnitClipper, batch: Microbatch) -> None:
    """Of the sum, each time."""
    clipper.total.to(CPU)


def pinned_copy(clipper: PerUnitClipper, batch: Microbatch) -> None:
    """Of numbers that the device could make for itself, each time; that nobody waits for it makes it no better."""
    for _ in range(4):
        torch.zeros(len(batch.row_weight)).to(batch.row_weight.device, non_blocking=True)


def planted(base: pathlib.Path) -> dict[str, Any]:
    """What each mistake leaves behind."""
    found: dict[str, Any] = {}
    for mistake in (cpu_tensor, item_in_a_loop, copy_to_the_host, pinned_copy):
        with simulated_device.simulated() as device, in_accumulate(mistake):
            trainer = make_trainer(Sim(torch.device("sim:0")), base, CELLS["lora batched"])
            try:
                found[mistake.__name__] = counted(trainer, device)
            except simulated_device.MixedDevices as error:
                found[mistake.__name__] = str(error)
    with simulated_device.simulated() as device:
        trainer = make_trainer(Sim(torch.device("sim:0")), base, CELLS["lora batched"])
        found["noise"] = noise_copies(trainer, device)
        with mock.patch.object(digits, "_from_tensors", drawn_on_the_host):
            found["noise_of_the_host"] = noise_copies(trainer, device)
    return found


def main(base: pathlib.Path, out: pathlib.Path, with_self_test: bool) -> None:
    """Write the object to ``out``, and what a failure says beside it; a self-test takes many passes by hand."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    simulated_device.register()
    with contextlib.redirect_stdout(io.StringIO()):
        cells = {
            name: compared(base, cell, out.with_suffix(f".{cell.route}"), with_self_test)
            for name, cell in CELLS.items()
        }
        found = {"cells": cells, "planted": planted(base)}
    out.write_text(json.dumps(found, indent=1))
