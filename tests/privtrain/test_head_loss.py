"""Losses in chunks of tokens are those of the whole logits, and so are their gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from privtrain.models import head_loss
from privtrain.models.head_loss import FrozenHead, cross_entropy
from tests.privtrain.test_parity import CAUSAL


@pytest.mark.parametrize("num_tokens", [1, 61, 128, 192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_of_chunks_are_those_of_all_logits(num_tokens, dtype):
    torch.manual_seed(0)
    logits = (8 * torch.randn(num_tokens, 50)).to(dtype).requires_grad_()
    targets, weight = torch.randint(0, 50, (num_tokens,)), torch.rand(num_tokens)
    found, expected = cross_entropy(logits, targets), F.cross_entropy(logits.float(), targets, reduction="none")
    assert torch.allclose(found, expected, atol=1e-5)
    gradients = [torch.autograd.grad((losses * weight).sum(), logits)[0].float() for losses in (found, expected)]
    assert float((gradients[0] - gradients[1]).abs().max()) <= (1e-6 if dtype == torch.float32 else 4e-3)


def model_of(name: str):
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CAUSAL[name]()).train()


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_frozen_head_gives_the_models_losses_and_gradients(name):
    model = model_of(name)
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    found = FrozenHead.of(model)
    assert found is not None
    assert model.training
    ids, targets, weight = torch.randint(0, 90, (1, 48)), torch.randint(0, 90, (48,)), torch.rand(48)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    ours = (found.losses(targets, input_ids=ids) * weight).sum()
    plain = (F.cross_entropy(model(input_ids=ids).logits[0], targets, reduction="none") * weight).sum()
    assert float(ours) == pytest.approx(float(plain), rel=1e-5)
    pairs = zip(*(torch.autograd.grad(loss, trained) for loss in (ours, plain)), strict=True)
    assert all(float((a - b).norm()) <= 1e-5 * float(b.norm() + 1e-3) for a, b in pairs)


def test_heads_that_are_trained_capped_or_hooked_need_all_logits():
    assert FrozenHead.of(model_of("llama")) is None  # trained
    capped = model_of("gemma2")
    capped.requires_grad_(False)
    assert FrozenHead.of(capped) is None
    model = model_of("llama")
    model.requires_grad_(False)
    assert FrozenHead.of(model) is not None
    model.lm_head.register_forward_hook(lambda *_: None)
    assert FrozenHead.of(model) is None


def test_no_logits_of_all_tokens_exist_under_a_frozen_head(monkeypatch):
    model = model_of("llama")
    model.requires_grad_(False)
    found, sizes = FrozenHead.of(model), []
    assert found is not None
    right = head_loss._losses
    monkeypatch.setattr(head_loss, "_losses", lambda own, wanted: sizes.append(len(own)) or right(own, wanted))
    found.losses(torch.zeros(192, dtype=torch.int64), input_ids=torch.zeros(1, 192, dtype=torch.int64))
    assert sizes == [64] * 3
