"""A unit that is not finite is alone: beside it, everybody else's contribution is what it would be without it."""

from __future__ import annotations

import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from privtrain.backends import DdpBackend
from privtrain.clipping import PerUnitClipper, clipper
from privtrain.data.microbatch import Packer
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import clipped_sum, invented_users, make_clipper
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
ROUTES = ["batched", "two_pass", "one_unit"]
USERS = invented_users(6, most_records=3, seed=4)
#: A user's first records begin with such a token if it offends, each in its own way.
NAN_LOSS, INF_LOSS, NAN_CONSTANT, OVERFLOW, LOUD = range(290, 295)


class _Leaking(torch.autograd.Function):
    """A kernel that reads into the rows before and after, and multiplies what it finds there by zero."""

    @staticmethod
    def forward(ctx, x):
        return x + 0 * (x.roll(1, 0) + x.roll(-1, 0))

    @staticmethod
    def backward(ctx, g):
        return g + 0 * (g.roll(1, 0) + g.roll(-1, 0))


class _Loud(torch.autograd.Function):
    """Poisons the neighbours of a row that begins with LOUD; that row itself stays finite."""

    @staticmethod
    def forward(ctx, x, is_loud):
        near = is_loud.roll(1, 0) | is_loud.roll(-1, 0)
        return torch.where((near & ~is_loud)[:, None, None], torch.nan, x)

    @staticmethod
    def backward(ctx, g):
        return g, None


class LeakingModel(nn.Module):
    """Trainable layers with the faulty kernel between them, and dropout."""

    def __init__(self, dropout: float = 0.0, *, leaks: bool = True) -> None:
        super().__init__()
        self.kernel = _Leaking.apply if leaks else lambda x: x
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 300, bias=False)
        self.dropout = dropout
        self.num_passes = 0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        x = self.embed(ids)
        x = torch.where((ids[:, :1] == OVERFLOW)[..., None], x * 1e30, x)
        x = _Loud.apply(x, ids[:, 0] == LOUD)
        for layer in self.layers:
            x = self.kernel(x + nn.functional.dropout(layer(x) ** 2, p=self.dropout))
        return self.head(self.kernel(self.norm(x)))

    def losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        log_probs = self(ids[:, :-1]).log_softmax(-1)
        losses = -(log_probs.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)
        first = ids[:, 0]
        losses = losses * torch.where(first == NAN_LOSS, torch.nan, torch.where(first == INF_LOSS, torch.inf, 1.0))
        return losses + torch.where(first == NAN_CONSTANT, torch.nan, 0.0)  # whose gradient is finite


def offending(users, who: dict[int, int]):
    """The users, with a token put at the start of one record of each offender."""
    changed = []
    for user, records in enumerate(users):
        records = [record.copy() for record in records]
        if user in who:
            records[-1][0] = who[user]
        changed.append(records)
    return changed


def make(model: LeakingModel, route: str, **options) -> PerUnitClipper:
    return make_clipper(model, Layout.of(model), 0.3, model.losses, route=route, **options)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.isfinite(found).all()) and float((found - expected).double().norm()) <= 1e-6 * 0.3


@pytest.mark.parametrize("route", ROUTES)
@hypothesis.settings(max_examples=6)
@hypothesis.given(
    who=st.dictionaries(
        st.integers(0, 5), st.sampled_from([NAN_LOSS, INF_LOSS, NAN_CONSTANT, OVERFLOW]), min_size=1, max_size=3
    ),
    microbatch_size=st.integers(1, 8),
)
def test_mates_contribute_what_they_would_without_offenders(route, who, microbatch_size):
    model = LeakingModel()
    one = make(model, route)
    found = clipped_sum(one, offending(USERS, who), microbatch_size)
    zeroed = one.diagnostics
    others = [records for user, records in enumerate(USERS) if user not in who]
    assert close(found, clipped_sum(make(model, route), others, microbatch_size))
    assert sorted(zeroed.nonfinite_owners) == sorted(who)
    assert zeroed.num_nonfinite == len(who)
    assert zeroed.num_units == len(USERS)
    assert all(math.isfinite(loss) for user, loss in zeroed.unit_losses.items() if user not in who)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("microbatch_size", [2, 3, 8])
def test_units_that_are_finite_alone_are_all_right(route, microbatch_size):
    """Nobody offends by itself, yet beside one unit others are not numbers: all of them count, as if alone."""
    model = LeakingModel(leaks=False)
    users = offending(invented_users(6, most_records=1), {1: LOUD, 4: LOUD})
    one = make(model, route)
    found = clipped_sum(one, users, microbatch_size)
    alone = [clipped_sum(make(model, route), [user], microbatch_size) for user in users]
    assert close(found, torch.stack(alone).sum(dim=0))
    assert one.diagnostics.nonfinite_owners == []


