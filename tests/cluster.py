"""Ranks of a whole job without a launcher, and faults at chosen moments of it.

A fork server that has everything imported makes a rank in well under a second, in the environment that accelerate makes
of a shipped launch file. Faults are planted from outside the product: its methods are wrapped in the rank's process,
told when to strike, and record what was applied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import pathlib
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

#: Phases of a step and of the release; before them a job can be struck in "join", "load" and "evaluate", at step -1.
PHASES = ("intent", "forward", "reduce", "noise", "optimizer", "commit", "checkpoint", "export")


#: Backend → file of launch/accelerate that asks for it.
LAUNCH_FILES = {"ddp": "cpu", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}

#: Longer than the shortest ``performance.collective_timeout_seconds``.
SLOW_SECONDS = 12

_SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "usr1": signal.SIGUSR1, "stop": signal.SIGSTOP}


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens, when.

    Attributes:
        phase: one of ``PHASES``.
        step: in which step; for a checkpoint the number of steps behind it.
        moment: before, inside (a torn write, or while the others wait) or after.
        action: kill, term, usr1 or stop: a signal to a rank; fill: the disk; raise: an error of the rank's own; slow:
            nothing for ``SLOW_SECONDS``.
        rank: who is hit.
    """

    phase: str
    step: int
    moment: str = "before"
    action: str = "kill"
    rank: int = 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def launch_environment(launch_file: str) -> dict[str, str]:
    """What ``accelerate launch`` tells the two ranks that it starts by a shipped file, said by its own code."""
    from accelerate.commands import launch

    told: dict[str, str] = {}
    path = pathlib.Path(__file__).parent.parent / "launch" / "accelerate" / f"{launch_file}.yaml"
    arguments = ["--config_file", str(path), "--num_processes", "2", "-m", "privtrain"]
    with mock.patch("torch.distributed.run.run", side_effect=lambda _: told.update(os.environ)):
        launch.launch_command(launch.launch_command_parser().parse_args(arguments))
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def fork_server() -> ForkServerContext:
    """The one fork server of this process, with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.cluster_imports"])
    return context


class Ranks:
    """Forked ranks of one program, as a launch file would have started them, and their output.

    Args:
        arguments: of the command line, the program first: privtrain or attacks.
        logs: directory for their output.
        world_size: number of ranks; a single one is started as without a launcher.
        launch_file: name of a file in launch/accelerate.
        before: what each rank calls before the program starts, with its number.
    """

    def __init__(
        self,
        arguments: Sequence[str | pathlib.Path],
        logs: pathlib.Path,
        *,
        world_size: int = 2,
        launch_file: str = "cpu",
        before: Callable[[int], object] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"log-{time.monotonic_ns()}-{rank}" for rank in range(world_size)]
        environment = {**os.environ, **launch_environment(launch_file), "ACCELERATE_USE_CPU": "true"}
        if world_size > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            environment |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        self.ranks: list[BaseProcess] = []
        for rank, log in enumerate(self._logs):
            given = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world_size > 1 else {}
            task = (rank, environment | given, log, [str(word) for word in arguments], before)
            self.ranks.append(fork_server().Process(target=_rank, args=task))
            self.ranks[-1].start()

    def output(self, rank: int | None = None) -> str:
        logs = self._logs if rank is None else [self._logs[rank]]
        return "\n".join(log.read_text() for log in logs if log.exists())

    def send(self, rank: int, number: int) -> None:
        pid = self.ranks[rank].pid
        assert pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def wait(self, timeout_seconds: float = 120, *, as_launcher: bool = True) -> list[int]:
        """Exit codes by rank. As torch's launcher would: once a rank fails the others get SIGTERM, later SIGKILL."""
        end = time.monotonic() + timeout_seconds
        is_ending = False
        while any(rank.is_alive() for rank in self.ranks) and time.monotonic() < end:
            if as_launcher and not is_ending and any(rank.exitcode for rank in self.ranks):
                is_ending, end = True, min(end, time.monotonic() + 30)
                for index, rank in enumerate(self.ranks):
                    if rank.is_alive():
                        self.send(index, signal.SIGTERM)
            time.sleep(0.01)
        hung = [index for index, rank in enumerate(self.ranks) if rank.is_alive()]
        for index in hung:
            self.send(index, signal.SIGKILL)
        for rank in self.ranks:
            rank.join()
        codes = [rank.exitcode for rank in self.ranks]
        assert all(code is not None for code in codes)
        return [-99 if index in hung else code for index, code in enumerate(codes)]  # type: ignore[misc]


