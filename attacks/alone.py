"""One attack job at a time on the same signals file: two jobs would overwrite each other's partial results."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from privtrain.files.private import locked_file, make_private_directory


@contextlib.contextmanager
def alone(signals_path: pathlib.Path, *, is_writer: bool = False) -> Iterator[None]:
    """Hold the lock of one signals file, ``.<name>.lock`` beside it, while the block runs.

    A job that scores a shadow model writes a signals file of its own, so it holds another lock.

    Args:
        signals_path: the file of per-token scores that the job writes or reads.
        is_writer: whether the job writes that file. A writer makes the file's directory; a reader that finds no
            directory goes on without a lock, and then reports by itself that nothing was scored.

    Raises:
        RunBusy: if another process holds the lock.
        UnsafePath: if the directory, or the lock, is not this user's alone.
    """
    if not is_writer and not os.path.lexists(signals_path.parent):
        yield
        return
    make_private_directory(signals_path.parent)
    busy = f"another attack job is at work on {signals_path}; wait for it, then run the same command"
    with locked_file(signals_path.with_name(f".{signals_path.stem}.lock"), busy=busy):
        yield
