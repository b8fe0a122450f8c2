"""Join the other ranks, and say what went wrong in words when the machines fail the job."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import traceback
from collections.abc import Iterator

from privtrain.backends import Backend, Watch, create_backend
from privtrain.config.schema import PerformanceSection
from privtrain.errors import ModelFailed, Preempted, PrivtrainError, StorageFailed
from privtrain.job.stop import StopRequest

_FULL = {errno.ENOSPC: "no space left on the disk", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file too large"}
#: A process group whose peer died may refuse to be left; the process goes all the same after this.
_TEARDOWN_SECONDS = 20.0


@contextlib.contextmanager
def joined(performance: PerformanceSection, stop: StopRequest) -> Iterator[Backend]:
    """This rank's backend, with every rank watching that the others live.

    Raises:
        RankLost: if another rank died or was cut off, named; within ``heartbeat_timeout_seconds`` at the latest (where
            the main thread cannot be interrupted the process ends instead, with the same message and exit code).
        StorageFailed: for a full disk.
    """
    backend = create_backend(performance.collective_timeout_seconds)
    stop.joined()
    try:
        watch = Watch(backend, performance.heartbeat_timeout_seconds)
        try:
            yield backend
        except Preempted:
            raise
        except Exception as error:
            told = _explained(error, watch, stop)
            _leave_even_if_teardown_hangs(backend, told)
            if told is error:
                raise
            raise told from error
        finally:
            watch.close()
    finally:
        backend.close()


def _explained(error: Exception, watch: Watch, stop: StopRequest) -> Exception:
    """The error that people should see; the other ranks are told if it is this rank's own."""
    # A pass that gathers weights fails where another rank is lost, and clipping knows no collectives.
    cause = error.__cause__ if isinstance(error, ModelFailed) and isinstance(error.__cause__, Exception) else error
    if isinstance(cause, PrivtrainError):
        told: Exception = error
    else:
        told = _storage_failure(cause) or watch.explain(cause, stop.requested) or error
        if told is not error and not isinstance(told, StorageFailed):
            return told
    watch.announce(f"{type(told).__name__}: {told}", told.exit_code if isinstance(told, PrivtrainError) else 1)
    return told


def _storage_failure(error: Exception) -> StorageFailed | None:
    """Whether a write failed for want of room; safetensors tells so in words alone."""
    number = error.errno if isinstance(error, OSError) else None
    if number not in _FULL:
        number = next((n for n in _FULL if f"os error {n}" in str(error)), None)
    if number is None:
        return None
    place = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    return StorageFailed(
        f"{_FULL[number]}{place}; nothing is lost: make room for the run directory, and the same command goes on "
        "from the last checkpoint"
    )


def _leave_even_if_teardown_hangs(backend: Backend, error: Exception) -> None:
    if backend.world_size == 1:
        return

    def leave() -> None:
        traceback.print_exception(error, file=sys.stderr)
        os._exit(error.exit_code if isinstance(error, PrivtrainError) else 1)

    timer = threading.Timer(_TEARDOWN_SECONDS, leave)
    timer.daemon = True
    timer.start()
