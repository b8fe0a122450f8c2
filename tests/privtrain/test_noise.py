"""Invariants 4 and 5: noise once, of the stated size, the same on every rank, and exactly the rounded Gaussian."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from scipy import stats

from privtrain.backends import DdpBackend
from privtrain.privacy import noise, normal
from privtrain.privacy.digits import BLOCK
from privtrain.privacy.fixed_point import grid_exponent
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import StepNoise, noise_exponent, noised, noised_vector
from privtrain.privacy.secret import SecretKey
from tests.ranks import run_on_ranks

NOISE_MULTIPLIER, CLIPPING_NORM, NUM_STEPS = 1.7, 0.3, 200
STDDEV, EXPONENT = NOISE_MULTIPLIER * CLIPPING_NORM, grid_exponent(CLIPPING_NORM)


def make_layout() -> Layout:
    shapes = {"b": (40, 7), "a": (13,), "c": (90, 3)}
    return Layout({name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()})


def step_noise(seed: int = 0) -> StepNoise:
    return StepNoise(SecretKey.insecure(seed, "noise"))


def draw(total: torch.Tensor, key: StepNoise | None = None, *, name: str = "w", first: int = 0, stddev: float = STDDEV):
    return noised(total, exponent=EXPONENT, stddev=stddev, noise=key or step_noise(), name=name, first=first)


def signed(digits) -> torch.Tensor:
    """Digits as the integers that a tensor holds."""
    return torch.from_numpy(np.asarray(digits, dtype=np.uint64).view(np.int64))


def slow_release(total: list[int], key: StepNoise, *, exponent: int, stddev: float, name: str, first: int) -> list[int]:
    """round((S·h + σX) / g), by search among half-integers with exact comparisons; float64 says where to begin."""
    released, found = noise_exponent(stddev, exponent), []
    for coordinate, value in enumerate(total, start=first):
        block, place = divmod(coordinate, BLOCK)
        bits = int(key.key.stream("noise", name, block).uint64(place + 1)[place])

        def more(number: int, coordinate: int = coordinate) -> int:
            return int(key.key.stream("more noise", name, coordinate).uint64(number + 1)[number])

        def is_under(n: int, value: int = value, bits: int = bits, more=more) -> bool:
            edge = Fraction(2 * n + 1, 2) * Fraction(2) ** released - value * Fraction(2) ** exponent
            return normal.is_below(bits, more, edge / Fraction(stddev))

        x = float(normal.quantiles(signed([bits]))[0])
        start = math.floor(
            value * Fraction(2) ** (exponent - released) + Fraction(x * stddev) / Fraction(2) ** released
        )
        found.append(normal.nearest(start, is_under))
    return found


def adversarial_sums(key: StepNoise, num: int, *, exponent: int, stddev: float, name: str) -> list[int]:
    """Sums that bring each coordinate as near to a half-integer as their grid allows, on either side."""
    released = noise_exponent(stddev, exponent)
    x = normal.quantiles(signed(key.key.stream("noise", name, 0).uint64(num)))
    sums = []
    for i, value in enumerate(x.tolist()):
        t = Fraction(value) * Fraction(stddev) / Fraction(2) ** released
        gap = math.floor(t) + Fraction(1, 2) - t
        sums.append(round(gap * Fraction(2) ** (released - exponent)) + (i % 3 - 1))
    return sums


# What is released lies on the public grid and is exactly the rounded Gaussian.


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 100.0, 1e7])
@pytest.mark.parametrize("num", [150, pytest.param(30_000, marks=pytest.mark.campaign)])
def test_fast_path_equals_high_precision_at_half_integers(multiplier, num):
    """The sums are chosen, knowing the noise, to lie at the edges between two released values."""
    key = step_noise(3)
    kind = {"exponent": EXPONENT, "stddev": multiplier * CLIPPING_NORM, "name": "w"}
    sums = adversarial_sums(key, num, **kind)
    found = noised(torch.tensor(sums), noise=key, **kind)
    grid = 2.0 ** noise_exponent(kind["stddev"], EXPONENT)
    assert (found / grid).long().tolist() == slow_release(sums, key, first=0, **kind)


@pytest.mark.parametrize("num", [400, pytest.param(100_000, marks=pytest.mark.campaign)])
def test_fast_path_equals_high_precision_on_ordinary_sums(num):
    key = step_noise(4)
    kind = {"exponent": EXPONENT, "stddev": STDDEV, "name": "w", "first": BLOCK - num // 2}
    sums = torch.from_numpy(np.random.default_rng(0).integers(-(2**61), 2**61, num))
    found = noised(sums, noise=key, **kind)
    grid = 2.0 ** noise_exponent(STDDEV, EXPONENT)
    assert torch.equal(found, torch.tensor(slow_release(sums.tolist(), key, **kind), dtype=torch.float64) * grid)


def test_mutant_without_doubtful_check_rounds_edges_wrong(monkeypatch):
    """The mutant: rounding what float64 computed."""
    key = step_noise(3)
    kind = {"exponent": EXPONENT, "stddev": 100.0 * CLIPPING_NORM, "name": "w"}
    sums = adversarial_sums(key, 500, **kind)
    right = noised(torch.tensor(sums), noise=key, **kind)
    monkeypatch.setattr(noise.ExactRounding, "_doubtful", lambda *_: torch.zeros(0, dtype=torch.int64))
    assert not torch.equal(noised(torch.tensor(sums), noise=key, **kind), right)


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    sums=st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=8),
    exponent=st.integers(-200, 100),
    log_stddev=st.floats(-40, 120),
    mantissa=st.floats(1, 2),
    first=st.integers(0, 3 * BLOCK),
)
def test_any_sum_and_noise_is_released_on_the_grid_and_exactly(sums, exponent, log_stddev, mantissa, first):
    """Noise far below the sum's grid and far above it, and sums of any size."""
    key, stddev = step_noise(5), mantissa * 2.0 ** (exponent + log_stddev)
    kind = {"exponent": exponent, "stddev": stddev, "name": "w", "first": first}
    found = noised(torch.tensor(sums), noise=key, **kind)
    expected = [float(n) for n in slow_release(sums, key, **kind)]
    assert (found / 2.0 ** noise_exponent(stddev, exponent)).tolist() == expected


