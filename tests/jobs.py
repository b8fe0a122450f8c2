"""Run whole jobs on two forked ranks and kill them; the command that starts them by ``accelerate launch`` itself."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

from tests.cluster import Ranks

REPOSITORY = pathlib.Path(__file__).parent.parent
CPU_CONFIG = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"


def is_installed(package: str) -> bool:
    """Whether a package that carries weights or data is here."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def command(module: str, *arguments: str | pathlib.Path) -> list[str]:
    """``accelerate launch`` of a module with the shipped CPU config: two gloo ranks."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU_CONFIG)]
    return [*launcher, "-m", module, *map(str, arguments)]


@dataclasses.dataclass(frozen=True)
class Done:
    """How a job ended: 0, or the code of the first rank that failed, and what all ranks wrote."""

    returncode: int
    output: str


def run(
    program: str,
    *arguments: str | pathlib.Path,
    launch_file: str = "cpu",
    before: Callable[[int], object] | None = None,
    timeout_seconds: float = 240,
) -> Done:
    """Run a program on two forked ranks to its end.

    Args:
        program: privtrain or attacks.
        arguments: its command line.
        launch_file: of launch/accelerate.
        before: what each rank calls first, with its number; a function at module level.
        timeout_seconds: after which it is killed.
    """
    with started(program, *arguments, launch_file=launch_file, before=before) as job:
        codes = job.wait(timeout_seconds)
        return Done(next((code for code in codes if code), 0), job.output())


@contextlib.contextmanager
def started(
    program: str,
    *arguments: str | pathlib.Path,
    launch_file: str = "cpu",
    before: Callable[[int], object] | None = None,
) -> Iterator[Ranks]:
    """A job that was just started; whatever is left of it at the end is killed."""
    with tempfile.TemporaryDirectory() as logs:
        job = Ranks([program, *arguments], pathlib.Path(logs), launch_file=launch_file, before=before)
        try:
            yield job
        finally:
            job.wait(0)


def wait_for_ledger(job: Ranks, ledger: pathlib.Path, num_bytes: int, timeout_seconds: float = 120) -> bool:
    """Whether the ledger grew to ``num_bytes`` before the job ended."""
    return _wait(job, lambda: ledger.exists() and ledger.stat().st_size >= num_bytes, timeout_seconds)


def wait_for_checkpoint(job: Ranks, run: pathlib.Path, step: int, timeout_seconds: float = 120) -> bool:
    """Whether a checkpoint of ``step`` appeared before the job ended."""
    return _wait(job, (run / "checkpoints" / f"step-{step:08d}").exists, timeout_seconds)


def _wait(job: Ranks, holds: Callable[[], bool], timeout_seconds: float) -> bool:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and any(rank.is_alive() for rank in job.ranks):
        if holds():
            return True
        time.sleep(0.001)
    return False


def kill_rank(job: Ranks, rank: int) -> None:
    """SIGKILL one rank and end the others, as torch's launcher does."""
    job.send(rank, signal.SIGKILL)
    job.wait(90)
