"""The cooperative unit without other ranks: two passes hold no unit's gradient and notice what differs between them."""

from __future__ import annotations

import contextlib

import pytest
import torch

from privtrain.clipping import CooperativeClipper
from privtrain.errors import GuaranteeLost
from privtrain.models.losses import row_losses
from tests.privtrain.models_for_tests import (
    clipped_sum,
    invented_users,
    relative_error,
    tiny_lora,
)

CPU = torch.device("cpu")


class LoneShards:
    """A shard group of one rank, whose part is the whole."""

    rank, size = 0, 1
    repeats_backward = True

    def __init__(self, layout) -> None:
        self.layout = layout
        self.weights = layout.parameters

    def reshard(self) -> None:
        pass

    def scattered(self, total, *, once):
        return LoneSum(total, self.layout)

    @contextlib.contextmanager
    def collecting(self, sink):
        yield
        gradients = [p.grad for p in self.layout.parameters.values()]
        for parameter in self.layout.parameters.values():
            parameter.grad = None  # first of all: the model is shared with other tests, and a sink may raise
        for slot, gradient in zip(self.layout.slots, gradients, strict=True):
            if gradient is not None:
                sink(slot, gradient)

    def sum_over_group(self, vector) -> None:
        pass


class LoneSum:
    """What one rank contributes is the sum; ``names`` in their order."""

    def __init__(self, total, layout) -> None:
        self.total, self.layout = total, layout
        self.names: list[str] = []

    @contextlib.contextmanager
    def contribution(self, name):
        slot = next(slot for slot in self.layout.slots if slot.name == name)
        whole = torch.zeros(slot.whole_shape, dtype=torch.int64)
        yield whole
        self.names.append(name)
        self.layout.view(self.total, slot).add_(whole)

    def reset(self) -> None:
        pass

    def flush(self) -> None:
        pass

    def check_order(self) -> None:
        pass


class PiecewiseShards(LoneShards):
    """Hands a tensor over twice, as a framework that flushes a tied tensor early would."""

    @contextlib.contextmanager
    def collecting(self, sink):
        def halves(slot, part):
            sink(slot, part / 2)
            sink(slot, part / 2)

        with super().collecting(halves):
            yield


class PiecewiseAgainShards(PiecewiseShards):
    """The same in the second pass alone."""

    num_passes = 0

    def collecting(self, sink):
        self.num_passes += 1
        return super().collecting(sink) if self.num_passes > 1 else LoneShards.collecting(self, sink)


def losses_of(model):
    return lambda ids, mask: row_losses(model, ids, mask)


def test_two_passes_hold_no_gradient_of_a_unit_that_fits(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    clipper = CooperativeClipper(model, LoneShards(layout), 0.3, losses_of(model), CPU, "flat", "two_pass")
    held = []
    original = clipper._run
    clipper._run = lambda *args, **options: (held.append(clipper._gradient), original(*args, **options))
    clipped_sum(clipper, invented_users(4, most_records=1), 2)
    assert len(held) == 8
    assert all(value is None for value in held)
    held.clear()
    clipped_sum(clipper, [invented_users(1, most_records=1)[0] * 3], 2)
    assert len(held) == 3, "three rows of one unit do not fit a microbatch of two"
    assert all(value is not None for value in held)
    assert clipper._gradient is None, "and are let go afterwards"


def test_dropout_is_the_same_in_both_passes(tiny_llama):
    model, layout = tiny_lora(tiny_llama)

    def noisy(ids, mask):
        return row_losses(model, ids, mask) * torch.rand(())

    sums = []
    for route in ("auto", "two_pass"):
        torch.manual_seed(0)
        clipper = CooperativeClipper(model, LoneShards(layout), 1e-2, noisy, CPU, "flat", route)
        sums.append(clipped_sum(clipper, invented_users(3, most_records=1), 1))
    assert relative_error(sums[1], sums[0].double()) < 1e-6


def test_a_unit_that_is_longer_the_second_time_stops_the_job(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    calls = []

    def growing(ids, mask):
        calls.append(1)
        return row_losses(model, ids, mask) * (1 + 1e-3 * len(calls))

    clipper = CooperativeClipper(model, LoneShards(layout), 1e-2, growing, CPU, "flat", "two_pass")
    with pytest.raises(GuaranteeLost, match="clipping_route: auto"):
        clipped_sum(clipper, invented_users(1, most_records=1), 1)


@pytest.mark.parametrize("shards", [PiecewiseShards, PiecewiseAgainShards])
def test_a_tensor_that_arrives_in_pieces_has_no_norm_of_its_own(tiny_llama, shards):
    model, layout = tiny_lora(tiny_llama)
    clipper = CooperativeClipper(model, shards(layout), 1e-2, losses_of(model), CPU, "flat", "two_pass")
    with pytest.raises(GuaranteeLost, match="in pieces"):
        clipped_sum(clipper, invented_users(1, most_records=1), 1)