@pytest.mark.parametrize("stddev", [1e-9, 0.3, 1.0, 7.7, 1e12])
def test_grid_is_finer_than_noise_and_no_finer_than_sum(stddev):
    grid = 2.0 ** noise_exponent(stddev, EXPONENT)
    assert grid == 2.0**EXPONENT or 2.0**-21 < grid / stddev <= 2.0**-20
    assert grid >= 2.0**EXPONENT


def test_extreme_tails_are_decided_digit_by_digit(monkeypatch):
    """First digits all zero or all one: float64 knows nothing of X beyond 9, the later digits do."""
    monkeypatch.setattr(SecretKey, "stream", _Extreme.stream)
    found = noised(torch.zeros(4, dtype=torch.int64), exponent=EXPONENT, stddev=1.0, noise=step_noise(), name="w")
    low, high = float(stats.norm.isf(2.0**-64)), float(stats.norm.isf(2.0**-70))
    assert (found[:2] < -low).all()
    assert (found[2:] > low).all()
    assert torch.equal(found[:2], -found[2:])
    assert -float(found[0]) == pytest.approx(float(stats.norm.isf(2.0**-66)), abs=2.0**-19)
    assert -float(found[0]) < high


class _Extreme:
    """Digits of coordinates 0, 1: 64 zeros, then 01000…; of 2, 3: their complements."""

    def __init__(self, context: tuple[object, ...]) -> None:
        self._context = context

    @staticmethod
    def stream(key: SecretKey, purpose: str, *context: object) -> _Extreme:
        return _Extreme((purpose, *context))

    def seek(self, word: int) -> _Extreme:
        assert word == 0
        return self

    def uint64(self, count: int) -> np.ndarray:
        ones = 2**64 - 1
        if self._context[0] == "noise":
            return np.array([0, 0, ones, ones], dtype=np.uint64)[:count]
        is_low = self._context[2] in (0, 1)
        return np.array(
            [2**62, *[0] * (count - 1)] if is_low else [ones - 2**62, *[ones] * (count - 1)], dtype=np.uint64
        )


# The law.


def test_released_numbers_follow_the_rounded_gaussian():
    """A coarse grid, so that single points have weight: chi-square against the Gaussian's mass on each cell."""
    exponent, stddev, num = 0, 1.5, 200_000
    sums = torch.full((num,), 3)
    found = noised(sums, exponent=exponent, stddev=stddev, noise=step_noise(7), name="w")
    assert noise_exponent(stddev, exponent) == 0
    edges = np.concatenate([[-np.inf], np.arange(-2, 8) + 0.5, [np.inf]])
    expected = np.diff(stats.norm.cdf(edges, loc=3, scale=stddev)) * num
    counts = np.histogram(found.numpy(), bins=np.concatenate([[-1e9], edges[1:-1], [1e9]]))[0]
    assert stats.chisquare(counts, expected).pvalue > 1e-6


def test_noise_is_normal_to_the_tails():
    found = draw(torch.zeros(1 << 20, dtype=torch.int64)).numpy() / STDDEV
    assert stats.kstest(found[:200_000], "norm").pvalue > 1e-4
    for reach in (2.0, 3.0, 4.0):
        for count in ((found > reach).sum(), (found < -reach).sum()):
            low, high = stats.binom.interval(1 - 1e-6, len(found), stats.norm.sf(reach))
            assert low <= count <= high


