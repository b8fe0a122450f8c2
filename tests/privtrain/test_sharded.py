"""The clipper of sharded gradients: the bits of one process, equal work for all ranks, one part of the sum a rank."""

from __future__ import annotations

import contextlib
import io
import pathlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from privtrain.backends import shards
from privtrain.backends.group import reduce_scatter_flat
from privtrain.clipping import PerUnitClipper, ShardedClipper, batched, factors
from privtrain.data.microbatch import Packer
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.models.losses import row_losses
from privtrain.privacy.layout import Layout
from tests.privtrain.cells import CPU, Cell, make_backend, make_trainer
from tests.privtrain.models_for_tests import clipped_sum, invented_users, relative_error
from tests.privtrain.test_cancelling import CLIPPING_NORM, ManyTokens, cancelling_losses, cancelling_unit
from tests.privtrain.test_cooperative import LoneShards
from tests.privtrain.test_parity import build
from tests.ranks import run_on_ranks

ROUTES = ("batched", "two_pass")


class OnePassShards(LoneShards):
    """A framework that gathers weights once a forward pass and once for its backward pass, as DeepSpeed does."""

    repeats_backward = False


def never(flag: bool) -> bool:
    return flag


def sharded(model, layout, losses=None, *, route="batched", style="flat", kind=LoneShards) -> ShardedClipper:
    losses = losses or (lambda ids, mask: row_losses(model, ids, mask))
    return ShardedClipper(model, kind(layout), CLIPPING_NORM, losses, CPU, style, route, any_rank=never)


def whole(model, layout, losses=None, *, route="batched", style="flat") -> PerUnitClipper:
    losses = losses or (lambda ids, mask: row_losses(model, ids, mask))
    return PerUnitClipper(model, layout, CLIPPING_NORM, losses, CPU, style, route)


@pytest.mark.parametrize("kind", [LoneShards, OnePassShards])
@pytest.mark.parametrize("style", ["flat", "per_layer", "automatic"])
@pytest.mark.parametrize("route", ROUTES)
def test_sharded_sum_has_the_bits_of_one_process(route, style, kind):
    users = invented_users(5, most_records=3, seed=2)
    model, layout = build("llama", "full")
    expected = clipped_sum(whole(model, layout, route=route, style=style), users, 4)
    assert torch.equal(clipped_sum(sharded(model, layout, route=route, style=style, kind=kind), users, 4), expected)


@pytest.mark.parametrize("route", ROUTES)
@hypothesis.settings(max_examples=4, deadline=None)
@hypothesis.given(seed=st.integers(0, 10_000), rest=st.sampled_from([1e-2, 1e-4, 1e-6]), num_pairs=st.integers(1, 3))
def test_sharded_units_that_cancel_have_the_bits_of_one_process(route, seed, rest, num_pairs):
    """They are measured multiplied out, tensor by tensor."""
    model, layout = build("llama", "full")
    losses, users = cancelling_losses(model, rest), [cancelling_unit(seed, num_pairs), *invented_users(2, 2, seed=1)]
    expected = clipped_sum(whole(model, layout, losses, route=route), users, 8)
    assert torch.equal(clipped_sum(sharded(model, layout, losses, route=route), users, 8), expected)


def sharded_norm(model: ManyTokens, route: str) -> float:
    clipper = sharded(model, Layout.of(model), model.losses, route=route)
    return float(clipped_sum(clipper, [[np.arange(4)]], 1).double().norm()) / CLIPPING_NORM


@pytest.mark.parametrize("route", ROUTES)
def test_a_sharded_product_longer_than_its_norm_is_taken_back(route, monkeypatch):
    """A kernel's bias of any size, and the mutant that does not look at it."""
    original = factors.Product.block
    monkeypatch.setattr(factors.Product, "block", lambda *arguments: original(*arguments).mul_(1 + 1e-3))
    assert sharded_norm(ManyTokens(3), route) <= 1 + 1e-5
    monkeypatch.setattr(PerUnitClipper, "_longer", lambda *_: [])
    assert sharded_norm(ManyTokens(3), route) > 1 + 5e-4


