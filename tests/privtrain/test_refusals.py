"""Layers by Opacus' rules or one unit at a time, and everything that is refused, by name and with a reason."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as hf
from opacus.layers import DPGRU, DPLSTM, DPMultiheadAttention
from torch import nn

from privtrain.errors import UnsupportedLayer
from privtrain.models.losses import row_losses
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import brute_force_sum, clipped_sum, invented_users, make_clipper, relative_error
from tests.privtrain.test_parity import _SIZES

USERS = invented_users(5, most_records=3, seed=4)


class Sequences(nn.Module):
    """Token ids through an embedding, a sequence layer and a linear layer: [rows, tokens] → [rows, tokens, 4]."""

    def __init__(self, layer: nn.Module, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 6)
        self.layer = layer
        self.head = nn.Linear(width, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        if isinstance(self.layer, DPMultiheadAttention):
            swapped = hidden.transpose(0, 1)
            mixed = self.layer(swapped, swapped, swapped)[0].transpose(0, 1)
        elif isinstance(self.layer, nn.MultiheadAttention):
            mixed = self.layer(hidden, hidden, hidden, need_weights=False)[0]
        else:
            mixed = self.layer(hidden)[0]
        return self.head(mixed)


def row_loss(model):
    """Of the first two tokens, which every record has: recurrent layers and attention see padding otherwise."""
    return lambda ids, mask: model(ids[:, :2]).square().sum(dim=(1, 2)) + 0 * mask.sum(1)


LAYERS = {
    "DPLSTM": (lambda: DPLSTM(6, 5, batch_first=True), 5, "auto"),
    "DPLSTM, two ways": (lambda: DPLSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True), 10, "auto"),
    "DPGRU": (lambda: DPGRU(6, 5, batch_first=True), 5, "auto"),
    "DPMultiheadAttention": (lambda: DPMultiheadAttention(6, 2), 6, "one_unit"),
    "DPMultiheadAttention with bias_kv": (lambda: DPMultiheadAttention(6, 2, add_bias_kv=True), 6, "one_unit"),
    "LSTM": (lambda: nn.LSTM(6, 5, batch_first=True), 5, "one_unit"),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), 6, "one_unit"),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_sequence_layers_are_exact(kind):
    make, width, route = LAYERS[kind]
    model = Sequences(make(), width)
    layout = Layout.of(model)
    for style in ("flat", "per_layer"):
        reference = brute_force_sum(model, layout, USERS, 0.3, style=style, losses=row_loss(model))
        clipper = make_clipper(model, layout, 0.3, row_loss(model), style=style)
        for microbatch_size in (2, 16):  # 2 rows of 2 tokens: rows and tokens could be taken for each other
            assert relative_error(clipped_sum(clipper, USERS, microbatch_size), reference) < 1e-5
        assert clipper.route == route


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_are_exact(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(300, 6, mode=mode), nn.Linear(6, 4))
    losses = lambda ids, mask: model(ids[:, :2]).square().sum(1) + 0 * mask.sum(1)  # noqa: E731
    layout = Layout.of(model)
    reference = brute_force_sum(model, layout, USERS, 0.3, losses=losses)
    clipper = make_clipper(model, layout, 0.3, losses)
    assert relative_error(clipped_sum(clipper, USERS, 3), reference) < 1e-5
    assert clipper.route == "one_unit"


@pytest.mark.parametrize(
    ("layer", "name", "reason"),
    [
        (nn.LSTM(6, 5, batch_first=True), "'layer' of type LSTM", "Opacus.*DPLSTM"),
        (nn.GRU(6, 5, batch_first=True), "'layer' of type GRU", "Opacus.*GRU class"),
        (nn.MultiheadAttention(6, 2), "'layer' of type MultiheadAttention", "Opacus.*DPMultiheadAttention"),
        (DPMultiheadAttention(6, 2), "'layer' of type DPMultiheadAttention", "tokens before rows"),
        (nn.EmbeddingBag(9, 6), "'layer' of type EmbeddingBag", "no exact per-unit clipping rule"),
    ],
)
def test_the_batched_route_refuses_by_name_and_says_what_to_do(layer, name, reason):
    model = Sequences(layer)
    with pytest.raises(UnsupportedLayer, match=f"{name}.*{reason}") as refused:
        make_clipper(model, Layout.of(model), 1.0, row_loss(model), route="batched")
    assert "performance.clipping_route: one_unit" in str(refused.value)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(6), nn.SyncBatchNorm(6), nn.InstanceNorm1d(6, track_running_stats=True)]
)
def test_statistics_over_units_are_refused_on_every_route(layer):
    model = nn.Sequential(nn.Linear(6, 6), layer)
    for route in ("auto", "batched", "one_unit"):
        with pytest.raises(UnsupportedLayer, match=r"'1' of type .*statistics.*GroupNorm.*\(Opacus: "):
            make_clipper(model, Layout.of(model), 1.0, None, route=route)


def mixtral(**changes) -> nn.Module:
    torch.manual_seed(0)
    config = hf.MixtralConfig(**{**_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    return hf.AutoModelForCausalLM.from_config(config)


def test_a_router_with_a_load_balancing_loss_is_refused_by_name():
    model = mixtral(output_router_logits=True)
    for route in ("auto", "batched", "one_unit"):
        with pytest.raises(
            UnsupportedLayer, match=r"router 'model\.layers\.0\..*' .*load-balancing.*output_router_logits: false"
        ):
            make_clipper(model, Layout.of(model), 1.0, route=route)
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedLayer, match="load-balancing"):
        make_clipper(lora, Layout.of(lora), 1.0)
    switch = hf.SwitchTransformersForConditionalGeneration(
        hf.SwitchTransformersConfig(
            d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, vocab_size=30, num_experts=2
        )
    )
    with pytest.raises(UnsupportedLayer, match=r"expert_capacity|load-balancing"):
        make_clipper(switch, Layout.of(switch), 1.0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_experts_without_it_are_exact_one_unit_at_a_time(method):
    model = mixtral()
    if method == "lora":
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layout = Layout.of(model)
    with pytest.raises(UnsupportedLayer, match="sorts the tokens of a batch by expert"):
        make_clipper(model, layout, 0.3, route="batched")
    clipper = make_clipper(model, layout, 0.3)
    with torch.no_grad():
        for p in layout.parameters.values():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    reference = brute_force_sum(model, layout, USERS, 0.3)
    assert relative_error(clipped_sum(clipper, USERS, 4), reference) < 1e-5
    assert clipper.route == "one_unit"


class FusedHead(nn.Module):
    """A head whose weight a kernel reads by itself, as fused cross-entropies do: its module is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(300, 6)
        self.head = nn.Linear(6, 4, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids) @ self.head.weight.T


