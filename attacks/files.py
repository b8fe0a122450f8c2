"""Writing files so that a crash leaves the old file or the new one, never a half."""

from __future__ import annotations

import json
import os
import pathlib
import tempfile
from collections.abc import Mapping


def write_atomically(path: pathlib.Path, content: bytes, *, mode: int) -> None:
    """Replaces ``path`` by ``content``: temporary file, fsync, rename, fsync of the directory.

    Args:
        path: the file to replace; its directory must exist.
        content: the whole new content.
        mode: permission bits of the file, 0o600 for anything under ``secret/``.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        pathlib.Path(temporary).replace(path)
    finally:
        pathlib.Path(temporary).unlink(missing_ok=True)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_private_directory(path: pathlib.Path) -> None:
    """Makes a directory and whatever parents are missing, each readable by its owner alone.

    Args:
        path: the directory; left as it is if it exists.
    """
    # mkdir(parents=True) would give the parents the default mode, not this one.
    for directory in [*reversed(path.parents), path]:
        if not directory.is_dir():
            directory.mkdir(mode=0o700, exist_ok=True)


def write_json(path: pathlib.Path, facts: Mapping[str, object]) -> None:
    """Writes a public JSON file, readable by a person and free of NaN and infinity.

    Args:
        path: the file to replace.
        facts: the content; keys keep their order.

    Raises:
        ValueError: if a value is NaN or infinite.
    """
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, text.encode() + b"\n", mode=0o644)
