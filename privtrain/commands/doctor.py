"""``privtrain doctor``: what would stop or spoil a run on these machines, each with its fix. Trains nothing.

Without a config it looks at the environment; with one also at the run directory, W&B and the self-test on the real
model, process group and device. Start it the way the job will be started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Literal

import torch
from packaging.requirements import Requirement
from rich.console import Console

from privtrain.backends import Backend
from privtrain.config import Config
from privtrain.config.publishing import RegistrySection
from privtrain.config.training import PerformanceSection
from privtrain.errors import EXIT_WRONG_INPUT, PrivtrainError
from privtrain.files.atomic import write_atomically
from privtrain.inputs import Inputs, load_checked, read_inputs
from privtrain.job.claim import check_run_directory
from privtrain.job.stop import StopRequest, listening
from privtrain.job.supervise import process_group
from privtrain.job.train import rehearse
from privtrain.process.group import num_launched
from privtrain.registry import clock, views
from privtrain.registry.database import registry_url
from privtrain.registry.store import Registry

#: Free space below which a run directory gets a warning; a LoRA run needs far less, a full model's checkpoints more.
_LITTLE_SPACE_BYTES = 2**30
_BANDWIDTH_NUM_FLOATS = 2**22
_NUM_TRIALS = 3
#: A registry that takes longer to answer is reported.
_REGISTRY_SECONDS = 10.0
_MARKS = {"ok": "[green]ok[/]     ", "warning": "[yellow]warning[/]", "fault": "[bold red]fault[/]  "}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what was looked at, e.g. ``disk``.
        status: a fault would stop a run, a warning would spoil it.
        what: what was seen, in words.
        fix: what to do about a warning or fault.
        values: what was measured, for ``--json``.
    """

    name: str
    status: Literal["ok", "warning", "fault"]
    what: str
    fix: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)


def examine(config_path: pathlib.Path | None, overrides: Sequence[str], *, as_json: bool) -> int:
    """Look at everything and print it on rank 0; return the exit code: 0, or 2 if there is a fault.

    Raises:
        ConfigError: for a config that cannot be run.
    """
    config = load_checked(config_path, overrides) if config_path is not None else None
    findings = [*_versions(), *_launcher(), _disk(config), _wandb(config), _registry(config)]
    # Libraries may print on the way; with --json stdout is for the report alone.
    kept_clean = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with kept_clean:
        try:
            findings += _findings_of_all_ranks(config)
        except PrivtrainError as error:
            findings.append(Finding("ranks and self-test", "fault", str(error), "see the message; nothing was trained"))
    is_well = not any(finding.status == "fault" for finding in findings)
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            print(json.dumps({"ok": is_well, "findings": [dataclasses.asdict(f) for f in findings]}, indent=2))
        else:
            _print(findings, is_well)
    return 0 if is_well else EXIT_WRONG_INPUT


def _print(findings: list[Finding], is_well: bool) -> None:
    """Print a line for each finding, its fix below it, and the conclusion."""
    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        console.print(f"{_MARKS[finding.status]} {finding.name}: {finding.what}")
        if finding.fix:
            console.print(f"        fix: {finding.fix}")
    console.print("ready to train" if is_well else "[bold red]not ready[/]: mend the faults above")