def test_mutant_sharded_units_that_cancel_are_not_measured(monkeypatch):
    monkeypatch.setattr(ShardedClipper, "_remeasured", lambda self, passes, calls, squares, units: squares)
    monkeypatch.setattr(PerUnitClipper, "_longer", lambda *_: [])
    model, layout = build("llama", "full")
    monkeypatch.setattr(batched, "_is_cheap", lambda *_: False)
    norms = []
    for seed in range(4):
        clipper = sharded(model, layout, cancelling_losses(model, 1e-6))
        norms.append(float(clipped_sum(clipper, [cancelling_unit(seed, 2)], 8).double().norm()) / CLIPPING_NORM)
    assert max(norms) > 1 + 1e-4


@pytest.mark.parametrize("route", ROUTES)
def test_a_sharded_unit_that_is_not_finite_counts_as_zero(route):
    users = invented_users(4, most_records=2, seed=3)
    users[1] = [np.full(5, 7), *users[1][:1]]
    model, layout = build("llama", "full")

    def losses(ids, mask):
        return row_losses(model, ids, mask) * torch.where((ids[:, 0] == 7) & (ids[:, 1] == 7), torch.nan, 1.0)

    clipper = sharded(model, layout, losses, route=route)
    found = clipped_sum(clipper, users, 4)
    assert torch.equal(found, clipped_sum(whole(model, layout, route=route), [users[0], *users[2:]], 4))
    assert clipper.diagnostics.num_nonfinite == 1


def test_units_larger_than_a_microbatch_are_joint():
    """And must be: a rank alone would hold the gradient of all weights."""
    users = [*invented_users(3, most_records=2, seed=4), [np.arange(3 + i, 12 + i) for i in range(5)]]
    model, layout = build("llama", "full")
    expected = clipped_sum(whole(model, layout), users, 2)
    clipper = sharded(model, layout)
    packer = Packer(2, max_length=16, pad_id=0)
    clipper.reset()
    flags = []
    for batch in packer.pack_share([users[:3]], 0, users[3:]):
        clipper.accumulate(batch)
        flags.append((batch.is_joint, batch.owners))
    assert flags[-3:] == [(True, (3,))] * 3
    assert not any(is_joint for is_joint, _ in flags[:-3])
    total = clipper.finish().double() * 2.0**clipper.grid_exponent
    assert relative_error(total, expected.double()) < 1e-6
    assert clipper.diagnostics.num_units == 4
    with pytest.raises(GuaranteeLost, match="spans microbatches"):
        clipped_sum(clipper, users, 2)


def test_a_layer_without_a_rule_makes_all_ranks_work_together(monkeypatch):
    from privtrain.clipping import rules

    monkeypatch.delitem(rules._RULES, torch.nn.Linear)
    model, layout = build("llama", "full")
    for route in ("auto", "two_pass"):
        clipper = sharded(model, layout, route=route)
        assert clipper.route == "one_unit"
        assert "Linear" in clipper.fallback_reason
    assert clipper.joint_route == "two_pass"
    with pytest.raises(UnsupportedLayer, match="no exact per-unit clipping rule"):
        sharded(model, layout, route="batched")


def test_layer_that_fails_under_hooks_unites_the_ranks(monkeypatch):
    """If all have the same rows, as in the self-test; later it stops the job."""
    from privtrain.clipping import rules

    monkeypatch.setitem(rules._RULES, torch.nn.Linear, lambda *_: {})
    model, layout = build("llama", "full")
    users = invented_users(3, most_records=2)
    clipper = sharded(model, layout, route="auto")
    expected = clipped_sum(sharded(model, layout, route="one_unit"), users, 2)
    assert torch.equal(clipped_sum(clipper, users, 2), expected)
    assert clipper.route == "one_unit"
    settled = sharded(model, layout, route="auto")
    settled.settle("batched")
    with pytest.raises(UnsupportedLayer, match="one_unit"):
        clipped_sum(settled, users, 2)
    monkeypatch.setattr(ShardedClipper, "_is_everywhere", lambda *_: False)
    with pytest.raises(UnsupportedLayer, match="one_unit"):
        clipped_sum(sharded(model, layout, route="auto"), users, 2)