@pytest.mark.parametrize("route", ["batched", "two_pass"])
def test_mates_keep_their_dropout_and_later_microbatches_too(route):
    """Beside an offender that only its loss gives away, the masks of all others are those that were drawn anyway."""
    model = LeakingModel(dropout=0.5)
    sums = []
    for who in ({2: NAN_CONSTANT}, {2: NAN_LOSS}):
        torch.manual_seed(5)
        sums.append(clipped_sum(make(model, route), offending(USERS, who), 4))
        drawn_next = torch.rand(1)
        torch.manual_seed(5)
        sums.append(clipped_sum(make(model, route), offending(USERS, {}), 4))
        assert torch.equal(drawn_next, torch.rand(1)), "the repetition left random numbers as it found them"
    assert close(sums[0], sums[2])
    assert float((sums[1] - sums[0]).double().norm()) <= 0.3 * (1 + 1e-5), "the user's own contribution and no more"


def test_a_microbatch_without_offenders_runs_once():
    model = LeakingModel()
    one = make(model, "batched")
    clipped_sum(one, USERS, 4)
    model.num_passes = 0
    clipped_sum(one, USERS, 4)
    assert model.num_passes == Packer(4, max_length=16, pad_id=0).num_batches(USERS)


@pytest.mark.parametrize("offenders", [{}, {2: NAN_LOSS}])
def test_ranks_run_equally_many_passes_whoever_offends(offenders):
    """A rank without offenders hears of them and repeats as often as the one that has them."""
    passes = []
    for users, who in ((offending(USERS, offenders), offenders), (USERS[:2], {}), ([], {})):
        model = LeakingModel()
        one = PerUnitClipper(
            model,
            Layout.of(model),
            0.3,
            model.losses,
            CPU,
            route="batched",
            equal_passes=True,
            any_rank=lambda flag: flag or bool(offenders),
        )
        found = clipped_sum(one, users, 4, num_batches=6)
        passes.append(model.num_passes)
        others = [records for user, records in enumerate(users) if user not in who]
        assert close(found, clipped_sum(make(model, "batched"), others, 4))
    assert len(set(passes)) == 1


class GatheringModel(LeakingModel):
    """Every forward pass waits for all ranks, as one over a sharded base does."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        DdpBackend(CPU).barrier()
        return super().forward(ids)


def _sum_on_a_gathering_rank() -> tuple[torch.Tensor, int]:
    """Of rank 0's users, of whom one offends; rank 1 has nobody."""
    backend, model = DdpBackend(CPU), GatheringModel()

    def any_rank(flag: bool) -> bool:
        flags = torch.tensor([float(flag)])
        backend.reduce(flags)
        return float(flags) > 0

    layout = Layout.of(model)
    one = PerUnitClipper(model, layout, 0.3, model.losses, CPU, equal_passes=True, any_rank=any_rank)
    users = offending(USERS, {2: NAN_LOSS}) if backend.rank == 0 else []
    return clipped_sum(one, users, 4, num_batches=8), model.num_passes


@pytest.mark.dist
def test_ranks_that_gather_repeat_together():
    """Were one rank to repeat alone, it would wait for the other until the time-out."""
    (mine, num_passes), (theirs, num_passes_there) = run_on_ranks(2, _sum_on_a_gathering_rank)
    others = [records for user, records in enumerate(USERS) if user != 2]
    assert close(mine, clipped_sum(make(LeakingModel(), "batched"), others, 4))
    assert not theirs.any()
    assert num_passes == num_passes_there


@pytest.mark.parametrize("route", ["batched", "two_pass"])
def test_mutant_a_microbatch_is_not_repeated(route, monkeypatch):
    monkeypatch.setattr(clipper.Measured, "is_finite", lambda self, losses: True)
    monkeypatch.setattr(clipper.math, "isfinite", lambda value: True)
    model = LeakingModel()
    one = make(model, route)
    found = clipped_sum(one, offending(USERS, {2: NAN_LOSS}), 8)
    monkeypatch.undo()
    others = [records for user, records in enumerate(USERS) if user != 2]
    assert not close(found, clipped_sum(make(model, route), others, 8))


def test_a_microbatch_alone_keeps_rows_in_their_places():
    packer = Packer(8, max_length=16, pad_id=9)
    (batch,) = packer.pack([[np.arange(1, 5)], [np.arange(2, 6)] * 2, [np.arange(3, 6)]], 1)
    for index in range(len(batch.owners)):
        alone = batch.alone(index)
        mine = batch.owner == index
        assert alone.owners == (batch.owners[index],)
        assert torch.equal(alone.input_ids[mine], batch.input_ids[mine])
        assert bool((alone.input_ids[~mine] == 9).all())
        assert torch.equal(alone.row_weight, torch.where(mine, batch.row_weight, 0.0))
        assert not alone.target_mask[~mine].any()
    assert batch.alone(len(batch.owners)).owners == ()