def _versions() -> list[Finding]:
    """Compare the installed libraries with the versions that the installed privtrain declares that it needs."""
    wrong, seen = [], {"python": platform.python_version(), "torch_device": _accelerator()}
    for line in importlib.metadata.requires("privtrain") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue  # for another platform, or of an extra
        try:
            seen[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(seen[requirement.name], prereleases=True):
            wrong.append(f"{requirement.name} {seen[requirement.name]} is not {requirement.specifier}")
    names = ("python", "torch", "accelerate", "transformers", "peft", "deepspeed", "torch_device")
    text = ", ".join(f"{name} {seen[name]}" for name in names if name in seen)
    if wrong:
        return [Finding("versions", "fault", "; ".join(wrong), "pip install -c constraints.txt privtrain", seen)]
    return [Finding("versions", "ok", text, values=seen)]


def _accelerator() -> str:
    """Return number and name of this machine's GPUs as torch sees them, e.g. ``8 x NVIDIA H100``, or ``cpu``."""
    if not torch.accelerator.is_available():
        return "cpu"
    kind = str(torch.accelerator.current_accelerator())
    return f"{torch.accelerator.device_count()} x {torch.cuda.get_device_name() if kind == 'cuda' else kind}"


def _launcher() -> list[Finding]:
    """Warn of launchers that hide the job's exit code, and of an accelerate setting that is not used."""
    findings = []
    has_several_ranks = num_launched() > 1
    # Our `privtrain launch` sets this variable, and srun passes a task's exit code on.
    is_privtrain_launch = "PRIVTRAIN_LAUNCH_DIRECTORY" in os.environ
    is_srun = "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if has_several_ranks and not is_privtrain_launch and not is_srun:
        findings.append(
            Finding(
                "exit code",
                "warning",
                "torchrun and accelerate launch end with 1 whatever the job's exit code is",
                "start them with: privtrain launch accelerate launch ...; pre-empted jobs then end with 75",
            )
        )
    if os.environ.get("ACCELERATE_MIXED_PRECISION", "no") != "no":
        findings.append(
            Finding(
                "mixed_precision",
                "warning",
                f"the accelerate config asks for {os.environ['ACCELERATE_MIXED_PRECISION']}; it is not used",
                'set mixed_precision: "no" there and performance.precision in the run\'s config',
            )
        )
    return findings


def _disk(config: Config | None) -> Finding:
    """Measure free space and the time of one durable write where the run directory will be."""
    wanted = config.run.directory if config is not None else pathlib.Path.cwd()
    # The run directory need not exist yet: its nearest existing parent is on the same disk.
    place = next(path for path in [wanted, *wanted.absolute().parents] if path.is_dir())
    free_bytes = shutil.disk_usage(place).free
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".privtrain-doctor-") as directory:
            began = time.monotonic()
            write_atomically(pathlib.Path(directory) / "probe", b"\0" * 4096)
            fsync_seconds = time.monotonic() - began
    except OSError as error:
        return Finding("disk", "fault", f"{place}: {error}", "choose another run.output_dir, or make room there")
    what = f"{place}: {free_bytes / 2**30:.1f} GiB free, a durable write takes {fsync_seconds * 1e3:.1f} ms"
    values = {"path": str(place), "free_bytes": free_bytes, "fsync_seconds": fsync_seconds}
    if free_bytes < _LITTLE_SPACE_BYTES:
        return Finding("disk", "warning", what, "make room or set run.output_dir: a full disk stops the job", values)
    return Finding("disk", "ok", what, values=values)


def _wandb(config: Config | None) -> Finding:
    """Return whether metrics would get to W&B; nothing is sent."""
    if config is not None and not config.tracking.wandb:
        return Finding("W&B", "ok", "off (tracking.wandb); metrics.jsonl has everything that is released")
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode != "online":
        return Finding("W&B", "ok", f"{mode}; later: privtrain track sync RUN")
    netrc = pathlib.Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    _, _, address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rpartition("//")
    host, _, _ = address.partition("/")
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and host in netrc.read_text(encoding="utf-8"))
    if not has_key:
        return Finding("W&B", "fault", f"WANDB_MODE=online without a key for {host}", "run: wandb login, or unset it")
    return Finding("W&B", "ok", f"online at {host}, a key is there")


def _registry(config: Config | None) -> Finding:
    """Return whether the registry of privacy budgets can be used; nothing is reserved.

    The registry is a database, shared by runs, of how much ε may be spent on each data set. It is optional.
    """
    section = config.registry if config is not None else RegistrySection()
    url = registry_url(section)
    is_other_rank = os.environ.get("RANK", "0") != "0"  # rank 0 alone asks the registry, and prints its findings
    if is_other_rank or url is None:
        return Finding("registry", "ok", "none: this run's budget alone counts (registry.dataset)")
    if config is not None and section.dataset is None:
        return Finding("registry", "fault", "a registry without a data set", "set registry.dataset: who is charged")
    try:
        registry = Registry(url, retry_seconds=min(section.retry_seconds, _REGISTRY_SECONDS), read_only=True)
        # Each of these raises what would stop a run: no key for pseudonyms of users, a clock that is wrong.
        registry.database.key()
        registry.database.read(clock.now)
        budgets = views.budgets(registry.database)
    except PrivtrainError as error:
        return Finding("registry", "fault", str(error), "do as it says, or set PRIVTRAIN_REGISTRY or registry.url")
    what = "; ".join(f"{b.name}: {b.spent:.3f} of {b.epsilon:g} spent at δ {b.delta:g}" for b in budgets)
    if not budgets:
        return Finding("registry", "fault", f"{registry.database.shown} has no budget", "privtrain registry budget set")
    return Finding("registry", "ok", f"{registry.database.shown}: {what}")


