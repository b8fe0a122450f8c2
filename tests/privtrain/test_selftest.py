"""Invariant 9: planted faults make the start-up self-test refuse to train."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from privtrain.backends import LocalBackend, ddp
from privtrain.clipping import capture, clipper, rules, styles
from privtrain.errors import SelfTestFailed
from privtrain.models import row_losses
from privtrain.noise import add_gaussian_noise_
from privtrain.training.selftest import run_self_test
from tests.privtrain.models_for_tests import tiny_lora
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")


def self_test(directory, backend) -> None:
    model, layout = tiny_lora(directory)
    run_self_test(
        model=model,
        layout=layout,
        row_losses=lambda ids, mask: row_losses(model, ids, mask),
        clipping_norm=0.5,
        noise_multiplier=1.3,
        backend=backend,
        vocabulary_size=200,
        precision="fp32",
    )


def test_it_passes_and_leaves_the_model_bit_for_bit_as_it_was(tiny_llama):
    _, layout = tiny_lora(tiny_llama)
    before = [p.detach().clone() for p in layout.parameters.values()]
    self_test(tiny_llama, LocalBackend(CPU))
    assert all(torch.equal(a, b) for a, b in zip(before, layout.parameters.values(), strict=True))
    assert all(p.grad is None for p in layout.parameters.values())


def unclipped(style, norms, clipping_norm):
    return torch.ones_like(norms)


def wrong_rule(module, activation, output_gradient):
    return rules.linear(module, activation, 0 * output_gradient)


class DoubleNoise(LocalBackend):
    def add_noise(self, vector, layout, key, step, stddev):
        add_gaussian_noise_(vector, layout, key=key, step=step, stddev=2 * stddev)


class NoNoise(LocalBackend):
    def add_noise(self, vector, layout, key, step, stddev):
        pass


class MeanNotSum(LocalBackend):
    def reduce(self, vector):
        vector.div_(2)


class Doubled(LocalBackend):
    def reduce(self, vector):
        vector.mul_(2)


def test_mutant_clipping_skipped(tiny_llama, monkeypatch):
    monkeypatch.setattr(styles, "factors", unclipped)
    with pytest.raises(SelfTestFailed, match="above clipping_norm"):
        self_test(tiny_llama, LocalBackend(CPU))


def test_mutant_rule_that_loses_a_layer(tiny_llama, monkeypatch):
    monkeypatch.setitem(rules._RULES, torch.nn.Linear, wrong_rule)
    with pytest.raises(SelfTestFailed, match="is off by"):
        self_test(tiny_llama, LocalBackend(CPU))


def test_mutant_one_layer_is_not_captured(tiny_llama, monkeypatch):
    original = capture.captured
    monkeypatch.setattr(
        clipper,
        "captured",
        lambda modules, parameters, num_rows, sink: original(
            dict(list(modules.items())[1:]), parameters, num_rows, sink
        ),
    )
    monkeypatch.setattr(clipper.PerUnitClipper, "_refuse_hidden_uses", lambda *_: None)  # which would see it first
    with pytest.raises(SelfTestFailed, match="a layer is not covered"):
        self_test(tiny_llama, LocalBackend(CPU))


def test_mutant_a_unit_is_clipped_record_by_record(tiny_llama, monkeypatch):
    original = clipper.PerUnitClipper.accumulate

    def forgetful(self, batch):
        original(self, batch)
        if self._open is not None:
            so_far, self._open.gradient = self._open.gradient, {}
            self._add_unit(dataclasses.replace(batch, last_continues=False), len(batch.owners), so_far)

    monkeypatch.setattr(clipper.PerUnitClipper, "accumulate", forgetful)
    with pytest.raises(SelfTestFailed):
        self_test(tiny_llama, LocalBackend(CPU))


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (DoubleNoise, "noise has standard deviation"),
        (NoNoise, "noise has standard deviation"),
        (MeanNotSum, "is off by"),
        (Doubled, "above clipping_norm"),
    ],
)
def test_mutant_backend(tiny_llama, backend, message):
    with pytest.raises(SelfTestFailed, match=message):
        self_test(tiny_llama, backend(CPU))


def _on_ranks(directory, mutant: str) -> str:
    backend = ddp.DdpBackend(CPU)
    if mutant == "mean":
        sum_reduce = backend.reduce

        def mean_reduce(vector):
            sum_reduce(vector)
            vector.div_(backend.world_size)

        backend.reduce = mean_reduce
    if mutant == "rank noise":
        backend.add_noise = lambda vector, layout, key, step, stddev: add_gaussian_noise_(
            vector, layout, key=key, step=step + backend.rank, stddev=stddev
        )
    if mutant == "different start":
        _, layout = tiny_lora(directory)
        with torch.no_grad():
            next(iter(layout.parameters.values())).add_(1e-3 * backend.rank)
    try:
        self_test(directory, backend)
    except SelfTestFailed as error:
        return str(error)
    return "passed"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        ("none", "passed"),
        ("mean", "is off by"),
        ("rank noise", "different noise"),
        ("different start", "different trainable parameters"),
    ],
)
def test_mutants_on_two_ranks(tiny_llama, mutant, message):
    for outcome in run_on_ranks(2, _on_ranks, tiny_llama, mutant):
        assert message in outcome
