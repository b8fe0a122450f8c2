"""What a step costs on a cluster, predicted: its time, by part, and that of plain training.

Nothing is measured: counted operations, bytes, kernels and collectives (:mod:`privtrain.models.work`) are divided by
published peak figures times a stated utilisation. Every record is taken to be as long as ``data.max_length``. Plain
training is the same batch, layout and microbatch without clipping and noise, so utilisation cancels in the overhead.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import TYPE_CHECKING

from privtrain.errors import ConfigError, Fault
from privtrain.models.memory import LaunchLayout

if TYPE_CHECKING:
    from privtrain.models.work import Work


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Published peak figures of one GPU and its share of the machine's network.

    Attributes:
        flops: bf16 operations a second, dense.
        memory_bytes: size of its memory.
        memory_bandwidth: bytes a second.
        node_bandwidth: bytes a second to the other GPUs of its machine, one way.
        network_bandwidth: bytes a second to other machines, one way.
    """

    flops: float
    memory_bytes: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float


#: From NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and DGX B200: dense bf16 (half of "with sparsity"),
#: HBM, half of NVLink's "bidirectional" figure; of DGX A100, H100, H200, B200: one 200 or 400 Gb/s adapter a GPU.
GPUS = {
    "a100": Gpu(312e12, 80e9, 2.039e12, 300e9, 25e9),
    "h100": Gpu(989e12, 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu(989e12, 141e9, 4.8e12, 450e9, 50e9),
    "b200": Gpu(2250e12, 180e9, 8.0e12, 900e9, 50e9),
}
GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True)
class Utilisation:
    """Which share of a peak is reached, and what a launch costs.

    Attributes:
        flops: of matrix products over a whole pass. Llama 3 reports 38 to 43 % on H100 (arXiv 2407.21783, table 4).
        memory: of kernels that read and write once; an assumption.
        links: of collectives on large messages; an assumption (nccl-tests reach about four fifths).
        launch_seconds: of a kernel from Python, where the GPU waits for it; an assumption.
        step_seconds: of drawing a batch and of the ledger's two writes to disk; an assumption.
        overlap: share of a pass that launches and collectives run beside; none where one core does all of it.
    """

    flops: float = 0.4
    memory: float = 0.7
    links: float = 0.8
    launch_seconds: float = 5e-6
    step_seconds: float = 0.02
    overlap: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal GPUs in machines of eight, one rank each."""

    num_ranks: int
    gpu: Gpu
    name: str
    utilisation: Utilisation = Utilisation()

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read a number of GPUs and their name, such as ``8xh100``.

        Raises:
            ConfigError: for anything else.
        """
        match = re.fullmatch(r"([1-9][0-9]{0,4})x([a-z0-9]+)", text.lower())
        if match is None or match[2] not in GPUS:
            allowed = ", ".join(sorted(GPUS))
            raise ConfigError(
                [Fault("--cluster", f"given {text!r}; must be a number, x and one of {allowed}: 64xh100")]
            )
        return cls(int(match[1]), GPUS[match[2]], match[2])

    def compute(self, flops: float) -> float:
        """Return seconds of matrix products on one GPU."""
        return flops / (self.gpu.flops * self.utilisation.flops)

    def touch(self, num_bytes: float) -> float:
        """Return seconds of reading and writing so many bytes of one GPU's memory."""
        return num_bytes / (self.gpu.memory_bandwidth * self.utilisation.memory)

    def collect(self, num_bytes: float) -> float:
        """Return seconds in which each rank sends and receives all of a vector but its own part, as a ring does.

        That is one all-gather or one reduce-scatter; an all-reduce is two. The slowest link counts.
        """
        link = self.gpu.node_bandwidth if self.num_ranks <= GPUS_PER_NODE else self.gpu.network_bandwidth
        return num_bytes * (self.num_ranks - 1) / self.num_ranks / (link * self.utilisation.links)


