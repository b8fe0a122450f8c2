"""Invariants 4 and 5: noise once, of the stated size, the same on every rank, never shared between runs or steps."""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats

from privtrain.backends import DdpBackend
from privtrain.layout import Layout
from privtrain.noise import BLOCK, add_gaussian_noise_, gaussian
from privtrain.secret import SecretKey
from tests.ranks import run_on_ranks

NOISE_MULTIPLIER, CLIPPING_NORM, NUM_STEPS = 1.7, 0.3, 200


def make_layout() -> Layout:
    shapes = {"b": (40, 7), "a": (13,), "c": (90, 3)}
    return Layout({name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})


def _noise_only_steps(secret: bytes) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
    """Every step's reduced and noised sum, and the parameters at the end, through the job's backend."""
    backend, layout = DdpBackend(torch.device("cpu")), make_layout()
    optimizer = torch.optim.AdamW(list(layout.parameters.values()), lr=0.1)
    steps = []
    for step in range(NUM_STEPS):
        total = layout.zeros(backend.device)
        backend.reduce(total)
        backend.add_noise(total, layout, SecretKey(secret), step, NOISE_MULTIPLIER * CLIPPING_NORM)
        steps.append(total.clone())
        backend.apply(total, layout, optimizer, divide_by=8.0)
    parameters = [p.detach() for p in layout.parameters.values()]
    return steps, parameters, backend.in_sync(parameters)


@pytest.mark.dist
def test_noise_has_the_planned_spread_and_ranks_stay_bit_identical():
    first, second = run_on_ranks(2, _noise_only_steps, SecretKey.insecure(3, "noise").reveal())
    assert first[2]
    assert second[2]
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))
    layout = make_layout()
    for slot in layout.slots:
        draws = torch.stack([layout.view(step, slot) for step in first[0]]).double()
        std = float(draws.square().mean().sqrt())
        standard_error = NOISE_MULTIPLIER * CLIPPING_NORM / math.sqrt(2 * draws.numel())
        assert abs(std - NOISE_MULTIPLIER * CLIPPING_NORM) < 3 * standard_error
    everything = torch.stack(first[0]).flatten().numpy() / (NOISE_MULTIPLIER * CLIPPING_NORM)
    assert stats.kstest(everything, "norm").pvalue > 1e-3


def test_two_runs_never_share_noise():
    keys = [SecretKey.generate() for _ in range(4)]
    draws = [gaussian(key, step, name, 0, 64) for key in keys for step in range(50) for name in ("a", "b")]
    everything = torch.cat(draws)
    assert len(everything.unique()) == len(everything)


def test_noise_differs_by_step_and_tensor_and_is_a_pure_function():
    key = SecretKey.insecure(0, "noise")
    base = gaussian(key, 5, "a", 0, 100)
    assert torch.equal(base, gaussian(key, 5, "a", 0, 100))
    for other in (gaussian(key, 6, "a", 0, 100), gaussian(key, 5, "b", 0, 100)):
        assert not torch.isin(other, base).any()


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(start=st.integers(0, 3 * BLOCK), size=st.integers(1, BLOCK))
def test_a_shard_draws_its_own_part_of_the_same_noise(start, size):
    key = SecretKey.insecure(1, "noise")
    whole = gaussian(key, 0, "w", 0, 4 * BLOCK)
    assert torch.equal(gaussian(key, 0, "w", start, start + size), whole[start : start + size])


def test_noise_is_added_in_fp32_and_none_is_drawn_without_a_multiplier():
    layout = make_layout()
    vector = torch.ones(layout.num_coordinates)
    add_gaussian_noise_(vector, layout, key=SecretKey.insecure(0, "noise"), step=0, stddev=0.0)
    assert torch.equal(vector, torch.ones(layout.num_coordinates))
    with pytest.raises(AssertionError):
        add_gaussian_noise_(vector.bfloat16(), layout, key=SecretKey.insecure(0, "noise"), step=0, stddev=1.0)
