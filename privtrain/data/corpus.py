"""Read rows and group them by owner (the user whose row it is), with a stated rule for every row that cannot be used.

Rules: a row without a user id is dropped (nobody's guarantee could cover it); a row with nothing to learn from is
dropped (no text after stripping, no completion, no assistant turn, a label that is not declared: :mod:`.formats`);
over-long text is kept and truncated at ``data.max_length`` tokens later. Each is counted; the counts are private
diagnostics, because they describe the data.
"""

from __future__ import annotations

import collections
import dataclasses
import decimal
import glob
import itertools
import math
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from privtrain.config.data import DataSection, FilesSource, HubSource
from privtrain.data import formats, index
from privtrain.data.digest import RecordDigest
from privtrain.data.formats import Unusable
from privtrain.data.packaged import PACKAGED
from privtrain.data.rows import file_columns, file_rows, hub_rows, other_kind
from privtrain.errors import ConfigError, Fault
from privtrain.files import reading

_FORMATS = (".jsonl", ".csv", ".parquet")
_UNPACKED_BY = {".gz": "gunzip", ".zst": "zstd -d", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}
#: What to do with files of other endings.
_SUFFIX_HINTS = {
    ".json": "; name it .jsonl if it holds one object a line, and convert an array with: jq -c '.[]' FILE",
    ".tsv": "; name it .csv: tabs are read",
    ".txt": "; make rows of it that name a user and a text",
    **dict.fromkeys((".ndjson", ".jsonlines", ".jl"), "; name it .jsonl"),
    **dict.fromkeys((".pq", ".parq", ".pqt"), "; name it .parquet"),
    **dict.fromkeys((".arrow", ".feather", ".orc", ".avro"), "; convert it to Parquet"),
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "; save it as CSV"),
    **{ending: f"; unpack it: {command} FILE" for ending, command in _UNPACKED_BY.items()},
}

#: What to do with user ids of other types than text and whole number.
_ID_REMEDIES: dict[type, str] = {
    float: "pandas writes whole numbers so where an id is missing, and keeps them by astype('Int64')",
    decimal.Decimal: "to whole numbers, e.g. by pyarrow's cast('int64')",
    bytes: "to text, e.g. the hexadecimal digits",
    dict: "a field of an object becomes a column of its own, e.g. by pyarrow's Table.flatten()",
}

#: Rows that are looked at where a configuration is refused before the source is read.
_NUM_FIRST_ROWS = 1000

#: How a path begins that was an address, such as ``s3://bucket``: as a path it has one slash.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+]+:/")