@dataclasses.dataclass(frozen=True)
class Job:
    """What of configuration and plan decides a step's work.

    Attributes:
        work: of one row.
        layout: how the launch divides the model; its ranks are the cluster's.
        num_units: expected in a step.
        records_per_unit: k.
        microbatch_size: rows of a pass.
        is_full: whether all weights are trained.
        checkpoints: whether activations are computed a second time in the backward pass.
        is_two_pass: whether gradients are let go once they are measured, and a second backward pass adds them.
        reduces_once: ``performance.reduce_once``. Plain training then adds up its gradients for as long.
    """

    work: Work
    layout: LaunchLayout
    num_units: float
    records_per_unit: int
    microbatch_size: int
    is_full: bool
    checkpoints: bool
    is_two_pass: bool
    reduces_once: bool = False

    @property
    def sends_once(self) -> bool:
        """Whether gradients in parts are reduced once a step: such as are asked to, and such as fit into a bucket."""
        from privtrain.backends.shards import BUCKET  # imports torch

        return self.reduces_once or self.work.num_trained <= BUCKET

    @property
    def is_cooperative(self) -> bool:
        """Whether all ranks work on one unit at a time: gradients are sharded, and a unit exceeds a microbatch."""
        is_sharded = self.is_full and self.layout.shards_gradients
        return is_sharded and self.records_per_unit > self.microbatch_size


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted seconds of a step on every rank, by part, of private and of plain training.

    Attributes:
        parts: part → seconds of private training.
        plain_parts: the same of plain training.
        useful_seconds: of the same rows' plain passes alone, spread over the ranks without rest or recomputation.
    """

    parts: dict[str, float]
    plain_parts: dict[str, float]
    useful_seconds: float

    @property
    def seconds(self) -> float:
        """Seconds of a private step."""
        return sum(self.parts.values())

    @property
    def overhead(self) -> float:
        """Extra seconds of private over plain training, relative."""
        return self.seconds / sum(self.plain_parts.values()) - 1

    @property
    def efficiency(self) -> float:
        """Share of a private step that plain passes of its rows would take."""
        return self.useful_seconds / self.seconds


#: Bytes of device memory that a number of a unit's gradient is read and written in: product, norm, quotient, float64
#: copy, its norm and the sum over units (:func:`privtrain.clipping.exact_sum.add_measured`); and of the sum a pass.
_UNIT_BYTES, _SUM_BYTES = 44, 40
#: Of a coordinate's noise: 480 kernels of ChaCha20, each on a quarter of 64 bytes for 8 coordinates; then the inverse
#: normal and the rounding (:mod:`privtrain.privacy.chacha`, :mod:`privtrain.privacy.noise`).
_NOISE_BYTES = 480 * 5 + 250
#: Of a coordinate's digest (:mod:`privtrain.privacy.sum_digest`) and of AdamW's step.
_DIGEST_BYTES, _OPTIMIZER_BYTES = 150, 28
_FP32_BYTES, INT64_BYTES, _BF16_BYTES = 4, 8, 2
#: Kernels a trained tensor and microbatch beyond plain training's: for LoRA by the batched route; for all weights, and
#: for each unit of the microbatch, where it is one row and where its rows are joined (counted on the simulated device
#: of the tests, on a Llama of two layers).
_EXTRA_KERNELS = 15
_FULL_KERNELS, _UNIT_KERNELS = (89, 31), (11, 30)
#: A layer is multiplied out for its norm where p·d is at most this times n (p + d); else by Gram matrices.
_GRAM_FACTOR = 1.25


def predict(job: Job, cluster: Cluster) -> Prediction:
    """Predict a step of private and of plain training on a cluster."""
    num_rows = job.num_units * job.records_per_unit
    useful = cluster.compute(job.work.plain_flops) * num_rows / cluster.num_ranks
    return Prediction(_private_seconds(job, cluster), _plain_seconds(job, cluster), useful)


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Passes of a rank in a step.

    Attributes:
        num_passes: forward passes, each with at least one backward pass.
        num_rows: rows of each.
        num_units: units whose gradients this rank multiplies out.
        num_gathers: gathers of sharded weights a pass.
        reduced_bytes: bytes a trained coordinate that a pass reduce-scatters, where gradients are sharded.
        rounds: how often all of it is done.
    """

    num_passes: float
    num_rows: int
    num_units: float
    num_gathers: int = 2
    reduced_bytes: int = _FP32_BYTES
    rounds: int = 1


