"""Clipping, noise, replay and resuming on a GPU, against loops on the CPU."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import transformers as hf

from privtrain.backends import LocalBackend
from privtrain.clipping import PerUnitClipper, exact_sum, styles
from privtrain.data.microbatch import Packer
from privtrain.errors import ModelFailed, SelfTestFailed
from privtrain.models.losses import row_losses
from privtrain.privacy.banded import Strategy
from privtrain.privacy.correlated import NoiseHistory
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import StepNoise, noised
from privtrain.privacy.secret import SecretKey
from privtrain.training.selftest import run_self_test
from tests.conftest import write_config
from tests.jobs import REPOSITORY
from tests.privtrain.cells import NUM_STEPS, Cell, make_trainer, self_test, trained
from tests.privtrain.models_for_tests import Users, brute_force_sum, invented_users, relative_error, tiny_lora

pytestmark = pytest.mark.gpu

_NORM = 0.3
_ROUTES = [("lora", "batched"), ("lora", "one_unit"), ("full", "batched"), ("full", "two_pass"), ("full", "one_unit")]
#: bf16 keeps 8 bits; over a few hundred products of a tiny model's backward pass that adds up to about a percent.
_TOLERANCE = {"fp32": 1e-5, "bf16": 0.05}


def on(device: torch.device, base, method: str) -> tuple[torch.nn.Module, Layout]:
    """A copy of the tiny model there, its adapter away from its starting point."""
    model = copy.deepcopy(tiny_lora(base)[0])
    if method == "full":
        model = model.get_base_model().requires_grad_(True)
    model = model.to(device)
    return model, Layout.of(model)


def clip(model, layout: Layout, users: Users, device: torch.device, route: str, precision: str = "fp32", size: int = 4):
    """The clipped sum in grid steps, on the CPU, and the clipper's grid."""

    def losses(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return row_losses(model, ids, mask)

    clipper = PerUnitClipper(model, layout, _NORM, losses, device, route=route)
    packer = Packer(size, max_length=16, pad_id=0)
    clipper.reset()
    for batch in packer.pack(users, packer.num_batches(users)):
        clipper.accumulate(batch.to(device))
    return clipper.finish().cpu().clone(), clipper.grid_exponent


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "route"), _ROUTES)
def test_clipped_sum_is_that_of_a_loop_over_users(device, base, method, route, precision):
    users = invented_users(6, most_records=3)
    expected = brute_force_sum(*on(torch.device("cpu"), base, method), users, _NORM)
    total, exponent = clip(*on(device, base, method), users, device, route, precision)
    assert relative_error(exact_sum.as_float32(total, exponent), expected) < _TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "route"), _ROUTES)
def test_a_user_is_clipped_to_the_same_bits_whoever_is_there(device, base, method, route, precision):
    model, layout = on(device, base, method)
    users = invented_users(6, most_records=3)
    alone = sum(clip(model, layout, [user], device, route, precision)[0] for user in users)
    for order in itertools.islice(itertools.permutations(range(6)), 0, 720, 180):
        together, _ = clip(model, layout, [users[i] for i in order], device, route, precision)
        assert torch.equal(together, alone)


@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"])
def test_every_attention_kernel_keeps_users_apart(device, base, backend):
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model, layout = on(device, base, "lora")
    users = invented_users(4, most_records=2)
    try:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            alone = sum(clip(model, layout, [user], device, "batched", "bf16")[0] for user in users)
            together, _ = clip(model, layout, users, device, "batched", "bf16")
    except (RuntimeError, ModelFailed) as error:
        if "No available kernel" not in str(error) and "No viable backend" not in str(error):
            raise
        pytest.skip(f"{backend} does not run here")
    assert torch.equal(together, alone)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_self_test_passes(device, base, method):
    trainer = make_trainer(LocalBackend(device), base, Cell(method=method))
    assert self_test(trainer) in ("auto", "batched", "two_pass")


def _factor_of_one(factors: Callable) -> Callable:
    return lambda *arguments, **keywords: torch.ones_like(factors(*arguments, **keywords))


