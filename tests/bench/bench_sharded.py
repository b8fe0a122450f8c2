"""All weights trained on ranks of this machine: ``python -m tests.bench.bench_sharded [RANKS …]``, gloo, a thread each.

For every number of ranks, records of a user and backend: rows, passes and reduce-scatters of a rank in a step, CPU
seconds of all ranks, and their ratio to plain data-parallel training on the same rows (backward of the summed loss, one
all-reduce). Beside it what :mod:`privtrain.commands.cluster` predicts from the same counts for a machine as fast as one
core: its rates are measured first, by kernels that have nothing to do with training.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from privtrain.backends import shards
from privtrain.clipping import ShardedClipper
from privtrain.commands.cluster import Cluster, Gpu, Job, Utilisation, predict
from privtrain.config.model import ModelSection
from privtrain.data.microbatch import Packer
from privtrain.models.losses import row_losses
from privtrain.models.memory import LaunchLayout
from privtrain.models.weights import BaseSource
from privtrain.models.work import Work, count_model
from tests.privtrain import cells
from tests.ranks import run_on_ranks

NUM_USERS, LENGTH, MICROBATCH_SIZE = 8, 64, 8
NUM_REPETITIONS = 3
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=0,
    max_position_embeddings=256,
    use_cache=False,
)
LAYOUTS = {
    "plain": LaunchLayout(),
    "zero2": LaunchLayout(shards_optimizer=True, shards_gradients=True),
    "zero3": LaunchLayout(shards_optimizer=True, shards_gradients=True, shards_parameters=True),
    "fsdp2": LaunchLayout(shards_optimizer=True, shards_gradients=True, shards_parameters=True),
}
#: Parts of the prediction that a step without noise, optimizer and ledger has.
PARTS = (
    "forward and backward passes",
    "waiting for launches",
    "waiting for weights and gradients",
    "norms and second pass",
    "clipped sum",
    "reduction and update of weights",
)


@dataclasses.dataclass(frozen=True)
class Found:
    """Of one rank and step."""

    num_rows: int
    num_passes: int
    num_sent: int
    cpu_seconds: float


def measure(name: str, directory: pathlib.Path, num_records: int) -> Found:
    """The fastest of a few steps."""
    backend = cells.make_backend("zero1" if name == "plain" else name)
    with contextlib.redirect_stdout(io.StringIO()):
        model = backend.load_base(BaseSource(ModelSection(name_or_path=str(directory)), torch.float32))
    model.requires_grad_(True).train()
    rng = np.random.default_rng(0)
    users = [[rng.integers(1, 500, size=LENGTH) for _ in range(num_records)] for _ in range(NUM_USERS)]
    by_share = [users[share :: backend.world_size] for share in range(backend.world_size)]
    packer = Packer(min(MICROBATCH_SIZE, max(map(len, by_share)) * num_records), LENGTH, 0)
    counts = {"rows": 0, "passes": 0, "sent": 0}

    def losses(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counts["rows"] += len(ids)
        counts["passes"] += 1
        return row_losses(model, ids, mask)

    reduce = shards.reduce_scatter_flat

    def counted(*arguments: Any) -> None:
        counts["sent"] += 1
        reduce(*arguments)

    shards.reduce_scatter_flat = counted
    if name == "plain":
        parameters = list(model.parameters())

        def step() -> None:
            for batch in packer.pack_share(by_share, backend.rank):
                (losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum().backward()
            for parameter in parameters:
                if parameter.grad is not None:
                    backend.reduce(parameter.grad.view(-1))
                    parameter.grad = None
    else:
        placement = backend.place(model)
        assert placement.shards is not None
        clipper = ShardedClipper(
            model, placement.shards, 0.3, losses, cells.CPU, "flat", "batched", any_rank=backend.any_rank
        )

        def step() -> None:
            clipper.reset()
            for batch in packer.pack_share(by_share, backend.rank):
                clipper.accumulate(batch)
            backend.reduce_total(clipper.finish())

    step()
    taken = []
    for _ in range(NUM_REPETITIONS):
        counts.update(rows=0, passes=0, sent=0)
        backend.barrier()
        taken.append(_cpu_seconds(step))
    return Found(counts["rows"], counts["passes"], counts["sent"], min(taken))


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def rates() -> tuple[float, float, float]:
    """Operations and bytes a second, and seconds of a kernel on nothing, of one core."""
    left, right = torch.randn(MICROBATCH_SIZE * LENGTH, CONFIG.hidden_size), torch.randn(CONFIG.hidden_size, 384)
    large, small = torch.zeros(1 << 20), torch.zeros(1)

    def fastest(call: Callable[[], object], times: int) -> float:
        return min(_cpu_seconds(lambda: [call() for _ in range(times)]) for _ in range(5)) / times

    product = fastest(lambda: left @ right, 50)
    copy = fastest(lambda: large.add(1.0), 10)
    return 2.0 * left.numel() * 384 / product, 8.0 * large.numel() / copy, fastest(lambda: small.add(1.0), 2000)


def link(num_bytes: int) -> float:
    """Bytes a second of CPU time that a rank sends by reduce-scatter, as :meth:`Cluster.collect` counts."""
    backend = cells.make_backend("ddp")
    if backend.world_size == 1:
        return float("inf")
    whole = torch.zeros(num_bytes // 8 // backend.world_size * backend.world_size, dtype=torch.int64)
    mine = torch.empty(len(whole) // backend.world_size, dtype=torch.int64)
    shards.reduce_scatter_flat(mine, whole)
    taken = min(_cpu_seconds(lambda: shards.reduce_scatter_flat(mine, whole)) for _ in range(5))
    return 8 * len(whole) * (backend.world_size - 1) / backend.world_size / taken


def predicted(work: Work, name: str, num_ranks: int, num_records: int, cluster: Cluster) -> float:
    """Seconds of one rank."""
    layout = dataclasses.replace(LAYOUTS[name], num_ranks=num_ranks)
    size = min(MICROBATCH_SIZE, -(-NUM_USERS // num_ranks) * num_records)
    job = Job(work, layout, NUM_USERS, num_records, size, is_full=True, checkpoints=False, is_two_pass=False)
    found = predict(job, cluster)
    parts = found.plain_parts if name == "plain" else found.parts
    return sum(parts.get(part, 0.0) for part in PARTS)


def main(chosen: list[str]) -> None:
    """Print the table for 1, 2 and 4 ranks, or for those named on the command line."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        work = count_model(LlamaForCausalLM(CONFIG), torch.float32, LENGTH)
    flops, bandwidth, launch = rates()
    print(
        f"one core: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s, {launch * 1e6:.1f} us a kernel", flush=True
    )
    with tempfile.TemporaryDirectory() as place:
        directory = pathlib.Path(place)
        torch.manual_seed(0)
        LlamaForCausalLM(CONFIG).save_pretrained(directory)
        for num_ranks in map(int, chosen or ("1", "2", "4")):
            sent = min(run_on_ranks(num_ranks, link, 8 * work.num_trained))
            core = Gpu(flops, 64e9, bandwidth, sent, sent)
            usage = Utilisation(1.0, 1.0, 1.0, launch, 0.0, overlap=0.0)
            cluster = Cluster(num_ranks, core, "core", usage)
            print(f"{num_ranks} ranks: {sent / 1e9:.2f} GB/s of CPU time", flush=True)
            for num_records in (1, 4):
                plain = plain_predicted = 0.0
                for name in LAYOUTS:
                    found = run_on_ranks(num_ranks, measure, name, directory, num_records)
                    seconds = sum(rank.cpu_seconds for rank in found)
                    expected = num_ranks * predicted(work, name, num_ranks, num_records, cluster)
                    plain, plain_predicted = plain or seconds, plain_predicted or expected
                    rows = {(rank.num_rows, rank.num_passes, rank.num_sent) for rank in found}
                    print(
                        f"  k={num_records} {name:5} (rows, passes, reduce-scatters) a rank {sorted(rows)}, "
                        f"CPU {seconds:.3f} s = {seconds / plain:.2f} x plain; "
                        f"predicted {expected:.3f} s = {expected / plain_predicted:.2f} x",
                        flush=True,
                    )


if __name__ == "__main__":
    main(sys.argv[1:])