def _findings_of_all_ranks(config: Config | None) -> list[Finding]:
    """Return what can be seen only with all ranks: who is there, how fast they talk, and the self-test."""
    performance = config.performance if config is not None else PerformanceSection()
    inputs = read_inputs(config) if config is not None else None
    if inputs is not None:
        check_run_directory(inputs)
    with listening() as stop, process_group(performance, stop) as backend:
        findings = [_world(backend), _agreement(backend), _network(backend)]
        if inputs is not None:
            findings.append(_self_test(inputs, backend, stop))
        backend.barrier()
    return findings


def _world(backend: Backend) -> Finding:
    """Return the machine and device of each rank; two ranks on one GPU are almost always a mistake."""
    places = [text.decode() for text in _gather(backend, f"{platform.node()} {backend.device}".encode())]
    on_gpus = [place for place in places if not place.endswith(("cpu", "cpu:0"))]
    shared = sorted({place for place in on_gpus if on_gpus.count(place) > 1})
    lines = "".join(f"\n          rank {rank}: {place}" for rank, place in enumerate(places))
    what = f"{backend.describe()}{lines}"
    values = {"world_size": backend.world_size, "ranks": places}
    if shared:
        fix = "start as many processes a machine as it has GPUs (num_processes, --nproc-per-node, --ntasks-per-node)"
        return Finding("world", "fault", f"several ranks share {', '.join(shared)}; {what}", fix, values)
    return Finding("world", "ok", what, values=values)


def _gather(backend: Backend, text: bytes, num_pieces: int = 4) -> list[bytes]:
    """Return every rank's text, by rank, cut to 32 * num_pieces bytes.

    Backends gather only digests of 32 bytes, so the text is sent in pieces of 32.
    """
    padded = text[: 32 * num_pieces].ljust(32 * num_pieces, b"\0")
    gathered = [backend.gather_digests(padded[32 * i : 32 * (i + 1)]) for i in range(num_pieces)]  # [piece][rank]
    return [b"".join(pieces).rstrip(b"\0") for pieces in zip(*gathered, strict=True)]


def _agreement(backend: Backend) -> Finding:
    """Return whether all ranks run the same software."""
    own = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions() if d.metadata["Name"]}
    text = json.dumps([platform.python_version(), platform.machine(), sorted(own.items())])
    digests = backend.gather_digests(hashlib.sha256(text.encode()).digest())  # by rank
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        return Finding(
            "software",
            "warning",
            f"rank {', '.join(others)} has other packages than rank 0",
            "use one image or environment on every machine: a job with other libraries on a rank is refused",
        )
    return Finding("software", "ok", "the same packages on every rank")


def _network(backend: Backend) -> Finding:
    """Measure bandwidth and latency of one all-reduce in fp32, the only large thing that a step sends under DDP."""
    if backend.world_size == 1:
        return Finding("network", "ok", "one process, nothing to send")
    seconds, latency = _reduce_seconds(backend, _BANDWIDTH_NUM_FLOATS), _reduce_seconds(backend, 1)
    num_bytes = 4 * _BANDWIDTH_NUM_FLOATS
    what = (
        f"all-reduce of {num_bytes / 1e6:.1f} MB in {seconds * 1e3:.1f} ms ({num_bytes / seconds / 1e9:.2f} GB/s), "
        f"of one number in {latency * 1e3:.2f} ms"
    )
    return Finding("network", "ok", what, values={"bytes_per_second": num_bytes / seconds, "latency_seconds": latency})


def _reduce_seconds(backend: Backend, num_floats: int) -> float:
    """Return the seconds of the fastest of a few reductions of so many floats."""
    vector = torch.zeros(num_floats, dtype=torch.float32, device=backend.device)
    best = float("inf")
    for _ in range(_NUM_TRIALS):
        backend.barrier()
        began = time.monotonic()
        backend.reduce(vector)
        float(vector[0])  # waits for the device
        best = min(best, time.monotonic() - began)
    return best


def _self_test(inputs: Inputs, backend: Backend, stop: StopRequest) -> Finding:
    """Load the real model on all ranks and check clipping, noise and reduction as the start of a job does."""
    began = time.monotonic()
    num_coordinates = rehearse(inputs, backend, stop)
    seconds = time.monotonic() - began
    what = (
        f"passed on {inputs.config.model.public_name}: {num_coordinates:,} trainable coordinates "
        f"({4 * num_coordinates / 1e6:.1f} MB a reduction), {seconds:.1f} s with loading"
    )
    return Finding("self-test", "ok", what, values={"num_coordinates": num_coordinates, "seconds": seconds})