def test_two_passes_keep_no_gradient_between_layers(monkeypatch):
    """But what layers share."""
    kept = []
    original = batched.UnitGradients.add_now

    def watched(self, name, *arguments):
        kept.append({*self._dense, *self._outers, *self._lookups})
        original(self, name, *arguments)

    monkeypatch.setattr(batched.UnitGradients, "add_now", watched)
    model, layout = build("llama", "full")
    clipped_sum(sharded(model, layout, route="two_pass"), invented_users(3, most_records=1), 4)
    tied = {"model.embed_tokens.weight"} if model.config.tie_word_embeddings else set()
    assert len(kept) >= len(layout.slots) - 1
    assert all(names <= tied for names in kept)


def test_a_user_of_several_rows_is_multiplied_out_once(monkeypatch):
    """Its product is kept in place of the factors, and adds the bits that factors do."""
    layout = Layout({"weight": torch.nn.Parameter(torch.zeros(64, 64))})
    generator = torch.Generator().manual_seed(0)
    outer = factors.Outer(*(torch.randn(8, 16, 64, generator=generator) for _ in range(2)))
    weights, made = torch.tensor([[3e4, 5e4]]), []
    product = batched.Product
    monkeypatch.setattr(batched, "Product", lambda *arguments: made.append(arguments) or product(*arguments))
    kept, again = (batched.UnitGradients(layout, [4, 4], CPU) for _ in range(2))
    kept.add("weight", outer)
    kept.complete("weight")
    total, expected = layout.zeros(CPU, torch.int64), torch.zeros(64, 64, dtype=torch.int64)
    kept.add_weighted(total, weights)
    assert len(made) == 2
    assert not kept._outers
    again.add_now("weight", expected, outer, weights[0])
    assert torch.equal(total.view(64, 64), expected)
    squares, _ = kept.squares()
    assert squares[0].tolist() == pytest.approx([float(kept.unit(i)["weight"].double().norm()) ** 2 for i in range(2)])


# With other ranks.


def part_of_a_sum(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    backend = make_backend("ddp")
    rank, size = backend.rank, backend.world_size
    vectors = torch.arange(5 * size * size).view(size, -1) << 40
    mine = torch.empty(5, dtype=dtype)
    reduce_scatter_flat(mine, vectors[rank].to(dtype, copy=True))
    return mine, vectors.sum(dim=0)[5 * rank : 5 * rank + 5].to(dtype)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_each_rank_gets_its_part_of_a_sum(dtype):
    assert all(torch.equal(mine, expected) for mine, expected in run_on_ranks(3, part_of_a_sum, dtype))


def one_step(names, directory: pathlib.Path, cell: Cell):
    """Of each backend: rows a rank ran, the order and largest size of its contributions, and its parts of a sum."""
    found = []
    for name in names:
        with contextlib.redirect_stdout(io.StringIO()):
            trainer = make_trainer(make_backend(name), directory, cell)
        num_rows = [0]
        original = trainer.clipper._row_losses

        def counted(ids, mask, original=original, num_rows=num_rows):
            num_rows[0] += len(ids)
            return original(ids, mask)

        trainer.clipper._row_losses = counted
        trainer.clipper._saw_every_use = trainer.clipper._is_rehearsed = True
        trainer.clipper.reset()
        trainer._accumulate(trainer.sampler.draw(0))
        total = trainer.backend.reduce_total(trainer.clipper.finish())
        parts = {s.name: (s.first, trainer.layout.view(total, s).flatten().tolist()) for s in trainer.layout.slots}
        found.append((num_rows[0], len(total), parts))
    return found


def put_together(by_rank) -> list[dict[str, list[int]]]:
    result = []
    for backends in zip(*by_rank, strict=True):
        tensors: dict[str, dict[int, int]] = {}
        for _, _, parts in backends:
            for name, (first, values) in parts.items():
                tensors.setdefault(name, {}).update(enumerate(values, start=first))
        result.append({name: [values[i] for i in range(len(values))] for name, values in tensors.items()})
    return result


SAME_BITS = ["ddp", "zero2", "fsdp2"]


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.campaign)])
@pytest.mark.parametrize(
    "cell",
    [
        Cell("full"),
        Cell("full", route="two_pass", style="per_layer", reduce_once=True),
        Cell("full", gradient_checkpointing=True, sampling_prob=0.15),
    ],
    ids=["batched", "two_pass", "few_users"],
)
def test_sums_have_the_same_bits_on_every_backend(tiny_llama, cell, world_size):
    """DeepSpeed's stage 3 adds up a residual's gradients in an order of its own, on any number of ranks."""
    (expected,) = put_together([one_step(["local"], tiny_llama, cell)])
    by_rank = run_on_ranks(world_size, one_step, [*SAME_BITS, "zero3"], tiny_llama, cell)
    *same, of_zero3 = put_together(by_rank)
    for name, found in zip(SAME_BITS, same, strict=True):
        assert found == expected, name
    assert [of_zero3] == put_together(run_on_ranks(1, one_step, ["zero3"], tiny_llama, cell))
    for name in expected:
        error = np.subtract(of_zero3[name], expected[name])
        assert np.linalg.norm(error) <= 2e-6 * np.linalg.norm(expected[name])


