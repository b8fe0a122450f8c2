"""What a step costs on a GPU: plain training and ours, alternating in one process.

    python -m tests.gpu.timings [--device cuda] [--out gpu.json] [--model NAME_OR_PATH] [--rounds 5]

Without a model, one of the shape of a 1B Llama is made of random weights: time does not depend on their values. Of a
packed line, "plain" is one full row of as many tokens. Prints
one Markdown table and writes one JSON object: tokens a second, kernels, waits of the host and peak memory, each over
one microbatch, for LoRA and full fine-tuning; and coordinates of noise a second.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

from privtrain.clipping import PerUnitClipper, variable_length
from privtrain.clipping.lines import LineClipper
from privtrain.config.model import LoraSection
from privtrain.data.lines import Line, LinePacker
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.models.losses import row_losses, token_losses
from privtrain.models.trainable import add_lora
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import noised
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.sum_digest import bind
from privtrain.training.repeatable import demand_repeatable, prefer_repeatable

_SHAPES = {
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128_256},
    "cpu": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512},
}
_HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 4096}
#: (method, route, rows, tokens, records of a user)
_CASES = [
    ("lora", "batched", 4, 1024, 1),
    ("lora", "batched", 1, 1024, 1),
    ("lora", "batched", 4, 1024, 4),
    ("full", "batched", 4, 512, 1),
    ("full", "two_pass", 4, 512, 1),
]
#: Routes of packed lines → whether one kernel attends within all records; and records of a line.
_LINES = {"line, one kernel": True, "line, by record": False}
_RECORDS_OF_A_LINE = 8
_CASES += [("lora", route, 1, 1024, _RECORDS_OF_A_LINE) for route in _LINES]
Step = Callable[[], None]


def load(name: str | None, device: torch.device) -> torch.nn.Module:
    """In bf16 on a GPU, as a frozen base is."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if name:
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(device)
    shape = _SHAPES[device.type] | (_HEADS if device.type == "cuda" else {"num_attention_heads": 4})
    torch.manual_seed(0)
    with torch.device(device):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, use_cache=False)).to(dtype)


