"""What fails under hooks and succeeds without them goes one unit at a time on ``auto``, whatever the exception."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from privtrain.clipping import fallback
from privtrain.errors import GuaranteeLost, ModelFailed, UnsupportedLayer
from privtrain.models.losses import row_losses
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import (
    brute_force_sum,
    clipped_sum,
    invented_users,
    make_clipper,
    relative_error,
)

USERS = invented_users(4, most_records=2, seed=4)


class Small(nn.Module):
    """Embedding, trainable layers, squared outputs; subclasses misbehave in between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(300, 6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def between(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def losses(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (self.head(self.between(self.embed(ids))).square().sum(-1) * mask).sum(1)


class InPlace(Small):
    """Writes into a layer's output."""

    def between(self, x):
        y = self.layer(x)
        y += 1.0
        y.mul_(2.0)
        return y


class Repeating(Small):
    """Calls a layer once for all rows, and repeats its output by the number of rows that it believes in."""

    def between(self, x):
        position = self.layer(torch.ones(1, x.shape[1], 6))
        return x * position.repeat(x.shape[0], 1, 1)


class _Reversible(torch.autograd.Function):
    """Calls the layer once more in the backward pass, as reversible networks do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        with torch.no_grad():
            return x + layer(x)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            torch.autograd.backward(ctx.layer(x), g)
        return g + x.grad, None


class Reversible(Small):
    """A layer between two trainable ones whose gradients only a backward pass within the backward pass finds."""

    def between(self, x):
        return _Reversible.apply(x, self.layer)


class Picky(Small):
    """Compares what it gets with what it gave out, and has an exception of its own."""

    def between(self, x):
        y = self.layer(x)
        if type(y.grad_fn).__name__ == "_CaptureBackward":
            raise KeyError("not my own layer")
        return y


def misbehaving() -> list[type[Small]]:
    return [InPlace, Repeating, Picky]


@pytest.mark.parametrize("kind", misbehaving())
def test_auto_falls_back_and_is_exact(kind):
    model = kind()
    layout = Layout.of(model)
    clipper = make_clipper(model, layout, 0.3, model.losses)
    found = clipped_sum(clipper, USERS, 3)
    assert relative_error(found, brute_force_sum(model, layout, USERS, 0.3, losses=model.losses)) < 1e-5
    assert clipper.diagnostics.num_units == len(USERS)
    if kind is not Repeating:  # whose repeated output our own expansion may agree with
        assert clipper.route == "one_unit"
        assert clipper.fallback_reason


@pytest.mark.parametrize("kind", [InPlace, Picky])
@pytest.mark.parametrize("route", ["batched", "two_pass"])
def test_an_explicit_route_is_refused_with_the_way_out(kind, route):
    model = kind()
    clipper = make_clipper(model, Layout.of(model), 0.3, model.losses, route=route)
    with pytest.raises(UnsupportedLayer, match=r"(RuntimeError|KeyError).*performance.clipping_route: one_unit"):
        clipped_sum(clipper, USERS, 3)
    assert not clipper.total.any()


def test_failed_second_pass_falls_back_before_adding(monkeypatch):
    """The first microbatch rehearses it: where it cannot succeed, no unit has been added yet."""
    model = Small()
    layout = Layout.of(model)
    clipper = make_clipper(model, layout, 0.3, model.losses)
    monkeypatch.setattr(clipper, "_memory_budget", 0.0)
    once: list[int] = []

    def again(*_args, **_options):
        once.append(1)
        raise GuaranteeLost("a second backward pass did not come by ['layer']")

    monkeypatch.setattr("privtrain.clipping.passes.Passes.again", again)
    found = clipped_sum(clipper, USERS, 3)
    assert relative_error(found, brute_force_sum(model, layout, USERS, 0.3, losses=model.losses)) < 1e-5
    assert (clipper.route, len(once)) == ("one_unit", 1)


def test_a_model_that_fails_without_hooks_too_is_named(monkeypatch):
    model = Small()
    clipper = make_clipper(model, Layout.of(model), 0.3, model.losses)
    monkeypatch.setattr(model, "between", lambda x: x @ torch.ones(5, 5))
    with pytest.raises(ModelFailed, match="with and without clipping's hooks: RuntimeError"):
        clipped_sum(clipper, USERS, 3)
    assert clipper.route == "auto"


GONE = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4: a remote worker crashed")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), GONE])
def test_too_little_memory_or_a_lost_rank_changes_no_route(error, monkeypatch):
    model = Small()
    clipper = make_clipper(model, Layout.of(model), 0.3, model.losses)
    original = model.between

    def between(x):
        if len(x) > 1:
            raise error
        return original(x)

    monkeypatch.setattr(model, "between", between)
    with pytest.raises(type(error)):
        clipped_sum(clipper, USERS, 3)
    assert clipper.route == "auto"


def test_a_backward_pass_of_the_models_own_is_refused_by_name():
    """One unit at a time never sees its gradients; that is known at the first row, not at the end of the step."""
    model = Reversible()
    layout = Layout.of(model)
    clipper = make_clipper(model, layout, 0.3, model.losses, route="one_unit")
    with pytest.raises(UnsupportedLayer, match=r"backward pass of its own for 'layer\."):
        clipped_sum(clipper, USERS, 3)
    assert all(parameter.grad is None for parameter in layout.parameters.values())


def test_a_backward_pass_of_the_models_own_is_exact_under_hooks():
    model, plain = Reversible(), Small()
    plain.between = lambda x: x + plain.layer(x)
    found = clipped_sum(make_clipper(model, Layout.of(model), 0.3, model.losses), USERS, 3)
    reference = brute_force_sum(plain, Layout.of(plain), USERS, 0.3, losses=plain.losses)
    assert relative_error(found, reference) < 1e-5


def test_a_settled_route_is_kept_and_stops_the_job(monkeypatch):
    """After the self-test a user's rows must not choose how everybody else's gradients are rounded."""
    model = Small()
    clipper = make_clipper(model, Layout.of(model), 0.3, model.losses)
    clipper.settle("auto")
    clipped_sum(clipper, USERS, 3)
    monkeypatch.setattr(model, "between", InPlace.between.__get__(model))
    with pytest.raises(UnsupportedLayer, match="one_unit"):
        clipped_sum(clipper, USERS, 3)
    assert clipper.route == "auto"


def test_mutant_no_comparison_lets_the_traceback_out(monkeypatch):
    def cause(failure, _row_loss, _parameters):
        raise failure

    monkeypatch.setattr(fallback, "cause", cause)
    model = InPlace()
    with pytest.raises(RuntimeError, match="modified inplace"):
        clipped_sum(make_clipper(model, Layout.of(model), 0.3, model.losses), USERS, 3)


def test_ctrl_writes_into_its_embeddings_and_falls_back():
    torch.manual_seed(0)
    config = hf.CTRLConfig(vocab_size=256, n_positions=64, n_embd=16, dff=24, n_layer=1, n_head=2, resid_pdrop=0.0)
    config.embd_pdrop = 0.0
    model = hf.AutoModelForCausalLM.from_config(config).train()
    layout = Layout.of(model)
    clipper = make_clipper(model, layout, 0.3)
    losses = lambda ids, mask: row_losses(model, ids, mask)  # noqa: E731
    found = clipped_sum(clipper, USERS, 3)
    assert relative_error(found, brute_force_sum(model, layout, USERS, 0.3, losses=losses)) < 1e-5
    assert clipper.route == "one_unit"
