"""What can be seen of a model's files without reading a weight: pointers in their place, cut or damaged files."""

from __future__ import annotations

import json
import pathlib
import struct

from privtrain.errors import PrivtrainError
from privtrain.files import reading

_LFS = b"version https://git-lfs.github.com/spec/"
_INDEX = "model.safetensors.index.json"
#: The safetensors format: 8 bytes of length, so many of JSON, then the tensors without a gap.
_LENGTH_BYTES, _MOST_HEADER_BYTES = 8, 100_000_000
_WITHOUT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state")
_READ_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".json", ".model", ".txt")


def weight_file_faults(directory: pathlib.Path, gguf_file: str | None = None) -> list[str]:
    """Return what is wrong with the files of a model directory, one line each that names the file.

    Args:
        directory: of the model.
        gguf_file: the one file that will be read of it; by default all that transformers may read.
    """
    if gguf_file is not None:
        paths = [directory / gguf_file]
    else:
        paths = sorted(path for path in directory.iterdir() if path.suffix in _READ_SUFFIXES and path.is_file())
        paths = [path for path in paths if not path.name.startswith(_WITHOUT_WEIGHTS)]
    faults = [f"{path} {problem}" for path in paths if (problem := _problem(path))]
    index = directory / _INDEX
    if gguf_file is None and not (directory / "model.safetensors").exists() and index in paths and not faults:
        faults += _missing_parts(index)
    return faults


def _problem(path: pathlib.Path) -> str:
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if head == _LFS:
        return "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    if path.suffix in (".safetensors", ".bin", ".pt", ".gguf") and size == 0:
        return "is empty"
    return _safetensors_problem(path, size) if path.suffix == ".safetensors" else ""


def _safetensors_problem(path: pathlib.Path, size: int) -> str:
    """Return what keeps a safetensors file from being whole."""
    damaged = "is damaged, or was not copied to its end; fetch it again"
    with open(path, "rb") as file:
        start = file.read(_LENGTH_BYTES)
        if len(start) < _LENGTH_BYTES:
            return damaged
        (length,) = struct.unpack("<Q", start)
        if length > min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            return damaged
        header = file.read(length)
    try:
        tensors = dict(json.loads(header).items())
        end = max((int(tensors[name]["data_offsets"][1]) for name in tensors if name != "__metadata__"), default=0)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return damaged
    expected = _LENGTH_BYTES + length + end
    return "" if size == expected else f"{damaged} ({size} bytes; its header tells of {expected})"


def _missing_parts(index: pathlib.Path) -> list[str]:
    try:
        parts = reading.read_json(index)["weight_map"].values()
        names = sorted({str(part) for part in parts})
    except (PrivtrainError, KeyError, AttributeError) as error:
        return [f"{index} is not an index of weights ({type(error).__name__})"]
    return [f"{index} names {name}, which is not there" for name in names if not (index.parent / name).is_file()]
