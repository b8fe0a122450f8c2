"""Predict how long a training step takes on a cluster, part by part, beside the same step of plain training.

Nothing is measured: counted operations, bytes, kernels and collectives (:mod:`privtrain.models.work`) are divided by
published peak figures times a stated utilisation. Every record is taken to be as long as ``data.max_length``. Plain
training is the same batch, layout and microbatch without clipping and noise, so utilisation cancels in the overhead.

Words used here:

- unit: what is sampled and clipped, a user with at most k records or one record; a row is one record of the batch.
- trained coordinates: the numbers in all trained weights. The clipped sum holds one int64 for each of them.
- pass: one microbatch through the model, forward and backward. Two-pass clipping goes backward twice: the first time
  for the norm of each unit's gradient alone, the second time for the sum of clipped gradients.
- cooperative: all ranks work on one unit at a time, each on some of the unit's rows.
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
    """Which share of a published peak is reached in practice, and fixed times that no peak figure covers.

    Attributes:
        flops: share of peak operations that matrix products reach over a whole pass. Llama 3 reports 38 to 43 % on
            H100 (arXiv 2407.21783, table 4).
        memory: share of peak memory bandwidth that kernels reach which read and write once; an assumption.
        links: share of link bandwidth that collectives of large messages reach; an assumption (nccl-tests reach about
            four fifths).
        launch_seconds: time to launch one kernel from Python, where the GPU waits for it; an assumption.
        step_seconds: time of a step for drawing the batch and for the ledger's two writes to disk; an assumption.
        overlap: share of a pass's computation that can hide launches and collectives: 1 on a GPU, 0 where one CPU core
            does all of it.
    """

    flops: float = 0.4
    memory: float = 0.7
    links: float = 0.8
    launch_seconds: float = 5e-6
    step_seconds: float = 0.02
    overlap: float = 1.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Equal GPUs in machines of eight, one rank on each GPU. The methods turn counted work into seconds."""

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
        """Return seconds of one all-gather or one reduce-scatter of a vector of so many bytes; an all-reduce is two.

        In a ring each rank sends and receives all of the vector but its own part. The slowest link counts.
        """
        slowest_link = self.gpu.node_bandwidth if self.num_ranks <= GPUS_PER_NODE else self.gpu.network_bandwidth
        bytes_sent = num_bytes * (self.num_ranks - 1) / self.num_ranks
        return bytes_sent / (slowest_link * self.utilisation.links)


@dataclasses.dataclass(frozen=True)
class Job:
    """What of configuration and plan decides a step's work.

    Attributes:
        work: counted operations, kernels and parameters of one row.
        layout: how the launch divides the model; its ranks are the cluster's.
        num_units: units expected in a step, over all ranks.
        records_per_unit: k, rows of each unit.
        microbatch_size: rows of a pass.
        is_full: whether all weights are trained; else an adapter is.
        checkpoints: whether activations are computed a second time in the backward pass.
        is_two_pass: whether clipping goes backward twice (see the module).
        reduces_once: ``performance.reduce_once``: where gradients are sharded, each rank adds up its own sum over the
            whole step and reduces it once at the end. Plain training is then taken to reduce once a step, too.
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
        """Whether sharded gradients are reduced once a step, instead of in every pass.

        That is so if the configuration asks for it, or if all of them fit into the one bucket that is sent when full.
        """
        from privtrain.backends.shards import BUCKET  # imports torch

        return self.reduces_once or self.work.num_trained <= BUCKET

    @property
    def is_cooperative(self) -> bool:
        """Whether all ranks work on one unit at a time: gradients are sharded, and a unit exceeds a microbatch."""
        is_sharded = self.is_full and self.layout.shards_gradients
        return is_sharded and self.records_per_unit > self.microbatch_size


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Predicted seconds of one step, part by part, of private and of plain training; all ranks take equally long.

    Attributes:
        parts: part of a private step, in words, → its seconds.
        plain_parts: the same for a step of plain training.
        useful_seconds: what the forward and backward passes of the same rows would take without privacy, if ranks never
            waited and nothing was computed twice.
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
        """Extra time of a private step over a plain one, relative: 0.2 if it takes a fifth longer."""
        return self.seconds / sum(self.plain_parts.values()) - 1

    @property
    def efficiency(self) -> float:
        """Share of a private step's time that is useful: plain passes of the same rows."""
        return self.useful_seconds / self.seconds


