"""Read rows and group them by owner, with a stated rule for every row that cannot be used.

Rules: a row without a user id is dropped (nobody's guarantee could cover it); a row whose text is empty after
stripping is dropped; over-long text is kept and truncated at ``data.max_length`` tokens later. Each is counted; the
counts are private diagnostics, because they describe the data.
"""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from privtrain.config.schema import DataSection, FilesSource, HubSource
from privtrain.data import plays
from privtrain.errors import ConfigError, Fault

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How many rows were read and what became of them. Private: it describes the data."""

    num_rows: int
    num_without_user: int
    num_empty: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Every kept record by owner, in a canonical order that does not depend on file order across users.

    Attributes:
        records: user id → texts, users sorted, texts in reading order.
        counts: what was dropped.
        manifest_sha256: digest of the kept records; part of the run's fingerprint.
    """

    records: Mapping[str, tuple[str, ...]]
    counts: RowCounts
    manifest_sha256: str

    @property
    def num_records(self) -> int:
        """Number of kept records."""
        return sum(map(len, self.records.values()))


def check_source(data: DataSection) -> list[Fault]:
    """Faults that can be seen without reading the rows: missing files, formats, columns."""
    if isinstance(data.source, HubSource):
        return []
    if not isinstance(data.source, FilesSource):
        try:
            plays.play_files()
        except ConfigError as error:
            return list(error.faults)
        return []
    faults = []
    for pattern in data.source.paths:
        files = _expand(pattern)
        if not files:
            faults.append(Fault("data.source.paths", f"no such file: {pattern}"))
        for file in files:
            if file.suffix not in _READERS:
                faults.append(Fault("data.source.paths", f"{file} is not one of {', '.join(_READERS)}"))
                continue
            columns = _columns(file)
            for key in ("user_column", "text_column"):
                if getattr(data, key) not in columns:
                    problem = f"no column {getattr(data, key)!r} in {file}; it has {', '.join(sorted(columns))}"
                    faults.append(Fault(f"data.{key}", problem))
    return faults


def load_corpus(data: DataSection) -> Corpus:
    """Read every row and group by owner.

    Raises:
        ConfigError: if the source cannot be read or no row is left.
    """
    faults = check_source(data)
    if faults:
        raise ConfigError(faults)
    return group_by_user(_rows(data))


def group_by_user(rows: Iterable[tuple[object, object]]) -> Corpus:
    """Apply the rules of this module to (user id, text) pairs."""
    records: dict[str, list[str]] = {}
    num_rows = num_without_user = num_empty = 0
    for user, text in rows:
        num_rows += 1
        owner = "" if user is None or user != user else str(user).strip()
        content = text.strip() if isinstance(text, str) else ""
        if not owner:
            num_without_user += 1
        elif not content:
            num_empty += 1
        else:
            records.setdefault(owner, []).append(content)
    if not records:
        raise ConfigError([Fault("data.source", f"no usable row among {num_rows}")])
    ordered = {user: tuple(records[user]) for user in sorted(records)}
    return Corpus(ordered, RowCounts(num_rows, num_without_user, num_empty), _digest(ordered))


def _digest(records: Mapping[str, tuple[str, ...]]) -> str:
    digest = hashlib.sha256()
    for user, texts in records.items():
        for part in (user, *texts):
            encoded = part.encode("utf-8", errors="surrogatepass")
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        digest.update(b"\xff" * 8)
    return digest.hexdigest()


def _rows(data: DataSection) -> Iterator[tuple[object, object]]:
    if not isinstance(data.source, FilesSource | HubSource):
        yield from plays.read_plays()
        return
    import datasets

    datasets.disable_progress_bars()
    if isinstance(data.source, HubSource):
        table = datasets.load_dataset(data.source.name, split=data.source.split, revision=data.source.revision)
        missing = {data.user_column, data.text_column} - set(table.column_names or [])
        if missing:
            raise ConfigError(
                [Fault("data", f"no column {sorted(missing)} in {data.source.name}: {table.column_names}")]
            )
        for row in table:
            yield row[data.user_column], row[data.text_column]  # pyright: ignore[reportCallIssue, reportArgumentType]
        return
    for pattern in data.source.paths:
        for file in _expand(pattern):
            yield from _file_rows(file, data.user_column, data.text_column)


def _file_rows(file: pathlib.Path, user_column: str, text_column: str) -> Iterator[tuple[object, object]]:
    try:
        table = _table(file)
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError([Fault("data.source.paths", f"cannot read {file}: {error}")]) from None
    yield from zip(table[user_column].to_pylist(), table[text_column].to_pylist(), strict=True)


def _table(file: pathlib.Path):
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file)
    if file.suffix == ".csv":
        return pyarrow.csv.read_csv(file, parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True))
    return pyarrow.json.read_json(file, parse_options=pyarrow.json.ParseOptions(newlines_in_values=True))


def _columns(file: pathlib.Path) -> set[str]:
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(file).names if file.suffix == ".parquet" else _table(file).column_names
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise ConfigError([Fault("data.source.paths", f"cannot read {file}: {error}")]) from None
    return set(names)


def _expand(pattern: pathlib.Path) -> list[pathlib.Path]:
    if any(c in str(pattern) for c in "*?["):
        return [pathlib.Path(p) for p in sorted(glob.glob(str(pattern), recursive=True))]
    return [pattern] if pattern.is_file() else []
