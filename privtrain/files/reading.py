"""Open files that may be damaged, replaced or made by somebody else: whatever is wrong is one line that names the file.

Nothing is assumed of a file. It must be a regular file (no link, no directory, no pipe: opening one could wait for
ever), of a size that its kind can have, and readable in one way only. Messages name the file and, where there is one,
the line; never a value, since private records pass through here too.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

from privtrain.errors import DamagedFile
from privtrain.files import strict_json, strict_yaml

MAX_BYTES = 1 << 30
"""Of a file that is read whole, unless its reader says otherwise."""

_WHAT_IT_IS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@contextlib.contextmanager
def opened(
    path: pathlib.Path,
    *,
    remedy: str = "",
    max_bytes: int | None = None,
    follow_links: bool = False,
    may_be_empty: bool = False,
) -> Iterator[BinaryIO]:
    """Open a regular file for reading.

    Args:
        path: the file.
        remedy: what the error tells the user to do, for example the command to run next.
        max_bytes: the largest size that is accepted; any if None.
        follow_links: for files that people name themselves and that may lie behind links.
        may_be_empty: whether a file of no bytes is accepted.

    Raises:
        DamagedFile: if it is missing, no regular file, empty, larger than that, or may not be read.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise DamagedFile(path, _problem(path, error), remedy) from None
    except ValueError:  # a null byte
        raise DamagedFile(path, "is no name of a file", remedy) from None
    status = os.fstat(descriptor)
    if stat.S_ISDIR(status.st_mode):  # os.fdopen would raise an error of its own
        os.close(descriptor)
        raise DamagedFile(path, "is a directory, not a file", remedy)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(path, f"is {_kind(status.st_mode)}, not a file", remedy)
        if status.st_size == 0 and not may_be_empty:
            raise DamagedFile(path, "is empty", remedy)
        if max_bytes is not None and status.st_size > max_bytes:
            raise DamagedFile(path, f"has {status.st_size} bytes; expected at most {max_bytes}", remedy)
        yield file


def read_bytes(
    path: pathlib.Path, *, remedy: str = "", max_bytes: int = MAX_BYTES, follow_links: bool = False
) -> bytes:
    """Return the whole of a file; see :func:`opened`."""
    with opened(path, remedy=remedy, max_bytes=max_bytes, follow_links=follow_links) as file:
        try:
            content = file.read(max_bytes + 1)  # it may have grown since it was opened
        except OSError as error:
            raise DamagedFile(path, _problem(path, error), remedy) from None
    if len(content) > max_bytes:
        raise DamagedFile(path, f"has more than {max_bytes} bytes", remedy)
    return content


