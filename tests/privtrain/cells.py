"""Short runs of the trainer on any backend, on the tiny model: one cell of the parity matrix."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import pathlib

import numpy as np
import torch
import torch.distributed as dist

from privtrain.backends import Backend, DdpBackend, LocalBackend
from privtrain.backends.fsdp2 import Fsdp2Backend
from privtrain.backends.zero import ZeroBackend, ZeroSettings
from privtrain.config.model import LoraSection, ModelSection
from privtrain.config.privacy import NoisedMetricsSection, PrivacySection
from privtrain.config.training import TrainingSection
from privtrain.data.microbatch import Packer
from privtrain.data.units import UnitData
from privtrain.ledger.log import NullLedger
from privtrain.models.trainable import add_lora
from privtrain.models.weights import BaseSource
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.secret import SecretKey
from privtrain.tracking import NullTracker
from privtrain.training.selftest import run_self_test
from privtrain.training.trainer import Trainer
from tests.privtrain.models_for_tests import invented_users

CPU = torch.device("cpu")
SHARDED = ("zero1", "zero2", "zero3", "fsdp2")
NUM_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is trained, and on whose behalf; ``sampling_prob`` decides whether a rank can go without a user."""

    method: str = "lora"
    unit: str = "user"
    sampling_prob: float = 0.6
    style: str = "flat"
    route: str = "auto"
    clipping_norm: float = 0.5
    microbatch_size: int = 3
    noise_multiplier: float = 1.0
    reduce_once: bool = False
    gradient_checkpointing: bool = False
    noised_metrics: bool = False
    num_bands: int | None = None

    @property
    def plan(self) -> PrivacyPlan:
        return _plan(self)


@functools.cache
def _plan(cell: Cell) -> PrivacyPlan:
    section = PrivacySection(
        unit=cell.unit,
        records_per_user=3 if cell.unit == "user" else None,
        sampling_prob=cell.sampling_prob,
        expected_batch_size=4.0,
        clipping_norm=cell.clipping_norm,
        clipping_style=cell.style,
        noised_metrics=NoisedMetricsSection() if cell.noised_metrics else None,
        noise_multiplier=cell.noise_multiplier,
        noise="independent" if cell.num_bands is None else "banded",
        num_bands=cell.num_bands,
        num_steps=NUM_STEPS,
        target_delta=1e-3,
        insecure_seed=5,
    )
    return PrivacyPlan.build(section)


def make_backend(name: str) -> Backend:
    """By the names of launch/accelerate; the process group must be there for all but ``local``."""
    if dist.is_initialized():  # in a rank's own process; elsewhere jobs of other tests would inherit it
        os.environ["LOCAL_RANK"] = str(dist.get_rank())
    if name == "local":
        return LocalBackend(CPU)
    if name == "ddp":
        return DdpBackend(CPU)
    if name.startswith("fsdp2"):
        return Fsdp2Backend(CPU, num_replicas=2 if name.endswith("hsdp") else 1)
    return ZeroBackend(CPU, ZeroSettings(int(name[4]), offload_optimizer=name.endswith("offload")))


def make_trainer(backend: Backend, directory: pathlib.Path, cell: Cell) -> Trainer:
    base = backend.load_base(BaseSource(ModelSection(name_or_path=str(directory)), torch.float32))
    if cell.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    if cell.method == "full":
        model = base.requires_grad_(True)
    else:
        lora = LoraSection(rank=2, alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
        model = add_lora(base, lora, init_seed=0, public_name="tiny")
    users = invented_users(7, most_records=1 if cell.unit == "example" else 4)
    units = UnitData(tuple(f"user-{i}" for i in range(7)), tuple(map(tuple, users)), 0)
    return Trainer(
        plan=cell.plan,
        training=TrainingSection(learning_rate=1e-2, weight_decay=0.01),
        model=model.train(),
        units=units,
        backend=backend,
        key=SecretKey.insecure(5, "cells"),
        generation=0,
        ledger=NullLedger(),
        tracker=NullTracker(),
        autocast=torch.autocast("cpu", enabled=False),
        packer=Packer(cell.microbatch_size, max_length=16, pad_id=0),
        clipping_route=cell.route,
        reduce_once=cell.reduce_once,
    )


def self_test(trainer: Trainer) -> str:
    return run_self_test(trainer, vocabulary_size=200, precision="fp32")


def key_noise_by_step_alone(trainer: Trainer) -> None:
    """So that sums that differ by rounding get the same noise and can be compared to a tolerance. Never in a job."""
    bound_sum = trainer.bound_sum

    def bound(clipper, total, totals, key, step, previous=""):
        return bound_sum(clipper, torch.zeros_like(total), dict.fromkeys(totals, 0), key, step, previous)

    trainer.bound_sum = bound


def trained(trainer: Trainer) -> dict[str, np.ndarray]:
    """Every trained tensor, whole, on rank 0; empty elsewhere."""
    layout, result = trainer.layout, {}
    for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
        value = trainer.backend.whole(slot, parameter)
        if value is not None:
            result[slot.name] = value.numpy()
    return result


def run_cell(name: str, directory: pathlib.Path, cell: Cell, with_self_test: bool = True) -> dict[str, np.ndarray]:
    """Self-test, then three steps; the trained tensors."""
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(make_backend(name), directory, cell)
    if with_self_test:
        self_test(trainer)
    key_noise_by_step_alone(trainer)
    for step in range(NUM_STEPS):
        trainer.train_step(step)
    return trained(trainer)


def run_cells(
    cells: list[tuple[str, Cell]], directory: pathlib.Path, with_self_test: bool
) -> list[dict[str, np.ndarray]]:
    """Several cells in one process."""
    return [run_cell(name, directory, cell, with_self_test) for name, cell in cells]
