"""Rows out of Python as a private file, so that a run can be resumed and attacked with its own data."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from privtrain.errors import ConfigError, Fault
from privtrain.files.atomic import temporary_of, write_atomically
from privtrain.files.private import locked_file, make_private_directory
from privtrain.privacy.secret import SecretKey, load_key_file

DIRECTORY = "rows"
#: Also the run's name, unless one is given.
FILE = "in-memory.jsonl"


def store_rows(rows: Iterable[Mapping[str, Any]], parent: pathlib.Path) -> pathlib.Path:
    """Write rows as JSON lines into a private directory (mode 0700); return the file, the same for the same rows.

    The file's name is published in the configuration, and is the default of the run's: so it is always the same. Names
    of different rows that differ would tell, of two runs, whether anybody joined or left in between. The directory's
    name, which is not published, tells rows apart; it is keyed by ``rows/key``, which is as private as they are.

    Raises:
        ConfigError: at a row that JSON cannot hold, or if there is none.
    """
    # Data frames of pandas and polars are refused: iterating over one yields the names of its columns.
    is_frame = any(hasattr(rows, name) for name in ("iterrows", "iter_rows"))
    if is_frame or isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
        hint = "; of a data frame give frame.to_dict('records') or frame.to_dicts()" if is_frame else ""
        problem = f"given {type(rows).__name__}; give mappings, one a row, or a datasets.Dataset{hint}"
        raise ConfigError([Fault("rows", problem)])
    directory = parent / DIRECTORY
    make_private_directory(directory)
    digest, num_rows = hashlib.sha256(), 0
    temporary = temporary_of(directory / f"{os.getpid()}.jsonl")
    try:
        with open(temporary, "w", encoding="utf-8", opener=_private) as file:
            for num_rows, row in enumerate(rows, start=1):
                line = _line(row, num_rows)
                digest.update(line.encode())
                file.write(line)
        if not num_rows:
            raise ConfigError([Fault("rows", "there is none")])
        name = _key(directory).derive("name of rows", digest.hexdigest()).hex()[:16]
        make_private_directory(directory / name)
        path = directory / name / FILE
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _key(directory: pathlib.Path) -> SecretKey:
    """Return the key that the names of this directory's files are derived with; make it if it is not there."""
    path = directory / "key"
    with locked_file(directory / "key.lock"):
        if not path.exists():
            write_atomically(path, SecretKey.generate().reveal().hex() + "\n", mode=0o600)
        return load_key_file(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _line(row: Mapping[str, Any], number: int) -> str:
    """Return a row as a line of JSON; ``number`` names the row in the error."""
    try:
        return json.dumps(dict(row), ensure_ascii=True, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        kind = "no mapping of columns" if not isinstance(row, Mapping) else type(error).__name__
        problem = f"row {number} cannot be kept as JSON ({kind}); give texts, whole numbers and lists of these"
        raise ConfigError([Fault("rows", problem)]) from None