# Bytes of device memory that are read and written for each trained coordinate:
#: For a unit's gradient: product, norm, quotient, float64 copy, its norm and the sum over units
#: (:func:`privtrain.clipping.exact_sum.add_measured`); and, once a pass, for the clipped sum.
_UNIT_BYTES, _SUM_BYTES = 44, 40
#: For the noise: 480 kernels of ChaCha20, each on a quarter of 64 bytes for 8 coordinates; then the inverse normal and
#: the rounding (:mod:`privtrain.privacy.chacha`, :mod:`privtrain.privacy.noise`).
_NOISE_BYTES = 480 * 5 + 250
#: For the digest of the sum (:mod:`privtrain.privacy.sum_digest`), and for AdamW's step.
_DIGEST_BYTES, _OPTIMIZER_BYTES = 150, 28

#: Bytes of one number of each type.
_FP32_BYTES, INT64_BYTES, _BF16_BYTES = 4, 8, 2

# Kernels for each trained tensor in a pass, beyond plain training's (counted on the simulated device of the tests, on a
# Llama of two layers):
#: For an adapter by the batched route.
_EXTRA_KERNELS = 15
#: Where all weights are trained: for the microbatch as a whole, and for each of its units.
_FULL_KERNELS, _UNIT_KERNELS = 89, 11
#: The same for units of several rows, whose rows are joined to one.
_FULL_KERNELS_JOINED, _UNIT_KERNELS_JOINED = 31, 30

#: The norm of a unit's gradient of a weight [p, d], over n tokens: the gradient is multiplied out where p·d is at most
#: this times n (p + d); else its norm comes from Gram matrices [n, n] of inputs and output gradients, without it.
_GRAM_FACTOR = 1.25


def predict(job: Job, cluster: Cluster) -> Prediction:
    """Predict a step of private and of plain training on a cluster."""
    num_rows = job.num_units * job.records_per_unit
    return Prediction(
        parts=_private_seconds(job, cluster),
        plain_parts=_plain_seconds(job, cluster),
        useful_seconds=cluster.compute(job.work.plain_flops) * num_rows / cluster.num_ranks,
    )


@dataclasses.dataclass(frozen=True)
class _Schedule:
    """Passes of a rank in a step.

    Attributes:
        num_passes: forward passes, each with at least one backward pass.
        num_rows: rows of a pass.
        num_units: how often this rank forms a unit's gradient, or its part of one.
        num_gathers: how often a pass gathers sharded weights: 2, forward and backward; 3 with a second backward pass.
        reduced_bytes: bytes for each trained coordinate that a pass reduce-scatters, where gradients are sharded; 0
            where they are reduced once a step instead.
        rounds: how often all of these passes are done: 2 where cooperating ranks clip in two passes.
    """

    num_passes: float
    num_rows: int
    num_units: float
    num_gathers: int = 2
    reduced_bytes: int = _FP32_BYTES
    rounds: int = 1


def _plain_schedule(job: Job, num_ranks: int) -> _Schedule:
    """Return the schedule without privacy.

    Passes are those of the busiest rank, for which the others wait, each as long as that of a full microbatch.
    """
    rows = math.ceil(job.num_units / num_ranks) * job.records_per_unit
    return _Schedule(
        num_passes=math.ceil(rows / job.microbatch_size),
        num_rows=job.microbatch_size,
        num_units=job.num_units / num_ranks,  # the mean; read for private training alone
        reduced_bytes=0 if job.reduces_once else _FP32_BYTES,  # 0: gradients are sent at the end of the step instead
    )


def _private_schedule(job: Job, num_ranks: int) -> _Schedule:
    """Return the schedule of private training, by how gradients are sharded and whether ranks cooperate on a unit."""
    if job.is_cooperative:
        return _cooperative_schedule(job, num_ranks)
    plain = _plain_schedule(job, num_ranks)
    if job.is_full and job.layout.shards_gradients:
        # Every pass gathers weights for forward and each backward, and reduce-scatters int64 contributions, unless
        # those of all passes are sent once at the end of the step.
        num_gathers = 3 if job.is_two_pass else 2
        reduced_bytes = 0 if job.sends_once else INT64_BYTES
        return dataclasses.replace(plain, num_gathers=num_gathers, reduced_bytes=reduced_bytes)
    # A unit of many rows takes several passes, and each of them forms a gradient of it.
    return dataclasses.replace(plain, num_units=max(plain.num_units, plain.num_passes))


