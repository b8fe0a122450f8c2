"""One attack job at a time on the same files: two would write into each other's parts and pages."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator

from privtrain.files.private import locked_file, make_private_directory


@contextlib.contextmanager
def alone(signals_path: pathlib.Path, *, is_writer: bool = False) -> Iterator[None]:
    """Lock signals and all that is computed from them; shadows of a run have signals of their own.

    Args:
        signals_path: the signals.
        is_writer: whether their directory is to be made; without it there is nothing to hold where there is none.

    Raises:
        RunBusy: if another process holds them.
        UnsafePath: if their directory, or the lock, is not this user's alone.
    """
    if not is_writer and not os.path.lexists(signals_path.parent):
        yield
        return
    make_private_directory(signals_path.parent)
    busy = f"another attack job is at work on {signals_path}; wait for it, then run the same command"
    with locked_file(signals_path.with_name(f".{signals_path.stem}.lock"), busy=busy):
        yield