def test_one_point_of_the_sum_is_hidden_in_low_digits():
    """What Mironov's attack reads: which last digits can occur. Both neighbours give the same set, the grid."""
    grid = 2.0 ** noise_exponent(STDDEV, EXPONENT)
    for value in (0, 1, 2**40 + 1, -(2**50) + 3):
        found = draw(torch.full((1000,), value)) / grid
        assert torch.equal(found, found.round())


@pytest.mark.parametrize(
    "beside",
    [
        lambda total, x: total.double() * 2.0**EXPONENT + STDDEV * x,  # float64 sum, not rounded
        lambda total, x: (total.double() * 2.0**EXPONENT).float().double() + (STDDEV * x).float().double(),
    ],
)
def test_adding_in_floating_point_is_off_the_grid(beside):
    """The mutants that the test above must tell from the door: noise added in float64, and in fp32."""
    total = torch.full((1000,), 2**40 + 1)
    x = normal.quantiles(signed(SecretKey.insecure(0, "x").stream("noise").uint64(1000)))
    found = beside(total, x) / 2.0 ** noise_exponent(STDDEV, EXPONENT)
    assert not torch.equal(found, found.round())


# Once, keyed, in parts.


def _noise_only_steps(secret: bytes) -> tuple[list[torch.Tensor], list[torch.Tensor], bool]:
    """Every step's reduced and noised sum, and the parameters at the end, through the job's backend."""
    backend, layout = DdpBackend(torch.device("cpu")), make_layout()
    optimizer = torch.optim.AdamW(list(layout.parameters.values()), lr=0.1)
    steps = []
    for step in range(NUM_STEPS):
        total = torch.zeros(layout.num_coordinates, dtype=torch.int64)
        key = StepNoise(SecretKey(SecretKey(secret).derive("step", step)))
        vector = backend.add_noise(backend.reduce_total(total), layout, key, exponent=EXPONENT, stddev=STDDEV)
        steps.append(vector.clone())
        backend.apply(vector, layout, optimizer, divide_by=8.0)
    parameters = [p.detach() for p in layout.parameters.values()]
    return steps, parameters, backend.in_sync(parameters)


@pytest.mark.dist
def test_noise_has_planned_spread_on_identical_ranks():
    first, second = run_on_ranks(2, _noise_only_steps, SecretKey.insecure(3, "noise").reveal())
    assert first[2]
    assert second[2]
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True))
    layout = make_layout()
    for slot in layout.slots:
        draws = torch.stack([layout.view(step, slot) for step in first[0]]).double()
        std = float(draws.square().mean().sqrt())
        standard_error = STDDEV / math.sqrt(2 * draws.numel())
        assert abs(std - STDDEV) < 3 * standard_error
    everything = torch.stack(first[0]).flatten().numpy() / STDDEV
    assert stats.kstest(everything, "norm").pvalue > 1e-3


def test_noise_is_a_pure_function_of_key_tensor_block():
    zeros = torch.zeros(2 * BLOCK, dtype=torch.int64)
    base = draw(zeros)
    assert torch.equal(base, draw(zeros))
    for other in (draw(zeros, step_noise(1)), draw(zeros, name="v"), base.roll(BLOCK)):
        assert float((base == other).double().mean()) < 1e-3


@hypothesis.settings(max_examples=15)
@hypothesis.given(start=st.integers(0, 2 * BLOCK), size=st.integers(0, BLOCK))
@hypothesis.example(start=5, size=0)  # a tensor of which a rank holds nothing
def test_a_shard_draws_its_own_part_of_the_same_noise(start, size):
    total = torch.arange(3 * BLOCK) * 12_345_677
    whole = draw(total, step_noise(1))
    assert torch.equal(draw(total[start : start + size], step_noise(1), first=start), whole[start : start + size])


def test_the_vector_is_the_tensors_released_one_by_one():
    layout, key = make_layout(), step_noise(2)
    total = torch.arange(layout.num_coordinates) << 30
    vector = noised_vector(total, layout, exponent=EXPONENT, stddev=STDDEV, noise=key)
    assert vector.dtype == torch.float32
    for slot in layout.slots:
        own = draw(total[slot.start : slot.start + slot.num_coordinates], key, name=slot.name)
        assert torch.equal(layout.view(vector, slot).flatten(), own.float())


def test_without_noise_the_integer_sum_comes_back():
    total = torch.tensor([3, -(2**41)])
    assert torch.equal(draw(total, stddev=0.0), total.double() * 2.0**EXPONENT)
    with pytest.raises(AssertionError):
        draw(total.float())
    for wrong in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="standard deviation"):
            draw(total, stddev=wrong)