@dataclasses.dataclass(frozen=True)
class RowCounts:
    """How many rows were read and what became of them. Private: it describes the data.

    Attributes:
        num_rows: rows that were read.
        num_without_user: rows that were dropped since they name no user.
        num_empty: rows that were dropped since there is nothing to learn from them.
        num_users_opted_out: users who were left out because they are on the do-not-train list.
        num_duplicates: records that were dropped since the same user has an equal one.
        reasons: of the ``num_empty`` rows: why a row cannot be used, in words → number of such rows.
    """

    num_rows: int
    num_without_user: int
    num_empty: int
    num_users_opted_out: int = 0
    num_duplicates: int = 0
    reasons: Mapping[str, int] = dataclasses.field(default_factory=dict, compare=False)

    def why_dropped(self) -> list[str]:
        """Return each reason with its number of rows, the most frequent first."""
        reasons = [f"{count} × {reason}" for reason, count in sorted(self.reasons.items(), key=lambda item: -item[1])]
        if self.num_without_user:
            reasons.append(f"{self.num_without_user} × no user id in the column that data.user_column names")
        return reasons


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Every kept record by user, in a canonical order that does not depend on file order across users.

    Attributes:
        records: user id → records in their text form (:mod:`.formats`), users sorted, records in reading order.
        counts: what was dropped.
        manifest_sha256: digest of the kept records; part of the run's fingerprint.
        is_on_disk: whether records are read from disk on access (:mod:`.index`); they then are tokenised on access too.
        source_digests: SHA-256 of the source's files in reading order, where they were hashed already.
    """

    records: Mapping[str, Sequence[str]]
    counts: RowCounts
    manifest_sha256: str
    is_on_disk: bool = False
    source_digests: tuple[str, ...] | None = None

    @property
    def num_records(self) -> int:
        """Number of kept records."""
        return sum(map(len, self.records.values()))


def check_source(data: DataSection) -> list[Fault]:
    """Return faults that can be seen without reading the rows: missing files, formats, columns."""
    faults = []
    if data.chat_template_file is not None and not data.chat_template_file.is_file():
        faults.append(Fault("data.chat_template_file", f"no such file: {data.chat_template_file}"))
    if isinstance(data.source, FilesSource):
        faults += _check_files(data.source, data, "data.source.paths", "user_column")
    elif not isinstance(data.source, HubSource):  # a packaged data set
        try:
            PACKAGED[data.source.kind].find()
        except ConfigError as error:
            faults += error.faults
    if isinstance(data.evaluation, FilesSource):
        faults += _check_files(data.evaluation, data, "data.evaluation.paths")
        if isinstance(data.source, FilesSource):
            private = {_real(file) for file in source_files(data.source)}
            faults += [
                Fault("data.evaluation.paths", f"{file} is a file of data.source, and so is not public")
                for file in source_files(data.evaluation)
                if _real(file) in private
            ]
    return faults


def _check_files(source: FilesSource, data: DataSection, path_key: str, *further_keys: str) -> list[Fault]:
    """Return faults of the files: named twice, missing, or without the columns.

    Args:
        source: the files.
        data: says which columns are read.
        path_key: key that names the files, for errors.
        *further_keys: keys of ``data`` that name columns, beside those of the format.
    """
    faults = []
    num_times = collections.Counter(map(_real, source_files(source)))
    for file, count in num_times.items():
        if count > 1:  # each record would be there twice: where records are the unit, as two units
            faults.append(Fault(path_key, f"{file} is named {count} times; each row would count as often"))
    for pattern in source.paths:
        files = files_named(pattern)
        if not files:
            faults.append(Fault(path_key, missing(pattern)))
        for file in files:
            faults += _check_file(file, data, path_key, (*further_keys, *data.column_keys))
    return faults


def _real(file: pathlib.Path) -> pathlib.Path:
    """Return the path without links; unlike ``resolve()`` also of a link that leads back to itself."""
    return pathlib.Path(os.path.realpath(file))


def columns_of(file: pathlib.Path, path_key: str = "data.source.paths") -> tuple[list[str], list[Fault]]:
    """Return the names of a file's columns, and why rows cannot be read from it; one of both is empty."""
    if not file.is_file():  # opening a pipe would wait for ever
        return [], [Fault(path_key, f"{file} is no file but a pipe, a device or a link to nothing")]
    if file.suffix not in _FORMATS:
        hint = _SUFFIX_HINTS.get(file.suffix, "")
        if file.suffix.lower() in _FORMATS:
            hint = "; write its ending in lower case"
        return [], [Fault(path_key, f"{file} is not one of {', '.join(_FORMATS)}{hint}")]
    if problem := other_kind(file):
        return [], [Fault(path_key, f"{file} {problem}")]
    try:
        columns = file_columns(file)
    except ConfigError as error:
        return [], list(error.faults)
    if not columns:
        return [], [Fault(path_key, f"{file} is empty, or its first line is; its columns must be named")]
    return columns, []


def _check_file(file: pathlib.Path, data: DataSection, path_key: str, keys: Sequence[str]) -> list[Fault]:
    """Return what is wrong with a file of rows, by its ending and its columns alone.

    Args:
        file: the file.
        data: says which columns are read.
        path_key: key that names the file, for errors.
        keys: keys of ``data`` that name columns.
    """
    columns, faults = columns_of(file, path_key)
    if faults:
        return faults
    wanted = {key: getattr(data, key) for key in keys}  # key → name of the column
    shown = f"it has {', '.join(map(visible_name, columns))}"
    if file.suffix == ".csv" and not set(wanted.values()) & set(columns):
        # Perhaps there is no header, and what was read as names is somebody's id and text: show none of it.
        shown = f"its first line, which must name the columns, names none of these ({len(columns)} others)"
    for key, name in wanted.items():
        if columns.count(name) != 1:
            problem = f"column {name!r} stands twice in {file}" if name in columns else f"no column {name!r} in {file}"
            alike = [column for column in columns if column and column != name and _bare(column) == _bare(name)]
            hint = f"; {shown}"
            if alike:
                hint = f"; its column {alike[0]!r} is written otherwise: set data.{key}: {alike[0]}"
            faults.append(Fault(f"data.{key}", problem + hint))
    return faults


