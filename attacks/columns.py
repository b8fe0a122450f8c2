"""Further columns of the data that the trainer does not read: labelled spans, dates, languages."""

from __future__ import annotations

import csv
import datetime
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet

from attacks.errors import AttackInputError
from privtrain.config.schema import DataSection, FilesSource
from privtrain.data.corpus import Corpus

Extras = Mapping[tuple[str, int], Mapping[str, Any]]


def read_columns(data: DataSection, corpus: Corpus, names: Sequence[str]) -> Extras:
    """Values of further columns by (user, record index).

    Args:
        data: where the rows are; files only.
        corpus: what the trainer read of them.
        names: columns.

    Raises:
        AttackInputError: if the source is no file, a column is missing, or the rows are not the corpus' rows.
    """
    if not names:
        return {}
    if not isinstance(data.source, FilesSource):
        raise AttackInputError(f"columns {', '.join(names)} can be read of data.source.kind: files only")
    found: dict[tuple[str, int], dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for row in _rows(data.source.paths):
        missing = [name for name in names if name not in row]
        if missing:
            raise AttackInputError(f"a row has no column {', '.join(missing)}; it has {', '.join(row)}")
        user, text = row.get(data.user_column), row.get(data.text_column)
        owner = "" if user is None else str(user).strip()
        if not owner or not isinstance(text, str) or not text.strip():
            continue
        index = counts.get(owner, 0)
        counts[owner] = index + 1
        if owner not in corpus.records or corpus.records[owner][index : index + 1] != (text.strip(),):
            raise AttackInputError(
                "the rows are not those that were trained on; restore the files named in config.yaml"
            )
        offset = len(text) - len(text.lstrip())
        found[owner, index] = {name: row[name] for name in names} | {"offset": offset}
    return found


def spans_of(value: object, offset: int) -> list[tuple[int, int]]:
    """Labelled spans: [start, end] pairs, or objects with ``start`` and ``end``, as a list or as JSON text.

    Args:
        value: a cell of the column.
        offset: characters that the trainer stripped at the front.

    Raises:
        AttackInputError: if it is something else.
    """
    try:
        items = json.loads(value) if isinstance(value, str) and value.strip() else (value or [])
        assert isinstance(items, list)
        pairs = [(item["start"], item["end"]) if isinstance(item, dict) else tuple(item) for item in items]
        return [(int(start) - offset, int(end) - offset) for start, end in pairs]
    except (AssertionError, KeyError, TypeError, ValueError):
        raise AttackInputError("a cell of the spans column is not a list of [start, end] pairs") from None


def days_of(value: object) -> float | None:
    """A date as days since 1970: ISO 8601 text, a date, or a number that is days already."""
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        moment = value if isinstance(value, datetime.date) else datetime.datetime.fromisoformat(str(value))
    except ValueError:
        raise AttackInputError("a cell of the date column is neither ISO 8601 nor a number of days") from None
    return float(moment.toordinal() - datetime.date(1970, 1, 1).toordinal())


def _rows(patterns: Sequence[pathlib.Path]) -> Iterator[Mapping[str, Any]]:
    for pattern in patterns:
        files = sorted(pattern.parent.glob(pattern.name)) if any(c in pattern.name for c in "*?[") else [pattern]
        for file in files:
            if file.suffix == ".parquet":
                yield from pyarrow.parquet.read_table(file).to_pylist()
            elif file.suffix == ".csv":
                with open(file, newline="", encoding="utf-8") as lines:
                    yield from csv.DictReader(lines, strict=True)
            else:
                with open(file, encoding="utf-8") as lines:
                    yield from (json.loads(line) for line in lines if line.strip())
