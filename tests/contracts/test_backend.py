"""Every backend takes the same steps: three of them, under noise of the step, equal one process to 1e-6 in fp32."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from tests.privtrain.cells import SHARDED, Cell, run_cell, run_cells
from tests.ranks import run_on_ranks

pytestmark = [pytest.mark.dist, pytest.mark.slow]

METHODS = ("lora", "full")
NAMES = ("ddp", *SHARDED)
#: Methods in turn; tests/privtrain/test_selftest.py runs the honest self-test with both.
SELF_TESTED = [(name, Cell(METHODS[number % 2])) for number, name in enumerate(NAMES)]
OTHERS = [(name, Cell(METHODS[1 - number % 2])) for number, name in enumerate(NAMES)]
#: Few draws, so that a rank, or a step, has no user at all.
SPARSE = [(name, Cell(method, sampling_prob=0.15)) for name in ("zero3", "fsdp2") for method in METHODS]
OPTIONS = [
    ("zero2", Cell("full", style="per_layer")),
    ("fsdp2", Cell("full", style="automatic")),
    *[(name, Cell("lora", route="one_unit")) for name in ("zero3", "fsdp2")],
    ("zero3", Cell("full", gradient_checkpointing=True)),
    ("fsdp2", Cell("lora", gradient_checkpointing=True)),
    ("zero2", Cell("full", route="two_pass", microbatch_size=3)),
    ("zero3", Cell("full", route="two_pass", microbatch_size=1)),
    ("fsdp2", Cell("full", style="per_layer", route="two_pass", gradient_checkpointing=True)),
    ("zero3-offload", Cell("full")),
]
FOUR_RANKS = [("zero3", Cell("full")), ("fsdp2-hsdp", Cell()), ("fsdp2-hsdp", Cell("full", route="two_pass"))]
#: The rest of the grid, each cell on two ranks.
MORE = [
    *[(name, Cell(method, "example")) for name in NAMES for method in METHODS],
    *[(name, Cell(method, sampling_prob=0.15)) for name in ("ddp", "zero1", "zero2") for method in METHODS],
    ("fsdp2", Cell("full", style="per_layer")),
    ("zero3", Cell("full", style="automatic")),
    ("zero3", Cell("lora", gradient_checkpointing=True)),
    ("fsdp2", Cell("full", gradient_checkpointing=True)),
    *[
        (name, Cell("full", route="two_pass", microbatch_size=m))
        for name, m in (("zero2", 1), ("zero3", 3), ("fsdp2", 1), ("fsdp2", 3))
    ],
    *[(f"zero{stage}-offload", Cell("full")) for stage in (1, 2)],
    *[("zero1", Cell(method, sampling_prob=0.3, num_bands=3)) for method in METHODS],
    *[("zero3", Cell(method, sampling_prob=0.3, num_bands=3)) for method in METHODS],
    ("ddp", Cell("full", sampling_prob=0.3, num_bands=3)),
]
BANDED = [
    *[(name, Cell("lora", sampling_prob=0.3, num_bands=3)) for name in ("ddp", "fsdp2")],
    *[(name, Cell("full", sampling_prob=0.3, num_bands=3)) for name in ("zero2", "fsdp2")],
]
MORE_OF_FOUR_RANKS = [("ddp", Cell()), ("zero3", Cell()), ("fsdp2-hsdp", Cell("full"))]


@functools.cache
def reference(directory, cell: Cell) -> dict[str, np.ndarray]:
    return run_cell("local", directory, cell, with_self_test=False)


def check(directory, world_size: int, cells: list[tuple[str, Cell]], with_self_test: bool = False) -> None:
    by_rank = run_on_ranks(world_size, run_cells, cells, directory, with_self_test)
    wrong = []
    for (name, cell), found in zip(cells, by_rank[0], strict=True):
        expected = reference(directory, cell)
        assert found.keys() == expected.keys()
        error = max(float(np.abs(found[key] - expected[key]).max()) for key in expected)
        if not error <= 1e-6:
            wrong.append((name, cell, error))
    assert not wrong


def test_parity_matrix_on_two_ranks(tiny_llama):
    """The self-test comes first, as in a job: it leaves nothing behind."""
    check(tiny_llama, 2, SELF_TESTED, with_self_test=True)
    check(tiny_llama, 2, OTHERS)


def test_ranks_and_steps_without_users(tiny_llama):
    check(tiny_llama, 2, SPARSE)


def test_styles_routes_checkpointing_and_offload(tiny_llama):
    check(tiny_llama, 2, OPTIONS)


def test_banded_noise_is_the_same_on_every_backend(tiny_llama):
    check(tiny_llama, 2, BANDED)


def test_four_ranks_and_replicas_of_shards(tiny_llama):
    check(tiny_llama, 4, FOUR_RANKS)


@pytest.mark.campaign
@pytest.mark.parametrize(("world_size", "cells"), [(2, MORE), (4, MORE_OF_FOUR_RANKS)])
def test_rest_of_the_grid(tiny_llama, world_size, cells):
    check(tiny_llama, world_size, cells)