@contextlib.contextmanager
def _loud_mate(model: torch.nn.Module) -> Iterator[None]:
    """A layer whose scale is that of its loudest row, as a kernel that quantises a whole batch has."""
    layer = next(m for name, m in model.named_modules() if name.endswith("up_proj"))

    def couple(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        step = output.detach().abs().amax() / 127
        return output + ((output / step).round() * step - output).detach()

    handle = layer.register_forward_hook(couple)
    try:
        yield
    finally:
        handle.remove()


def test_self_test_finds_rows_that_share_a_scale(device, base):
    trainer = make_trainer(LocalBackend(device), base, Cell())
    with _loud_mate(trainer.model), pytest.raises(SelfTestFailed):
        run_self_test(trainer, vocabulary_size=200, precision="fp32")


def test_self_test_finds_that_nothing_is_clipped(device, base, monkeypatch):
    trainer = make_trainer(LocalBackend(device), base, Cell())
    monkeypatch.setattr(styles, "factors", _factor_of_one(styles.factors))
    with pytest.raises(SelfTestFailed):
        run_self_test(trainer, vocabulary_size=200, precision="fp32")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_repeats_bit_for_bit(device, base, method):
    runs = []
    for _ in range(2):
        trainer = make_trainer(LocalBackend(device), base, Cell(method=method))
        for step in range(NUM_STEPS):
            trainer.train_step(step)
        runs.append(trained(trainer))
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_loud_user_beside_fifteen_moves_none_of_them(device, base, quantization):
    pytest.importorskip("bitsandbytes")
    if device.type != "cuda":
        pytest.skip("its CUDA kernels are what is tested")
    options = {"int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0}, "nf4": {"load_in_4bit": True}}
    config = hf.BitsAndBytesConfig(**options[quantization])
    model = hf.AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": 0})
    from privtrain.config.model import LoraSection
    from privtrain.models.trainable import add_lora

    model = add_lora(model, LoraSection(rank=2, alpha=4), init_seed=0, public_name="tiny")
    layout = Layout.of(model)
    users = invented_users(16, most_records=1)
    quiet, _ = clip(model, layout, users[:15], device, "auto", size=16)
    loud_alone, _ = clip(model, layout, users[15:], device, "auto", size=16)
    together, _ = clip(model, layout, users, device, "auto", size=16)
    assert torch.equal(together, quiet + loud_alone)


def test_noise_has_the_planned_spread_and_is_quick(device, base, capsys):
    num = 10_000_000 if device.type == "cuda" else 100_000
    trainer = make_trainer(LocalBackend(device), base, Cell())
    trainer.clipper.reset()
    zeros = torch.zeros(trainer.layout.num_coordinates, dtype=torch.int64, device=device)
    noise = trainer.bound_sum(trainer.clipper, zeros, {}, trainer._key, 0).noise
    started = time.monotonic()
    drawn = noised(torch.zeros(num, dtype=torch.int64, device=device), exponent=-40, stddev=2.0, noise=noise, name="x")
    values = drawn.double().cpu()
    seconds = time.monotonic() - started
    with capsys.disabled():
        print(f"\nnoise: {num / seconds / 1e6:.1f} million coordinates a second on {device.type}")
    spread = 2.0 * np.sqrt(2 / num) * 5
    assert abs(float(values.square().mean()) / 4.0 - 1) < spread
    assert abs(float(values.mean())) < 5 * 2.0 / np.sqrt(num)
    beyond = float((values.abs() > 6.0).double().mean())
    assert beyond == pytest.approx(0.0026998, rel=0.3)


def test_noise_on_the_device_is_that_of_the_cpu_bit_for_bit(device, base):
    """Digits, inverse normal and rounding: blocks entered within, tensors of one number, whole vectors."""
    sums = torch.from_numpy(np.random.default_rng(0).integers(-(2**50), 2**50, 300_000))
    noise = StepNoise(SecretKey.insecure(1, "gpu"))
    for first, count in ((0, len(sums)), (65_531, 9), (3, 1), (131_072, 200_000)):
        kind = {"exponent": -42, "stddev": 0.51, "noise": noise, "name": "w", "first": first}
        there = noised(sums[:count].to(device), **kind)
        assert there.device.type == device.type
        assert torch.equal(there.cpu(), noised(sums[:count], **kind))


def test_correlated_noise_on_the_device_is_that_of_the_cpu(device):
    layout = Layout({"w": torch.nn.Parameter(torch.empty(100_000, device="meta"))})
    strategy = Strategy.rounded([1.0, 0.7, -0.2])
    histories = [
        NoiseHistory(strategy, layout, where, exponent=-42, stddev=0.51) for where in (device, torch.device("cpu"))
    ]
    for step in range(4):
        noise = StepNoise(SecretKey.insecure(step, "gpu"))
        there, here = (history.advance(noise).cpu() for history in histories)
        assert torch.equal(there, here)


def test_a_killed_job_goes_on_to_the_same_adapter(device, tree, tmp_path):
    """Killed once two steps are there, and started again: the bytes of an undisturbed run."""
    tree["privacy"] |= {"num_steps": 6, "insecure_seed": 3}
    tree.setdefault("performance", {})["checkpoint_interval_steps"] = 1
    environment = os.environ | ({} if device.type == "cuda" else {"ACCELERATE_USE_CPU": "true"})
    found = []
    for name in ("undisturbed", "killed"):
        tree["run"] = {"name": name, "output_dir": str(tmp_path / "runs")}
        command = [sys.executable, "-m", "privtrain", "train", str(write_config(tree, tmp_path / f"{name}.yaml"))]
        run = tmp_path / "runs" / name
        if name == "killed":
            job = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
            while job.poll() is None and not (run / "checkpoints" / "step-00000002").exists():
                time.sleep(0.02)
            job.send_signal(signal.SIGKILL)
            job.wait()
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, stdout=subprocess.DEVNULL)
        found.append((run / "adapter" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