class Job(Ranks):
    """A training job of forked ranks that records what it applied.

    Args:
        config: YAML file.
        place: directory for logs, process ids and the record of what was applied; kept over several jobs of a run.
        world_size: number of ranks.
        fault: what to plant.
        overrides: dotted assignments.
        backend: a key of ``LAUNCH_FILES``.
    """

    def __init__(
        self,
        config: pathlib.Path,
        place: pathlib.Path,
        *,
        world_size: int = 2,
        fault: Fault | None = None,
        overrides: tuple[str, ...] = (),
        backend: str = "ddp",
    ) -> None:
        super().__init__(
            ["privtrain", "train", config, *overrides],
            place,
            world_size=world_size,
            launch_file=LAUNCH_FILES[backend],
            before=functools.partial(_plant, place, config, fault),
        )


def _rank(
    rank: int,
    environment: dict[str, str],
    log: pathlib.Path,
    arguments: list[str],
    before: Callable[[int], object] | None,
) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.clear()  # the fork server has that of the moment at which it was started
    os.environ.update(environment)
    sys.argv = arguments
    if "TESTS_LEAVE_OUT_SELF_TEST" in os.environ:  # the fixture no_self_test
        stand_in = importlib.import_module("tests.unproven").pack_as_proven
        importlib.import_module("privtrain.job.train")._self_test = stand_in
    if before is not None:
        before(rank)
    importlib.import_module(f"{arguments[0]}.cli").main()


def _plant(place: pathlib.Path, config: pathlib.Path, fault: Fault | None, rank: int) -> None:
    (place / f"pid-{rank}").write_text(str(os.getpid()))
    _Plant(rank, place, config, fault).install()


