"""Attention of a whole line in one kernel, with a stand-in for the GPU's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as hf

from privtrain.clipping import attention, variable_length
from privtrain.data.lines import LinePacker
from privtrain.errors import UnsupportedLayer
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import invented_users
from tests.privtrain.test_lines import after_self_test, make, total_of
from tests.privtrain.test_parity import _SIZES, CAUSAL, build

_CPU = torch.device("cpu")
_PACKER = LinePacker(128, 128, 8, 16, 0)
_NUM_MULTIPROCESSORS = 6


class Kernel:
    """Computes what torch's kernel would, sequence by sequence, and notes how it was called.

    ``leak`` is a share of the whole line's mean that every token gets: a kernel that mixes records.
    """

    def __init__(self, leak: float = 0.0) -> None:
        self.leak = leak
        self.launches: list[SimpleNamespace] = []

    def __call__(self, query, key, value, bounds, key_bounds, longest, longest_key, **options):
        assert query.dtype == key.dtype == value.dtype == torch.bfloat16
        assert torch.equal(bounds, key_bounds)
        assert longest == longest_key
        self.launches.append(SimpleNamespace(bounds=bounds.tolist(), longest=longest, heads=query.shape[1], **options))
        parts = []
        for first, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            if first == stop:
                continue
            sides = (side[first:stop].transpose(0, 1)[None].contiguous() for side in (query, key, value))
            place = torch.arange(stop - first)
            left = options["window_size"][0]
            distance = place[:, None] - place[None]
            seen = (distance >= 0) & (distance <= (left if left >= 0 else stop))
            found = F.scaled_dot_product_attention(
                *sides, attn_mask=seen, scale=options["scale"], enable_gqa=options["enable_gqa"]
            )
            parts.append(found[0].transpose(0, 1))
        output = torch.cat(parts)
        return output + self.leak * output.mean() if self.leak else output


@pytest.fixture
def kernel(monkeypatch) -> Kernel:
    return install(Kernel(), monkeypatch)


def install(kernel: Kernel, monkeypatch) -> Kernel:
    monkeypatch.setattr(variable_length, "_kernel", kernel)
    monkeypatch.setattr(variable_length, "refusal", lambda _device: "")
    monkeypatch.setattr(variable_length, "_num_multiprocessors", lambda _device: _NUM_MULTIPROCESSORS)
    return kernel


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_one_kernel_adds_what_attention_by_record_adds(name, kernel):
    model, layout = build(name, "full")
    users = invented_users(7, most_records=4)
    by_record = total_of(make(model, layout, precision="bf16"), users, _PACKER)
    in_one = total_of(make(model, layout, precision="bf16", in_one_kernel=True), users, _PACKER)
    assert kernel.launches
    change = (in_one - by_record).double().norm() / by_record.double().norm()
    assert change < 0.02  # bf16


def test_a_launch_depends_on_the_line_alone(kernel):
    model, layout = build("llama", "lora")
    clipper = make(model, layout, precision="bf16", in_one_kernel=True)
    users = invented_users(7, most_records=4)
    for units in (users[:1], users[3:5], users):
        total_of(clipper, units, _PACKER)
    assert len({launch.longest for launch in kernel.launches}) == 1
    for launch in kernel.launches:
        assert launch.longest == launch.bounds[-1] == _PACKER.num_tokens, "padding is a sequence too"
        # The backward pass then adds up in one part, however few records there are.
        assert (len(launch.bounds) - 1) * launch.heads >= _NUM_MULTIPROCESSORS
        assert launch.num_splits == 1


def test_windows_and_shared_heads_reach_the_kernel(kernel):
    window = 5
    torch.manual_seed(0)
    config = hf.MistralConfig(**{**_SIZES, "num_key_value_heads": 1}, sliding_window=window)
    model = hf.AutoModelForCausalLM.from_config(config)
    layout = Layout.of(model)
    users = invented_users(5, most_records=3)
    by_record = total_of(make(model, layout, precision="bf16"), users, _PACKER)
    in_one = total_of(make(model, layout, precision="bf16", in_one_kernel=True), users, _PACKER)
    assert {(launch.window_size, launch.enable_gqa) for launch in kernel.launches} == {((window - 1, 0), True)}
    assert (in_one - by_record).double().norm() / by_record.double().norm() < 0.02


@pytest.mark.parametrize(("name", "precision", "fits"), [("llama", "bf16", True), ("llama", "fp32", False)])
def test_self_test_takes_one_kernel_where_it_fits(name, precision, fits, kernel):
    torch.manual_seed(0)
    trainer = after_self_test(hf.AutoModelForCausalLM.from_config(CAUSAL[name]()), precision=precision)
    assert (trainer.packs_lines, trainer.why_by_record) == (True, "")
    assert bool(kernel.launches) is fits


def test_dropout_and_eager_attention_go_record_by_record(kernel):
    users = invented_users(3, most_records=2)
    torch.manual_seed(0)
    dropping = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**_SIZES, attention_dropout=0.3)).train()
    eager = hf.AutoModelForCausalLM.from_config(hf.LlamaConfig(**_SIZES), attn_implementation="eager").train()
    for model in (dropping, eager):
        total_of(make(model, Layout.of(model), precision="bf16", in_one_kernel=True), users, _PACKER)
    assert not kernel.launches


def test_a_kernel_that_mixes_records_is_not_used(monkeypatch):
    leaking = install(Kernel(leak=1e-2), monkeypatch)
    torch.manual_seed(0)
    trainer = after_self_test(hf.AutoModelForCausalLM.from_config(CAUSAL["llama"]()), precision="bf16")
    assert leaking.launches
    assert trainer.packs_lines, "lines stay, record by record"
    assert "units" in trainer.why_by_record
    assert not trainer.clipper.in_one_kernel
    num_launches = len(leaking.launches)
    total_of(trainer.clipper, invented_users(3, most_records=2), _PACKER)
    assert len(leaking.launches) == num_launches


def test_a_kernel_that_fails_is_not_used(monkeypatch):
    def failing(*_arguments, **_options):
        raise RuntimeError("no kernel image is available")

    install(failing, monkeypatch)
    torch.manual_seed(0)
    trainer = after_self_test(hf.AutoModelForCausalLM.from_config(CAUSAL["llama"]()), precision="bf16")
    assert trainer.packs_lines
    assert "no kernel image" in trainer.why_by_record


def test_a_cpu_has_no_such_kernel():
    assert variable_length.refusal(_CPU)


def test_one_kernel_sees_one_line_of_tokens_alone(kernel):
    model, _ = build("llama", "lora")
    (line,) = _PACKER.pack(invented_users(2, most_records=1), 1)
    with pytest.raises(UnsupportedLayer, match="one line"), attention.within_records(model, line, in_one_kernel=True):
        model(line.input_ids[:, :5])
