"""Rows out of files and data sets, as written: no type is guessed, so that 007 and 7 stay the two ids that they are.

Whatever a file holds, an error names it, the row or line, and what to do; never a value. A byte-order mark, which
spreadsheets write, is no part of the first column's name.
"""

from __future__ import annotations

import csv
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import IO

import pyarrow.parquet

from privtrain.config.data import HubSource
from privtrain.errors import ConfigError, Fault
from privtrain.files import strict_json

#: Lines of JSON that are read to learn which columns there are; a row need not name them all.
_LINES_FOR_COLUMNS = 1000
#: What separates the columns of CSV: the first of these that stands outside quotes in the first line. Spreadsheets
#: write semicolons where a comma is the decimal mark. The first line names the columns, so no row decides.
_SEPARATORS = ",;\t|"
#: A line that some spreadsheets write before the first to name the separator.
_NAMED_SEPARATOR = re.compile(r'"?sep=(.)"?\s*')
#: The limit of Python's csv module is 131,072 by default, which a conversation reaches.
_MOST_FIELD_CHARACTERS = (1 << 31) - 1

#: What to do about a file that does not hold one object a line.
_ONE_A_LINE = "a .jsonl file holds one object with named columns a line; convert an array with: jq -c '.[]' FILE"

#: How files begin that are something else than their ending says, and what to do. Texts may begin with the letters of a
#: format's mark, so what follows these counts too.
_OTHER_KINDS = (
    (rb"\x1f\x8b", "is compressed by gzip; unpack it: gunzip FILE"),
    (rb"\x28\xb5\x2f\xfd", "is compressed by zstd; unpack it: zstd -d FILE"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "is compressed by bzip2; unpack it: bunzip2 FILE"),
    (rb"\xfd7zXZ\0", "is compressed by xz; unpack it: unxz FILE"),
    (rb"PK\x03\x04", "is a ZIP archive or a spreadsheet (.xlsx); unpack it, or save it as CSV"),
    (rb"\xd0\xcf\x11\xe0", "is a spreadsheet of an old kind (.xls); save it as CSV"),
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"),
    (rb"(?i)\s*<(!doctype|html)\b", "is a web page, not the file; download it again"),
    (rb"PAR1[\0-\x1f]", "is Parquet; name it .parquet"),
    (rb"ARROW1\0", "is an Arrow file; convert it to Parquet"),
)

#: What reading a damaged file of rows raises.
READ_FAULTS = (OSError, ValueError, OverflowError, RecursionError, KeyError, csv.Error, pyarrow.ArrowException)
#: What the library datasets raises at names, scripts and files that it cannot load, beside its own errors.
_HUB_FAULTS = (*READ_FAULTS, RuntimeError, LookupError, TypeError, AttributeError, ImportError, NotImplementedError)

#: Kinds of files, by the names that the library datasets gives them, that say what type a column has.
_TYPED_BUILDERS = ("parquet", "arrow")


class TooManyFieldsError(ValueError):
    """A row of CSV with more fields than the header names."""


class NotAnObjectError(ValueError):
    """A line of JSON that holds something else than named values."""


def hub_rows(source: HubSource, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """Yield the values of these columns, row by row, of a data set on the Hugging Face hub.

    Of CSV and JSON the library datasets guesses types from all rows together, so that one more row could change how
    other users' ids and texts are read (007 or 7, 5 or 5.0, a day or a moment). Such data sets are refused.

    Raises:
        ConfigError: if it cannot be loaded, lacks a column, or its files do not say which types the columns have.
    """
    import datasets
    from datasets import exceptions

    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except (exceptions.DatasetGenerationError, pyarrow.ArrowException) as error:
        # Raised at a file that cannot be read; its message may quote rows.
        problem = f"cannot read the files of {source.name} ({type(error).__name__})"
        raise ConfigError([Fault("data.source.name", problem)]) from None
    except (*_HUB_FAULTS, exceptions.DatasetsError) as error:
        problem = f"cannot load {source.name}: {_hub_reason(error)}"
        raise ConfigError([Fault("data.source.name", problem)]) from None
    if not isinstance(table, datasets.Dataset):
        raise ConfigError([Fault("data.source.split", f"{source.split!r} of {source.name} is not one table of rows")])
    if table.info.builder_name not in _TYPED_BUILDERS:
        problem = (
            f"{source.name} is read from files without column types ({table.info.builder_name}), which are guessed "
            "from all rows together, so one user's row could change how others are read; download the files and give "
            "them with data.source.kind: files, which guesses nothing, or convert the data set to Parquet"
        )
        raise ConfigError([Fault("data.source.name", problem)])
    missing = set(columns) - set(table.column_names)
    if missing:
        problem = f"no column {sorted(missing)} in {source.name}; it has {', '.join(table.column_names)}"
        raise ConfigError([Fault("data", problem)])
    yield from zip(*(table[column] for column in columns), strict=True)


def _hub_reason(error: Exception) -> str:
    """Return why the library datasets cannot load a data set: its error's first line, unless that may quote a row."""
    if "scripts are no longer supported" in str(error):
        return (
            "it is loaded by a script, which the library datasets no longer runs; convert it to Parquet or JSONL and "
            "give the files with data.source.kind: files"
        )
    if isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, pyarrow.ArrowException):
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"{type(error).__name__}, whose message may hold values and is not shown"


