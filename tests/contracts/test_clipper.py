"""Every clipper, on every route and in every style: the loop over units, and at most C from any one of them."""

from __future__ import annotations

import pytest
import torch

from privtrain.clipping import CooperativeClipper
from privtrain.clipping.clipper import PerUnitClipper
from privtrain.models.losses import row_losses
from tests.privtrain.models_for_tests import (
    brute_force_sum,
    clipped_sum,
    invented_users,
    make_clipper,
    relative_error,
    tiny_lora,
)
from tests.privtrain.test_cooperative import LoneShards

CLIPPING_NORM = 0.3
STYLES = ("flat", "per_layer", "automatic")
CLIPPERS = [(PerUnitClipper, route) for route in ("auto", "batched", "two_pass", "one_unit")] + [
    (CooperativeClipper, route) for route in ("auto", "two_pass")
]
USERS = invented_users(5, most_records=3)

every_clipper = pytest.mark.parametrize(
    ("kind", "route"), CLIPPERS, ids=lambda value: getattr(value, "__name__", value)
)


def clipper_of(kind, route, tiny_llama, *, style="flat", losses=None):
    """A clipper over the tiny adapter, and that adapter."""
    model, layout = tiny_lora(tiny_llama)
    losses = losses or (lambda ids, mask: row_losses(model, ids, mask))
    if kind is CooperativeClipper:
        made = CooperativeClipper(model, LoneShards(layout), CLIPPING_NORM, losses, torch.device("cpu"), style, route)
    else:
        made = make_clipper(model, layout, CLIPPING_NORM, losses, style=style, route=route)
    return made, model, layout


@every_clipper
@pytest.mark.parametrize("style", STYLES)
def test_sum_is_that_of_the_loop_over_units(kind, route, style, tiny_llama):
    clipper, model, layout = clipper_of(kind, route, tiny_llama, style=style)
    expected = brute_force_sum(model, layout, USERS, CLIPPING_NORM, style=style)
    for microbatch_size in (1, 4):
        assert relative_error(clipped_sum(clipper, USERS, microbatch_size), expected) < 1e-5
        assert clipper.diagnostics.num_units == len(USERS)


@every_clipper
def test_one_unit_moves_the_sum_by_at_most_sensitivity(kind, route, tiny_llama):
    clipper, *_ = clipper_of(kind, route, tiny_llama)
    everybody = clipped_sum(clipper, USERS, 3)
    for removed in range(len(USERS)):
        without = clipped_sum(clipper, USERS[:removed] + USERS[removed + 1 :], 3)
        assert float((everybody - without).norm()) <= clipper.sensitivity
    assert clipper.sensitivity == pytest.approx(CLIPPING_NORM, rel=1e-3)


@every_clipper
def test_order_and_earlier_steps_change_no_bit(kind, route, tiny_llama):
    clipper, *_ = clipper_of(kind, route, tiny_llama)
    first = clipped_sum(clipper, USERS, 3)
    clipped_sum(clipper, USERS[:2], 3)
    assert torch.equal(clipped_sum(clipper, USERS[::-1], 3), first)


@every_clipper
def test_a_step_without_units_is_zero(kind, route, tiny_llama):
    clipper, *_ = clipper_of(kind, route, tiny_llama)
    assert not clipped_sum(clipper, [], 3, num_batches=1).any()
    assert clipper.diagnostics.num_units == 0


@every_clipper
def test_a_unit_that_is_not_finite_counts_as_zero_and_is_named(kind, route, tiny_llama):
    poison = int(USERS[2][0][0])
    model, _ = tiny_lora(tiny_llama)

    def losses(ids, mask):
        return row_losses(model, ids, mask) * torch.where(ids[:, 0] == poison, torch.nan, 1.0)

    clipper, *_ = clipper_of(kind, route, tiny_llama, losses=losses)
    good = [user for user in USERS if all(record[0] != poison for record in user)]
    assert len(good) == len(USERS) - 1
    total = clipped_sum(clipper, USERS, 3)
    assert clipper.diagnostics.num_nonfinite == 1
    assert relative_error(total, clipped_sum(clipper, good, 3).double()) < 1e-5