def rows_of_a_step(directory: pathlib.Path, name: str, records: int) -> tuple[int, int, int, int]:
    """Rows, passes, coordinates of the part, and reduce-scatters of a step whose model fits into a bucket, or waits."""
    reduce, reduced = shards.reduce_scatter_flat, []
    shards.reduce_scatter_flat = lambda mine, *others: (reduced.append(len(mine)), reduce(mine, *others))
    with contextlib.redirect_stdout(io.StringIO()):
        backend = make_backend(name)
        trainer = make_trainer(backend, directory, Cell("full", microbatch_size=4))
    users = [[np.arange(3 + user + i, 15 + user + i) for i in range(records)] for user in range(8)]
    counts = {"rows": 0, "passes": 0}
    original = trainer.clipper._row_losses

    def counted(ids, mask):
        counts["rows"] += len(ids)
        counts["passes"] += 1
        return original(ids, mask)

    trainer.clipper._row_losses = counted
    trainer.clipper._saw_every_use = trainer.clipper._is_rehearsed = True
    trainer.clipper.reset()
    placement = trainer.placement
    by_share = [users[share :: placement.num_shares] for share in range(placement.num_shares)]
    for batch in trainer.packer.pack_share(by_share, placement.share):
        trainer.clipper.accumulate(batch)
    part = len(trainer.clipper.finish())
    return counts["rows"], counts["passes"], part, len(reduced)


