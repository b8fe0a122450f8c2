"""All weights trained on ranks of this machine: ``python -m tests.bench.bench_sharded [SIZE] [RANKS …]``, gloo.

SIZE is ``tiny`` (default: a core waits for Python) or ``wide`` (a core multiplies). For every number of ranks, records
of a user and backend: rows, passes and reduce-scatters of a rank in a step, and CPU seconds of all ranks over those of
plain data-parallel training on the same rows (backward of the summed loss, one all-reduce). All alternate in one
process group; the ratio is the median over rounds. No noise, no optimizer. The last ratio is to plain training on the
same backend, which gathers weights and adds up parts of gradients likewise.

CPU seconds are user and system time of all threads of all ranks, a thread each for torch's kernels. Copies through
sockets count; waiting does not (gloo's ranks sleep), so more ranks than cores change little.

Beside it what :mod:`privtrain.commands.cluster` predicts from the same counts for a machine as fast as one core: its
rates are measured first, by kernels that have nothing to do with training.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import faulthandler
import io
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from privtrain.backends import Backend, shards
from privtrain.backends.group import reduce_scatter_flat
from privtrain.clipping import ShardedClipper
from privtrain.clipping.clipper import RowLosses
from privtrain.commands.cluster import Cluster, Gpu, Job, Utilisation, predict
from privtrain.config.model import ModelSection
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.models.losses import row_losses
from privtrain.models.memory import LaunchLayout
from privtrain.models.weights import BaseSource
from privtrain.models.work import Work, count_model
from privtrain.privacy.layout import Slot
from tests.privtrain import cells
from tests.ranks import run_on_ranks

#: A step over a rank's microbatches.
Step = Callable[[Sequence[Microbatch]], None]

MICROBATCH_SIZE = 8
NUM_ROUNDS = 2


@dataclasses.dataclass(frozen=True)
class Size:
    """A Llama, the tokens of a record, and how many users a step has where each has so many records."""

    width: int
    num_layers: int
    length: int
    users: dict[int, int]

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=512,
            hidden_size=self.width,
            intermediate_size=2 * self.width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=0,
            eos_token_id=0,
            max_position_embeddings=256,
            use_cache=False,
        )


SIZES = {"tiny": Size(192, 4, 64, users={1: 8, 4: 8}), "wide": Size(512, 4, 128, users={1: 16, 4: 8})}
LAYOUTS = {
    "zero2": LaunchLayout(shards_optimizer=True, shards_gradients=True),
    "zero3": LaunchLayout(shards_optimizer=True, shards_gradients=True, shards_parameters=True),
    "fsdp2": LaunchLayout(shards_optimizer=True, shards_gradients=True, shards_parameters=True),
}
NAMES = tuple(LAYOUTS)
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
    """Of one rank and step; CPU seconds of each round."""

    num_rows: int
    num_passes: int
    num_sent: int
    seconds: list[float]


def measure(size: Size, directory: pathlib.Path, num_records: int) -> dict[str, Found]:
    """Return what a step takes: ``"plain"``, each backend by its name, and ``"plain zero2"`` and so on."""
    faulthandler.cancel_dump_traceback_later()  # longer than a test may take
    backend = cells.make_backend("zero1")  # weights are whole
    batches = microbatches(size, backend, num_records)
    counts: collections.Counter[str] = collections.Counter()
    steps = {"plain": plain_step(backend, load(backend, directory), counts)}
    for name in NAMES:
        sharded = cells.make_backend(name)
        with own_linear():
            steps[name] = with_linear(private_step(sharded, load(sharded, directory), counts))
            # A model of its own: DeepSpeed remembers the order of modules, and a step of another kind would disturb it.
            steps[f"plain {name}"] = with_linear(plain_sharded_step(sharded, load(sharded, directory), counts))
    for step in steps.values():
        step(batches[:1])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    counted: dict[str, collections.Counter[str]] = {}
    for _ in range(NUM_ROUNDS):
        for name, step in steps.items():
            counts.clear()
            backend.barrier()
            seconds[name].append(_cpu_seconds(lambda step=step: step(batches)))
            counted[name] = counts.copy()
    return {name: Found(of["rows"], of["passes"], of["sent"], seconds[name]) for name, of in counted.items()}


@contextlib.contextmanager
def own_linear() -> Iterator[None]:
    """Confine what DeepSpeed's stage 3 puts in the place of torch's linear function, for good and for all models."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def with_linear(step: Step) -> Step:
    """Return a step that runs with the linear function of this moment."""
    linear = torch.nn.functional.linear

    def run(batches: Sequence[Microbatch]) -> None:
        with own_linear():
            torch.nn.functional.linear = linear
            step(batches)

    return run


