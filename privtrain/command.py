"""Run a command line so that a user's mistake is one clear message and an exit code, never a traceback."""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

from privtrain.errors import PrivtrainError, Preempted

#: A mistake that every rank meets is told by rank 0; the launcher ends the others before this many seconds are over.
_OTHER_RANKS_WAIT_SECONDS = 3.0

#: Names a file in which the first rank to fail leaves its exit code, for launchers that turn every code into 1.
EXIT_CODE_FILE = "PRIVTRAIN_EXIT_CODE_FILE"


def run_command(name: str, app: Callable[[], None]) -> None:
    """Run ``app`` and leave with its exit code.

    Args:
        name: what the message begins with.
        app: the command line.
    """
    # transformers deprecates names that it and PEFT still use themselves; users can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except Preempted as stop:
        # The job is saved: a launcher that signals the rest of the ranks now must not change their exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        record_exit_code(stop.exit_code)
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {stop}", file=sys.stderr)
        sys.exit(stop.exit_code)
    except PrivtrainError as error:
        record_exit_code(error.exit_code)
        _report(f"{name}: {error}")
        sys.exit(error.exit_code)


def record_exit_code(code: int) -> None:
    """Leave the code where ``privtrain launch`` finds it; the first rank's stands, the others follow from it."""
    path = os.environ.get(EXIT_CODE_FILE)
    if path is None:
        return
    try:
        with open(path, "x", encoding="ascii") as file:
            file.write(str(code))
    except OSError:
        pass  # told already, or no room for it: the launcher's own code stands then


def leave_at_once(message: str, code: int) -> NoReturn:
    """End this process from any thread, as a crash would: everything durable is on disk at every moment.

    One rank a machine prints the message.
    """
    record_exit_code(code)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"rank {os.environ.get('RANK', '0')}: privtrain: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def _report(message: str) -> None:
    """Print a failure once a job: at once on rank 0, on another rank only if the launcher has not ended it by then."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr)