def _cooperative_schedule(job: Job, num_ranks: int) -> _Schedule:
    """Return the schedule where all ranks take part in every unit of the step, each with an equal share of its rows."""
    rows_of_rank = math.ceil(job.records_per_unit / num_ranks)
    num_rows = min(job.microbatch_size, rows_of_rank)
    passes_per_unit = math.ceil(job.records_per_unit / (num_ranks * num_rows))
    return _Schedule(
        num_passes=job.num_units * passes_per_unit,
        num_rows=num_rows,
        num_units=job.num_units,
        rounds=2 if job.is_two_pass else 1,
    )


def _plain_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Return seconds of a step of plain training, by part."""
    schedule = _plain_schedule(job, cluster.num_ranks)
    return {
        **_passes(job, cluster, schedule, num_kernels=job.work.num_kernels, extra_flops=0.0),
        "reduction and update of weights": _reduction(job, cluster, _FP32_BYTES, sends_once=job.reduces_once),
        "optimizer": cluster.touch(_OPTIMIZER_BYTES * job.work.num_trained / _num_parts(job, cluster)),
    }


def _private_seconds(job: Job, cluster: Cluster) -> dict[str, float]:
    """Return seconds of a step of private training, by part."""
    work, trained = job.work, job.work.num_trained
    schedule = _private_schedule(job, cluster.num_ranks)
    norm_flops, second_pass_flops = _clipping_flops(job)
    extra_flops = norm_flops + second_pass_flops
    # A second backward pass is taken to launch as many kernels as the first pass, forward and backward.
    plain_kernels = work.num_kernels * (2 if second_pass_flops > 0 else 1)
    kernels = plain_kernels + _extra_kernels(job) * work.num_trained_tensors
    # Coordinates of each unit's gradient that this rank holds, and those of the clipped sum that each pass adds to.
    if job.is_cooperative:
        held_of_unit = added_by_pass = trained / cluster.num_ranks  # each rank has its part of every unit's gradient
    elif job.is_full:
        # No unit's gradient is held: matrix products add all units of a pass to the sum.
        held_of_unit, added_by_pass = 0, trained
    else:
        held_of_unit = added_by_pass = trained
    unit_bytes = schedule.num_units * held_of_unit * _UNIT_BYTES
    sum_bytes = unit_bytes + schedule.num_passes * added_by_pass * _SUM_BYTES
    # Cooperating ranks have sent each other the parts of gradients in every pass: no gradient is left for the end.
    sends_at_end = job.sends_once and not job.is_cooperative
    reduction = _reduction(job, cluster, INT64_BYTES, sends_once=sends_at_end)
    if not job.layout.shards_optimizer:
        # Every rank holds the whole sum, draws the noise of an equal share of it, and gathers the noised shares.
        reduction += cluster.collect(_FP32_BYTES * trained)
    return {
        **_passes(job, cluster, schedule, kernels, extra_flops),
        "norms and second pass": schedule.num_passes * schedule.num_rows * cluster.compute(extra_flops),
        "clipped sum": cluster.touch(sum_bytes),
        "reduction and update of weights": reduction,
        "noise": cluster.touch(_NOISE_BYTES * trained / cluster.num_ranks),  # each coordinate's once in the job
        "digest of the sum": cluster.touch(_DIGEST_BYTES * trained / _num_parts(job, cluster)),
        "optimizer": cluster.touch(_OPTIMIZER_BYTES * trained / _num_parts(job, cluster)),
        "sampling and ledger": cluster.utilisation.step_seconds,
    }


def _passes(
    job: Job, cluster: Cluster, schedule: _Schedule, num_kernels: float, extra_flops: float
) -> dict[str, float]:
    """Return seconds of the passes of a step, and how long the GPU waits for launches and collectives in them.

    A GPU computes while kernels are launched and collectives run; it waits only for the rest of them.

    Args:
        job: the job.
        cluster: where it runs.
        schedule: the passes.
        num_kernels: kernels that a pass launches.
        extra_flops: operations for a row beside the forward and backward pass (clipping). Their time is not counted
            here, but launches and collectives go on meanwhile.
    """
    work, layout = job.work, job.layout
    flops = work.plain_flops + (work.forward_flops if job.checkpoints else 0.0)
    compute_seconds = cluster.compute(schedule.num_rows * flops)
    busy_seconds = cluster.compute(schedule.num_rows * (flops + extra_flops))
    launch_seconds = num_kernels * cluster.utilisation.launch_seconds
    collective_seconds = 0.0
    if layout.shards_parameters:
        frozen_bytes = _BF16_BYTES * work.num_frozen
        trained_bytes = _FP32_BYTES * work.num_trained if job.is_full else 0  # adapters are not sharded
        collective_seconds += schedule.num_gathers * cluster.collect(frozen_bytes + trained_bytes)
    if layout.shards_gradients and job.is_full:
        collective_seconds += cluster.collect(schedule.reduced_bytes * work.num_trained)
    num_passes = schedule.rounds * schedule.num_passes
    overlap = cluster.utilisation.overlap
    # A pass lasts as long as computing or launching does, whichever is longer; collectives run beside both.
    hides_collectives = overlap * max(busy_seconds, launch_seconds)
    return {
        "forward and backward passes": num_passes * compute_seconds,
        "waiting for launches": num_passes * max(0.0, launch_seconds - overlap * busy_seconds),
        "waiting for weights and gradients": num_passes * max(0.0, collective_seconds - hides_collectives),
    }


def _extra_kernels(job: Job) -> float:
    """Return how many kernels clipping launches for each trained tensor in a pass, beyond plain training's."""
    if not job.is_full or job.is_cooperative:
        return _EXTRA_KERNELS
    units_in_pass = job.microbatch_size / job.records_per_unit
    if job.records_per_unit > 1:
        return _FULL_KERNELS_JOINED + _UNIT_KERNELS_JOINED * units_in_pass
    return _FULL_KERNELS + _UNIT_KERNELS * units_in_pass