@pytest.mark.dist
@pytest.mark.parametrize("records", [1, 4])
@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_a_rank_runs_its_share_of_the_rows_and_holds_its_part(tiny_llama, name, records):
    num_ranks, num_rows = 2, 8 * records
    found = run_on_ranks(num_ranks, rows_of_a_step, tiny_llama, name, records)
    assert [(rows, passes, sent) for rows, passes, _, sent in found] == [
        (num_rows // num_ranks, records, 1)
    ] * num_ranks
    parts = [part for _, _, part, _ in found]
    assert max(parts) <= 1.1 * sum(parts) / num_ranks


def contribute(order: list[list[str]], sizes: dict[str, int]):
    """Each rank adds its number, and one, to tensors in an order of its own."""
    backend = make_backend("ddp")
    rank, size = backend.rank, backend.world_size
    mine = {name: shards.equal_part(count, rank, size) for name, count in sizes.items()}
    layout = Layout(
        {name: torch.nn.Parameter(torch.zeros(count)) for name, (_, count) in mine.items()},
        {name: (first, (sizes[name],)) for name, (first, _) in mine.items()},
    )
    total = layout.zeros(CPU, torch.int64)
    summed = shards.ScatteredSum(total, layout, lambda s: -(-sizes[s.name] // size), size, None)
    for name in order[rank]:
        with summed.contribution(name) as out:
            out += torch.arange(len(out)) * (rank + 1)
    summed.flush()
    try:
        summed.check_order()
    except GuaranteeLost:
        return "different"
    return {s.name: (s.first, layout.view(total, s).tolist()) for s in layout.slots}


@pytest.mark.dist
@pytest.mark.parametrize("bucket", [1, 7, 1 << 22])
def test_contributions_add_up_in_parts_of_any_bucket(bucket, monkeypatch):
    monkeypatch.setattr(shards, "BUCKET", bucket)
    sizes = {"a": 7, "b": 1, "c": 4}
    first, second = run_on_ranks(2, contribute, [["c", "a", "b", "a"]] * 2, sizes)
    for name, times in (("a", 2), ("b", 1), ("c", 1)):
        assert first[name][1] + second[name][1] == [3 * times * i for i in range(sizes[name])]


def contributed(sizes, order, bucket: int, once: bool, kind=shards.ScatteredSum) -> tuple[list[int], list[int]]:
    """What a group of one rank has after it added 1, 2, … to tensors in this order; and what it should have."""
    layout = Layout({f"t{i}": torch.nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)})
    total, expected = layout.zeros(CPU, torch.int64), layout.zeros(CPU, torch.int64)
    sent: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BUCKET", bucket)
        patch.setattr(shards, "reduce_scatter_flat", lambda mine, vector, _group: sent.append(mine.copy_(vector)))
        summed = kind(total, layout, lambda slot: slot.num_coordinates, 1, None, once=once)
        for number, chosen in enumerate(order, start=1):
            slot = layout.slots[chosen % len(sizes)]
            with summed.contribution(slot.name) as out:
                waiting = sum(map(len, summed._pending.values()))
                assert once or waiting <= max(bucket, slot.num_coordinates)
                out += number
            layout.view(expected, slot).add_(number)
        assert not (once and sent), "before the end of the step"
        summed.flush()
    assert max(map(len, sent), default=0) <= max(bucket, *sizes)
    return total.tolist(), expected.tolist()


@hypothesis.settings(max_examples=50, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    bucket=st.integers(1, 24),
    order=st.lists(st.integers(0, 4), max_size=12),
    once=st.booleans(),
)
def test_contributions_wait_in_one_bucket_and_none_is_lost(sizes, bucket, order, once):
    """A tensor that waits is added to; no more waits than a bucket or the tensor in hand, unless all may wait."""
    found, expected = contributed(sizes, order, bucket, once)
    assert found == expected


class Forgetful(shards.ScatteredSum):
    """The mutant: a tensor that waits begins at zero again."""

    def contribution(self, name):
        self._pending.pop(self._index_of[name], None)
        return super().contribution(name)


def test_mutant_that_forgets_what_waits_is_seen():
    assert contributed([3, 2], [0, 0], 24, once=False, kind=Forgetful) == ([2, 2, 2, 0, 0], [3, 3, 3, 0, 0])


def test_what_waits_of_a_step_that_was_broken_off_is_forgotten():
    layout = Layout({"t": torch.nn.Parameter(torch.zeros(2))})
    total = layout.zeros(CPU, torch.int64)
    summed = shards.ScatteredSum(total, layout, lambda slot: slot.num_coordinates, 1, None, once=True)
    with summed.contribution("t") as out:
        out += 1
    summed.reset()
    summed.flush()
    assert not total.any()


@pytest.mark.dist
def test_ranks_that_contribute_in_different_orders_stop_the_job():
    assert run_on_ranks(2, contribute, [["a", "b"], ["b", "a"]], {"a": 4, "b": 4}) == ["different"] * 2
