"""Run a command line so that a user's mistake is one clear message and an exit code, never a traceback."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable

from privtrain.errors import PrivtrainError

#: A mistake that every rank meets is told by rank 0; the launcher ends the others before this many seconds are over.
_OTHER_RANKS_WAIT_SECONDS = 3.0


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
    except PrivtrainError as error:
        _report(f"{name}: {error}")
        sys.exit(error.exit_code)


def _report(message: str) -> None:
    """Print a failure once a job: at once on rank 0, on another rank only if the launcher has not ended it by then."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_OTHER_RANKS_WAIT_SECONDS)
        message = f"rank {rank}: {message}"
    print(message, file=sys.stderr)