class _Plant:
    """Wraps the phases of a step in this process, strikes once, and records what was applied to the parameters."""

    def __init__(self, rank: int, place: pathlib.Path, config: pathlib.Path, fault: Fault | None) -> None:
        self.rank, self.place, self.fault = rank, place, fault
        self.config = config
        self.step = -1
        self.is_spent = False

    def install(self) -> None:
        from privtrain.job import checkpoint, evaluation, publish, supervise
        from privtrain.job import train as job
        from privtrain.training.trainer import Trainer

        plant, original_init, original_step = self, Trainer.__init__, Trainer.train_step
        self._wrap(supervise, "create_backend", "join")
        self._wrap(job, "load_network", "load")
        self._wrap(evaluation, "on_held_out", "evaluate")
        self._wrap(Trainer, "_intend", "intent", torn=True)
        self._wrap(Trainer, "_commit", "commit", torn=True)

        def init(trainer: Any, **arguments: Any) -> None:
            original_init(trainer, **arguments)
            plant._wrap(trainer.clipper, "accumulate", "forward")
            plant._wrap(trainer.backend, "reduce_total", "reduce")
            plant._wrap(trainer.backend, "add_noise", "noise")
            plant._wrap(trainer.backend, "apply", "optimizer")

        def train_step(trainer: Any, step: int) -> None:
            plant.step = step
            original_step(trainer, step)
            plant.step = -1

        Trainer.__init__ = init
        Trainer.train_step = train_step
        original_replace = checkpoint.replace_directory

        def replace(source: pathlib.Path, target: pathlib.Path) -> None:
            plant.step = int(target.name.removeprefix("step-"))
            plant.strike("checkpoint", "inside")  # the files are written, the directory is not in place
            original_replace(source, target)
            plant.step = -1

        checkpoint.replace_directory = replace
        original_save, original_publish, original_install = checkpoint.save, job.publish, publish.install

        def save(directory: pathlib.Path, **arguments: Any) -> None:
            plant.step = arguments["step"]
            plant.strike("checkpoint", "before")
            original_save(directory, **arguments)
            plant.step = arguments["step"]
            plant.strike("checkpoint", "after")
            plant.step = -1

        def export(*arguments: Any, **named: Any) -> Any:
            plant.step = plant.fault.step if plant.fault else -1
            plant.strike("export", "before")
            released = original_publish(*arguments, **named)
            plant.strike("export", "after")
            return released

        def put_in_place(*arguments: Any) -> None:
            plant.strike("export", "inside")  # the release is recorded, and nothing of it is in its place
            original_install(*arguments)

        checkpoint.save, job.publish, publish.install = save, export, put_in_place

    def _wrap(self, owner: Any, name: str, phase: str, *, torn: bool = False) -> None:
        original, plant = getattr(owner, name), self

        def wrapped(*arguments: Any, **named: Any) -> Any:
            if phase == "join":
                plant.await_all()  # whoever is not yet listening for signals would die of the launcher's
            plant.strike(phase, "before")
            before = plant.ledger_files() if torn else (0, b"")
            if not torn:
                plant.strike(phase, "inside", pause_seconds=0.05)
            if phase == "optimizer" and plant.step >= 0:
                plant.record(arguments[0])
            result = original(*arguments, **named)
            if torn and plant.is_due(phase, "inside"):
                plant.tear(*before)
                plant.strike(phase, "inside")
            plant.strike(phase, "after")
            return result

        setattr(owner, name, wrapped)

    def await_all(self) -> None:
        """Wait until every rank of the job is here."""
        (self.place / f"here-{self.rank}").touch()
        everybody = [self.place / f"here-{rank}" for rank in range(int(os.environ.get("WORLD_SIZE", "1")))]
        while not all(path.exists() for path in everybody):
            time.sleep(0.01)

    @property
    def run(self) -> pathlib.Path:
        import yaml

        section = yaml.safe_load(self.config.read_text())["run"]
        return pathlib.Path(section["output_dir"]) / section["name"]

    def ledger_files(self) -> tuple[int, bytes]:
        """The size of the log, and its head file."""
        path = self.run / "secret" / "ledger.jsonl"
        return (path.stat().st_size, path.with_suffix(".head").read_bytes()) if path.exists() else (0, b"")

    def tear(self, size: int, head: bytes) -> None:
        """Leave the record that was just written half on disk and not in the head, as a loss of power would."""
        path = self.run / "secret" / "ledger.jsonl"
        if self.rank == 0 and self.fault and self.fault.action == "kill" and path.stat().st_size > size:
            os.truncate(path, size + (path.stat().st_size - size) // 2)
            path.with_suffix(".head").write_bytes(head)

    def record(self, vector: Any) -> None:
        """What is about to be applied: an account that does not rest on the ledger."""
        digest = hashlib.sha256(vector.cpu().numpy().tobytes()).hexdigest()
        with open(self.place / f"applied-{self.rank}", "a", encoding="utf-8") as file:
            file.write(json.dumps([self.step, digest]) + "\n")

    def is_due(self, phase: str, moment: str) -> bool:
        fault = self.fault
        if fault is None or self.is_spent or (fault.phase, fault.step, fault.moment) != (phase, self.step, moment):
            return False
        # Where only rank 0 is at work it strikes for the others; a torn write is rank 0's and takes its machine along.
        lone = phase in ("checkpoint", "export") or fault.action == "fill"
        return self.rank == (0 if lone else fault.rank)

    def strike(self, phase: str, moment: str, pause_seconds: float = 0.0) -> None:
        if not self.is_due(phase, moment):
            return
        self.is_spent = True
        fault = self.fault
        assert fault is not None
        time.sleep(pause_seconds)  # so that the other ranks wait in the collective by now
        (self.place / "struck").write_text(f"{phase} {moment} {fault.action} {fault.rank}")
        if fault.action == "fill":
            fill_disk(self.run.parent)
            return
        if fault.action == "slow":
            time.sleep(SLOW_SECONDS)
            return
        if fault.action == "raise":
            raise MemoryError("planted")
        number = _SIGNALS[fault.action]
        os.kill(int((self.place / f"pid-{fault.rank}").read_text()), number)


def fill_disk(directory: pathlib.Path) -> None:
    """Use up the last byte of a small file system; where none could be mounted, let no file of this process grow."""
    if not directory.is_mount():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return
    with contextlib.suppress(OSError), open(directory / "filler", "wb", buffering=0) as file:
        for size in (65536, 512, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)
