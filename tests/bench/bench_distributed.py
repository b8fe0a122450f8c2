"""What privacy costs on several ranks: ``python -m tests.bench.bench_distributed``; two gloo processes on this machine.

1. LoRA: a private step over a plain one of the same backend (same rows, summed loss, one reduction, one AdamW step),
   bytes sent in each, and the share of the noise.
2. All weights, in one pass and in two: the most gradient bytes that stay on a rank, against the whole gradient.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from privtrain.backends.base import step_optimizer
from privtrain.clipping import ShardedClipper
from privtrain.data.microbatch import Packer
from privtrain.data.units import UnitData
from privtrain.training.trainer import Trainer
from tests.privtrain import cells
from tests.ranks import run_on_ranks

NUM_RANKS = 2
NUM_ROUNDS = 16
LENGTH = 128


def save_model(directory: pathlib.Path, hidden_size: int, num_layers: int) -> pathlib.Path:
    """A random Llama of a size where a step takes a fraction of a second."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def make_trainer(name: str, directory: pathlib.Path, method: str, route: str = "auto") -> Trainer:
    cell = cells.Cell(method=method, unit="example", sampling_prob=1.0, microbatch_size=8, route=route)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = cells.make_trainer(cells.make_backend(name), directory, cell)
    rng = np.random.default_rng(0)
    records = tuple((rng.integers(1, 512, size=LENGTH),) for _ in range(16))
    trainer._units = UnitData(tuple(map(str, range(16))), records, 0)
    scheme, num_records = trainer.plan.scheme, trainer._units.num_records
    trainer.sampler = type(trainer.sampler)(scheme, trainer.plan.records_per_unit, trainer._key, num_records)
    trainer.packer = Packer(8, max_length=LENGTH, pad_id=0)
    return trainer


def plain_step(trainer: Trainer, step: int) -> None:
    """The same rows without clipping and noise: backward of the summed loss, one reduction, one optimizer step."""
    clipped = trainer.placement.clipped
    total = clipped.zeros(trainer.backend.device)
    for batch in trainer.microbatches(trainer.sampler.draw(step)):
        loss = (trainer.row_losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum()
        gradients = torch.autograd.grad(loss, list(clipped.parameters.values()))
        for slot, gradient in zip(clipped.slots, gradients, strict=True):
            clipped.view(total, slot).add_(gradient)
    part = trainer.backend.reduce_total(total)
    step_optimizer(part, trainer.layout, trainer.optimizer, 16.0)
    trainer.backend.publish()


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes that this rank hands to gradient and parameter collectives, from torch's profiler."""
    counts = {"bytes": 0}
    with torch.profiler.profile(record_shapes=True) as profile:
        yield counts
    for event in profile.events() or []:
        if event.name.startswith("gloo:"):
            counts["bytes"] += sum(int(np.prod(shape)) * 4 for shape in event.input_shapes[:1] if shape)


def alternating_seconds(first: Callable[[int], Any], second: Callable[[int], Any]) -> list[tuple[float, float]]:
    """Seconds of both in each round; by turns one or the other begins, so that what else runs here hits both alike."""
    rounds: list[tuple[float, float]] = []
    for step in range(NUM_ROUNDS):
        taken: dict[Any, float] = {}
        for function in (first, second) if step % 2 else (second, first):
            dist.barrier()
            started = time.perf_counter()
            function(step)
            dist.barrier()
            taken[function] = time.perf_counter() - started
        rounds.append((taken[first], taken[second]))
    return rounds[1:]


def lora(name: str, directory: pathlib.Path) -> dict[str, Any]:
    trainer = make_trainer(name, directory, "lora")
    private, plain = trainer.train_step, lambda step: plain_step(trainer, step)
    noise_seconds = []
    original = trainer.backend.add_noise

    def timed(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        vector = original(*arguments, **named)
        noise_seconds.append(time.perf_counter() - started)
        return vector

    trainer.backend.add_noise = timed  # type: ignore[method-assign]
    rounds = alternating_seconds(private, plain)
    seconds = statistics.median(first for first, _ in rounds)
    sent = []
    for function in (private, plain):
        with counted_bytes() as counts:
            function(0)
        sent.append(counts["bytes"])
    share = statistics.median(noise_seconds) / seconds
    ratio = statistics.median(first / second for first, second in rounds)
    return {"ratio": ratio, "step_ms": seconds * 1e3, "noise_share": share, "sent_bytes": sent}


def full(name: str, directory: pathlib.Path, route: str) -> dict[str, Any]:
    """Bytes of the clipped sum that stay on a rank, and the largest tensor of it on its way."""
    trainer = make_trainer(name, directory, "full", route)
    whole = 4 * sum(int(np.prod(slot.whole_shape)) for slot in trainer.layout.slots)
    clipper = trainer.clipper
    assert isinstance(clipper, ShardedClipper)
    in_flight = [0]
    original = clipper._sum.contribution

    @contextlib.contextmanager
    def watched(name: str) -> Iterator[torch.Tensor]:
        with original(name) as out:
            yield out
            in_flight.append(out.numel() * out.element_size())

    clipper._sum.contribution = watched  # type: ignore[method-assign]
    trainer.train_step(0)
    held = clipper.total.numel() * clipper.total.element_size()
    return {"held_share": held / whole, "tensor_in_flight_share": max(in_flight) / whole}


def main(chosen: list[str]) -> None:
    """Print the tables, for all backends or for those named on the command line."""
    with tempfile.TemporaryDirectory() as place:
        directory = save_model(pathlib.Path(place), hidden_size=576, num_layers=6)
        print("LoRA: private step / plain step, ms a step, noise's share, bytes handed to collectives (private, plain)")
        for name in chosen or ("ddp", *cells.SHARDED):
            row = run_on_ranks(NUM_RANKS, lora, name, directory)[0]
            print(
                f"  {name:6} {row['ratio']:.3f}  {row['step_ms']:7.1f}  {row['noise_share']:.4f}  "
                f"{row['sent_bytes'][0]} {row['sent_bytes'][1]}",
                flush=True,
            )
        print("All weights: bytes of a rank's part of the sum, and of the largest tensor on its way, / whole gradient")
        for name in [name for name in ("zero2", "zero3", "fsdp2") if name in (chosen or cells.SHARDED)]:
            for route in ("auto", "two_pass"):
                row = run_on_ranks(NUM_RANKS, full, name, directory, route)[0]
                print(f"  {name:6} {route:8} {row['held_share']:.3f}  {row['tensor_in_flight_share']:.3f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
