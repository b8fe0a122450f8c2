"""The causality probe: models that look ahead or read their padding do not begin to train."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from privtrain.errors import SelfTestFailed
from tests.privtrain.test_parity import _SIZES
from tests.privtrain.test_probes import OverTheBatch, start, with_layer


def test_bert_without_decoder_is_refused_with_the_way_out():
    config = hf.BertConfig(**{**_SIZES, "initializer_range": 0.02}, is_decoder=False)
    torch.manual_seed(0)
    with pytest.raises(SelfTestFailed, match=r"BertLMHeadModel is not causal.*set is_decoder: true"):
        start(hf.AutoModelForCausalLM.from_config(config))
    config.is_decoder = True
    assert start(hf.AutoModelForCausalLM.from_config(config)) == "auto"


class LooksAhead(nn.Module):
    """A little of the next token, as a mask that is off by one lets through."""

    def forward(self, hidden):
        return hidden + 1e-2 * torch.cat([hidden[:, 1:], hidden[:, -1:]], dim=1)


def test_mask_that_is_off_by_one_is_refused():
    with pytest.raises(SelfTestFailed, match="LlamaForCausalLM is not causal"):
        start(with_layer(LooksAhead()))


class FarOut(nn.Module):
    """A layer that is there for long rows alone, as blocks of attention are."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer(hidden) if hidden.shape[1] > 16 else hidden


@pytest.mark.parametrize(
    ("layer", "message"),
    [(LooksAhead, r"is not causal|reads the padding"), (OverTheBatch, r"rows of a batch are mixed by .*OverTheBatch")],
)
def test_what_only_long_rows_do_is_found(layer, message):
    with pytest.raises(SelfTestFailed, match=message):
        start(with_layer(FarOut(layer())))


class CountsTokens(nn.Module):
    """By the width of the row, which padding belongs to."""

    def forward(self, hidden):
        return hidden / hidden.shape[1]


def test_model_that_reads_padding_is_refused():
    with pytest.raises(SelfTestFailed, match="LlamaForCausalLM reads the padding"):
        start(with_layer(CountsTokens()))
