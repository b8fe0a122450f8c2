"""A unit whose factors leave fp32's range moves the sum by no more than C, and costs its mates nothing."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies
from torch import nn

from privtrain.clipping import PerUnitClipper
from privtrain.data.microbatch import Packer
from privtrain.privacy.layout import Layout

_WIDTH = 64
#: Of a token's input and of its output's gradient, in the first coordinates or in all.
_VALUES = (0.0, 1.0, -1.0, 1e-23, 1e-38, 1e19, 1e20, -1e20, 1e25, 1e38, -3e38, float("inf"), float("nan"))


class Given(nn.Module):
    """A linear layer whose factors are chosen by token: row t of one table meets row t of the other."""

    def __init__(self, inputs: torch.Tensor, gradients: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(_WIDTH, _WIDTH, bias=False)
        nn.init.zeros_(self.layer.weight)
        self.inputs, self.gradients = inputs, gradients

    def losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = self.layer(self.inputs[ids]) * self.gradients[ids]
        return torch.where((ids > 0)[..., None], found, 0.0).sum(dim=(1, 2)) * mask.any(dim=1)


def table(values: list[tuple[float, float, bool]]) -> Given:
    """Token 0 is padding and token 1 an ordinary one; the others have these values."""
    inputs, gradients = torch.zeros(2, 2 + len(values), _WIDTH)
    inputs[1, 0], gradients[1, 0] = 1.0, -1.0
    for token, (one, other, is_everywhere) in enumerate(values, start=2):
        place = slice(None) if is_everywhere else slice(0, 1)
        inputs[token, place], gradients[token, place] = one, other
    return Given(inputs, gradients)


def moved(model: Given, hostile: list[int], route: str, style: str = "flat") -> float:
    """By how many C one unit changes a sum of three others."""
    layout, packer = Layout.of(model), Packer(4, 8, 0)
    mates = [[np.array([1, 1, 1])] for _ in range(3)]
    sums = []
    clipper = PerUnitClipper(model, layout, 1.0, model.losses, torch.device("cpu"), style, route)
    for units in (mates, [*mates, [np.array(hostile)]]):
        clipper.reset()
        for batch in packer.pack(units, packer.num_batches(units)):
            clipper.accumulate(batch)
        sums.append(clipper.finish().clone())
    return float((sums[1] - sums[0]).double().norm()) * 2.0**clipper.grid_exponent


@pytest.mark.parametrize("route", ["batched", "two_pass"])
@pytest.mark.parametrize("style", ["flat", "per_layer", "automatic"])
def test_infinite_token_without_gradient_hides_no_overflow(route, style):
    """Its length, ∞ · 0, is not a number; the other token's product is beyond fp32."""
    model = table([(1e25, 0.0, False), (1e20, 1e20, False)])
    assert moved(model, [1, 3, 2], route, style) <= 1 + 1e-5


def test_mutant_a_length_that_is_not_known_passes(monkeypatch):
    right = PerUnitClipper._cancelled

    def known(self, squares, uncancelled):
        return right(self, squares, uncancelled.nan_to_num(nan=0.0))

    monkeypatch.setattr(PerUnitClipper, "_cancelled", known)
    monkeypatch.setattr(PerUnitClipper, "_longer", lambda *_: [])
    assert moved(table([(1e25, 0.0, False), (1e20, 1e20, False)]), [1, 3, 2], "batched") > 1.5


@hypothesis.given(
    values=strategies.lists(
        strategies.tuples(strategies.sampled_from(_VALUES), strategies.sampled_from(_VALUES), strategies.booleans()),
        min_size=6,
        max_size=6,
    ),
    hostile=strategies.lists(strategies.integers(1, 7), min_size=2, max_size=8),
    route=strategies.sampled_from(["batched", "two_pass", "one_unit"]),
)
def test_no_values_of_tokens_move_a_sum_by_more(values, hostile, route):
    assert moved(table(values), hostile, route) <= 1 + 1e-5
