"""Noise is bound to the sum: equal sums, equal noise, however they are cut; different sums, different noise."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from privtrain.backends import DdpBackend, LocalBackend
from privtrain.errors import GuaranteeLost
from privtrain.privacy import sum_digest
from privtrain.privacy.layout import Layout
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.sum_digest import BLOCK, bind, block_values
from tests.privtrain.cells import Cell, make_backend, make_trainer
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
KEY = SecretKey.insecure(0, "sum")
SHAPES = {"a": (3, BLOCK // 2 - 5), "b": (7,), "c": (BLOCK + 11,), "d": (1, 1)}
NUM_COORDINATES = 3 * (BLOCK // 2 - 5) + 7 + BLOCK + 11 + 1


def layout_of(parts: dict[str, tuple[int, int]] | None = None) -> Layout:
    """The whole, or a part of each tensor by (first, count)."""
    if parts is None:
        return Layout({name: torch.nn.Parameter(torch.empty(shape)) for name, shape in SHAPES.items()})
    tensors = {name: torch.nn.Parameter(torch.empty(count)) for name, (_, count) in parts.items()}
    return Layout(tensors, {name: (first, SHAPES[name]) for name, (first, _) in parts.items()})


def bound(total, *, step=3, public=(1.0, -41), metrics=(5,), key=KEY):
    return bind(key, step, total, layout_of(), public=public, metrics=metrics, sum_parts=lambda _: None)


def layout_of_one(size: int, first: int) -> Layout:
    return Layout({"w": torch.nn.Parameter(torch.empty(size, device="meta"))}, {"w": (first, (first + size,))})


def some_sum(seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**62), 2**62, (NUM_COORDINATES,), generator=torch.Generator().manual_seed(seed))


@hypothesis.settings(max_examples=20)
@hypothesis.given(data=st.data(), num_ranks=st.integers(1, 4))
def test_the_digest_is_independent_of_how_the_sum_is_cut(data, num_ranks):
    total, whole = some_sum(), layout_of()
    cuts = {}
    for slot in whole.slots:
        inner = data.draw(
            st.lists(st.integers(0, slot.num_coordinates), min_size=num_ranks - 1, max_size=num_ranks - 1)
        )
        cuts[slot.name] = [0, *sorted(inner), slot.num_coordinates]
    table = sum_digest._table(KEY, CPU)
    values = torch.zeros_like(block_values(total, whole, table))
    for rank in range(num_ranks):
        parts = {name: (edges[rank], edges[rank + 1] - edges[rank]) for name, edges in cuts.items()}
        mine = torch.cat([total[s.start + parts[s.name][0] :][: parts[s.name][1]] for s in whole.slots])
        values += block_values(mine, layout_of(parts), table)
    assert torch.equal(values, block_values(total, whole, table))


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    place=st.integers(0, NUM_COORDINATES - 1),
    change=st.sampled_from([1, -1, 2**31, 2**32, 2**40, 2**62]) | st.integers(1, 2**62),
)
def test_change_of_one_coordinate_changes_noise(place, change):
    """Powers of two too, which a product modulo 2**64 is weak against where halves are not taken apart."""
    total = some_sum()
    other = total.clone()
    other[place] += change
    assert bound(total.clone()).commitment == bound(total).commitment
    assert bound(other).commitment != bound(total).commitment
    assert bound(other).noise.key.reveal() != bound(total).noise.key.reveal()


def test_changes_that_a_plain_sum_would_hide_are_seen():
    total = some_sum()
    swapped, moved = total.clone(), total.clone()
    swapped[[0, 1]] = total[[1, 0]]
    moved[0], moved[BLOCK] = total[0] + 1, total[BLOCK] - 1
    halves = total.clone()
    halves[5] += 2**32 - 1
    assert len({bound(t).commitment for t in (total, swapped, moved, halves)}) == 4


@pytest.mark.parametrize(
    "other", [{"step": 4}, {"public": (1.0, -40)}, {"metrics": (6,)}, {"key": SecretKey.insecure(1, "sum")}]
)
def test_step_constants_metrics_and_key_are_bound_too(other):
    found, base = bound(some_sum(), **other), bound(some_sum())
    assert found.commitment != base.commitment
    assert found.noise.key.reveal() != base.noise.key.reveal()


def test_the_commitment_does_not_tell_the_key():
    found = bound(some_sum())
    assert found.noise.key.reveal().hex() != found.commitment
    assert "key" not in repr(found).replace("StepNoise(key=SecretKey(***))", "")


def test_lanes_agree_between_the_dot_and_the_product():
    """What a device without an integer dot computes is the same."""
    part, table = some_sum()[:2000].view(2, 1000), sum_digest._table(KEY, CPU)[:, :1000]
    by_product = sum_digest._lanes(part, table)
    assert torch.equal(torch.cat([sum_digest._lanes(row[None], table) for row in part]), by_product)
    low, high = part[:, None] & (2**32 - 1), part[:, None] >> 32
    assert torch.equal(by_product, (low * table[0::2] + high * table[1::2]).sum(2))


@pytest.mark.parametrize("first", [0, 5, BLOCK, BLOCK + 7])
def test_value_of_blocks_together_is_that_of_each_alone(first, monkeypatch):
    """As a device other than a CPU takes them."""
    total = torch.arange(4 * BLOCK + 100) * 987_654_321_012_345
    table, layout = sum_digest._table(KEY, CPU), layout_of_one(len(total), first)
    alone = block_values(total, layout, table)
    monkeypatch.setattr(sum_digest, "CHUNK_ON_CPU", 3 * BLOCK)
    assert torch.equal(block_values(total, layout, table), alone)


def _released(name: str, directory, cell: Cell) -> list[str]:
    """Commitment to the exact sum and released metrics of one step through the trainer."""
    trainer = make_trainer(make_backend(name), directory, cell)
    kept = []
    release = trainer.release

    def keep(*arguments, **named):
        kept.append(release(*arguments, **named))
        return kept[-1]

    trainer.release = keep
    trainer.train_step(0)
    return [kept[0].commitment, str(kept[0].auxiliary_sums)]


@pytest.mark.dist
@pytest.mark.parametrize(
    ("num_ranks", "name", "method", "unit"),
    [
        (2, "ddp", "lora", "user"),
        (2, "ddp", "full", "user"),
        (2, "zero1", "full", "example"),
        (4, "zero1", "full", "user"),
    ],
)
def test_any_number_of_ranks_has_equal_sum_and_noise(tiny_llama, num_ranks, name, method, unit):
    """Users have several records, so that where their rows lie differs with the hand they are dealt to."""
    cell = Cell(method, unit, noised_metrics=True)
    alone = _released("local", tiny_llama, cell)
    assert run_on_ranks(num_ranks, _released, name, tiny_llama, cell) == [alone] * num_ranks


def _with_another_sum_on_rank_one(directory):
    backend = DdpBackend(CPU)
    trainer = make_trainer(backend, directory, Cell())
    original = backend.reduce_total
    backend.reduce_total = lambda total: original(total) + backend.rank
    with pytest.raises(GuaranteeLost, match="different sums of step 0"):
        trainer.train_step(0)


@pytest.mark.dist
def test_ranks_that_hold_different_sums_release_nothing(tiny_llama):
    run_on_ranks(2, _with_another_sum_on_rank_one, tiny_llama)


def test_two_copies_with_different_sums_share_no_noise(tiny_llama):
    """As two copies of a run directory on machines whose kernels round differently: one grid step is enough."""
    vectors = []
    for nudge in (0, 0, 1):
        trainer = make_trainer(LocalBackend(CPU), tiny_llama, Cell())
        original = trainer.backend.reduce_total
        trainer.backend.reduce_total = lambda total, nudge=nudge, original=original: original(total).add_(nudge)
        vectors.append(trainer.release(trainer.clipper, KEY, 0).vector)
    assert torch.equal(vectors[0], vectors[1])
    assert float((vectors[0] == vectors[2]).double().mean()) < 1e-3
