"""Further columns of the data that the trainer does not read: labelled spans, dates, languages."""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet

from attacks.errors import AttackInputError
from privtrain.config.data import DataSection, FilesSource
from privtrain.data import formats
from privtrain.data.corpus import Corpus, normal_form, owner_of, source_files
from privtrain.data.rows import READ_FAULTS, NotAnObjectError, csv_rows, unreadable
from privtrain.errors import DamagedFile
from privtrain.files import reading

Extras = Mapping[tuple[str, int], Mapping[str, Any]]
"""(user, record index) to the values of further columns by name."""


def read_columns(
    data: DataSection,
    corpus: Corpus,
    names: Sequence[str],
    digests: Sequence[str] | None,
    wanted: Iterable[tuple[str, int]] | None = None,
) -> Extras:
    """Return the values of columns that the trainer does not read, by (user, index of the record in the corpus).

    Rows are read one after the other and numbered by the rules of the corpus, so memory grows with the wanted records
    alone. Of a user's equal rows, where ``data.deduplicate`` drops them, the first one's values count.

    Args:
        data: where the rows are; files only.
        corpus: what the trainer read of them, in memory or on disk.
        names: columns to read.
        digests: SHA-256 that each file must have, in reading order. The corpus' own digest does not cover columns that
            the trainer does not read.
        wanted: (user, record index) pairs; all records of the corpus if None.

    Returns:
        For each record the values by column, and under ``offset`` how many characters the trainer stripped at the front
        of the text.

    Raises:
        AttackInputError: if the source is no file, a column is missing, or the rows are not the corpus' rows.
        DamagedFile: if a file is not the one that it was.
    """
    if not names:
        return {}
    if not isinstance(data.source, FilesSource) or digests is None:
        raise AttackInputError(f"columns {', '.join(names)} can be read of data.source.kind: files only")
    chosen = None if wanted is None else set(wanted)
    owners = corpus.records if chosen is None else {user for user, _ in chosen}
    extras: dict[tuple[str, int], dict[str, Any]] = {}
    counters: dict[str, _RecordCounter] = {}
    for row in _rows(data.source, digests):
        # Number the row as the corpus does: rows without an owner or a text, and a user's equal rows, have no number.
        values = [row.get(getattr(data, key)) for key in data.column_keys]  # of the columns that the trainer reads
        owner, content = owner_of(row.get(data.user_column)), formats.canonical(data, values).strip()
        if not owner or not content or owner not in owners:
            continue
        counter = counters.setdefault(owner, _RecordCounter(data.deduplicate == "within_user"))
        index = counter.next_index(content)
        if index is None:
            continue
        if chosen is not None and (owner, index) not in chosen:
            continue
        known = corpus.records.get(owner, ())
        if index >= len(known) or known[index] != content:
            raise AttackInputError(_CHANGED)
        missing = [name for name in names if name not in row]
        if missing:
            raise AttackInputError(f"a row has no column {', '.join(missing)}; name one that every row has")
        text = values[0] if data.format == "text" else None  # spans are for this format alone
        offset = len(text) - len(text.lstrip()) if isinstance(text, str) else 0
        extras[owner, index] = {name: row[name] for name in names} | {"offset": offset}
    if chosen is not None and len(extras) < len(chosen):
        raise AttackInputError(_CHANGED)
    return extras


_CHANGED = "the rows are not those that were trained on; restore the files named in config.yaml"


class _RecordCounter:
    """Gives one user's rows, in reading order, the indices that they have as records of the corpus.

    Args:
        drops_equal: whether the corpus keeps only the first of a user's equal rows (``data.deduplicate``).
    """

    def __init__(self, drops_equal: bool) -> None:
        self._num_records = 0
        self._seen: set[bytes] | None = set() if drops_equal else None  # digests of the user's records so far

    def next_index(self, content: str) -> int | None:
        """Return the next row's index; None if the corpus dropped it because the user has an equal one."""
        if self._seen is not None:
            digest = hashlib.sha256(normal_form(content).encode("utf-8", errors="surrogatepass")).digest()
            if digest in self._seen:
                return None
            self._seen.add(digest)
        self._num_records += 1
        return self._num_records - 1


def spans_of(value: object, offset: int) -> list[tuple[int, int]]:
    """Return the labelled spans of a cell as (start, end) positions in the stripped text.

    Args:
        value: a list of [start, end] pairs or of objects with ``start`` and ``end``, or such a list as JSON text.
        offset: characters that the trainer stripped at the front of the text.

    Raises:
        AttackInputError: if the cell is something else.
    """
    try:
        if not value:  # an empty cell has no spans
            return []
        items = json.loads(value) if isinstance(value, str) else value
        assert isinstance(items, list)
        pairs = [(item["start"], item["end"]) if isinstance(item, dict) else tuple(item) for item in items]
        return [(int(start) - offset, int(end) - offset) for start, end in pairs]
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise AttackInputError("a cell of the spans column is not a list of [start, end] pairs") from None


def days_of(value: object) -> float | None:
    """Return a date as days since 1970: ISO 8601 text, a date, or a number that is days already."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            return number
        moment = value if isinstance(value, datetime.date) else datetime.datetime.fromisoformat(str(value))
    except (ValueError, OverflowError):
        raise AttackInputError("a cell of the date column is neither ISO 8601 nor a number of days") from None
    return float(moment.toordinal() - datetime.date(1970, 1, 1).toordinal())


def _rows(source: FilesSource, digests: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of all files with all columns; a damaged row is an error, as it is for the trainer."""
    files = source_files(source)
    if len(files) != len(digests):
        raise AttackInputError(_CHANGED)
    for file, digest in zip(files, digests, strict=True):
        number = 0
        try:
            for row in _rows_of(file, digest):
                yield row
                number += 1
        except READ_FAULTS as error:
            raise AttackInputError(f"{unreadable(file, number + 1, error)}; restore it") from None


def _rows_of(file: pathlib.Path, digest: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of one file (parquet, CSV or JSON lines); raise unless it has the digest that was sealed."""
    with reading.opened(file, follow_links=True) as content:
        # Hashed through the handle that is read: no other file can take its place in between.
        if reading.sha256_of(content, file) != digest:
            raise DamagedFile(
                file,
                "changed since the run was prepared or began, so the columns beside those that are trained on can say "
                "anything",
                "restore it",
            )
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(content) as shard:
                for batch in shard.iter_batches():
                    yield from batch.to_pylist()
            return
        lines = io.TextIOWrapper(content, encoding="utf-8-sig", newline="" if file.suffix == ".csv" else None)
        if file.suffix == ".csv":
            yield from csv_rows(lines)
            return
        for line in lines:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise NotAnObjectError
                yield row