def _bare(name: str) -> str:
    """Return a column's name without what people do not see as a difference: case, white space and quotes."""
    return "".join(name.split()).strip("'\"\ufeff").lower()


def visible_name(name: str) -> str:
    """Return a column's name, in quotes and escaped if it has characters that cannot be seen."""
    return name if name and name == name.strip() and name.isprintable() else ascii(name)


def load_corpus(data: DataSection, index_dir: pathlib.Path | None = None) -> Corpus:
    """Read every row, drop the unusable ones, and group the others by user.

    Args:
        data: section that names the source, its columns and the rules.
        index_dir: directory for an index of the records, from which they are read on access; it is built if it is not
            there. None: all records are held in memory.

    Raises:
        ConfigError: if the source cannot be read or no row is left.
    """
    faults = check_source(data)
    if faults:
        raise ConfigError(faults)
    if index_dir is None:
        corpus = group_by_user(_rows(data))
        corpus = deduplicated(corpus) if data.deduplicate == "within_user" else corpus
    else:
        corpus = _indexed(data, index_dir)
    _check_ids(corpus)
    return corpus


def _check_ids(corpus: Corpus) -> None:
    """Raise if two ids are one to people: 12 and 12.0, as tables write a column with gaps, or two that look alike."""
    records = corpus.records
    num_twice = num_alike = 0
    seen_forms: set[str] = set()  # as people see ids that are written otherwise
    for user in records:
        whole_number = user.removesuffix(".0")
        if whole_number != user and whole_number.isdecimal() and whole_number in records:
            num_twice += 1
        seen = user if user.isascii() else _seen(user)
        if seen != user:
            num_alike += seen in records or seen in seen_forms
            seen_forms.add(seen)
    faults = []
    if num_twice:
        problem = f"{num_twice} ids stand both as whole numbers and with .0 behind, and would count as two users each"
        faults.append(Fault("data.user_column", f"{problem}; write them in one way"))
    if num_alike:
        problem = f"{num_alike} ids look like other ids, but are written with other or invisible characters, and would"
        remedy = "write them in one way, e.g. by unicodedata.normalize('NFC', id)"
        faults.append(Fault("data.user_column", f"{problem} count as two users each; {remedy}"))
    if faults:
        raise ConfigError(faults)


def _seen(user: str) -> str:
    """Return an id as people see it: letters with their accents in one form, without characters of no width."""
    composed = unicodedata.normalize("NFC", user)
    return "".join(character for character in composed if unicodedata.category(character) != "Cf").strip()


def _indexed(data: DataSection, index_dir: pathlib.Path) -> Corpus:
    """Open the index of the records on disk; build it if there is none of these very files and rules."""
    if not isinstance(data.source, FilesSource):
        problem = f"is for data.source.kind: files; given {data.source.kind}"
        raise ConfigError([Fault("performance.index_dir", problem)])
    files = [file.resolve() for file in source_files(data.source)]
    made_of = {  # all that decides what is in the index
        "files": [[str(file), file.stat().st_size, file.stat().st_mtime_ns, file.stat().st_ctime_ns] for file in files],
        "format": data.format,
        "labels": data.labels,
        "deduplicate": data.deduplicate,
        "columns": [getattr(data, key) for key in ("user_column", *data.column_keys)],
    }
    form = normal_form if data.deduplicate == "within_user" else None
    # Rows and digests are given as functions: they are needed only if the index has to be built.
    opened = index.open_or_build(
        index_dir, made_of, lambda tally: _usable_rows(_rows(data), tally), form, lambda: digests_of(files)
    )
    counts = RowCounts(**opened.counts)
    if not opened.records:
        raise ConfigError([_no_row(counts)])
    return Corpus(opened.records, counts, opened.manifest_sha256, is_on_disk=True, source_digests=opened.source_digests)


def digests_of(files: Iterable[pathlib.Path]) -> tuple[str, ...]:
    """Return SHA-256 of each file."""
    return tuple(reading.file_sha256(file, follow_links=True) for file in files)


def deduplicated(corpus: Corpus) -> Corpus:
    """Of a user's records that differ only in white space, keep the first.

    What is kept of a user depends on this user's records alone: the same text of another user is no duplicate. The
    digest stays that of the data as they were read.
    """
    records = {user: _distinct(texts) for user, texts in corpus.records.items()}
    num_duplicates = corpus.num_records - sum(map(len, records.values()))
    return dataclasses.replace(
        corpus, records=records, counts=dataclasses.replace(corpus.counts, num_duplicates=num_duplicates)
    )


