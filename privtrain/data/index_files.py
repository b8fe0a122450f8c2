"""The files of an index on disk, and the digests that bind them: damage is found before it is learned from.

``index.json`` holds its own digest, the size of every file, and SHA-256 of all but the texts, which are small beside
them: these are hashed through the handle that is mapped, whenever an index is opened (10 million records: 0.3 GB, well
under a second). Texts may be larger than memory, so each has a digest of its own, 16 bytes of its SHA-256, and is
compared when it is read. So nothing of an index is used that is not what was written, and opening one costs what its
users cost, never what its texts do.

Digests without a key tell damage, not malice: whoever can write into a directory that is 0700 is the user who trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from privtrain.errors import DamagedFile
from privtrain.files import reading

SCHEMA = "privtrain/index/2"
DESCRIPTION = "index.json"

TEXTS = "texts.bin"
#: Every other file → type of its elements.
ARRAYS: Mapping[str, type[Any]] = {
    "text_ends.u64": np.uint64,
    "text_digests.bin": np.uint8,
    "users.bin": np.uint8,
    "user_ends.u64": np.uint64,
    "record_ends.u64": np.uint64,
}
DIGEST_BYTES = 16

_OWN_DIGEST = "description_sha256"


def text_digest(content: bytes) -> bytes:
    """Return a text's truncated SHA-256, which is checked whenever the text is read."""
    return hashlib.sha256(content).digest()[:DIGEST_BYTES]


@dataclasses.dataclass
class HashedFile:
    """A new file whose content is hashed as it is written.

    Attributes:
        file: the open file.
        num_bytes: bytes written so far.
        sha256: hash object of the bytes written so far.
    """

    file: IO[bytes]
    num_bytes: int = 0
    sha256: Any = dataclasses.field(default_factory=hashlib.sha256)

    def write(self, content: bytes) -> None:
        """Append."""
        self.file.write(content)
        self.sha256.update(content)
        self.num_bytes += len(content)


@contextlib.contextmanager
def created(path: pathlib.Path) -> Iterator[HashedFile]:
    """Create a file with mode 0600 for the block, and fsync it at the end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield HashedFile(file)
        file.flush()
        os.fsync(file.fileno())


def describe(directory: pathlib.Path, facts: Mapping[str, Any], files: Mapping[str, HashedFile]) -> None:
    """Write ``index.json`` as the last file of an index, which marks the index as complete.

    Args:
        directory: of the index.
        facts: further content: counts and digests.
        files: every file that was written, by name.
    """
    assert set(files) == {TEXTS, *ARRAYS}
    described: dict[str, dict[str, Any]] = {}
    for name, file in files.items():
        described[name] = {"num_bytes": file.num_bytes}
        if name != TEXTS:  # each text has a digest of its own
            described[name]["sha256"] = file.sha256.hexdigest()
    body = {"schema": SCHEMA, **facts, "files": described}
    with created(directory / DESCRIPTION) as file:
        file.write(json.dumps({**body, _OWN_DIGEST: _digest_of(body)}).encode())


def read_description(directory: pathlib.Path, remedy: str) -> dict[str, Any]:
    """Return the content of ``index.json``, exactly as :func:`describe` wrote it.

    Raises:
        DamagedFile: if it is missing, or differs in any byte; ``remedy`` says what to do.
    """
    path = directory / DESCRIPTION
    content = reading.read_bytes(path, remedy=remedy)
    description = reading.parse_json(content, path, remedy=remedy)
    body = {name: value for name, value in description.items() if name != _OWN_DIGEST}
    if description.get(_OWN_DIGEST) != _digest_of(body) or json.dumps(description).encode() != content:
        raise DamagedFile(path, "is not as it was written: it was altered or damaged", remedy)
    if description.get("schema") != SCHEMA or set(description.get("files", ())) != {TEXTS, *ARRAYS}:
        raise DamagedFile(path, "is no description of an index", remedy)
    return description


def map_checked(directory: pathlib.Path, description: Mapping[str, Any], remedy: str) -> dict[str, npt.NDArray[Any]]:
    """Map the files of an index; the arrays are compared with their digests, the texts' file with its size.

    Raises:
        DamagedFile: naming the file that is missing or not as it was written.
    """
    kinds = {TEXTS: np.uint8, **ARRAYS}
    return {name: _mapped(directory / name, kinds[name], facts, remedy) for name, facts in description["files"].items()}


def _mapped(path: pathlib.Path, kind: type[Any], facts: Mapping[str, Any], remedy: str) -> npt.NDArray[Any]:
    """Map one file into memory; raise DamagedFile unless its size, and its digest if there is one, are as described.

    Args:
        path: the file.
        kind: type of its elements.
        facts: what ``index.json`` says of it: ``num_bytes``, and ``sha256`` unless it holds the texts.
        remedy: what to do about a damaged file, for the error.
    """
    with reading.opened(path, remedy=remedy, may_be_empty=True) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != facts["num_bytes"]:
            raise DamagedFile(path, f"has {num_bytes} bytes; expected {facts['num_bytes']}", remedy)
        try:
            if "sha256" in facts and reading.sha256_of(file, path) != facts["sha256"]:
                raise DamagedFile(path, "is not as it was written: it was altered or damaged", remedy)
            return np.memmap(file, dtype=kind, mode="r") if num_bytes else np.zeros(0, dtype=kind)  # empty: no map
        except (OSError, ValueError) as error:
            raise DamagedFile(path, f"cannot be read ({type(error).__name__})", remedy) from None


def _digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