def _plain_schedule(job: Job, num_ranks: int) -> _Schedule:
    """Return the schedule without privacy: this rank's rows in full microbatches."""
    rows = math.ceil(job.num_units / num_ranks) * job.records_per_unit
    num_passes = math.ceil(rows / job.microbatch_size)
    reduced_bytes = 0 if job.reduces_once else _FP32_BYTES
    return _Schedule(num_passes, job.microbatch_size, job.num_units / num_ranks, reduced_bytes=reduced_bytes)


def _private_schedule(job: Job, num_ranks: int) -> _Schedule:
    """Return the schedule of private training, by how gradients are sharded and whether ranks cooperate on a unit."""
    if not (job.is_full and job.layout.shards_gradients):
        plain = _plain_schedule(job, num_ranks)
        # A unit of several microbatches is held once; units share a microbatch otherwise.
        return dataclasses.replace(plain, num_units=max(plain.num_units, plain.num_passes))
    if job.is_cooperative:  # all ranks on one unit
        num_rows = min(job.microbatch_size, math.ceil(job.records_per_unit / num_ranks))
        num_passes = job.num_units * math.ceil(job.records_per_unit / (num_ranks * num_rows))
        return _Schedule(num_passes, num_rows, job.num_units, rounds=2 if job.is_two_pass else 1)
    plain = _plain_schedule(job, num_ranks)
    gathers = 3 if job.is_two_pass else 2
    return dataclasses.replace(plain, num_gathers=gathers, reduced_bytes=0 if job.sends_once else INT64_BYTES)


def _plain_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Return seconds of a step of plain training, by part."""
    schedule = _plain_schedule(job, cluster.num_ranks)
    return {
        **_passes(job, cluster, schedule, job.work.num_kernels, 0.0),
        "reduction and update of weights": _reduction(job, cluster, _FP32_BYTES, sends_once=job.reduces_once),
        "optimizer": cluster.touch(_OPTIMIZER_BYTES * job.work.num_trained / _num_parts(job, cluster)),
    }


def _private_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Return seconds of a step of private training, by part."""
    work, trained = job.work, job.work.num_trained
    schedule = _private_schedule(job, cluster.num_ranks)
    norms, again = _clipping_flops(job)
    extra = norms + again
    kernels = work.num_kernels * (1 + (again > 0)) + _extra_kernels(job) * work.num_trained_tensors
    # Cooperating ranks hold parts of each unit's gradient; with all weights trained else, only products are held.
    held = trained / cluster.num_ranks if job.is_cooperative else 0 if job.is_full else trained
    added = trained if job.is_full and not job.is_cooperative else held
    summed = schedule.num_units * held * _UNIT_BYTES + schedule.num_passes * added * _SUM_BYTES
    reduction = _reduction(job, cluster, INT64_BYTES, sends_once=job.sends_once and not job.is_cooperative)
    if not job.layout.shards_optimizer:  # the noised runs are gathered
        reduction += cluster.collect(_FP32_BYTES * trained)
    return {
        **_passes(job, cluster, schedule, kernels, extra),
        "norms and second pass": schedule.num_passes * schedule.num_rows * cluster.compute(extra),
        "clipped sum": cluster.touch(summed),
        "reduction and update of weights": reduction,
        "noise": cluster.touch(_NOISE_BYTES * trained / cluster.num_ranks),  # each coordinate's once in the job
        "digest of the sum": cluster.touch(_DIGEST_BYTES * trained / _num_parts(job, cluster)),
        "optimizer": cluster.touch(_OPTIMIZER_BYTES * trained / _num_parts(job, cluster)),
        "sampling and ledger": cluster.utilisation.step_seconds,
    }


