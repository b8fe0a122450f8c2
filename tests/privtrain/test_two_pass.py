"""The two-pass route: what its second pass relies on is checked, and planted faults are noticed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from privtrain.clipping import batched, clipper, factors, passes
from privtrain.clipping.factors import GramCache, Lookup, Outer
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.models.losses import row_losses
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import (
    brute_force_sum,
    clipped_sum,
    invented_users,
    make_clipper,
    relative_error,
    squares_from_factors,
)
from tests.privtrain.test_parity import build

USERS = invented_users(5, most_records=3, seed=4)


class Dropping(nn.Module):
    """A small model with a lot of dropout, and a use of random numbers that torch does not know if asked to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)])
        self.head = nn.Linear(12, 300, bias=False)
        self.head.weight = self.embed.weight
        self.forgets_its_masks = False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            self.before_last = x
            x = x + torch.utils.checkpoint.checkpoint(
                self._block, layer, x, use_reentrant=False, preserve_rng_state=not self.forgets_its_masks
            )
        return self.head(x)

    def _block(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(nn.functional.dropout(torch.tanh(x), p=0.5))

    def losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        log_probs = self(ids[:, :-1]).log_softmax(-1)
        return -(log_probs.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)


def dropped_sum(model: Dropping, route: str, microbatch_size: int = 4) -> torch.Tensor:
    torch.manual_seed(7)
    return clipped_sum(make_clipper(model, Layout.of(model), 0.3, model.losses, route=route), USERS, microbatch_size)


@pytest.mark.parametrize("microbatch_size", [2, 4, 16])
def test_dropout_is_the_same_in_both_passes(microbatch_size):
    """One forward pass a microbatch on both routes: from the same seed they must agree, mask for mask."""
    model = Dropping()
    once = dropped_sum(model, "batched", microbatch_size)
    assert relative_error(dropped_sum(model, "two_pass", microbatch_size), once.double()) < 1e-5
    torch.manual_seed(8)
    other = clipped_sum(make_clipper(model, Layout.of(model), 0.3, model.losses), USERS, microbatch_size)
    assert relative_error(other, once.double()) > 1e-2, "the masks matter, so the comparison above means something"


def test_mutant_another_dropout_mask_in_the_second_pass():
    model = Dropping()
    model.forgets_its_masks = True
    with pytest.raises(GuaranteeLost, match="not the same in two backward passes"):
        dropped_sum(model, "two_pass")


def test_mutant_the_cross_term_of_a_tied_tensor_is_dropped(monkeypatch):
    original = factors._lookup_squares
    monkeypatch.setattr(factors, "_lookup_squares", lambda outers, lookups: _apart(original, outers, lookups))
    model = copy.deepcopy(build("llama", "full")[0]).requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    norms = [
        float(clipped_sum(make_clipper(model, Layout.of(model), 0.01, route="two_pass"), [user], 8).norm())
        for user in USERS
    ]
    assert any(abs(norm - 0.01) > 1e-7 for norm in norms)


def _apart(original, outers: list[Outer], lookups: list[Lookup]):
    if not lookups:
        return original(outers, lookups)
    return original([Outer(o.left * 0, o.right) for o in outers], lookups)


class Bypassed(Dropping):
    """A hidden state also reaches the loss beside the head."""

    def losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        losses = super().losses(ids, mask)
        return losses + (self.before_last.square().mean(2) * mask[:, 1:]).sum(1)


def backward_runs_of_the_head(model: Dropping, route: str) -> tuple[int, torch.Tensor]:
    """How often a gradient arrives at the logits, for one microbatch, and the clipped sum."""
    arrivals: list[int] = []

    def watch(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        output.register_hook(lambda _: arrivals.append(1))

    handle = model.head.register_forward_hook(watch)
    try:
        total = dropped_sum(model, route, 16)
    finally:
        handle.remove()
    return len(arrivals), total


@pytest.mark.parametrize(("kind", "repeats"), [(Dropping, False), (Bypassed, True)])
def test_second_pass_starts_at_the_heads_input(kind, repeats):
    model = kind()
    num_runs, total = backward_runs_of_the_head(model, "two_pass")
    once, expected = backward_runs_of_the_head(model, "batched")
    assert (num_runs > once) == repeats
    assert relative_error(total, expected.double()) < 1e-5


def test_mutant_second_pass_misses_path_beside_the_head(monkeypatch):
    monkeypatch.setattr(passes.Passes, "_neck", lambda self, calls, losses: calls.last[1])
    model = Bypassed()
    assert relative_error(dropped_sum(model, "two_pass"), dropped_sum(model, "batched").double()) > 1e-3


def test_mutant_a_layer_is_left_out_of_the_second_pass(monkeypatch):
    original = passes.Passes.again

    def forgetful(self, calls, add, used_rows):
        module = next(iter(self._seen))
        self._deferred.discard(module)
        original(self, calls, add, used_rows)

    monkeypatch.setattr(passes.Passes, "again", forgetful)
    model, layout = build("qwen2", "full")
    with pytest.raises(GuaranteeLost, match="did not reach"):
        clipped_sum(make_clipper(model, layout, 0.3, route="two_pass"), USERS, 16)


def test_mutant_the_rows_of_another_unit_get_the_factor(monkeypatch):
    original = batched.UnitGradients.add_now
    mutant = lambda self, name, out, gradient, weights: original(self, name, out, gradient, weights.flip(0))  # noqa: E731
    monkeypatch.setattr(batched.UnitGradients, "add_now", mutant)
    model, layout = build("qwen2", "full")
    total = clipped_sum(make_clipper(model, layout, 0.3, route="two_pass"), USERS, 16)
    assert relative_error(total, brute_force_sum(model, layout, USERS, 0.3)) > 1e-3


def test_an_open_unit_that_is_not_finite_adds_nothing():
    """A NaN row of a user that spans microbatches goes through the second pass on its own, and stays out of the sum."""
    model, layout = build("qwen2", "full")
    poison = int(USERS[2][1][0])
    losses = lambda ids, mask: row_losses(model, ids, mask) * torch.where(ids[:, 0] == poison, float("nan"), 1.0)  # noqa: E731
    good = [user for user in USERS if all(record[0] != poison for record in user)]
    assert len(good) == len(USERS) - 1
    reference = brute_force_sum(model, layout, good, 0.3)
    for microbatch_size in (1, 2, 3):
        one = make_clipper(model, layout, 0.3, losses, route="two_pass")
        assert relative_error(clipped_sum(one, USERS, microbatch_size), reference) < 1e-5
        assert one.diagnostics.num_nonfinite == 1


def test_the_bound_holds_in_bf16_for_the_whole_batch():
    """Removing one user re-deals everybody; the others' gradients must be rounded as before, whatever is kept."""
    model, layout = build("llama", "full")

    def losses(ids, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return 1e3 * row_losses(model, ids, mask)

    users = invented_users(12, most_records=3, seed=5)
    one = make_clipper(model, layout, 1.0, losses, route="two_pass")
    everybody = clipped_sum(one, users, 4)
    for removed in range(0, len(users), 4):
        without = clipped_sum(one, users[:removed] + users[removed + 1 :], 4)
        assert float((everybody - without).norm()) <= 1 + 1e-5
        assert float((everybody - without - clipped_sum(one, [users[removed]], 4)).norm()) < 1e-4


def test_tokens_that_cancel_are_clipped_by_their_true_norm(monkeypatch):
    monkeypatch.setattr(clipper, "_CANCELLED", 0.5)
    model, layout = build("qwen2", "full")
    tokens = USERS[4][0]
    cancelling = [tokens, tokens.copy(), tokens.copy(), np.append(tokens[:-1], 9)]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses = lambda ids, mask: 1e4 * signs[: len(ids)] * row_losses(model, ids, mask)  # noqa: E731
    total = clipped_sum(make_clipper(model, layout, 0.25, losses, route="two_pass"), [cancelling], 4)
    assert float(total.norm()) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize("route", ["two_pass", "one_unit"])
def test_reentrant_checkpointing_is_refused_by_name(route):
    model = copy.deepcopy(build("llama", "full")[0])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UnsupportedLayer, match="need non-reentrant gradient checkpointing"):
        make_clipper(model, Layout.of(model), 0.3, route=route)


@pytest.mark.parametrize(
    ("method", "checkpointed", "lets_go"),
    [("full", True, True), ("full", False, False), ("lora", True, False)],
)
def test_auto_takes_two_passes_with_checkpointing(method, checkpointed, lets_go, monkeypatch):
    model = copy.deepcopy(build("llama", method)[0])
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    dropped = []
    original = batched.UnitGradients.drop
    monkeypatch.setattr(batched.UnitGradients, "drop", lambda self, name: dropped.append(name) or original(self, name))
    clipped_sum(make_clipper(model, Layout.of(model), 0.3), USERS, 16)
    assert bool(dropped) == lets_go


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 128])
@pytest.mark.parametrize("num_features", [64, 576, 5000])
def test_rounding_of_gram_matrices_stays_below_its_bound(num_tokens, num_features):
    """On the tokens that are worst for fp32: aligned, repeated, alike, cancelling, of very different size."""
    generator = torch.Generator().manual_seed(num_tokens + num_features)
    draw = lambda *shape: torch.randn(1, *shape, generator=generator)  # noqa: E731
    noise, line = draw(num_tokens, num_features), draw(1, num_features)
    kinds = [
        noise,
        noise.abs(),
        torch.full_like(noise, 0.1),
        line.expand_as(noise).contiguous(),
        line * draw(num_tokens, 1).sign(),
        line + 1e-3 * noise,
        (3 * noise).exp(),
    ]
    for left in kinds:
        for right in kinds:
            outer = Outer(left, right)
            square, _, error = factors._outer_squares(outer, GramCache())
            assert abs(float(square - factors._outer_squares_float64(outer))) <= float(error) < float("inf")


