"""Join the process group, and turn failures of machines, disks and peers into one clear error."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from privtrain.backends import Backend, Watch, create_backend
from privtrain.config.training import PerformanceSection
from privtrain.errors import ModelFailed, Preempted, PrivtrainError, StorageFailed
from privtrain.job.stop import StopRequest

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}
#: Leaving a process group whose peer died may hang; the process exits after this time in any case.
_TEARDOWN_SECONDS = 20.0


@contextlib.contextmanager
def process_group(performance: PerformanceSection, stop: StopRequest) -> Iterator[Backend]:
    """Yield this rank's backend while a watch detects ranks that died.

    Raises:
        RankLost: if another rank died or was cut off, named; within ``heartbeat_timeout_seconds`` at the latest (where
            the main thread cannot be interrupted the process ends instead, with the same message and exit code).
        StorageFailed: for a full disk.
    """
    backend = create_backend(performance.collective_timeout_seconds)
    stop.joined_group()
    try:
        watch = Watch(backend, performance.heartbeat_timeout_seconds)
        try:
            yield backend
        except Preempted:
            raise
        except Exception as error:
            shown_error = _root_cause(error, watch, stop)
            _exit_after_timeout(backend, shown_error)
            if shown_error is error:
                raise
            raise shown_error from error
        finally:
            watch.close()
    finally:
        backend.close()


def _root_cause(error: Exception, watch: Watch, stop: StopRequest) -> Exception:
    """Return the error to show, and announce it to the other ranks if it is this rank's own.

    A rank that is lost makes the others' collectives fail with errors that say nothing of it; the watch knows better.
    """
    cause = error
    if isinstance(error, ModelFailed) and isinstance(error.__cause__, Exception):
        # Where weights are sharded, a forward pass gathers them: a lost rank then looks as if the model had failed.
        cause = error.__cause__
    shown_error = error
    if not isinstance(cause, PrivtrainError):  # such an error says what happened already
        storage_failure = _storage_failure(cause)
        if storage_failure is not None:
            shown_error = storage_failure
        else:
            others_fault = watch.explain(cause, stop.requested)
            if others_fault is not None:
                return others_fault  # which the other rank announces
    exit_code = shown_error.exit_code if isinstance(shown_error, PrivtrainError) else 1
    watch.announce(f"{type(shown_error).__name__}: {shown_error}", exit_code)
    return shown_error


def _storage_failure(error: Exception) -> StorageFailed | None:
    """Return an error for a write that failed because the disk is full, or ``None``."""
    number = error.errno if isinstance(error, OSError) else None
    if number not in _FULL:
        # safetensors gives only a message, e.g. "No space left on device (os error 28)".
        in_message = [known for known in _FULL if f"os error {known}" in str(error)]
        number = in_message[0] if in_message else None
    if number is None:
        return None
    place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return StorageFailed(
        f"{_FULL[number]}{place}; nothing is lost: make room for the run directory and repeat the command, which "
        "continues from the last checkpoint"
    )


def _exit_after_timeout(backend: Backend, error: Exception) -> None:
    """Start a timer that ends the process, with the error's exit code, if leaving the process group hangs."""
    if backend.world_size == 1:
        return

    def leave() -> None:
        traceback.print_exception(error, file=sys.stderr)
        os._exit(error.exit_code if isinstance(error, PrivtrainError) else 1)

    timer = threading.Timer(_TEARDOWN_SECONDS, leave)
    timer.daemon = True
    timer.start()