def _passes(
    job: Job, cluster: Cluster, schedule: _Schedule, num_kernels: float, extra_flops: float
) -> dict[str, float]:
    """Return seconds of forward and backward passes, and what they do not hide of launches and collectives.

    Args:
        job: the job.
        cluster: where it runs.
        schedule: the passes.
        num_kernels: of a pass.
        extra_flops: operations a row beside these, which hide launches and collectives too.
    """
    work, layout = job.work, job.layout
    flops = work.plain_flops + job.checkpoints * work.forward_flops
    compute = cluster.compute(schedule.num_rows * flops)
    busy = cluster.compute(schedule.num_rows * (flops + extra_flops))
    launch = num_kernels * cluster.utilisation.launch_seconds
    sent = 0.0
    if layout.shards_parameters:
        weights = _BF16_BYTES * work.num_frozen + (_FP32_BYTES * work.num_trained if job.is_full else 0)
        sent += schedule.num_gathers * cluster.collect(weights)
    if layout.shards_gradients and job.is_full:
        sent += cluster.collect(schedule.reduced_bytes * work.num_trained)
    num_passes = schedule.rounds * schedule.num_passes
    overlap = cluster.utilisation.overlap
    return {
        "forward and backward passes": num_passes * compute,
        "waiting for launches": num_passes * max(0.0, launch - overlap * busy),
        "waiting for weights and gradients": num_passes * max(0.0, sent - overlap * max(busy, launch)),
    }


def _extra_kernels(job: Job) -> float:
    """Return kernels a trained tensor and pass beyond plain training's."""
    if not job.is_full or job.is_cooperative:
        return _EXTRA_KERNELS
    is_joined = job.records_per_unit > 1
    return _FULL_KERNELS[is_joined] + _UNIT_KERNELS[is_joined] * job.microbatch_size / job.records_per_unit


def _clipping_flops(job: Job) -> tuple[float, float]:
    """Return operations a row of norms, and of the second backward pass, beyond those of plain training.

    An adapter's gradients are multiplied out unit by unit where plain training multiplies them out at once; cooperating
    ranks run a unit as plain training runs a microbatch.
    """
    from privtrain.clipping import clipper  # imports torch

    work = job.work
    if not job.is_full or job.is_cooperative:
        return 0.0, 0.0
    joined = work.num_tokens * job.records_per_unit
    direct = gram = 0.0
    for p, d in work.weight_shapes:
        if p * d <= _GRAM_FACTOR * joined * (p + d):
            direct += 2.0 * work.num_tokens * p * d
        else:
            gram += 2.0 * work.num_tokens * joined * (p + d)
    if not job.is_two_pass:  # what was multiplied out for a norm is kept
        return gram, 0.0
    again = work.activation_flops + job.checkpoints * work.forward_flops
    return gram + (1 - clipper._KEPT_SHARE) * direct, again


def _reduction(job: Job, cluster: Cluster, bytes_per_number: int, *, sends_once: bool) -> float:
    """Return seconds of collectives once a step: the sum over ranks, and stepped weights to who computes with them."""
    trained = job.work.num_trained
    if job.layout.shards_gradients and job.is_full:
        sent = bytes_per_number if sends_once else 0
        return cluster.collect((sent + (0 if job.layout.shards_parameters else _FP32_BYTES)) * trained)
    if job.layout.shards_optimizer:
        return cluster.collect((bytes_per_number + _FP32_BYTES) * trained)
    return 2 * cluster.collect(bytes_per_number * trained)


def _num_parts(job: Job, cluster: Cluster) -> int:
    """Return the ranks that a step of the optimizer is divided over."""
    return cluster.num_ranks if job.layout.shards_optimizer else 1