def _clipping_flops(job: Job) -> tuple[float, float]:
    """Return operations for a row beyond plain training's: those for norms, and those of a second backward pass."""
    from privtrain.clipping import clipper  # imports torch

    work = job.work
    # An adapter's gradients are multiplied out for each unit, as many operations as for the whole microbatch at once;
    # cooperating ranks run a unit as plain training runs a microbatch.
    if not job.is_full or job.is_cooperative:
        return 0.0, 0.0
    unit_tokens = work.num_tokens * job.records_per_unit
    direct_flops = gram_flops = 0.0
    for p, d in work.weight_shapes:  # outputs, inputs
        if p * d <= _GRAM_FACTOR * unit_tokens * (p + d):
            direct_flops += 2.0 * work.num_tokens * p * d
        else:
            gram_flops += 2.0 * work.num_tokens * unit_tokens * (p + d)
    if not job.is_two_pass:
        # Gradients that were multiplied out for a norm are kept and added up: plain training multiplies them out, too.
        return gram_flops, 0.0
    second_pass_flops = work.activation_flops + (work.forward_flops if job.checkpoints else 0.0)
    # Of the gradients multiplied out in the first pass a share is kept in memory; the rest are computed again.
    return gram_flops + (1 - clipper._KEPT_SHARE) * direct_flops, second_pass_flops


def _reduction(job: Job, cluster: Cluster, bytes_per_number: int, *, sends_once: bool) -> float:
    """Return seconds of the collectives at the end of a step: gradients to their ranks, updated weights to all ranks.

    Args:
        job: the job.
        cluster: where it runs.
        bytes_per_number: bytes in which one coordinate of the gradient is sent.
        sends_once: whether sharded gradients are sent now; else each pass has sent them.
    """
    trained = job.work.num_trained
    if job.layout.shards_gradients and job.is_full:
        gradient_bytes = bytes_per_number if sends_once else 0
        # Sharded weights stay where they were updated; each pass gathers them.
        weight_bytes = 0 if job.layout.shards_parameters else _FP32_BYTES
        return cluster.collect((gradient_bytes + weight_bytes) * trained)
    if job.layout.shards_optimizer:  # reduce-scatter of gradients, all-gather of updated weights
        return cluster.collect((bytes_per_number + _FP32_BYTES) * trained)
    return 2 * cluster.collect(bytes_per_number * trained)  # all-reduce


def _num_parts(job: Job, cluster: Cluster) -> int:
    """Return how many ranks divide the optimizer's update among them; 1: each rank updates all weights."""
    return cluster.num_ranks if job.layout.shards_optimizer else 1
