"""The sum over units is exact: no order, microbatch, mate or rank changes a bit of it, and one unit moves it by C."""

from __future__ import annotations

import functools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from privtrain.backends import DdpBackend
from privtrain.clipping import PerUnitClipper, batched, exact_sum
from privtrain.config.privacy import MAX_UNITS
from privtrain.data.microbatch import Packer
from privtrain.privacy import fixed_point
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import make_clipper
from tests.privtrain.test_parity import build, losses_of
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


class Table(torch.nn.Module):
    """Unit i's gradient is row i of a table."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(table.shape[1]))
        self.table = table

    def losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        unit = ids[:, 0] + 256 * ids[:, 1] + 65536 * ids[:, 2]
        return self.table[unit.clamp(max=len(self.table) - 1)] @ self.weight * mask.sum(1)


def clipper_of(table: torch.Tensor, clipping_norm: float = 1.0) -> PerUnitClipper:
    model = Table(table)
    return PerUnitClipper(model, Layout.of(model), clipping_norm, model.losses, CPU, route="one_unit")


def driven(table: torch.Tensor, order, microbatch_size: int) -> torch.Tensor:
    """The integers of a step whose units come in this order."""
    clipper = clipper_of(table)
    units = [[np.array([i % 256, i // 256 % 256, i // 65536, 1])] for i in order]
    packer = Packer(microbatch_size, 4, 0)
    for batch in packer.pack(units, packer.num_batches(units)):
        clipper.accumulate(batch)
    return clipper.finish()


def chosen_values(num_units: int) -> torch.Tensor:
    """What an fp32 sum rounds worst: one large run, one half, many just below half a unit in the last place."""
    k = 2 ** int(math.log2(num_units * 0.75))
    values = [1.0] * k + [0.5, -1.0] + [-0.75 * k * 2.0**-24] * (num_units - k)
    return torch.tensor(values)[:, None]


def moved_by_the_victim(num_units: int) -> float:
    table = chosen_values(num_units)
    victim = 2 ** int(math.log2(num_units * 0.75)) + 1
    others = [i for i in range(len(table)) if i != victim]
    change = driven(table, range(len(table)), 64) - driven(table, others, 64)
    return abs(float(change)) * 2.0 ** fixed_point.grid_exponent(1.0)


def test_one_unit_moves_a_sum_of_chosen_values_by_c():
    """Through a clipper; an fp32 sum of so few already rounds by hundreds of the tolerance."""
    assert moved_by_the_victim(600) <= 1 + 1e-5


@pytest.mark.campaign
def test_one_unit_moves_a_sum_of_1e5_chosen_values_by_c():
    assert moved_by_the_victim(100_000) <= 1 + 1e-5


ADVERSARIAL = strategies.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0**-24, -(2.0**-40), 1e-30, 1e30, -3e38, math.pi])


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    rows=strategies.lists(strategies.lists(ADVERSARIAL, min_size=3, max_size=3), min_size=1, max_size=12),
    seed=strategies.integers(0, 2**20),
    microbatch_size=strategies.integers(1, 9),
    num_ranks=strategies.integers(1, 4),
)
def test_sum_does_not_depend_on_order_packing_or_ranks(rows, seed, microbatch_size, num_ranks):
    table = torch.tensor(rows)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    parts = [driven(table, order[rank::num_ranks], microbatch_size) for rank in range(num_ranks)]
    assert torch.equal(sum(parts), driven(table, range(len(rows)), 4))


# The accumulator alone, at the number of units of a large step.


def added(gradients: torch.Tensor, order: np.ndarray, size: int, num_ranks: int = 1) -> torch.Tensor:
    """The sum of clipped rows, in an order, in batches of one size, dealt to ranks and reduced."""
    norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
    weights = exact_sum.on_grid(1 / norms.clamp(min=1.0), fixed_point.grid_exponent(1.0))
    total = torch.zeros(gradients.shape[1], dtype=torch.int64)
    for rank in range(num_ranks):
        part = torch.zeros_like(total)
        for batch in torch.from_numpy(order[rank::num_ranks].copy()).split(size):
            exact_sum.add_units(part, gradients[batch], weights[batch])
        total += part
    return total


def invented_rows(kind: str, num_units: int, rng: np.random.Generator) -> torch.Tensor:
    """[num_units, 3] fp32 gradients, ordinary or hostile."""
    normal = rng.standard_normal((num_units, 3))
    rows = {
        "ordinary": normal,
        "all sizes": normal * 10.0 ** rng.uniform(-44, 37, (num_units, 1)),
        "chosen": np.resize(chosen_values(num_units).numpy(), (num_units, 3)),
        "cancelling": np.where(np.arange(num_units)[:, None] % 2, 1, -1) * np.repeat(normal, 2, axis=0)[:num_units],
        "at the bound": np.sign(normal) / np.sqrt(3),
        "half a grid step": np.sign(normal) * 2.0 ** (fixed_point.grid_exponent(1.0) - 1),
        "denormal": normal * 1e-44,
    }[kind]
    return torch.from_numpy(rows.astype(np.float32))


KINDS = ["ordinary", "all sizes", "chosen", "cancelling", "at the bound", "half a grid step", "denormal"]


def check_one_value(kind, num_units, seed, size, num_ranks):
    rng = np.random.default_rng(seed)
    rows = invented_rows(kind, num_units, rng)
    expected = added(rows, np.arange(num_units), num_units)
    size = max(size, num_units // 1000)  # a thousand batches are enough, and what takes the time
    assert torch.equal(added(rows, rng.permutation(num_units), size, num_ranks), expected)
    assert torch.equal(added(rows, np.arange(num_units)[::-1], size, num_ranks), expected)


SETS = {
    "kind": strategies.sampled_from(KINDS),
    "num_units": strategies.integers(1, 100_000) | strategies.just(100_000),
    "seed": strategies.integers(0, 2**32 - 1),
    "size": strategies.integers(3, 5000),
    "num_ranks": strategies.integers(1, 16),
}


@hypothesis.settings(max_examples=15)
@hypothesis.given(**SETS)
def test_sum_of_up_to_1e5_contributions_has_one_value(kind, num_units, seed, size, num_ranks):
    check_one_value(kind, num_units, seed, size, num_ranks)


@pytest.mark.campaign
@hypothesis.settings(max_examples=300)
@hypothesis.given(**SETS)
def test_sum_of_any_contributions_has_one_value_campaign(kind, num_units, seed, size, num_ranks):
    check_one_value(kind, num_units, seed, size, num_ranks)


def moved_in_blocks(num_units: int) -> float:
    """As :func:`moved_by_the_victim`, without a model."""
    table = chosen_values(num_units)
    victim = 2 ** int(math.log2(num_units * 0.75)) + 1
    order = np.arange(len(table))
    change = added(table, order, 64) - added(table, order[order != victim], 64)
    return abs(float(change)) * 2.0 ** fixed_point.grid_exponent(1.0)


def test_one_unit_moves_1e5_chosen_values_by_c():
    assert moved_in_blocks(100_000) <= 1 + 1e-5


def test_mutant_accumulation_in_fp32_at_1e5(monkeypatch):
    """An fp32 sum of as many moves by a hundred clipping norms, and depends on order and ranks."""

    def in_fp32(total, gradients, weights):
        terms = (gradients * weights[:, None]).numpy()
        sums = np.add.accumulate(np.concatenate([total.float().numpy()[None], terms]))
        total.copy_(torch.from_numpy(sums[-1]).to(torch.int64))

    monkeypatch.setattr(exact_sum, "add_units", in_fp32)
    assert moved_in_blocks(100_000) > 100
    with pytest.raises(AssertionError):
        check_one_value("ordinary", 100_000, 0, 64, 2)


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-3, 1.0, 3e3, 1e19, 1e38])
@pytest.mark.parametrize("clipping_norm", [1e-12, 1e-3, 1.0, 1.5, 1e12])
def test_a_contribution_is_no_longer_than_c(size, clipping_norm):
    """At both ends of fp32's range, and where the factor alone would be below its normal numbers."""
    generator = torch.Generator().manual_seed(int(-math.log10(size)) + 50)
    table = (torch.randn(1, 50, generator=generator) * size).clamp(-3.4e38, 3.4e38)
    clipper = clipper_of(table, clipping_norm)
    (batch,) = Packer(1, 4, 0).pack([[np.array([0, 0, 0, 1])]], 1)
    clipper.accumulate(batch)
    contribution = clipper.finish().double() * 2.0**clipper.grid_exponent
    expected = table.double()[0] * min(1.0, clipping_norm / float(table.double().norm()))
    assert float(contribution.norm()) <= clipping_norm * (1 + 1e-5)
    assert bool((contribution.abs() <= expected.abs() * (1 + 2e-7)).all())
    assert float((contribution - expected).abs().max()) <= 2.0**-40 * clipping_norm + 2e-7 * float(expected.norm())


