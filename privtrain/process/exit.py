"""Run a command line so that a user's mistake is one clear message and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from privtrain.errors import EXIT_MACHINE_FAILED, EXIT_WRONG_INPUT, Preempted, PrivtrainError
from privtrain.process.slurm import adopt_slurm_tasks

#: Rank 0 reports a mistake that every rank meets; the launcher ends the others within this many seconds.
_OTHER_RANKS_WAIT_SECONDS = 3.0

#: Set by ``privtrain launch``: a directory of this machine for markers of its ranks, since launchers lose exit codes.
LAUNCH_DIRECTORY = "PRIVTRAIN_LAUNCH_DIRECTORY"


#: What the operating system says of a path that cannot serve; of any other error the traceback is wanted.
_WRONG_PATHS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTEMPTY),
}
_FULL_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def run_command(name: str, app: Callable[[], None]) -> None:
    """Run a command line; turn a user's mistake, a stop on request or a full disk into one message and an exit code.

    Args:
        name: of the command, which messages begin with.
        app: the command line; other exceptions of it keep their traceback.
    """
    # transformers deprecates names that it and PEFT still use themselves; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without ε shows its number; text in UTF-8 stays as it is
        sys.stdout.reconfigure(errors="backslashreplace")
    adopt_slurm_tasks(os.environ)
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where a full disk is said
    except Preempted as stop:
        record_exit_code(stop.exit_code)
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except PrivtrainError as error:
        _leave(name, str(error), error.exit_code)
    except BrokenPipeError:  # as of: privtrain preview CONFIG | head. Where typer sees it, it leaves so too
        _drop_output()
        sys.exit(1)
    except OSError as error:
        if not _has_working_directory():
            _leave(name, "the working directory was removed; change into one that is there", EXIT_WRONG_INPUT)
        if error.errno in _FULL_DISKS:
            _drop_output()
            _leave(name, f"{error.filename or 'a file or the output'}: {error.strerror}", EXIT_MACHINE_FAILED)
        if error.filename is None or error.errno not in _WRONG_PATHS:
            raise
        _leave(name, f"{error.filename}: {error.strerror}", EXIT_WRONG_INPUT)


def _leave(name: str, message: str, code: int) -> NoReturn:
    """Report a failure of a command of this name, and exit."""
    record_exit_code(code)
    _report(f"{name}: {message}")
    sys.exit(code)


def _drop_output() -> None:
    """Let what was not written yet go: at the end of the process it would fail again, and change the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def record_exit_code(code: int) -> None:
    """Record this rank's exit code for ``privtrain launch``; the first rank's stands, as others fail because of it."""
    _write_marker("exit-code", str(code))


def record_stop_request() -> None:
    """Record that a rank on this machine was asked to stop."""
    _write_marker("asked-to-stop", "")


def was_asked_to_stop(directory: str) -> bool:
    """Return whether a rank on this machine was asked to stop."""
    return os.path.exists(os.path.join(directory, "asked-to-stop"))


def _write_marker(name: str, content: str) -> None:
    """Leave a file for the launcher in its directory, if there is one; the first rank that writes it wins."""
    directory = os.environ.get(LAUNCH_DIRECTORY)
    if directory is None:
        return
    try:
        with open(os.path.join(directory, name), "x", encoding="ascii") as file:
            file.write(content)
    except OSError:
        pass  # already recorded, or the disk is full; the launcher falls back to its own exit code


def leave_at_once(message: str, code: int) -> NoReturn:
    """End this process from any thread without cleaning up; durable state is on disk at every moment."""
    record_exit_code(code)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"rank {os.environ.get('RANK', '0')}: privtrain: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def _report(message: str) -> None:
    """Print a failure once per job: rank 0 at once, another rank only if it still lives after a wait."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr)