@pytest.mark.parametrize(
    ("route", "style", "judges_alone"),
    [("batched", "flat", False), ("auto", "flat", False), ("batched", "per_layer", True), ("two_pass", "flat", True)],
)
def test_inexact_norms_are_judged_by_that_of_their_group(route, style, judges_alone):
    """A tensor's rounding counts as a share of the norm that a factor is made of. Two passes do not know it in time."""
    model, layout = build("llama", "full")
    one = make_clipper(model, layout, 0.5, route=route, style=style)
    squares = torch.ones(len(layout.slots), 4, dtype=torch.float64)
    errors = torch.zeros_like(squares)
    squares[0, 0], errors[0, 0] = 1e-6, 1e-8  # 1e-2 of its own square, 1e-8 of the unit's
    errors[0, 1] = 1e-4 * len(layout.slots)  # too much of either
    errors[0, 2] = torch.inf  # not known
    squares[1, 3] = torch.nan  # exact, and not finite
    doubts = one._doubts(squares, errors)
    assert doubts[0].tolist() == [judges_alone, True, True, False]
    assert not doubts[1:].any()


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12, 1e25])
def test_norms_survive_the_ends_of_the_range_of_fp32(scale):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, 5, 7, generator=generator) for _ in range(2))
    square, _ = squares_from_factors(2, (7, 7), Outer(left * scale, right))
    expected = torch.bmm((left * scale).double().transpose(1, 2), right.double()).square().sum(dim=(1, 2))
    assert torch.allclose(square.sqrt(), expected.sqrt(), rtol=1e-5, atol=0)