def without_users(corpus: Corpus, dropped: Iterable[str]) -> Corpus:
    """Return the corpus without these users; its digest stays that of the data as it was read.

    Raises:
        ConfigError: if nobody is left.
    """
    gone = set(dropped)
    if isinstance(corpus.records, index.IndexedRecords):
        records = corpus.records.without(gone)
    else:
        records = {user: texts for user, texts in corpus.records.items() if user not in gone}
    if not records:
        raise ConfigError([Fault("data.source", "every user is on the do-not-train list")])
    counts = dataclasses.replace(corpus.counts, num_users_opted_out=len(corpus.records) - len(records))
    return dataclasses.replace(corpus, records=records, counts=counts)


def group_by_user(rows: Iterable[tuple[object, object]]) -> Corpus:
    """Drop unusable rows and group the others by user.

    Args:
        rows: (user id, record in its text form), as written in the source; instead of a record that cannot be used an
            empty text, or :class:`~privtrain.data.formats.Unusable` with the reason.

    Raises:
        ConfigError: if no row is left.
    """
    records: dict[str, list[str]] = {}
    tally: dict[str, Any] = {}
    for owner, content in _usable_rows(rows, tally):
        records.setdefault(owner, []).append(content)
    if not records:
        raise ConfigError([_no_row(RowCounts(**tally))])
    ordered = {user: tuple(records[user]) for user in sorted(records)}
    return Corpus(ordered, RowCounts(**tally), _digest(ordered))


def faults_of_first_rows(data: DataSection) -> list[Fault]:
    """Return the faults of files none of whose first rows is usable; empty if one is. Reads no further."""
    if not isinstance(data.source, FilesSource):
        return []
    try:
        group_by_user(itertools.islice(_rows(data), _NUM_FIRST_ROWS))
    except ConfigError as error:
        return list(error.faults)
    return []


def _no_row(counts: RowCounts) -> Fault:
    """Return the fault of a source without a usable row, with how many were dropped for which reason."""
    reasons = counts.why_dropped()
    shown = f": {'; '.join(reasons)}" if reasons else ""
    among = f"no usable row among {counts.num_rows}" if counts.num_rows else "the source holds no row"
    return Fault("data.source", f"{among}{shown}")


