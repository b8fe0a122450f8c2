"""One job of a study: its directory, the commands that it runs, and how its end is recorded.

A job runs a cell of the study's grid, or several whose configurations are equal. ``done.json`` is written last and
atomically, with the digest of everything that decided what was done. A job without that file is run again in the same
directory, where training and scoring continue from what they saved. A changed cell has another digest, hence another
directory: nothing that is complete is ever overwritten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from privtrain.files.atomic import write_atomically, write_json
from privtrain.files.private import locked_file
from privtrain.studies.recipe import Cell, fill
from privtrain.studies.software import software

State = Literal["complete", "failed", "open"]

#: Digits of the digest in a directory's name.
_SHORT = 16
#: Of a failed job's log, what the report shows.
_LAST_LINES = 20

#: First words of a command → the arguments of this Python interpreter that stand for them, whatever is on the PATH.
_PROGRAMS = {
    ("privtrain",): ["-m", "privtrain"],
    ("attacks",): ["-m", "attacks"],
    ("accountants",): ["-m", "accountants.cli"],
    ("python",): [],
    ("accelerate", "launch"): ["-m", "accelerate.commands.launch"],
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A training and the commands that follow it, run once for all cells of the study's grid that are equal.

    Attributes:
        cells: the cells, which have one configuration and digest; the first one gives the job its name.
        directory: where its configuration, run and records lie.
        data: directory of the study's prepared files.
        recipe: directory of the recipe, where scripts of the study lie.
    """

    cells: tuple[Cell, ...]
    directory: pathlib.Path
    data: pathlib.Path
    recipe: pathlib.Path

    @property
    def name(self) -> str:
        """Name of its first cell."""
        return self.cells[0].name

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides what the job does, the same for all its cells."""
        return self.cells[0].digest

    @property
    def run(self) -> pathlib.Path:
        """The run directory."""
        return self.directory / "run"

    @property
    def log(self) -> pathlib.Path:
        """All that its commands printed."""
        return self.directory / "log.txt"

    def record(self) -> Mapping[str, Any] | None:
        """Return the content of ``done.json``, else of ``failed.json``; ``None`` if neither is of this job's digest."""
        for name in ("done.json", "failed.json"):
            path = self.directory / name
            if path.exists():
                record = json.loads(path.read_text(encoding="utf-8"))
                if record["digest"] == self.digest:
                    return record
        return None

    def state(self) -> State:
        """Return whether it is complete, failed at its last start, or still to be run."""
        record = self.record()
        if record is None:
            return "open"
        return "complete" if record["exit_code"] == 0 else "failed"

    def commands(self) -> list[list[str]]:
        """Return the job's commands as lists of words, with ``{config}`` and the other placeholders filled in.

        Program names stay as they are; :func:`as_typed` replaces them.
        """
        places = {
            "config": str(self.directory / "config.yaml"),
            "run": str(self.run),
            "cell": str(self.directory),
            "data": str(self.data),
            "recipe": str(self.recipe),
        }
        return [fill(command, places) for command in self.cells[0].commands]


def jobs_of(cells: Sequence[Cell], root: pathlib.Path, data: pathlib.Path, recipe: pathlib.Path) -> list[Job]:
    """Return the jobs of a grid's cells, in the grid's order; cells of equal digest share one.

    A job's directory is ``cells/NAME-DIGEST`` under the study's ``root``. One with the same digest and another name, of
    before a cell was renamed, is used again.
    """
    grouped: dict[str, list[Cell]] = {}
    for cell in cells:
        grouped.setdefault(cell.digest, []).append(cell)
    existing = {path.name[-_SHORT:]: path for path in sorted((root / "cells").glob("*"))}
    jobs = []
    for digest, sharing in grouped.items():
        short = digest[:_SHORT]
        directory = existing.get(short) or root / "cells" / f"{sharing[0].name}-{short}"
        jobs.append(Job(tuple(sharing), directory, data, recipe))
    return jobs


def as_typed(command: Sequence[str]) -> list[str]:
    """Return the arguments that run a command with this interpreter: e.g. ``python -m privtrain`` for ``privtrain``."""
    for words, replacement in _PROGRAMS.items():
        if tuple(command[: len(words)]) == words:
            return [sys.executable, *replacement, *command[len(words) :]]
    return list(command)


class Processes:
    """The processes that a study has started, so that a signal to the study reaches them all.

    Attributes:
        environment: variables of the processes.
        stopping: set when the study was asked to stop.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        self.stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        # Re-entrant: a second signal may interrupt `stop` in the thread that holds the lock.
        self._lock = threading.RLock()

    def run(self, command: Sequence[str], log: pathlib.Path) -> int:
        """Run a command to its end, with all output appended to ``log``; return its exit code.

        127 if there is no such program; -15, as of a process that SIGTERM ended, if the study is stopping already.
        """
        with open(log, "ab") as output:
            output.write(f"$ {shlex.join(command)}\n".encode())
            output.flush()
            with self._lock:
                if self.stopping.is_set():
                    return -signal.SIGTERM
                try:
                    process = subprocess.Popen(
                        as_typed(command),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        env=dict(self.environment),
                    )
                except OSError as error:
                    output.write(f"{error}\n".encode())
                    return 127
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)

    def stop(self) -> None:
        """Ask every process to save itself and leave, and start no other.

        A signal handler may call it, in the main thread, while other threads :meth:`run` commands: these hold the lock
        only as long as it takes to start a process or to forget one.
        """
        self.stopping.set()
        with self._lock:
            for process in self._running:
                process.terminate()


def run_job(job: Job, processes: Processes) -> State:
    """Run a job's commands one after another and record how it ended.

    Returns:
        ``"open"`` if the study was stopped meanwhile: nothing is recorded, the same command goes on.

    Raises:
        RunBusy: if another study runs the same job.
    """
    job.directory.mkdir(parents=True, exist_ok=True)
    with locked_file(job.directory / ".lock", busy=f"another study is running the cell in {job.directory}"):
        if job.state() == "complete":  # by another study since we looked
            return "complete"
        write_atomically(job.directory / "config.yaml", job.cells[0].config_yaml(job.directory, job.data))
        began = time.monotonic()
        for command in job.commands():
            code = processes.run(command, job.log)
            if processes.stopping.is_set():
                return "open"
            if code != 0:
                _write_record(job, "failed.json", code, began, command=shlex.join(command), last_lines=_tail(job.log))
                return "failed"
        _write_record(job, "done.json", 0, began)
        (job.directory / "failed.json").unlink(missing_ok=True)
        return "complete"


def thread_environment(num_threads: int) -> dict[str, str]:
    """Return this process's environment, with ``num_threads`` CPU threads for libraries, and W&B offline by default."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    quiet = {"WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
    return {**quiet, **os.environ, **dict.fromkeys(names, str(num_threads))}


def _write_record(job: Job, name: str, exit_code: int, began: float, **more: Any) -> None:
    """Write ``done.json`` or ``failed.json``; ``began``: by the monotonic clock, when this start of the job began."""
    record = {
        "digest": job.digest,
        "cells": [cell.name for cell in job.cells],
        "exit_code": exit_code,
        "seconds_of_last_start": round(time.monotonic() - began, 1),
        "software": software(),
        **more,
    }
    write_json(job.directory / name, record)


def _tail(log: pathlib.Path) -> list[str]:
    """Return the last lines of a log, of which no more than the end is read."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 65_536))
        return file.read().decode("utf-8", errors="replace").splitlines()[-_LAST_LINES:]