def steps_of(
    model: torch.nn.Module, batch: Microbatch, route: str, device: torch.device
) -> tuple[dict[str, Step], Layout]:
    """One microbatch in the middle of a step, plain and ours."""
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")

    def losses(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with autocast:
            return row_losses(model, ids, mask)

    def line_losses(line: Line) -> torch.Tensor:
        with autocast:
            return token_losses(model, line)

    def plain() -> None:
        (losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum().backward()

    layout = Layout.of(model)
    if route in _LINES:
        (num_tokens,) = batch.input_ids.shape[1:]
        line = line_of(num_tokens).to(device)
        lines = LineClipper(line_losses, model, layout, 1.0, losses, device, in_one_kernel=_LINES[route])
        lines.reset()
        return {"plain": plain, "ours": lambda: lines.accumulate(line)}, layout
    clipper = PerUnitClipper(model, layout, 1.0, losses, device, route=route)
    clipper.reset()
    return {"plain": plain, "ours": lambda: clipper.accumulate(batch)}, layout


def line_of(num_tokens: int) -> Line:
    """A full line of users with one record each."""
    length = num_tokens // _RECORDS_OF_A_LINE
    rng = np.random.default_rng(0)
    users = [[rng.integers(3, 500, size=length)] for _ in range(_RECORDS_OF_A_LINE)]
    (line,) = LinePacker(num_tokens, num_tokens, _RECORDS_OF_A_LINE, length, 0).pack(users, 1)
    return line


def waits_of(step: Step, device: torch.device) -> int | None:
    """Times that the host waits for the device, as CUDA tells them."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(warning.message) for warning in caught)


def kernels_of(step: Step, device: torch.device) -> int | None:
    """Kernels on the device."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum("mem" not in event.name.lower() for event in kernels)


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of one microbatch, the device's work included."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(case: tuple[str, str, int, int, int], name: str | None, device: torch.device, rounds: int) -> list[dict]:
    """Plain and ours for one case."""
    method, route, rows, tokens, k = case
    tokens = tokens if device.type == "cuda" or route in _LINES else tokens // 16
    model = load(name, device)
    if method == "lora":
        model = add_lora(model.requires_grad_(False), LoraSection(rank=16, alpha=16), 0, "timings")
    else:
        model = model.float().requires_grad_(True)
    model.train()
    rng = np.random.default_rng(0)
    num_users, num_records = (1, 1) if route in _LINES else (rows // k, k)
    users = [[rng.integers(3, 500, size=tokens) for _ in range(num_records)] for _ in range(num_users)]
    (batch,) = Packer(rows, tokens, pad_id=0).pack(users, 1)
    steps, layout = steps_of(model, batch.to(device), route, device)
    found: list[dict[str, Any]] = []
    peaks: dict[str, float | None] = {}
    for kind, step in steps.items():
        step()  # warms up, and probes the model
        peaks[kind] = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks[kind] = torch.cuda.max_memory_allocated() / 2**30
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(rounds):
        for kind, step in steps.items():
            times[kind].append(seconds_of(step, device))
    for kind, step in steps.items():
        seconds = statistics.median(times[kind])
        found.append(
            {
                "method": method,
                "route": route if kind == "ours" else "plain",
                "rows": rows,
                "tokens": tokens,
                "records_per_user": k,
                "tokens_per_second": rows * tokens / seconds,
                "time_over_plain": statistics.median(
                    mine / base for mine, base in zip(times[kind], times["plain"], strict=True)
                ),
                "num_kernels": kernels_of(step, device),
                "num_waits": waits_of(step, device),
                "peak_memory_gib": peaks[kind],
                "num_tensors": len(layout.slots),
            }
        )
    return found


def noise_per_second(device: torch.device) -> float:
    """Coordinates of noise a second, on the device at the end."""
    model = torch.nn.Linear(64, 64).to(device)
    layout = Layout.of(model)
    total = torch.zeros(layout.num_coordinates, dtype=torch.int64, device=device)
    noise = bind(SecretKey.generate(), 0, total, layout, public=[], metrics=[], sum_parts=lambda _: None).noise
    num = 20_000_000 if device.type == "cuda" else 500_000
    zeros = torch.zeros(num, dtype=torch.int64, device=device)

    def draw() -> None:
        noised(zeros, exponent=-40, stddev=1.0, noise=noise, name="x")

    return num / seconds_of(draw, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("gpu.json"))
    parser.add_argument("--model", default=None)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    prefer_repeatable(device)
    demand_repeatable(device, lambda: None, print)  # as a job does from its self-test on
    results: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__, "steps": []}
    results["device"] = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    print("| case | route | tokens/s | / plain | kernels | waits | peak GiB |\n|---|---|---|---|---|---|---|")
    for case in _CASES:
        why_not = variable_length.refusal(device) if _LINES.get(case[1]) else ""
        if why_not:
            print(f"| {case[1]} | not measured: {why_not} | | | | | |")
            continue
        for row in measure(case, options.model, device, options.rounds):
            results["steps"].append(row)
            name = f"{row['method']}, {row['rows']} x {row['tokens']}, {row['records_per_user']} a user"
            numbers = f"{row['tokens_per_second']:.0f} | {row['time_over_plain']:.2f}"
            peak = "" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}"
            print(f"| {name} | {row['route']} | {numbers} | {row['num_kernels']} | {row['num_waits']} | {peak} |")
            options.out.write_text(json.dumps(results, indent=1))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    results["noise_coordinates_per_second"] = noise_per_second(device)
    print(f"\nnoise: {results['noise_coordinates_per_second'] / 1e6:.1f} million coordinates a second")
    options.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
