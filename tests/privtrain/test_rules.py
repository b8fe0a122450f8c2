"""Rules, tied tensors, cancellation, PEFT's other methods, checkpointing and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import functools

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from hypothesis import strategies as st
from torch import nn

from privtrain.clipping import clipper as clipper_module
from privtrain.clipping import exact_sum, rules
from privtrain.clipping.factors import Lookup, Outer, squared_norms
from privtrain.data.microbatch import Packer
from privtrain.errors import UnsupportedLayer
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
from tests.privtrain.test_parity import CAUSAL, build, losses_of

USERS = invented_users(5, most_records=3, seed=4)
EVERY_ROUTE = pytest.mark.parametrize("route", ["batched", "two_pass", "one_unit"])


def check(model, layout, *, route="auto", losses=None, users=USERS, expected_route=None) -> None:
    clipper = make_clipper(model, layout, 0.3, losses, route=route)
    reference = brute_force_sum(model, layout, users, 0.3, losses=losses)
    assert float(reference.norm()) > 0
    for microbatch_size in (2, 16):
        assert relative_error(clipped_sum(clipper, users, microbatch_size), reference) < 1e-5
    assert expected_route in (None, clipper.route)


class Scale(nn.Module):
    """The example in the documentation of the rules: y = s · x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.s * x


def scale(module, x, g):
    return {"s": (x.float() * g.float()).sum(dim=1)}


def test_the_documented_example_makes_a_new_layer_exact(monkeypatch):
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(300, 6), Scale(6), nn.Linear(6, 4))
    losses = lambda ids, mask: (model(ids).square().sum(-1) * mask).sum(1)  # noqa: E731
    layout = Layout.of(model)
    with pytest.raises(UnsupportedLayer, match="'1' of type Scale"):
        make_clipper(model, layout, 0.3, losses, route="batched")
    rules.register(Scale, scale)
    check(model, layout, losses=losses, route="batched", expected_route="batched")