def test_the_most_units_of_a_step_do_not_overflow():
    """All of them at the bound in one coordinate."""
    for clipping_norm in (1.0, math.nextafter(2.0, 0), 1e-12, 1e12):
        weight = exact_sum.on_grid(torch.tensor([1.0], dtype=torch.float64), fixed_point.grid_exponent(clipping_norm))
        one = torch.zeros(1, dtype=torch.int64)
        exact_sum.add_units(one, torch.tensor([[clipping_norm]]), weight)
        assert 2**40 * (1 - 1e-6) <= int(one) <= 2**41 * (1 + 1e-5)
        assert int(one) * 2 * MAX_UNITS < 2**63 * (1 + 1e-5)


def test_a_unit_of_weight_zero_adds_nothing_whatever_it_is():
    total = torch.zeros(3, dtype=torch.int64)
    exact_sum.add_units(total, torch.tensor([[math.nan] * 3, [math.inf] * 3, [1.0] * 3]), torch.tensor([0.0, 0.0, 8.0]))
    assert total.tolist() == [8, 8, 8]


def test_more_measured_units_than_float64_adds_exactly():
    num_units = exact_sum._MOST_UNITS + 3
    gradients = torch.from_numpy(np.random.default_rng(1).standard_normal((num_units, 2, 2)).astype(np.float32))
    weights = torch.linspace(1, 2.0**39, num_units)
    total, measured = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64)
    exact_sum.add_units(total, gradients, weights)
    each = torch.zeros(num_units, 2, 2, dtype=torch.int64)
    for unit in range(num_units):
        exact_sum.add_unit(each[unit], gradients[unit], float(weights[unit]))
    squares = exact_sum.add_measured(measured, gradients, weights)
    assert torch.equal(measured, total)
    assert torch.equal(measured, each.sum(dim=0))
    torch.testing.assert_close(squares, each.double().square().sum(dim=(1, 2)), rtol=1e-12, atol=0)