def load(backend: Backend, directory: pathlib.Path) -> torch.nn.Module:
    with contextlib.redirect_stdout(io.StringIO()):
        model = backend.load_base(BaseSource(ModelSection(name_or_path=str(directory)), torch.float32))
    return model.requires_grad_(True).train()


def microbatches(size: Size, backend: Backend, num_records: int) -> list[Microbatch]:
    """Return this rank's share of the step's rows."""
    rng = np.random.default_rng(0)
    users = [
        [rng.integers(1, 500, size=size.length) for _ in range(num_records)] for _ in range(size.users[num_records])
    ]
    by_share = [users[share :: backend.world_size] for share in range(backend.world_size)]
    packer = Packer(min(MICROBATCH_SIZE, max(map(len, by_share)) * num_records), size.length, 0)
    return list(packer.pack_share(by_share, backend.rank))


def plain_step(backend: Backend, model: torch.nn.Module, counts: collections.Counter[str]) -> Step:
    """Return a step that reduces all gradients in one piece."""
    parameters = list(model.parameters())
    losses = counted_losses(model, counts)

    def step(batches: Sequence[Microbatch]) -> None:
        for batch in batches:
            (losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum().backward()
        backend.reduce(torch.cat([parameter.grad.view(-1) for parameter in parameters if parameter.grad is not None]))
        model.zero_grad()

    return step


def private_step(backend: Backend, model: torch.nn.Module, counts: collections.Counter[str]) -> Step:
    def counted(*arguments: Any) -> None:
        counts["sent"] += 1
        reduce_scatter_flat(*arguments)

    shards.reduce_scatter_flat = counted
    placement = backend.place(model)
    assert placement.shards is not None
    losses = counted_losses(model, counts)
    clipper = ShardedClipper(
        model, placement.shards, 0.3, losses, cells.CPU, "flat", "batched", any_rank=backend.any_rank
    )

    def step(batches: Sequence[Microbatch]) -> None:
        clipper.reset()
        for batch in batches:
            clipper.accumulate(batch)
        backend.reduce_total(clipper.finish())

    return step


def plain_sharded_step(backend: Backend, model: torch.nn.Module, counts: collections.Counter[str]) -> Step:
    """Return a step without privacy, in which the backend itself adds up gradients over ranks, in fp32."""
    placement = backend.place(model)
    shards_of_model, layout = placement.shards, placement.clipped
    assert shards_of_model is not None
    losses, total = counted_losses(model, counts), layout.zeros(cells.CPU)

    def add(slot: Slot, part: torch.Tensor) -> None:
        layout.view(total, slot).view(-1).add_(part)

    def step(batches: Sequence[Microbatch]) -> None:
        total.zero_()
        for batch in batches:
            shards_of_model.reshard()
            with shards_of_model.collecting(add):
                (losses(batch.input_ids, batch.target_mask) * batch.row_weight).sum().backward()

    return step


def counted_losses(model: torch.nn.Module, counts: collections.Counter[str]) -> RowLosses:
    """Return the losses of rows, which count rows and passes."""

    def losses(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        counts["rows"] += len(ids)
        counts["passes"] += 1
        return row_losses(model, ids, mask)

    return losses


def _cpu_seconds(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def rates(size: Size) -> tuple[float, float, float]:
    """Operations and bytes a second, and seconds of a kernel on nothing, of one core."""
    left, right = torch.randn(MICROBATCH_SIZE * size.length, size.width), torch.randn(size.width, 2 * size.width)
    large, small = torch.zeros(1 << 20), torch.zeros(1)

    def fastest(call: Callable[[], object], times: int) -> float:
        return min(_cpu_seconds(lambda: [call() for _ in range(times)]) for _ in range(5)) / times

    product = fastest(lambda: left @ right, 50)
    copy = fastest(lambda: large.add(1.0), 10)
    return (
        2.0 * left.numel() * 2 * size.width / product,
        8.0 * large.numel() / copy,
        fastest(lambda: small.add(1.0), 2000),
    )


def link(num_bytes: int) -> float:
    """Bytes a second of CPU time that a rank sends by reduce-scatter, as :meth:`Cluster.collect` counts."""
    backend = cells.make_backend("ddp")
    if backend.world_size == 1:
        return float("inf")
    whole = torch.zeros(num_bytes // 8 // backend.world_size * backend.world_size, dtype=torch.int64)
    mine = torch.empty(len(whole) // backend.world_size, dtype=torch.int64)
    reduce_scatter_flat(mine, whole)
    taken = min(_cpu_seconds(lambda: reduce_scatter_flat(mine, whole)) for _ in range(5))
    return 8 * len(whole) * (backend.world_size - 1) / backend.world_size / taken


def predicted(work: Work, size: Size, name: str, num_ranks: int, num_records: int, cluster: Cluster) -> float:
    """Return the predicted CPU time over that of plain training."""
    num_users = size.users[num_records]
    rows = min(MICROBATCH_SIZE, -(-num_users // num_ranks) * num_records)

    def seconds(layout: LaunchLayout, *, is_plain: bool) -> float:
        layout = dataclasses.replace(layout, num_ranks=num_ranks)
        job = Job(work, layout, num_users, num_records, rows, is_full=True, checkpoints=False, is_two_pass=False)
        found = predict(job, cluster)
        parts = found.plain_parts if is_plain else found.parts
        return sum(parts.get(part, 0.0) for part in PARTS)

    return seconds(LAYOUTS[name], is_plain=False) / seconds(LaunchLayout(), is_plain=True)


def main(arguments: list[str]) -> None:
    """Print the table for 1, 2, 4 and 8 ranks, or for those named on the command line."""
    torch.set_num_threads(1)
    size = SIZES[arguments.pop(0) if arguments and arguments[0] in SIZES else "tiny"]
    with torch.device("meta"):
        work = count_model(LlamaForCausalLM(size.config), torch.float32, size.length)
    flops, bandwidth, launch = rates(size)
    print(f"a core: {flops / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s, {launch * 1e6:.1f} us a kernel", flush=True)
    with tempfile.TemporaryDirectory() as place:
        directory = pathlib.Path(place)
        torch.manual_seed(0)
        LlamaForCausalLM(size.config).save_pretrained(directory)
        for num_ranks in map(int, arguments or ("1", "2", "4", "8")):
            sent = min(run_on_ranks(num_ranks, link, 8 * work.num_trained))
            core = Gpu(flops, 64e9, bandwidth, sent, sent)
            cluster = Cluster(num_ranks, core, "core", Utilisation(1.0, 1.0, 1.0, launch, 0.0, overlap=0.0))
            print(f"{num_ranks} ranks: {sent / 1e9:.2f} GB/s of CPU time", flush=True)
            for num_records in size.users:
                of_ranks = run_on_ranks(num_ranks, measure, size, directory, num_records)
                for name in NAMES:
                    expected = predicted(work, size, name, num_ranks, num_records, cluster)
                    print(f"  k={num_records} {line(name, of_ranks)}; predicted {expected:.2f} x", flush=True)


def line(name: str, of_ranks: Sequence[Mapping[str, Found]]) -> str:
    """Return one backend's figures, of all ranks."""
    counts = sorted({(found[name].num_rows, found[name].num_passes, found[name].num_sent) for found in of_ranks})
    seconds = {
        which: [sum(of_round) for of_round in zip(*(found[which].seconds for found in of_ranks), strict=True)]
        for which in (name, "plain", f"plain {name}")
    }
    ratios, own = (
        sorted(private / other for private, other in zip(seconds[name], seconds[which], strict=True))
        for which in ("plain", f"plain {name}")
    )
    return (
        f"{name:5} (rows, passes, reduce-scatters) a rank {counts}, plain {statistics.median(seconds['plain']):.3f} s, "
        f"private {statistics.median(seconds[name]):.3f} s = {statistics.median(ratios):.2f} x "
        f"({ratios[0]:.2f} to {ratios[-1]:.2f}), {statistics.median(own):.2f} x plain {name}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