class Convolutions(nn.Module):
    """Rows of [tokens, features] through convolutions over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 6)
        self.deep = nn.Conv1d(6, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.depthwise = nn.Conv1d(4, 4, 3, padding=2, dilation=2, groups=4)
        self.bare = nn.Conv2d(1, 2, (2, 1), bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(torch.tanh(self.norm(self.deep(self.embedding(ids).mT))))
        return self.bare(hidden[:, None]).flatten(1)


@EVERY_ROUTE
def test_convolutions_and_group_norms_by_opacus_rules(route):
    torch.manual_seed(0)
    model = Convolutions()
    losses = lambda ids, mask: model(ids[:, :2]).square().sum(1) + 0 * mask.sum(1)  # noqa: E731
    check(model, Layout.of(model), losses=losses, route=route)


def test_a_norm_that_only_looks_like_one_gets_no_rule():
    class OddRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))
            self.eps = 1e-6

        def forward(self, x):
            return self.weight.square() * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    with pytest.raises(UnsupportedLayer, match="OddRMSNorm"):
        rules.rule_for("norm", OddRMSNorm())


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.InstanceNorm1d(6, track_running_stats=True)])
def test_layers_with_statistics_are_refused_on_every_route(layer):
    model = nn.Sequential(nn.Linear(6, 6), layer)
    for route in ("auto", "batched", "one_unit"):
        with pytest.raises(UnsupportedLayer, match=r"'1' of type .*statistics"):
            make_clipper(model, Layout.of(model), 1.0, None, route=route)


def test_a_trainable_tensor_outside_the_layout_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    with pytest.raises(UnsupportedLayer, match=r"1\.weight.*not in the layout"):
        make_clipper(model, Layout({f"0.{n}": p for n, p in model[0].named_parameters()}), 1.0)


def test_embeddings_that_depend_on_the_batch_are_refused():
    for options in ({"max_norm": 1.0}, {"scale_grad_by_freq": True}):
        with pytest.raises(UnsupportedLayer, match="depend on others"):
            rules.rule_for("embedding", nn.Embedding(10, 4, **options))


@EVERY_ROUTE
def test_a_tied_tensor_contributes_one_norm(route):
    """The embedding and head gradients of one tensor add up before the norm; taken apart a unit reached 1.9 C."""
    model = copy.deepcopy(build("llama", "full")[0]).requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    clipper = make_clipper(model, Layout.of(model), 0.01, route=route)
    for user in USERS:
        assert float(clipped_sum(clipper, [user], 8).norm()) == pytest.approx(0.01, rel=1e-5)


numbers = st.floats(-4, 4, width=32, allow_subnormal=False)


@hypothesis.settings(max_examples=60)
@hypothesis.given(data=st.data(), tokens=st.integers(1, 12), cancel=st.booleans())
def test_the_norm_from_factors_is_the_norm_of_the_product(data, tokens, cancel):
    draw = lambda *shape: torch.from_numpy(  # noqa: E731
        data.draw(hypothesis.extra.numpy.arrays(np.float32, shape, elements=numbers))
    )
    left, right, values = draw(1, tokens, 7), draw(1, tokens, 5), draw(1, tokens, 5)
    ids = torch.from_numpy(data.draw(hypothesis.extra.numpy.arrays(np.int64, (1, tokens), elements=st.integers(0, 6))))
    if cancel:  # every token's contribution is taken back by another
        left, right = torch.cat([left, -left], 1), torch.cat([right, right], 1)
    whole = torch.einsum("rtp,rtd->pd", left.double(), right.double()).index_add(0, ids[0], values[0].double())
    square, uncancelled = squares_from_factors(1, (7, 5), Outer(left, right), Lookup(ids, values))
    assert float(square) == pytest.approx(float(whole.square().sum()), rel=2e-5, abs=1e-12 * float(uncancelled))


@pytest.mark.parametrize("size", [1, 4096, 4097, 3 * 10**7])
def test_norms_of_large_tensors_are_not_lost_in_fp32(size):
    value = torch.rand(2, size, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = torch.linalg.vector_norm(value, dim=1, dtype=torch.float64)
    assert torch.allclose(squared_norms(value).sqrt(), exact, rtol=5e-7, atol=0)


def test_a_large_gradients_norm_does_not_depend_on_its_row():
    # 24 rows are more than torch adds up at once, and not a multiple: of a column, other rows take another order.
    value = torch.rand(5 * 8192, generator=torch.Generator().manual_seed(0)).expand(24, -1)
    assert len(set(squared_norms(value).tolist())) == 1


@pytest.mark.parametrize("style", ["flat", "per_layer"])
def test_a_unit_whose_tokens_cancel_is_multiplied_out(style, monkeypatch):
    model, layout = build("qwen2", "full")
    tokens = USERS[4][0]
    user = [tokens, tokens.copy(), tokens.copy(), np.append(tokens[:-1], 9)]
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses = lambda ids, mask: 1e4 * signs[: len(ids)] * row_losses(model, ids, mask)  # noqa: E731
    multiplied = []
    original = clipper_module.UnitGradients.unit
    monkeypatch.setattr(clipper_module.UnitGradients, "unit", lambda self, i: multiplied.append(i) or original(self, i))
    monkeypatch.setattr(clipper_module, "_CANCELLED", 0.5)
    clipper = make_clipper(model, layout, 0.25, losses, style=style, route="batched")
    total = clipped_sum(clipper, [user], 4)
    assert multiplied == [0]
    assert float(total.norm()) <= 0.25 * (1 + 1e-5)


@pytest.mark.parametrize("style", ["flat", "per_layer", "automatic"])
@EVERY_ROUTE
@hypothesis.settings(max_examples=3)
@hypothesis.given(order=st.permutations(range(5)), removed=st.integers(0, 4), size=st.integers(1, 7))
def test_order_batch_mates_and_microbatches_change_nothing(style, route, order, removed, size):
    model, layout = build("gemma3", "full")
    clipper = make_clipper(model, layout, 0.3, style=style, route=route)
    everybody = clipped_sum(clipper, USERS, 16)
    shuffled = [USERS[i] for i in order]
    assert relative_error(clipped_sum(clipper, shuffled, size), everybody.double()) < 1e-5
    without = clipped_sum(clipper, [USERS[i] for i in order if i != removed], size)
    alone = clipped_sum(clipper, [USERS[removed]], 16)
    assert float((everybody - without).norm()) <= 0.3 * (1 + 1e-5)
    assert float((everybody - without - alone).norm()) < 1e-5 * float(everybody.norm())


@pytest.mark.parametrize("style", ["flat", "per_layer", "automatic"])
@EVERY_ROUTE
def test_the_bound_holds_in_bf16_with_all_weights_trained(style, route):
    model, layout = build("qwen3", "full")

    def losses(ids, mask):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return 1e3 * row_losses(model, ids, mask)

    clipper = make_clipper(model, layout, 1.0, losses, style=style, route=route)
    everybody = clipped_sum(clipper, USERS, 4)
    for removed in range(len(USERS)):
        without = clipped_sum(clipper, USERS[:removed] + USERS[removed + 1 :], 4)
        assert float((everybody - without).norm()) <= 1 + 1e-3


@pytest.mark.parametrize("name", ["roberta", "opt", "gpt2"])
def test_only_biases(name):
    model = copy.deepcopy(build(name, "full")[0])
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("bias"))
    check(model, Layout.of(model), losses=losses_of(name, model))


def _moved(model: nn.Module) -> tuple[nn.Module, Layout]:
    layout = Layout.of(model)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layout.parameters.values():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.train(), layout


@functools.cache
def _base(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CAUSAL[name]())


_LORA = functools.partial(peft.LoraConfig, r=2, task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("config", "route"),
    [
        (_LORA(target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]), "auto"),
        (_LORA(target_modules=["q_proj", "down_proj"], use_dora=True), "one_unit"),
        (_LORA(target_modules=["q_proj", "embed_tokens"]), "one_unit"),
        (peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "one_unit"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "one_unit"),
        (peft.IA3Config(task_type="CAUSAL_LM", target_modules=["q_proj"], feedforward_modules=[]), "one_unit"),
    ],
    ids=["modules_to_save", "dora", "lora on embeddings", "prompt tuning", "prefix tuning", "ia3"],
)
def test_other_adapters_are_exact(config, route):
    model, layout = _moved(peft.get_peft_model(copy.deepcopy(_base("qwen2")), config))
    check(model, layout, expected_route=route)


@pytest.mark.parametrize(
    ("method", "route", "reentrant"),
    [
        ("lora", "batched", False),
        ("lora", "batched", True),
        ("full", "batched", False),
        ("full", "batched", True),
        ("full", "two_pass", False),
        ("lora", "two_pass", False),
        ("full", "auto", False),
        ("lora", "one_unit", False),
        ("full", "one_unit", False),
    ],
)
def test_gradient_checkpointing(method, route, reentrant):
    model = copy.deepcopy(build("llama", method)[0])
    reference = brute_force_sum(model, Layout.of(model), USERS, 0.3)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    layout = Layout.of(model)
    for microbatch_size in (2, 16):
        ours = clipped_sum(make_clipper(model, layout, 0.3, route=route), USERS, microbatch_size)
        assert relative_error(ours, reference) < 1e-5


@EVERY_ROUTE
def test_losses_on_some_tokens_only(route):
    """Assistant-only masks: context tokens are not predicted, and a unit with none to predict adds nothing."""
    model, layout = build("llama", "full")
    records = [[np.arange(5, 17)], [np.arange(30, 42)]]
    (batch,) = Packer(2, max_length=12, pad_id=0).pack(records, 1)
    mask = batch.target_mask.clone()
    mask[0, :6], mask[1] = False, False
    clipper = make_clipper(model, layout, 0.3, route=route)
    clipper.reset()
    clipper.accumulate(dataclasses.replace(batch, target_mask=mask))
    loss = row_losses(model, batch.input_ids[:1], mask[:1]).sum() * batch.row_weight[0]
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layout.parameters.values()))]).double()
    expected *= min(1.0, 0.3 / float(expected.norm()))
    assert relative_error(exact_sum.as_float32(clipper.finish(), clipper.grid_exponent), expected) < 1e-5


@EVERY_ROUTE
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_unit_that_is_not_finite_adds_nothing(route, bad):
    model, layout = build("gemma2", "full")
    poison = int(USERS[2][0][0])

    def losses(ids, mask):
        return row_losses(model, ids, mask) * torch.where(ids[:, 0] == poison, bad, 1.0)

    good = [user for user in USERS if all(record[0] != poison for record in user)]
    assert len(good) == len(USERS) - 1
    clipper = make_clipper(model, layout, 0.3, losses, route=route)
    total = clipped_sum(clipper, USERS, 16)
    assert clipper.diagnostics.num_nonfinite == 1
    assert relative_error(total, brute_force_sum(model, layout, good, 0.3)) < 1e-5