def test_kernel_that_hides_activations_is_refused_by_name():
    model = FusedHead()
    layout, losses = Layout.of(model), lambda ids, mask: (model(ids).square().sum(-1) * mask).sum(1)
    with pytest.raises(UnsupportedLayer, match=r"'head\.weight' .*fused kernel.*one_unit"):
        clipped_sum(make_clipper(model, layout, 0.3, losses, route="batched"), USERS, 4)
    clipper = make_clipper(model, layout, 0.3, losses)
    reference = brute_force_sum(model, layout, USERS, 0.3, losses=losses)
    assert relative_error(clipped_sum(clipper, USERS, 4), reference) < 1e-5
    assert clipper.route == "one_unit"


def test_unused_module_is_not_refused():
    model = FusedHead()
    model.spare = nn.Linear(3, 3)
    model.head.weight.requires_grad_(False)
    layout, losses = Layout.of(model), lambda ids, mask: (model(ids).square().sum(-1) * mask).sum(1)
    clipper = make_clipper(model, layout, 0.3, losses, route="batched")
    reference = brute_force_sum(model, layout, USERS, 0.3, losses=losses)
    assert relative_error(clipped_sum(clipper, USERS, 4), reference) < 1e-5


def test_the_check_for_hidden_uses_leaves_dropout_as_it_was():
    model = FusedHead()
    model.spare = nn.Linear(3, 3)
    model.head.weight.requires_grad_(False)
    dropout = nn.Dropout(0.5)
    losses = lambda ids, mask: (dropout(model(ids)).square().sum(-1) * mask).sum(1)  # noqa: E731
    clipper = make_clipper(model, Layout.of(model), 0.3, losses, route="batched")
    sums = []
    for _ in range(2):
        torch.manual_seed(5)
        sums.append(clipped_sum(clipper, USERS, 4))
    assert torch.equal(*sums)


def test_loss_over_prompt_tuning_is_refused_on_batched(tiny_llama):
    base = hf.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(UnsupportedLayer, match="prompt and prefix tuning"):
        make_clipper(model, Layout.of(model), 1.0, lambda ids, mask: row_losses(model, ids, mask), route="batched")
