"""What can be seen of a model's files without reading a weight: pointers in their place, cut or damaged files."""

from __future__ import annotations

import json
import pathlib
import struct
from collections.abc import Iterable

from privtrain.errors import PrivtrainError
from privtrain.files import reading

_LFS = b"version https://git-lfs.github.com/spec/"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
_ADAPTER_CONFIG = "adapter_config.json"
#: Weights in one file, the one that transformers loads first.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
#: The safetensors format: 8 bytes of length, so many of JSON, then the tensors without a gap.
_LENGTH_BYTES, _MOST_HEADER_BYTES = 8, 100_000_000
_DESCRIPTIONS = (".json", ".model", ".txt")
#: Descriptions that transformers reads, and the most bytes of one that are parsed before.
_READ_AS_JSON = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json"),
)
_MOST_PARSED_BYTES = 1 << 20


def weight_file_faults(directory: pathlib.Path, gguf_file: str | None = None) -> list[str]:
    """Return what is wrong with the files of a model directory, one line each that names the file.

    Args:
        directory: of the model.
        gguf_file: the one file that will be read of it; by default all that transformers may read.
    """
    if gguf_file is not None:
        paths = [directory / gguf_file]
    else:
        paths = sorted(path for path in directory.iterdir() if path.suffix in _DESCRIPTIONS and path.is_file())
    faults = _problems(paths)
    if gguf_file is None and not faults:
        weights, faults = weights_read(directory)
        faults += _problems(weights)
        if (directory / _ADAPTER_CONFIG).exists():
            faults.append(
                f"{directory / _ADAPTER_CONFIG} makes transformers load an adapter on the model, or another model; "
                "merge it first (privtrain export --merge), or remove it"
            )
    return faults


def weights_read(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Return (weight files that transformers opens, faults of their index).

    Of several formats only the one that transformers prefers counts: a clone without large files keeps Git LFS pointers
    in the place of the others.
    """
    for whole in _WHOLE:
        if (directory / whole).is_file():
            return [directory / whole], []
        index = directory / f"{whole}.index.json"
        if index.is_file():
            return _parts(index)
    parts = sorted(directory.glob("model-*-of-*.safetensors"))
    if parts:
        problem = f"{directory} holds {parts[0].name} and no {_WHOLE[0]}.index.json, which names the parts; fetch it"
        return [], [problem]
    return [], []


def _problems(paths: Iterable[pathlib.Path]) -> list[str]:
    """Return a line for each file with which something is wrong."""
    problems = [(path, _problem(path)) for path in paths]
    return [f"{path} {problem}" for path, problem in problems if problem]


def _problem(path: pathlib.Path) -> str:
    """Return what is wrong with a file of a model, as far as its first bytes and its size tell; empty if nothing."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            head = file.read(len(_LFS))
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if head == _LFS:
        return "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    if path.suffix in _WEIGHT_SUFFIXES and size == 0:
        return "is empty"
    if path.name in _READ_AS_JSON and size <= _MOST_PARSED_BYTES:
        return _json_problem(path)
    return _safetensors_problem(path, size) if path.suffix == ".safetensors" else ""


def _json_problem(path: pathlib.Path) -> str:
    """Return what is wrong with a file of JSON; empty if nothing. transformers ignores some that are damaged."""
    try:
        json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        return "is not JSON in UTF-8, or is cut short; fetch it again"
    return ""


def _safetensors_problem(path: pathlib.Path, size: int) -> str:
    """Return what is wrong with a safetensors file whose size is not what its header says; empty if nothing."""
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
        ranges = [entry["data_offsets"] for name, entry in tensors.items() if name != "__metadata__"]  # [begin, end]
        end = max((int(offsets[1]) for offsets in ranges), default=0)
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
        return damaged
    expected = _LENGTH_BYTES + length + end
    return "" if size == expected else f"{damaged} ({size} bytes; its header tells of {expected})"


def _parts(index: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """Return (the weight files that an index names, faults); with faults there are no files."""
    try:
        # The hub's cache keeps every file as a link.
        content = reading.read_bytes(index, follow_links=True)
        names = sorted({str(name) for name in reading.parse_json(content, index)["weight_map"].values()})
    except (PrivtrainError, KeyError, AttributeError) as error:
        return [], [f"{index} is not an index of weights ({type(error).__name__})"]
    elsewhere = [name for name in names if not name or name in (".", "..") or set(name) & set("/\\\0")]
    if elsewhere:
        return [], [f"{index} names parts outside of its directory ({elsewhere[0]!r}); put them beside it"]
    parts = [index.parent / name for name in names]
    missing = [f"{index} names {part.name}, which is not there" for part in parts if not part.is_file()]
    if missing:
        return [], missing
    return parts, []