# A unit's own numbers, whatever shares its microbatch.


@pytest.mark.parametrize("num_threads", [1, 2])
def test_measured_length_does_not_depend_on_mates(num_threads):
    """Its last bits decide whether a unit is taken back and clipped by another number."""
    gradients = torch.from_numpy(np.random.default_rng(2).standard_normal((9, 100_003)).astype(np.float32))
    weights = torch.linspace(2.0**30, 2.0**31, len(gradients))

    def measured(units) -> torch.Tensor:
        total = torch.zeros(gradients.shape[1], dtype=torch.int64)
        return exact_sum.add_measured(total, gradients[units].clone(), weights[units])

    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        alone = torch.cat([measured([unit]) for unit in range(len(gradients))])
        assert torch.equal(measured(list(range(9))), alone)
        assert torch.equal(measured([7, 0, 3, 8]), alone[[7, 0, 3, 8]])
    finally:
        torch.set_num_threads(before)


_USERS = [
    [np.random.default_rng([1, user, record]).integers(3, 250, size=4 * (user % 3) + 4) for record in range(count)]
    for user, count in enumerate((1, 3, 2, 1, 5, 1))
]


def step(clipper: PerUnitClipper, users, microbatch_size: int) -> torch.Tensor:
    """The integers of a step."""
    packer = Packer(microbatch_size, max_length=16, pad_id=0)
    clipper.reset()
    for batch in packer.pack(users, packer.num_batches(users)):
        clipper.accumulate(batch)
    return clipper.finish().clone()


