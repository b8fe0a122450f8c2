"""Invariants 1, 2, 3 and 8: sensitivity, a user is one unit, losses of a unit alone, fp32."""

from __future__ import annotations

import pathlib

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from privtrain.backends import DdpBackend
from privtrain.clipping import rules
from privtrain.data.microbatch import Packer
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.models.losses import row_losses
from privtrain.privacy import fixed_point
from privtrain.privacy.layout import Layout
from privtrain.privacy.sampling import DrawnUnit, assign_to_ranks
from tests.privtrain.models_for_tests import (
    brute_force_sum,
    clipped_sum,
    invented_users,
    make_clipper,
    plain_unit_gradient,
    relative_error,
    tiny_lora,
)
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("microbatch_size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("clipping_norm", [1e-3, 0.5, 1e6])
def test_sum_equals_brute_force_for_any_microbatch_size(tiny_llama, microbatch_size, clipping_norm):
    model, layout = tiny_lora(tiny_llama)
    users = invented_users(7, most_records=4)
    ours = clipped_sum(make_clipper(model, layout, clipping_norm), users, microbatch_size)
    expected = brute_force_sum(model, layout, users, clipping_norm)
    truncated = len(users) * layout.num_coordinates**0.5 * 2.0 ** fixed_point.grid_exponent(clipping_norm)
    assert float((ours.double() - expected).norm()) < 1e-5 * float(expected.norm()) + truncated


def _reduced_sums(directory: pathlib.Path, microbatch_sizes: list[int]) -> list[torch.Tensor]:
    """What a rank holds after the reduction, with the job's own dealing."""
    model, layout = tiny_lora(directory)
    backend = DdpBackend(CPU)
    users = invented_users(5, most_records=4)
    drawn = [DrawnUnit(i, tuple(range(len(u)))) for i, u in enumerate(users)]
    shares = assign_to_ranks(drawn, [max(map(len, u)) for u in users], backend.world_size)
    mine = [users[d.unit] for d in shares[backend.rank]]
    sums = []
    for size in microbatch_sizes:
        packer = Packer(size, max_length=16, pad_id=0)
        num_batches = max(packer.num_batches([users[d.unit] for d in share]) for share in shares)
        total = clipped_sum(make_clipper(model, layout, 0.5), mine, size, num_batches)
        backend.reduce(total)
        sums.append(total)
    return sums


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_reduced_sum_equals_brute_force_on_any_number_of_ranks(tiny_llama, world_size):
    model, layout = tiny_lora(tiny_llama)
    reference = brute_force_sum(model, layout, invented_users(5, most_records=4), 0.5)
    for sums in run_on_ranks(world_size, _reduced_sums, tiny_llama, [1, 3, 4, 16]):
        for total in sums:
            assert relative_error(total, reference) < 1e-5


@hypothesis.settings(max_examples=25)
@hypothesis.given(data=st.data())
def test_removing_a_user_moves_sum_by_at_most_clipping_norm(tiny_llama, data):
    lengths = st.lists(st.lists(st.integers(2, 14), min_size=1, max_size=4), min_size=1, max_size=5)
    seed = data.draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    users = [[rng.integers(0, 257, size=n) for n in records] for records in data.draw(lengths)]
    clipping_norm = data.draw(st.floats(1e-3, 10))
    removed = data.draw(st.integers(0, len(users) - 1))
    size = data.draw(st.integers(1, 6))
    model, layout = tiny_lora(tiny_llama)
    clipper = make_clipper(model, layout, clipping_norm)
    with_user = clipped_sum(clipper, users, size)
    without = clipped_sum(clipper, users[:removed] + users[removed + 1 :], size)
    slack = clipping_norm * 1e-5 + 1e-6 * float(with_user.norm())
    assert float((with_user - without).norm()) <= clipping_norm + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cancelling_contributions_are_clipped_by_true_norm(tiny_llama, dtype):
    """Opposite-signed losses nearly cancel over a user's tokens: where Gram norms in low precision lose the norm."""
    model, layout = tiny_lora(tiny_llama, dtype)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])

    def losses(ids, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return 1e4 * signs[: len(ids)] * row_losses(model, ids, mask)

    tokens = np.arange(3, 15)
    user = [tokens, tokens.copy(), tokens.copy(), np.append(tokens[:-1], 99)]
    clipper = make_clipper(model, layout, 0.25, losses)
    assert float(clipped_sum(clipper, [user], 4).norm()) <= 0.25 * (1 + 1e-5)


def test_a_user_with_a_nan_loss_contributes_zero_and_is_counted(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    users = invented_users(4, most_records=2)

    def losses(ids, mask):
        values = row_losses(model, ids, mask)
        poisoned = (ids == users[1][0][0]).any(dim=1) & (ids == users[1][0][1]).any(dim=1)
        return values * torch.where(poisoned, float("nan"), 1.0)

    clipper = make_clipper(model, layout, 0.5, losses)
    total = clipped_sum(clipper, users, 3)
    assert clipper.diagnostics.num_nonfinite == 1
    reference = brute_force_sum(model, layout, [u for i, u in enumerate(users) if i != 1], 0.5)
    assert relative_error(total, reference) < 1e-5


def test_a_user_is_clipped_once_jointly_not_per_record(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    user = invented_users(4, most_records=4)[3]
    total = clipped_sum(make_clipper(model, layout, 1e-3), [user], 2)
    assert float(total.norm()) == pytest.approx(1e-3, rel=1e-5)
    per_record = sum(clipped_sum(make_clipper(model, layout, 1e-3), [[r]], 2) for r in user)
    assert float(per_record.norm()) > 1.5e-3, "the records' own clipped gradients add up to more: a different mechanism"


def test_a_units_gradient_does_not_depend_on_its_batch_mates(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    users = invented_users(5, most_records=3)
    alone = clipped_sum(make_clipper(model, layout, 1e3), [users[2]], 8)
    together = clipped_sum(make_clipper(model, layout, 1e3), users, 8)
    others = sum(clipped_sum(make_clipper(model, layout, 1e3), [u], 8) for i, u in enumerate(users) if i != 2)
    assert relative_error(together - others, alone.double()) < 1e-4
    assert relative_error(alone, plain_unit_gradient(model, layout, users[2]).double()) < 1e-5


def test_padding_microbatches_add_nothing(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    clipper = make_clipper(model, layout, 0.5)
    users = invented_users(3, most_records=2)
    assert torch.equal(clipped_sum(clipper, users, 2), clipped_sum(clipper, users, 2, num_batches=6))
    assert float(clipped_sum(clipper, [], 2, num_batches=2).norm()) == 0


def test_no_unclipped_gradient_is_left_on_a_parameter(tiny_llama):
    model, layout = tiny_lora(tiny_llama)
    clipper = make_clipper(model, layout, 0.5)
    clipped_sum(clipper, invented_users(3, most_records=2), 2)
    assert all(p.grad is None and p.requires_grad for p in layout.parameters.values())
    parameter = next(iter(layout.parameters.values()))
    parameter.grad = torch.ones_like(parameter)
    try:
        with pytest.raises(GuaranteeLost, match="unclipped gradients"):
            clipper.finish()
    finally:
        parameter.grad = None


def test_the_bound_holds_in_bf16_for_the_whole_batch(tiny_llama):
    """Removing one user re-deals everybody; in bf16 the others' gradients must still be rounded as before."""
    model, layout = tiny_lora(tiny_llama)

    def losses(ids, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return row_losses(model, ids, mask)

    users = invented_users(24, most_records=3, seed=5)
    clipper = make_clipper(model, layout, 1.0, lambda ids, mask: 1e3 * losses(ids, mask))
    everybody = clipped_sum(clipper, users, 4)
    for removed in range(0, len(users), 3):
        without = clipped_sum(clipper, users[:removed] + users[removed + 1 :], 4)
        alone = clipped_sum(clipper, [users[removed]], 4)
        assert float((everybody - without).norm()) <= 1 + 1e-5
        assert float((everybody - without - alone).norm()) < 1e-4, "somebody else's contribution changed"


def test_sums_and_norms_are_fp32_under_bf16_forward(tiny_llama):
    model, layout = tiny_lora(tiny_llama, torch.bfloat16)
    clipper = make_clipper(model, layout, 1e-4)
    total = clipped_sum(clipper, [invented_users(1, most_records=1)[0]], 2)
    assert total.dtype == torch.float32
    assert float(total.norm()) == pytest.approx(1e-4, rel=1e-5)


class Doubler(nn.Linear):
    """A layer type nobody registered: y = 2 x Wᵀ."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _toy(layer: nn.Module) -> tuple[nn.Module, Layout]:
    model = nn.Sequential(nn.Embedding(300, 6).requires_grad_(False), layer)
    return model, Layout.of(model)


def _toy_losses(model: nn.Module):
    return lambda ids, mask: (model(ids).square().sum(-1) * mask).sum(1)


def test_a_layer_without_a_rule_is_refused_by_name():
    model, layout = _toy(Doubler(6, 3))
    with pytest.raises(UnsupportedLayer, match="'1' of type Doubler"):
        make_clipper(model, layout, 1.0, _toy_losses(model), route="batched")


def test_a_registered_rule_makes_a_new_layer_exact(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    rules.register(Doubler, lambda module, x, g: rules.linear(module, x, 2 * g))
    model, layout = _toy(Doubler(6, 3))
    users = invented_users(3, most_records=2)
    losses = _toy_losses(model)
    ours = clipped_sum(make_clipper(model, layout, 0.5, losses), users, 2)
    reference = brute_force_sum(model, layout, users, 0.5, losses=losses)
    assert relative_error(ours, reference) < 1e-5


def test_flattened_tokens_need_one_unit_at_a_time():
    model, layout = _toy(nn.Linear(6, 3))
    losses = lambda ids, mask: (model[1](model[0](ids).flatten(0, 1)).sum(-1).view(ids.shape) * mask).sum(1)  # noqa: E731
    users = invented_users(3, most_records=2)
    with pytest.raises(UnsupportedLayer, match="cannot be told apart"):
        clipped_sum(make_clipper(model, layout, 0.5, losses, route="batched"), users, 2)
    ours = clipped_sum(make_clipper(model, layout, 0.5, losses), users, 2)
    assert relative_error(ours, brute_force_sum(model, layout, users, 0.5, losses=losses)) < 1e-5