def file_rows(file: pathlib.Path, columns: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """Yield the values of these columns, row by row, of a JSONL, CSV or Parquet file.

    Raises:
        ConfigError: at the first row that cannot be read.
    """
    number, unit = 0, "row"  # rows or lines read so far, and which of the two, for the error
    try:
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as shard:
                for batch in shard.iter_batches(columns=list(columns)):
                    yield from zip(*(batch[column].to_pylist() for column in columns), strict=True)
                    number += batch.num_rows
        elif file.suffix == ".csv":
            with _opened(file) as lines:
                for row in csv_rows(lines):
                    if None in row:  # DictReader's key for fields behind the last column, which would be lost
                        raise TooManyFieldsError
                    number += 1
                    yield tuple(row[c] for c in columns)
        else:
            unit = "line"
            with _opened(file) as lines:
                for line in lines:
                    if line.strip():
                        yield _pick(_parsed(line), columns)
                    number += 1
    except READ_FAULTS as error:
        raise ConfigError([Fault("data.source.paths", unreadable(file, number + 1, error, unit))]) from None


def file_columns(file: pathlib.Path) -> list[str]:
    """Return the names of a file's columns: from CSV's first line, Parquet's footer, or JSONL's first 1,000 lines.

    Raises:
        ConfigError: if it cannot be read.
    """
    number = 0
    try:
        if file.suffix == ".parquet":
            try:
                return pyarrow.parquet.read_schema(file).names
            except pyarrow.ArrowInvalid as error:  # of the footer, which holds no row
                raise ConfigError([Fault("data.source.paths", f"cannot read {file}: {error}")]) from None
        with _opened(file) as lines:
            if file.suffix == ".csv":
                return list(csv_rows(lines).fieldnames or [])
            names: dict[str, None] = {}
            for line in lines:
                if number == _LINES_FOR_COLUMNS:
                    break
                if line.strip():
                    row = _parsed(line)
                    if not isinstance(row, dict):
                        raise NotAnObjectError
                    names.update(dict.fromkeys(row))
                number += 1
            return list(names)
    except READ_FAULTS as error:
        unit = "row" if file.suffix == ".csv" else "line"
        raise ConfigError([Fault("data.source.paths", unreadable(file, number + 1, error, unit))]) from None


def other_kind(file: pathlib.Path) -> str:
    """Return what a file is if its first bytes say that it is something else than its ending does; else nothing."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(64)
    except OSError:
        return ""  # reading it says why
    is_own_kind = file.suffix == ".parquet" and head.startswith(b"PAR1")
    for start, problem in _OTHER_KINDS:
        if re.match(start, head) and not is_own_kind:
            return problem
    # A zero byte at the start is no UTF-8 text. UTF-16 with its mark is named when the file is read.
    if file.suffix != ".parquet" and b"\0" in head[:2] and head[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return "is not UTF-8 text (UTF-16 without a mark, or no text at all); save it as UTF-8"
    return ""


def unreadable(file: pathlib.Path, number: int, error: Exception, unit: str = "row") -> str:
    """Return where and in which way a file cannot be read, without a word of what is in it.

    Args:
        file: the file.
        number: number of the row or line that was being read, from 1.
        error: one of ``READ_FAULTS``.
        unit: what ``number`` counts: row or line.
    """
    match error:
        case OSError(strerror=str(reason)):
            return f"cannot read {file}: {reason}"
        case json.JSONDecodeError():
            reason = f"not JSON ({error.msg} at column {error.colno})"
            if error.doc.strip() in ("[", "{"):  # the first line of a document that goes over several
                reason = _ONE_A_LINE
            elif error.msg == "Extra data":
                reason = "something stands behind its object; give each object a line of its own, without a comma"
        case UnicodeDecodeError():
            is_utf16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
            reason = f"not UTF-8 ({'UTF-16' if is_utf16 else error.reason}); save it as UTF-8"
        case csv.Error():
            reason = f"not CSV ({error})"  # the module's own words
        case RecursionError():
            reason = "nested too deeply"
        case strict_json.RepeatedKeyError():
            reason = "an object names a key twice, and only one of its values could be used; keep one"
        case TooManyFieldsError():
            reason = "it has more fields than the first line names columns; put quotes around a text that holds commas"
        case NotAnObjectError():
            reason = f"not a JSON object; {_ONE_A_LINE}"
        case _:
            reason = f"{type(error).__name__}, whose message may hold values and is not shown"
    return f"cannot read {file}, in or after {unit} {number}: {reason}"


def csv_rows(lines: IO[str]) -> csv.DictReader[str]:
    """Return a reader of CSV whose fields may be as long as a document, whatever separates them.

    Args:
        lines: the opened file, at its start, with its line ends as written.
    """
    csv.field_size_limit(_MOST_FIELD_CHARACTERS)
    first = lines.readline()
    named = _NAMED_SEPARATOR.fullmatch(first)
    if named:
        return csv.DictReader(lines, delimiter=named[1], strict=True)
    outside_quotes = "".join(first.split('"')[::2])
    separator = next((mark for mark in _SEPARATORS if mark in outside_quotes), ",")
    return csv.DictReader(itertools.chain([first], lines), delimiter=separator, strict=True)


def _opened(file: pathlib.Path) -> IO[str]:
    return open(file, newline="" if file.suffix == ".csv" else None, encoding="utf-8-sig")


def _parsed(line: str) -> object:
    return json.loads(line, object_pairs_hook=strict_json.unique_keys)


def _pick(row: object, columns: Sequence[str]) -> tuple[object, ...]:
    if not isinstance(row, dict):
        raise NotAnObjectError
    return tuple(row.get(column) for column in columns)