def differs_among_mates(name: str, method: str, route: str, microbatch_size: int) -> bool:
    """Whether units that share microbatches, in two orders, add other integers than each of them alone."""
    model, layout = build(name, method)
    clipper = make_clipper(model, layout, 0.3, losses_of(name, model), route=route)
    alone = sum(step(clipper, [user], microbatch_size) for user in _USERS)
    return any(not torch.equal(step(clipper, users, microbatch_size), alone) for users in (_USERS, _USERS[::-1]))


_ROUTES = ("batched", "two_pass", "one_unit")
_MODELS = (("llama", "lora"), ("llama", "full"), ("gpt2", "full"))
_ON_TWO_THREADS = {("llama", "lora", "batched"), ("gpt2", "full", "two_pass")}  # here; the campaign has all


@pytest.mark.parametrize(
    ("name", "method", "route", "num_threads"),
    [
        pytest.param(*model, route, threads, marks=[pytest.mark.campaign] if is_long else [])
        for model in _MODELS
        for route in _ROUTES
        for threads in (1, 2)
        for is_long in [threads == 2 and (*model, route) not in _ON_TWO_THREADS]
    ],
)
def test_a_units_bits_do_not_depend_on_its_mates(name, method, route, num_threads):
    """Any change in one unit's norm or rounding would change the sum, which is exact."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        assert not differs_among_mates(name, method, route, microbatch_size=5)
    finally:
        torch.set_num_threads(before)


def test_mutant_a_path_that_mates_decide(monkeypatch):
    """A unit's rows in one product when all units have as many, row by row otherwise: the bits tell."""
    original = batched.UnitGradients._multiplied

    def joined(self, gradient):
        if len(set(self._counts)) > 1:
            return original(self, gradient)
        left, right = (
            value[: self.num_rows].reshape(self.num_units, -1, value.shape[2])
            for value in (gradient.left, gradient.right)
        )
        value = left.new_zeros(len(gradient.left), left.shape[2], right.shape[2])
        value[self._firsts] = torch.bmm(left.transpose(1, 2), right)
        return value

    monkeypatch.setattr(batched.UnitGradients, "_multiplied", joined)
    assert differs_among_mates("llama", "lora", "batched", microbatch_size=5)


# Over ranks.


def _integers(directory, num_ranks: int) -> list[np.ndarray]:
    del directory
    model, layout = build("llama", "lora")
    backend = DdpBackend(CPU)
    clipper = make_clipper(model, layout, 0.3, losses_of("llama", model))
    mine = _USERS[backend.rank :: num_ranks]
    found = []
    for size in (2, 5):
        packer = Packer(size, max_length=16, pad_id=0)
        clipper.reset()
        for batch in packer.pack(mine, packer.num_batches(mine)):
            clipper.accumulate(batch)
        found.append(backend.reduce_total(clipper.finish().clone()).numpy())
    return found


@functools.cache
def _expected() -> list[np.ndarray]:
    return run_on_ranks(1, _integers, None, 1)[0]


@pytest.mark.dist
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_reduced_sum_has_the_same_bits_on_any_number_of_ranks(num_ranks):
    for found in run_on_ranks(num_ranks, _integers, None, num_ranks):
        for sums, expected in zip(found, _expected(), strict=True):
            assert np.array_equal(sums, expected)
