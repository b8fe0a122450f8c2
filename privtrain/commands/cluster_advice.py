"""``privtrain plan --cluster``: the predicted step, and which setting would shorten it.

Words used here:

- full training: the base model's own weights are trained and released; else an adapter is.
- plain training: the same batch without clipping and noise. *Overhead* is the private step's extra time over it, and
  *efficiency* the share of the private step's time that plain passes alone would take.
- two-pass clipping goes backward twice: first for the units' norms, then for the clipped sum. It is slower and needs
  less memory.
- strategy: how the noise of steps is correlated. With b *bands*, noise is spread over b steps, and each rank keeps its
  part of the b - 1 noises before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from privtrain.commands.cluster import INT64_BYTES, Cluster, Job, predict
from privtrain.config import Config
from privtrain.models.memory import LaunchLayout, model_size
from privtrain.privacy.plan import PrivacyPlan

#: Share of a GPU's memory that a job can use: the framework, workspaces and fragments take the rest.
_USABLE_MEMORY = 0.85
#: A setting is named where it shortens the step by at least this share.
_WORTHWHILE = 0.02
_NUM_SHOWN = 3
#: Parts of the memory (names of :func:`privtrain.models.memory.model_size`) that grow with the rows of a microbatch.
_BY_ROW = ("activations", "logits", "gradients of units")


class _Change(NamedTuple):
    """A setting that may shorten the step.

    Attributes:
        setting: in words.
        job: the job with it.
        memory_bytes: device memory of one rank with it.
    """

    setting: str
    job: Job
    memory_bytes: int


def describe_cluster(config: Config, plan: PrivacyPlan, layout: LaunchLayout, cluster_text: str) -> dict[str, Any]:
    """Return the predicted step on a cluster, and settings that would shorten it, the best first.

    Args:
        config: a valid configuration; the model's own config must be at hand, its weights need not.
        plan: its plan.
        layout: how the launch divides the model.
        cluster_text: such as ``8xh100``.

    Raises:
        ConfigError: if there is no such cluster, or the model's config cannot be loaded.
    """
    from privtrain.models.work import count_work  # imports torch

    cluster = Cluster.parse(cluster_text)
    layout = dataclasses.replace(layout, num_ranks=cluster.num_ranks)
    is_full, performance = config.training.releases_model, config.performance
    checkpoints = performance.gradient_checkpointing
    job = Job(
        work=count_work(config),
        layout=layout,
        num_units=plan.expected_batch_size,
        records_per_unit=plan.records_per_unit,
        microbatch_size=performance.microbatch_size,
        is_full=is_full,
        checkpoints=checkpoints,
        is_two_pass=_is_two_pass(performance.clipping_route, is_full, checkpoints=checkpoints),
        reduces_once=performance.reduce_once,
    )
    prediction = predict(job, cluster)
    num_bands = 1 if plan.strategy is None else plan.strategy.num_bands  # 1: each step's noise is independent
    memory = model_size(config, layout, num_bands).memory_bytes
    usable = _USABLE_MEMORY * cluster.gpu.memory_bytes

    changes = list(_changes(job, memory))
    if checkpoints:
        changes.extend(_changes_without_checkpoints(config, job, num_bands))
    return {
        "cluster": f"{cluster.num_ranks} x {cluster.name.upper()}",
        "predicted_step_seconds": prediction.seconds,
        "predicted_run_hours": prediction.seconds * plan.num_steps / 3600,
        "predicted_parts_seconds": prediction.parts,
        "predicted_plain_parts_seconds": prediction.plain_parts,
        "predicted_overhead": prediction.overhead,
        "predicted_efficiency": prediction.efficiency,
        "memory_bytes": sum(memory.values()),
        "usable_memory_bytes": usable,
        "faster_settings": _faster(changes, cluster, seconds_now=prediction.seconds, usable_bytes=usable),
    }


def _changes_without_checkpoints(config: Config, job: Job, num_bands: int) -> Iterator[_Change]:
    """Yield gradient checkpointing switched off: by itself, and together with each further setting.

    Args:
        config: with gradient checkpointing.
        job: the job as configured.
        num_bands: steps that noise is spread over.
    """
    performance = config.performance
    without = performance.model_copy(update={"gradient_checkpointing": False})
    memory = model_size(config.model_copy(update={"performance": without}), job.layout, num_bands).memory_bytes
    is_two_pass = _is_two_pass(performance.clipping_route, job.is_full, checkpoints=False)
    job = dataclasses.replace(job, checkpoints=False, is_two_pass=is_two_pass)
    setting = "performance.gradient_checkpointing: false"
    yield _Change(setting, job, sum(memory.values()))
    for further in _changes(job, memory):
        yield further._replace(setting=f"{setting}, {further.setting}")


def _is_two_pass(route: str, is_full: bool, *, checkpoints: bool) -> bool:
    """Return whether clipping goes backward twice: ``auto`` chooses that to save memory, where checkpointing does."""
    return route == "two_pass" or (route == "auto" and is_full and checkpoints)


def _faster(
    changes: list[_Change], cluster: Cluster, *, seconds_now: float, usable_bytes: float
) -> list[dict[str, Any]]:
    """Return the settings that fit into memory and shorten the step enough to be worth it, the fastest first.

    Args:
        changes: settings to choose from.
        cluster: where the job runs.
        seconds_now: predicted seconds of a step as configured.
        usable_bytes: of a GPU's memory, what a job can use.

    Returns:
        For each setting its words, ``predicted_step_seconds`` and ``memory_bytes``, for JSON.
    """
    worthwhile = []
    for change in changes:
        seconds = predict(change.job, cluster).seconds
        if change.memory_bytes <= usable_bytes and seconds < (1 - _WORTHWHILE) * seconds_now:
            row = {"setting": change.setting, "predicted_step_seconds": seconds, "memory_bytes": change.memory_bytes}
            worthwhile.append(row)
    return sorted(worthwhile, key=lambda row: row["predicted_step_seconds"])[:_NUM_SHOWN]


def _changes(job: Job, memory: dict[str, int]) -> Iterator[_Change]:
    """Yield settings that may shorten the step, each with the job and the memory that it leads to.

    Args:
        job: the job as configured.
        memory: part → bytes of device memory of one rank, as configured.
    """
    for factor in (2, 4, 8):
        rows = factor * job.microbatch_size
        bytes_by_row = sum(memory.get(part, 0) for part in _BY_ROW)
        size = sum(memory.values()) + (factor - 1) * bytes_by_row
        if rows <= job.num_units * job.records_per_unit / job.layout.num_ranks:  # a rank has as many in a step
            yield _Change(f"performance.microbatch_size: {rows}", dataclasses.replace(job, microbatch_size=rows), size)
    layout = job.layout
    if layout.shards_gradients and job.is_full and not job.reduces_once:
        # The rank's own whole sum is held, in place of the one tensor that is just being reduced.
        size = sum(memory.values()) - memory.get("tensor on its way", 0) + INT64_BYTES * job.work.num_trained
        yield _Change("performance.reduce_once: true", dataclasses.replace(job, reduces_once=True), size)
    if layout.shards_parameters and not job.is_full:
        # Each rank then holds the whole frozen base. An adapter's memory stays: its gradients were never sharded.
        size = sum(memory.values()) + (layout.num_ranks - 1) * memory.get("frozen base", 0)
        replicated = dataclasses.replace(layout, shards_parameters=False, shards_gradients=False)
        yield _Change("launch/accelerate/zero1.yaml", dataclasses.replace(job, layout=replicated), size)


def print_cluster(console: Console, d: dict[str, Any]) -> None:
    """Print the predicted step as a table, and the settings that would shorten it."""
    table = Table(f"predicted step on {d['cluster']}", "seconds", "of plain training")
    plain = d["predicted_plain_parts_seconds"]
    for part, seconds in d["predicted_parts_seconds"].items():
        if seconds or plain.get(part):
            table.add_row(part, f"{seconds:.4f}", f"{plain[part]:.4f}" if part in plain else "")
    table.add_row("[bold]together[/]", f"[bold]{d['predicted_step_seconds']:.4f}[/]", f"{sum(plain.values()):.4f}")
    console.print(table)
    console.print(
        f"predicted overhead over plain training {100 * d['predicted_overhead']:.1f} %, efficiency "
        f"{100 * d['predicted_efficiency']:.0f} %, run {d['predicted_run_hours']:.2f} hours, if every record is as "
        "long as data.max_length; from counted work and published peaks, not measured"
    )
    if d["memory_bytes"] > d["usable_memory_bytes"]:
        sizes = f"{d['memory_bytes'] / 2**30:.1f} of {d['usable_memory_bytes'] / 2**30:.1f} GiB"
        console.print(f"[yellow]warning[/]: a rank is estimated to need {sizes} that a GPU has to give")
    for other in d["faster_settings"]:
        console.print(
            f"faster with {other['setting']}: predicted {other['predicted_step_seconds']:.4f} s, "
            f"{other['memory_bytes'] / 2**30:.1f} GiB a rank"
        )
