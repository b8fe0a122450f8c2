"""Records on disk: an index that is built in one pass over the source and read at random, whatever the number of users.

The rules are those of :mod:`.corpus` and so is the digest; only the place differs. duckdb sorts the kept rows by user
outside memory, and six flat files are written from that order and mapped into memory afterwards:

    texts.bin, text_ends.u64       every record's text, users in order, records in reading order
    text_digests.bin               a digest of each, compared whenever a text is read
    users.bin, user_ends.u64       every user's id
    record_ends.u64                where each user's records end

Texts stand one after another in texts.bin. Ends are running totals: text i is bytes ``text_ends[i - 1]`` to
``text_ends[i]`` of it, and the records of user u are numbers ``record_ends[u - 1]`` to ``record_ends[u]`` (exclusive).

Whatever is read is compared with digests of what was written: see :mod:`.index_files`.

The directory holds everybody's ids and texts, so it is 0700, as is the one it lies in (``performance.index_dir``), and
it is no part of a run. It is named by what it was made of: the files' paths, sizes and times, and the settings that
make records of rows. Processes of a machine share it; whoever comes first makes it.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow
from typing_extensions import override

from privtrain.data.digest import RecordDigest
from privtrain.data.index_files import (
    ARRAYS,
    DIGEST_BYTES,
    SCHEMA,
    TEXTS,
    HashedFile,
    created,
    describe,
    map_checked,
    read_description,
    text_digest,
)
from privtrain.data.packed import ERRORS, OrderedMapping
from privtrain.errors import DamagedFile
from privtrain.files.private import check_private_tree, locked_file, make_private_directory

#: Rows that are in memory at once.
_ROWS_AT_ONCE = 1 << 12
#: Digests that are compared at once.
_DIGESTS_AT_ONCE = 1 << 20
#: What duckdb may hold of the rows it sorts; the rest is on disk meanwhile.
_SORT_MEMORY = "1GB"
_SORT_THREADS = 2

Ends = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class IndexedRecords(OrderedMapping[Sequence[str]]):
    """User id → records, read from disk on access; users sorted. Users can be hidden from it (:meth:`without`).

    Attributes:
        directory: where the files are.
        texts: bytes of all texts, mapped into memory.
        text_ends: [records] one past the last byte of each text.
        text_digests: [records, 16] truncated SHA-256 of each text.
        users: bytes of all ids, mapped into memory.
        user_ends: [users] one past the last byte of each id.
        record_ends: [users] one past the number of each user's last record.
        places: numbers of the users that are not hidden, increasing: item i of the mapping is user ``places[i]``.
    """

    directory: pathlib.Path
    texts: npt.NDArray[np.uint8]
    text_ends: Ends
    text_digests: npt.NDArray[np.uint8]
    users: npt.NDArray[np.uint8]
    user_ends: Ends
    record_ends: Ends
    places: npt.NDArray[np.int64] | range

    @classmethod
    def open(cls, directory: pathlib.Path, description: Mapping[str, Any]) -> IndexedRecords:
        """Map the files of an index, which must be as its description (``index.json``) has them.

        Raises:
            DamagedFile: naming the file that is not as it was written.
        """
        files = map_checked(directory, description, _remedy(directory))
        return cls(
            directory=directory,
            texts=files[TEXTS],
            text_ends=files["text_ends.u64"],
            text_digests=files["text_digests.bin"].reshape(-1, DIGEST_BYTES),
            users=files["users.bin"],
            user_ends=files["user_ends.u64"],
            record_ends=files["record_ends.u64"],
            places=range(len(files["user_ends.u64"])),
        )

    def without(self, users: Iterable[str]) -> IndexedRecords:
        """Return the records with these users hidden."""
        positions = [self._position(user) for user in users]
        known = [position for position in positions if position is not None]
        remaining = np.delete(np.asarray(self.places, dtype=np.int64), known)
        return dataclasses.replace(self, places=remaining)

    @property
    def num_records(self) -> int:
        """Number of records of all users that are not hidden."""
        return sum(map(len, self.values()))

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return (self._user(int(place)) for place in self.places)

    def __getitem__(self, user: str) -> Sequence[str]:
        position = self._position(user)
        if position is None:
            raise KeyError("no such user")  # no message may hold an id
        return self._texts_of(int(self.places[position]))

    def __contains__(self, user: object) -> bool:
        return isinstance(user, str) and self._position(user) is not None

    @override
    def in_order(self) -> Iterator[tuple[str, Sequence[str]]]:
        return ((self._user(int(place)), self._texts_of(int(place))) for place in self.places)

    def _position(self, user: str) -> int | None:
        """Return where in ``places`` the user's number stands; None for an unknown or hidden user."""
        wanted = user.encode("utf-8", errors=ERRORS)
        position = bisect.bisect_left(self.places, wanted, key=lambda place: self._id(int(place)))
        is_found = position < len(self) and self._id(int(self.places[position])) == wanted
        return position if is_found else None

    def _id(self, place: int) -> bytes:
        """Return the id of user number ``place``, as UTF-8."""
        start = int(self.user_ends[place - 1]) if place else 0
        return self.users[start : int(self.user_ends[place])].tobytes()

    def _user(self, place: int) -> str:
        return self._id(place).decode("utf-8", errors=ERRORS)

    def _texts_of(self, place: int) -> Sequence[str]:
        """Return the records of user number ``place``; none is read yet."""
        first = int(self.record_ends[place - 1]) if place else 0
        return _Texts(self, range(first, int(self.record_ends[place])))

    def num_among(self, texts: Iterable[str]) -> int:
        """Return how many stored records, those of hidden users too, equal one of these texts.

        Digests are compared instead of texts, so that none has to be read.
        """
        wanted_bytes = b"".join(text_digest(text.encode("utf-8", errors=ERRORS)) for text in texts)
        wanted = _halves(np.frombuffer(wanted_bytes, dtype=np.uint8))
        wanted_pairs = set(map(tuple, wanted.tolist()))
        stored = _halves(self.text_digests)
        num_found = 0
        for start in range(0, len(stored), _DIGESTS_AT_ONCE):
            chunk = np.asarray(stored[start : start + _DIGESTS_AT_ONCE])
            likely = chunk[np.isin(chunk[:, 0], wanted[:, 0])]  # first halves are equal; few are left to compare whole
            num_found += sum(tuple(pair) in wanted_pairs for pair in likely.tolist())
        return num_found

    def text(self, record: int) -> str:
        """Return record number ``record``, after comparing it with its digest.

        Raises:
            DamagedFile: if it is not as it was written. The message does not say which record: a step reads the users
                that it drew, and who these are is secret.
        """
        start = int(self.text_ends[record - 1]) if record else 0
        content = self.texts[start : int(self.text_ends[record])].tobytes()
        if text_digest(content) != self.text_digests[record].tobytes():
            problem = "holds a text that is not as it was written: it was altered or damaged"
            raise DamagedFile(self.directory / TEXTS, problem, _remedy(self.directory))
        return content.decode("utf-8", errors=ERRORS)


