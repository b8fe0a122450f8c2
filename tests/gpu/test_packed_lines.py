"""Packed lines on a GPU: attention record by record, and of a whole line in one kernel."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf

from privtrain.clipping import exact_sum, variable_length
from privtrain.clipping.lines import LineClipper
from privtrain.data.lines import LinePacker
from privtrain.models.losses import row_losses, token_losses
from privtrain.privacy.layout import Layout
from privtrain.training.selftest import run_self_test
from tests.privtrain.models_for_tests import Users, relative_error
from tests.privtrain.test_probes import trainer_of

pytestmark = pytest.mark.gpu

_NUM_PACKINGS = {"cuda": 20, "cpu": 2}
_PACKER = LinePacker(512, 512, 16, 256, 0)
_WAYS = ["by record", "in one kernel"]


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    """Heads of 64 numbers, four to a key, as small Llamas have."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    return hf.LlamaForCausalLM(config)


@pytest.fixture
def way(request, device) -> bool:
    """Whether one kernel does it; skips what the device does not have."""
    in_one_kernel = request.param == "in one kernel"
    why_not = variable_length.refusal(device) if in_one_kernel else ""
    if why_not:
        pytest.skip(why_not)
    return in_one_kernel


def users_of(num: int) -> Users:
    rng = np.random.default_rng(0)
    return [[rng.integers(3, 500, size=rng.integers(3, 120)) for _ in range(rng.integers(1, 4))] for _ in range(num)]


def clipper_of(model: torch.nn.Module, device: torch.device, *, in_one_kernel: bool) -> LineClipper:
    there = copy.deepcopy(model).to(device).train()

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16)

    def of_line(line) -> torch.Tensor:
        with autocast():
            return token_losses(there, line)

    def of_rows(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with autocast():
            return row_losses(there, ids, mask)

    return LineClipper(of_line, there, Layout.of(there), 0.3, of_rows, device, in_one_kernel=in_one_kernel)


def total_of(clipper: LineClipper, units: Users, device: torch.device) -> torch.Tensor:
    clipper.reset()
    for line in _PACKER.pack(units, _PACKER.num_batches(units)):
        clipper.accumulate(line.to(device))
    return clipper.finish().cpu().clone()


@pytest.mark.parametrize("way", _WAYS, indirect=True)
def test_a_unit_adds_the_same_bits_in_every_packing(device, model, way):
    clipper, users = clipper_of(model, device, in_one_kernel=way), users_of(24)
    alone = [total_of(clipper, [user], device) for user in users]
    rng = np.random.default_rng(1)
    for _ in range(_NUM_PACKINGS[device.type]):
        members = rng.permutation(len(users))[: rng.integers(2, len(users) + 1)]
        together = total_of(clipper, [users[i] for i in members], device)
        assert torch.equal(together, sum(alone[i] for i in members))


def test_one_kernel_adds_what_attention_by_record_adds(device, model):
    why_not = variable_length.refusal(device)
    if why_not:
        pytest.skip(why_not)
    sums = []
    for in_one_kernel in (False, True):
        clipper = clipper_of(model, device, in_one_kernel=in_one_kernel)
        sums.append(exact_sum.as_float32(total_of(clipper, users_of(24), device), clipper.grid_exponent))
    assert relative_error(sums[1], sums[0]) < 0.05  # bf16


def test_self_test_packs_lines(device, model):
    from privtrain.backends import LocalBackend

    trainer = trainer_of(copy.deepcopy(model).to(device), precision="bf16", backend=LocalBackend(device))
    trainer.autocast = torch.autocast(device.type, torch.bfloat16)
    trainer.line_packer = LinePacker.of(trainer.packer.max_length, 8, 0, device_type=device.type)
    trainer.clipper = trainer.new_clipper(trainer.row_losses, "auto")
    run_self_test(trainer, vocabulary_size=200, precision="bf16")
    assert (trainer.packs_lines, trainer.why_rows) == (True, "")
    assert trainer.why_by_record == variable_length.refusal(device)