def _usable_rows(rows: Iterable[tuple[object, object]], tally: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (user id, text) of the usable rows, stripped; at the end, fill ``tally`` with fields of ``RowCounts``."""
    num_rows = num_without_user = num_empty = 0
    reasons: dict[str, int] = {}
    for user, text in rows:
        num_rows += 1
        owner = owner_of(user)
        content = text.strip() if isinstance(text, str) else ""
        if not owner:
            num_without_user += 1
        elif not content:
            num_empty += 1
            reason = text.reason if isinstance(text, Unusable) else "no text"
            reasons[reason] = reasons.get(reason, 0) + 1
        else:
            yield owner, content
    tally.update(num_rows=num_rows, num_without_user=num_without_user, num_empty=num_empty, reasons=reasons)


def _distinct(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts without those that differ from an earlier one only in white space."""
    first_of_form: dict[str, str] = {}
    for text in texts:
        first_of_form.setdefault(normal_form(text), text)
    return tuple(first_of_form.values())


def normal_form(text: str) -> str:
    """Return the text with every run of white space replaced by one space, and none at the ends."""
    return " ".join(text.split())


def owner_of(user: object, place: str = "") -> str:
    """Return a value of the user column as text, or an empty string if it is missing.

    Args:
        user: the value of the user column.
        place: file and row for the error message, which never quotes the id.

    Raises:
        ConfigError: if the id is neither text nor an integer, or holds an unpaired surrogate.
    """
    if user is None or (isinstance(user, float) and math.isnan(user)):
        return ""
    where = f"{place}: " if place else ""
    if isinstance(user, str):
        try:
            user.encode()
        except UnicodeEncodeError:
            problem = f"{where}a user id holds half of a surrogate pair, which no file can hold; mend the column"
            raise ConfigError([Fault("data.user_column", problem)]) from None
        return user.strip()
    if isinstance(user, int) and not isinstance(user, bool):
        return str(user)
    remedy = _ID_REMEDIES.get(type(user), "is it the right column?")
    problem = (
        f"{where}a user id is neither text nor a whole number (it is of type {type(user).__name__}): one person could "
        f"count as two; convert the column: {remedy}"
    )
    raise ConfigError([Fault("data.user_column", problem)])


def _digest(records: Mapping[str, tuple[str, ...]]) -> str:
    """Return the digest of all records by user; users must be in order."""
    digest = RecordDigest()
    for user, texts in records.items():
        digest.user(user.encode("utf-8", errors="surrogatepass"))
        for text in texts:
            digest.record(text.encode("utf-8", errors="surrogatepass"))
    return digest.hexdigest()


def _rows(data: DataSection) -> Iterator[tuple[object, object]]:
    """Yield (user id, record or why there is none) of every row; fail with the row's place on a bad user id."""
    if not isinstance(data.source, FilesSource | HubSource):
        for user, text in PACKAGED[data.source.kind].rows():
            if user:  # a text of the package that names nobody is no fault of those who train on it
                yield user, text
        return
    columns = [getattr(data, key) for key in ("user_column", *data.column_keys)]
    for name, number, (user, *values) in _of_source(data.source, columns):
        # owner_of raises at a bad id. The caller calls it too, but without the row's place; a plain text is never bad.
        if not isinstance(user, str) or not user.isascii():
            owner_of(user, f"{name}, row {number}")
        yield user, formats.canonical(data, values) or formats.why_unusable(data, values)


def _of_source(
    source: FilesSource | HubSource, columns: Sequence[str]
) -> Iterator[tuple[str, int, tuple[object, ...]]]:
    """Yield every row as (name of its file or data set, number of the row in it from 1, values of these columns)."""
    if isinstance(source, HubSource):
        named_rows = [(source.name, hub_rows(source, columns))]
    else:
        named_rows = [(str(file), file_rows(file, columns)) for file in source_files(source)]  # opened one by one below
    for name, rows in named_rows:
        for number, values in enumerate(rows, start=1):
            yield name, number, values


def load_evaluation(data: DataSection, corpus: Corpus) -> tuple[str, ...]:
    """Return the usable records of ``data.evaluation``, public rows that results are measured on; none without it.

    Args:
        data: the section.
        corpus: the private records, which must not be among the public ones.

    Raises:
        ConfigError: if it cannot be read, no row of it can be used, or a record of the private data is among them.
    """
    if data.evaluation is None:
        return ()
    columns = [getattr(data, key) for key in data.column_keys]
    rows = (formats.canonical(data, values) for _, _, values in _of_source(data.evaluation, columns))
    records = tuple(record for record in rows if record)
    if not records:
        raise ConfigError([Fault("data.evaluation", "no row of it can be used")])
    public = set(records)
    if isinstance(corpus.records, index.IndexedRecords):
        num_private = corpus.records.num_among(public)
    else:
        num_private = sum(record in public for texts in corpus.records.values() for record in texts)
    if num_private:
        problem = (
            f"{num_private} records of data.source are among its rows, and what is measured on these would be "
            "published without noise; take them out of one of the two"
        )
        raise ConfigError([Fault("data.evaluation", problem)])
    return records


def source_files(source: FilesSource) -> list[pathlib.Path]:
    """Return the files of a source in reading order."""
    return [file for pattern in source.paths for file in files_named(pattern)]


def missing(pattern: pathlib.Path) -> str:
    """Return why a path or pattern of ``data.source.paths`` names no file."""
    if pattern.is_dir():
        return f"{pattern} is a directory; name its files, e.g. {pattern / '*.jsonl'}"
    name, hint = str(pattern), ""
    if name.startswith("~"):
        hint = "; write the home directory out"
    elif _ADDRESS.match(name):
        hint = "; files are read from disk: download them, or name a data set of the hub by data.source.kind: hub"
    elif "$" in name:
        hint = "; variables of the environment are not read in a configuration"
    elif "{" in name:
        hint = "; patterns are made of *, ? and [...]; name further files as further items"
    elif pattern.is_symlink():
        hint = "; it is a link to something that is not there"
    return f"no such file: {name}{hint}"


def files_named(pattern: pathlib.Path) -> list[pathlib.Path]:
    """Return the files that a path or glob pattern names."""
    if pattern.is_file():  # also one whose name holds a bracket
        return [pattern]
    if any(c in str(pattern) for c in "*?["):
        matches = map(pathlib.Path, sorted(glob.glob(str(pattern), recursive=True)))
        return [path for path in matches if not path.is_dir()]
    return []
