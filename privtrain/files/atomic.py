"""Write so that after a crash a file is the old one or the new one, whole, and on disk."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def temporary_of(path: pathlib.Path) -> pathlib.Path:
    """Return the temporary path beside ``path`` where its new content is written first."""
    return path.with_name(f".{path.name}.tmp")


def write_atomically(path: pathlib.Path, content: str | bytes, mode: int = 0o644) -> None:
    """Write, fsync and rename: after a crash the file is the old one or the new one, whole."""
    _write_atomically(path, [content.encode("utf-8") if isinstance(content, str) else content], mode)


def _write_atomically(path: pathlib.Path, parts: Iterable[bytes], mode: int) -> None:
    """Do what :func:`write_atomically` says with content that comes in parts."""
    temporary = temporary_of(path)
    try:
        temporary.unlink(missing_ok=True)  # one that a crash left, or a link that somebody put there
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)  # the umask may have taken bits away
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_json(path: pathlib.Path, value: Mapping[str, Any], mode: int = 0o644) -> None:
    """Write indented JSON as :func:`write_atomically` does, piece by piece: a manifest may name millions of users."""
    _write_atomically(path, json_pieces(value), mode)


def json_pieces(value: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield a value's JSON in the one form that :func:`write_json` writes, so that a reader can compare the bytes."""
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False)
    return (piece.encode("utf-8") for piece in itertools.chain(encoder.iterencode(value), ["\n"]))


def replace_directory(source: pathlib.Path, target: pathlib.Path) -> None:
    """Rename ``source`` to ``target``, which is deleted first if it exists; all contents are on disk before that."""
    sync_tree(source)
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)
    sync_directory(target.parent)


def sync_tree(directory: pathlib.Path) -> None:
    """Bring everything in a directory onto the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            sync_file(pathlib.Path(root) / name)
        sync_directory(pathlib.Path(root))


def sync_file(path: pathlib.Path) -> None:
    """Bring a file's content onto the disk."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def sync_directory(path: pathlib.Path) -> None:
    """Bring the entries of a directory onto the disk: without that a crash may undo a rename in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