def sha256_of(file: BinaryIO, path: pathlib.Path) -> str:
    """Return SHA-256 of an open file from its beginning; it stands at the beginning afterwards.

    Raises:
        DamagedFile: if the disk does not give it.
    """
    try:
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType] - it has readinto
        file.seek(0)
    except OSError as error:
        raise DamagedFile(path, f"cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def file_sha256(path: pathlib.Path, *, follow_links: bool = False) -> str:
    """Return SHA-256 of a regular file; see :func:`opened`."""
    with opened(path, follow_links=follow_links, may_be_empty=True) as file:
        return sha256_of(file, path)


def read_json(
    path: pathlib.Path, *, remedy: str = "", schema: str | None = None, max_bytes: int = MAX_BYTES
) -> dict[str, Any]:
    """Return the JSON object in a file; no key may stand twice, and every number must be finite.

    Args:
        path: the file.
        remedy: what an error tells the user to do.
        schema: what the object's key ``schema`` must say; anything if None.
        max_bytes: the largest size that is accepted.

    Raises:
        DamagedFile: if the file holds anything else.
    """
    content = parse_json(read_bytes(path, remedy=remedy, max_bytes=max_bytes), path, remedy=remedy)
    if schema is not None and content.get("schema") != schema:
        raise DamagedFile(path, f"has another schema than {schema!r}", remedy)
    return content


def parse_json(content: bytes, path: pathlib.Path, *, line: int | None = None, remedy: str = "") -> dict[str, Any]:
    """Return the JSON object in ``content``, with the rules of :func:`read_json`.

    Args:
        content: of the whole file, or of one line.
        path: of the file, for error messages.
        line: number of the line that ``content`` is; None of a whole file.
        remedy: what an error tells the user to do.

    Raises:
        DamagedFile: if it is anything else.
    """
    where = "" if line is None else f"line {line} "
    try:
        value = strict_json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DamagedFile(path, f"{where}is not UTF-8 at byte {error.start}", remedy, line=line) from None
    except json.JSONDecodeError as error:
        at = f"at byte {error.pos}" if line is not None else f"in line {error.lineno}"
        raise DamagedFile(path, f"{where}is not JSON {at}", remedy, line=line) from None
    except ValueError as error:
        raise DamagedFile(path, f"{where}is not JSON with one meaning: {error}", remedy, line=line) from None
    if not isinstance(value, dict):
        raise DamagedFile(path, f"{where}holds no JSON object", remedy, line=line)
    return value


def read_json_lines(
    path: pathlib.Path, *, remedy: str = "", max_bytes: int = MAX_BYTES, may_have_mark: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines, each with its line's number from 1; empty lines are skipped.

    Args:
        path: the file.
        remedy: what an error tells the user to do.
        max_bytes: the largest size that is accepted.
        may_have_mark: whether a byte-order mark may come first, as in files that people write in editors.

    Raises:
        DamagedFile: naming the line, if one holds anything but a JSON object.
    """
    content = read_bytes(path, remedy=remedy, max_bytes=max_bytes)
    content = content.removeprefix(codecs.BOM_UTF8) if may_have_mark else content
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield number, parse_json(line, path, line=number, remedy=remedy)


def read_yaml(
    path: pathlib.Path, *, remedy: str = "", max_bytes: int = 16 << 20, follow_links: bool = False
) -> dict[str, Any]:
    """Return the YAML mapping in a file, read by the rules of :mod:`.strict_yaml`; an empty file gives an empty one.

    Raises:
        DamagedFile: if the file holds anything else, or a key that is no text.
    """
    content = read_bytes(path, remedy=remedy, max_bytes=max_bytes, follow_links=follow_links)
    try:
        document = strict_yaml.parse(content.decode("utf-8"))
    except strict_yaml.YAML_FAULTS as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise DamagedFile(path, f"is not YAML{where}", remedy) from None
    if document.faults:
        problems = "; ".join(f"line {fault.line}, {fault.key}: {fault.problem}" for fault in document.faults)
        raise DamagedFile(path, f"has no single meaning: {problems}", remedy, line=document.faults[0].line)
    tree = {} if document.value is None else document.value
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise DamagedFile(path, "holds no mapping of names", remedy)
    return tree


def finite_number(row: Mapping[str, Any], key: str, path: pathlib.Path, *, line: int) -> float | None:
    """Return ``row[key]`` as a finite number; None where the row lacks the key or holds null.

    Args:
        row: one line of a file, parsed.
        key: of the number.
        path: of the file, for error messages.
        line: number of the line, for error messages.

    Raises:
        DamagedFile: if the value is no number, or not finite.
    """
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DamagedFile(path, f"line {line}: {key} is no number", line=line)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DamagedFile(path, f"line {line}: {key} is not finite", line=line)
    return number


def _problem(path: pathlib.Path, error: OSError) -> str:
    """Return why a file cannot be opened or read, as the predicate of a sentence that begins with its path."""
    match error.errno:
        case errno.ENOENT | errno.ENOTDIR:
            return "is missing"
        case errno.ELOOP | errno.EMLINK:
            return "is a link, not a file" if os.path.islink(path) else "lies behind a loop of links"
        case errno.EACCES | errno.EPERM:
            return "may not be read by this user"
        case errno.ENXIO:
            return "is a socket or a pipe, not a file"
        case _:
            return f"cannot be read ({error.strerror or type(error).__name__})"


def _kind(mode: int) -> str:
    return next((name for test, name in _WHAT_IT_IS if test(mode)), "something else")