def _halves(digests: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Return digests of 16 bytes as [digests, 2] numbers of 64 bits, which compare faster than bytes."""
    return digests.reshape(-1).view(np.uint64).reshape(-1, 2)


class _Texts(Sequence[str]):
    """One user's records, read on access; their number is known without reading any.

    Args:
        records: the index.
        numbers: numbers of the user's records in it.
    """

    def __init__(self, records: IndexedRecords, numbers: range) -> None:
        self._records = records
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        numbers = self._numbers[index]  # one number, or a range of a slice
        return self._records.text(numbers) if isinstance(numbers, int) else tuple(map(self._records.text, numbers))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]


class Index(NamedTuple):
    """An index that was opened.

    Attributes:
        records: the records by user.
        counts: how many rows were read and dropped: fields of :class:`~privtrain.data.corpus.RowCounts`.
        manifest_sha256: digest of the kept records.
        source_digests: SHA-256 of each file that they were read from.
    """

    records: IndexedRecords
    counts: dict[str, Any]
    manifest_sha256: str
    source_digests: tuple[str, ...]


def open_or_build(
    parent: pathlib.Path,
    made_of: Mapping[str, Any],
    rows: Callable[[dict[str, Any]], Iterable[tuple[str, str]]],
    form: Callable[[str], str] | None = None,
    source_digests: Callable[[], Sequence[str]] = tuple,
) -> Index:
    """Open the index of some files and rules; if there is none, one process builds it while the others wait.

    Args:
        parent: directory that holds indexes.
        made_of: all that decides the index's content (files with sizes and times, rules); its digest is the name.
        rows: called only to build. Given a dictionary, it yields the kept (user id, text) pairs in reading order, and
            puts its counts into the dictionary at the end.
        form: maps a text to a normal form; of a user's texts with the same form the first is kept and the others are
            counted as duplicates. None keeps all. The digest covers all texts.
        source_digests: called only to build; returns SHA-256 of each file that the rows are read from.

    Raises:
        UnsafePath: if ``parent`` or the index is a link, another user's or open to others.
        DamagedFile: if a file of the index is missing or not as it was written.
    """
    name = hashlib.sha256(json.dumps([SCHEMA, made_of], sort_keys=True).encode()).hexdigest()[:32]
    make_private_directory(parent)
    directory = parent / f"index-{name}"
    with locked_file(parent / f"index-{name}.lock"):
        if os.path.lexists(directory):
            check_private_tree(directory)
        else:
            temporary = parent / f"index-{name}.tmp"
            shutil.rmtree(temporary, ignore_errors=True)  # of a process that died
            temporary.mkdir(mode=0o700)
            try:
                _build(temporary, rows, form, source_digests)
                os.replace(temporary, directory)  # an index is there as a whole, or not at all
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    description = read_description(directory, _remedy(directory))
    return Index(
        IndexedRecords.open(directory, description),
        description["counts"],
        description["manifest_sha256"],
        tuple(description["source_digests"]),
    )


def _remedy(directory: pathlib.Path) -> str:
    return f"remove {directory}, and it is made again"


def _build(
    directory: pathlib.Path,
    rows: Callable[[dict[str, Any]], Iterable[tuple[str, str]]],
    form: Callable[[str], str] | None,
    source_digests: Callable[[], Sequence[str]],
) -> None:
    """Sort the rows by owner, on disk, and write the index's files into an empty directory.

    The other arguments are those of :func:`open_or_build`.
    """
    import duckdb

    counts: dict[str, Any] = {}
    config: dict[str, Any] = {
        "memory_limit": _SORT_MEMORY,
        "threads": _SORT_THREADS,
        "temp_directory": str(directory / "sorting"),
    }
    with contextlib.closing(duckdb.connect(str(directory / "rows.duckdb"), config=config)) as connection:
        # Regular buffers end at 2 GiB a batch, which long documents reach.
        connection.execute("SET arrow_large_buffer_size = true")
        connection.execute("CREATE TABLE rows (owner BLOB, place BIGINT, content BLOB)")
        for table in _tables(rows(counts)):
            connection.register("batch", table)
            connection.execute("INSERT INTO rows SELECT * FROM batch")
            connection.unregister("batch")
        sorted_rows = connection.sql("SELECT owner, content FROM rows ORDER BY owner, place")
        files, digest, num_duplicates = _write(directory, sorted_rows.to_arrow_reader(_ROWS_AT_ONCE), form)
    (directory / "rows.duckdb").unlink()
    shutil.rmtree(directory / "sorting", ignore_errors=True)
    counts["num_duplicates"] = num_duplicates
    facts = {"counts": counts, "manifest_sha256": digest, "source_digests": list(source_digests())}
    describe(directory, facts, files)


def _tables(rows: Iterable[tuple[str, str]]) -> Iterator[pyarrow.Table]:
    """Yield the rows in tables of ``_ROWS_AT_ONCE`` with columns owner, place (number in reading order) and content."""
    iterator, first = iter(rows), 0
    while batch := list(itertools.islice(iterator, _ROWS_AT_ONCE)):
        owners = [user.encode("utf-8", errors=ERRORS) for user, _ in batch]
        contents = [text.encode("utf-8", errors=ERRORS) for _, text in batch]
        yield pyarrow.table(
            {
                "owner": pyarrow.array(owners, pyarrow.binary()),
                "place": pyarrow.array(range(first, first + len(batch)), pyarrow.int64()),
                "content": pyarrow.array(contents, pyarrow.large_binary()),
            }
        )
        first += len(batch)


def _write(
    directory: pathlib.Path, batches: Iterable[pyarrow.RecordBatch], form: Callable[[str], str] | None
) -> tuple[dict[str, HashedFile], str, int]:
    """Write the flat files of an index.

    Args:
        directory: where.
        batches: rows (owner, content), sorted by owner; a user's rows may go on in the next batch.
        form: as of :func:`open_or_build`.

    Returns:
        The files by name, with the digest of what each holds; the digest of all rows; the number of duplicates that
        were left out.
    """
    digest = RecordDigest()
    current_user: bytes | None = None
    forms_of_user: set[str] = set()
    num_rows = num_records = users_end = texts_end = 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(created(directory / name)) for name in (TEXTS, *ARRAYS)}
        texts, text_ends, text_digests, users, user_ends, record_ends = files.values()
        for batch in batches:
            # What this batch adds to each file.
            new_users: list[bytes] = []
            ends_of_users: list[int] = []  # of users whose last row was in this batch
            kept: list[bytes] = []
            for owner, content in zip(batch.column(0).to_pylist(), batch.column(1).to_pylist(), strict=True):
                if owner != current_user:
                    if current_user is not None:
                        ends_of_users.append(num_records)
                    current_user = owner
                    new_users.append(owner)
                    digest.user(owner)
                    forms_of_user.clear()
                digest.record(content)
                num_rows += 1
                if form is None or _is_new(form(content.decode("utf-8", errors=ERRORS)), forms_of_user):
                    kept.append(content)
                    num_records += 1

            texts.write(b"".join(kept))
            texts_end = _write_ends(text_ends, kept, texts_end)
            text_digests.write(b"".join(map(text_digest, kept)))
            users.write(b"".join(new_users))
            users_end = _write_ends(user_ends, new_users, users_end)
            record_ends.write(np.asarray(ends_of_users, dtype=np.uint64).tobytes())
        if current_user is not None:  # the last user's records end with the rows
            record_ends.write(np.asarray([num_records], dtype=np.uint64).tobytes())
    return files, digest.hexdigest(), num_rows - num_records


def _is_new(form: str, seen: set[str]) -> bool:
    """Return whether a form was not seen yet, and note it as seen."""
    is_new = form not in seen
    seen.add(form)
    return is_new


def _write_ends(file: HashedFile, parts: Sequence[bytes], start: int) -> int:
    """Append the end of each part to ``file``, if parts follow one another from ``start`` on; return the last end."""
    lengths = np.fromiter(map(len, parts), dtype=np.uint64, count=len(parts))
    ends = np.cumsum(lengths, dtype=np.uint64) + np.uint64(start)
    file.write(ends.tobytes())
    return int(ends[-1]) if len(ends) else start
