"""Invariant 4: each coordinate's noise is drawn once in the job, and all ranks together have that of one alone."""

from __future__ import annotations

import contextlib
import io
import pathlib
from unittest import mock

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from privtrain.backends import DdpBackend
from privtrain.privacy import noise
from privtrain.privacy.layout import Layout
from privtrain.privacy.secret import SecretKey
from tests.privtrain.cells import Cell, make_backend, make_trainer
from tests.ranks import run_on_ranks

KEY = SecretKey.insecure(11, "shared noise")
CELLS = {
    "lora": Cell(noised_metrics=True),
    "banded": Cell(sampling_prob=0.3, num_bands=3),
    "full": Cell(method="full"),
}


def steps_without_units(name: str, directory: pathlib.Path, cell: Cell) -> tuple[int, int, list[torch.Tensor]]:
    """Noise of two steps in which nobody is drawn.

    Returns:
        Coordinates that this rank drew a step, trained coordinates, and on rank 0 every tensor of both steps.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = make_trainer(make_backend(name), directory, cell)
    history, previous, tensors, num_drawn = trainer.new_history(trainer.clipper), "", [], 0
    rounded = noise.ExactRounding.apply

    def counted(self, total, *arguments, **named):
        nonlocal num_drawn
        num_drawn += len(total)
        return rounded(self, total, *arguments, **named)

    for step in range(2):
        trainer.clipper.reset()
        with mock.patch.object(noise.ExactRounding, "apply", counted):
            vector, _, previous = trainer.release(trainer.clipper, KEY, step, history=history, previous=previous)
        tensors += [trainer.backend.whole(slot, trainer.layout.view(vector, slot)) for slot in trainer.layout.slots]
    num_auxiliary = len(trainer.plan.auxiliary_sums)  # a number or two, which every rank draws
    num_trained = sum(slot.num_whole_coordinates for slot in trainer.layout.slots)
    return num_drawn // 2 - num_auxiliary, num_trained, [t for t in tensors if t is not None]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("num_ranks", "name", "cell"),
    [
        (2, "ddp", "lora"),
        (3, "ddp", "banded"),
        (2, "ddp", "full"),
        (2, "zero1", "lora"),
        pytest.param(2, "zero3", "full", marks=pytest.mark.campaign),
        (2, "fsdp2", "full"),
        (4, "fsdp2-hsdp", "full"),
    ],
)
def test_ranks_together_draw_each_coordinate_once(tiny_llama, num_ranks, name, cell):
    num_trained, _, alone = steps_without_units("local", tiny_llama, CELLS[cell])
    found = run_on_ranks(num_ranks, steps_without_units, name, tiny_llama, CELLS[cell])
    assert [row[1] for row in found] == [num_trained] * num_ranks
    assert sum(row[0] for row in found) == num_trained
    assert all(torch.equal(one.flatten(), other.flatten()) for one, other in zip(alone, found[0][2], strict=True))


def _everyone_draws_everything(directory: pathlib.Path) -> tuple[int, int]:
    with mock.patch.object(DdpBackend, "holders", return_value=None):
        return steps_without_units("ddp", directory, CELLS["lora"])[:2]


@pytest.mark.dist
def test_ranks_that_all_draw_everything_are_counted(tiny_llama):
    """The mutant, which releases the same bits."""
    found = run_on_ranks(2, _everyone_draws_everything, tiny_llama)
    assert sum(num_drawn for num_drawn, _ in found) == 2 * found[0][1]


@hypothesis.settings(max_examples=50)
@hypothesis.given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), num_runs=st.integers(1, 5))
def test_runs_of_a_layout_cover_each_coordinate_once(sizes, num_runs):
    layout = Layout({f"t{i}": torch.nn.Parameter(torch.empty(n, device="meta")) for i, n in enumerate(sizes)})
    length, size = sum(sizes), -(-sum(sizes) // num_runs)
    found: list[tuple[str, int]] = []
    for rank in range(num_runs):
        low, high = min(rank * size, length), min((rank + 1) * size, length)
        run = layout.run(low, high)
        assert run.num_coordinates == high - low
        assert [slot.whole_shape for slot in run.slots] == [slot.whole_shape for slot in layout.slots]
        found += [(s.name, i) for s in run.slots for i in range(s.first, s.first + s.num_coordinates)]
    assert found == [(slot.name, i) for slot in layout.slots for i in range(slot.num_coordinates)]
