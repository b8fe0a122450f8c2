"""The contribution log of one run, open for its one writer: append-only, chained, intent then commit, fsynced.

The log is a file of chained records (:mod:`.chain`). Beside it lie the head file, which shows if records were cut off
its end (:mod:`.head`), and the bodies of the steps: which units took part, by pseudonym (:mod:`.bodies`). Bodies of the
latest steps lie in a row file, the *open segment*; when it is large enough it is *sealed* into a Parquet file.

An *intent* record is on disk before a step touches any user's data, a *commit* record after the update: a crash can
therefore over-count what was spent, never under-count it. What a crash leaves unfinished at the end (a torn record,
rows of an intent that was never recorded) is cut off on opening, and the repair is recorded; any other damage is
refused with its place.

Written by rank 0 alone with ordinary appends, overwrites in place and fsync: safe on network file systems. Holds
pseudonyms, so it stays in ``secret/``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from typing_extensions import override

from privtrain.errors import GuaranteeLost, LedgerCorrupt, RunBusy
from privtrain.files.atomic import sync_directory
from privtrain.files.private import check_private_directory, make_private_directory, open_private_file
from privtrain.ledger import merkle
from privtrain.ledger.bodies import (
    ROW,
    check_segment_file,
    chunk_hashes,
    directory_of,
    read_open,
    read_segment,
    rows_path,
    segment_path,
    to_parquet,
    to_table,
)
from privtrain.ledger.chain import SCHEMA, LedgerState, apply, make_line, parse, replay
from privtrain.ledger.groups import check_groups
from privtrain.ledger.head import HeadFile, check_head, head_path, opened_head
from privtrain.privacy.secret import SecretKey, pseudonym
from privtrain.run.bundle import ReleaseManifest

#: Contributions of an open segment at which it is sealed.
SEGMENT_ROWS = 1 << 18


def verify(path: pathlib.Path) -> LedgerState:
    """Check the whole log and return what it says.

    Checked: the chain; that it was not shortened since the head file was written; that a commit follows its intent; no
    step twice; every body against the root in its record; no unit twice in a step; no unit above k; where steps draw
    from groups in turn, no unit in two groups.

    Raises:
        LedgerCorrupt: naming file and offset of the first thing that does not hold, a torn tail included.
    """
    state = verify_chain(path)
    for index, segment in enumerate(state.segments):
        read_segment(path, index, segment, state)
    _, num_torn_bytes = read_open(path, state)
    if num_torn_bytes:
        open_rows = rows_path(path, len(state.segments))
        raise LedgerCorrupt(f"{open_rows}: {num_torn_bytes} bytes of an unfinished write at the end; {_TORN}")
    check_groups(path, state)
    return state


def verify_chain(path: pathlib.Path, *, allow_torn: bool = False) -> LedgerState:
    """Check the chained records without the bodies and return the state; faster than :func:`verify`.

    Args:
        path: the log.
        allow_torn: ignore an unfinished record at the end, as there may be while a job is writing.

    Raises:
        LedgerCorrupt: naming file and offset of the first record that does not hold, or of an unfinished one.
    """
    while True:
        size = path.stat().st_size
        try:
            state, end = replay(path)
            check_head(path, state, end)
        except LedgerCorrupt:
            if path.stat().st_size == size:
                raise
            continue  # it grew: a job is writing, and log and head file were read at different moments
        if size > end and not allow_torn:
            raise LedgerCorrupt(f"{path}: {size - end} bytes of an unfinished record at byte {end}; {_TORN}")
        return state


_TORN = (
    "the last write was torn, or a job is writing at this moment. Resuming the run cuts it off and records the repair"
)


class Ledger:
    """The open log of a run that is training. Use :func:`open_ledger`.

    Attributes:
        state: what the records say.
        repair: what was cut off on opening, in words; empty if nothing was.
    """

    def __init__(
        self,
        path: pathlib.Path,
        state: LedgerState,
        pseudonym_key: SecretKey,
        head: HeadFile,
        open_rows: np.ndarray,
        segment_rows: int = SEGMENT_ROWS,
    ) -> None:
        self.state = state
        self.repair = ""
        self._path = path
        self._key = pseudonym_key
        self._head = head
        self._log = _Appender(path)
        self._size = self._log.size
        self._rows = _Appender(rows_path(path, len(state.segments)))
        self._open_rows = [open_rows]  # of the open segment, one array a step
        self._segment_rows = segment_rows
        # (generation, step) of the last intent, and the names of its units in the order of their rows.
        self._units_of_step: tuple[tuple[int, int], list[str]] | None = None

    def blinded(self, purpose: str, digest: str) -> str:
        """Return an HMAC of a digest under the run's key: without the key, nobody can test a guess against the log."""
        return self._key.derive(f"ledger {purpose}", digest).hex()

    def begin_session(self, *, generation: int, from_step: int, environment: str, split: str = "") -> None:
        """Record that training (re)starts at ``from_step``; a new generation abandons the steps past it.

        Args:
            generation: number of the stretch of training under one secret that starts or continues.
            from_step: steps that the loaded model has behind it.
            environment: digest of code, libraries and devices.
            split: commitment to which users are held in and out; the same in every session.
        """
        fields = {"environment": self.blinded("environment", environment)}
        if split:
            fields["split"] = split
        self._append("session", generation=generation, from_step=from_step, **fields)

    def intend(self, generation: int, step: int, units: Sequence[tuple[str, int]]) -> None:
        """Write a step's units to disk before they contribute. A step that is replayed is not written again.

        Args:
            generation: the current generation.
            step: the logical step.
            units: (name, number of records) of every unit in the step. Names are stored as pseudonyms.

        Raises:
            GuaranteeLost: if a unit is there twice or brings more than k records, or if the step was begun before with
                other contributions.
        """
        limit = self.state.records_per_unit
        is_repeated = len({name for name, _ in units}) != len(units)
        if is_repeated or any(not 1 <= count <= limit for _, count in units):
            raise GuaranteeLost(
                f"step {step} draws a unit twice or with more than {limit} records; this is a bug, report it"
            )
        names, rows, root = _body(self._key, generation, step, units)
        known = self.state.intents.get((generation, step))
        if known is None:
            self._write_intent(generation, step, rows, root)
        elif known != root:
            raise GuaranteeLost(
                f"step {step} was begun before with other users; its noise must not cover a second sum. "
                "Start a new run with another run.name"
            )
        self._units_of_step = (generation, step), names

    def _write_intent(self, generation: int, step: int, rows: np.ndarray, root: str) -> None:
        """Write the step's rows, and only then the record that commits to them by their Merkle root."""
        if len(rows):
            self._rows.append(rows.tobytes(), at=ROW.itemsize * self._num_open_rows)
        self._append("intent", generation=generation, step=step, num_units=len(rows), root=root)
        self._open_rows.append(rows)

    def commit(self, generation: int, step: int, commitment: str, zeroed: Collection[str] = ()) -> None:
        """Write to disk that the step's update was made. A step that is replayed is not written again.

        Args:
            generation: the current generation.
            step: the step of the last :meth:`intend`.
            commitment: digest of the exact sum, see :mod:`privtrain.privacy.sum_digest`.
            zeroed: names of the units whose gradient was not finite, so that they contributed zero.

        Raises:
            GuaranteeLost: if it was committed with another sum.
        """
        known = self.state.commits.get((generation, step))
        if known is not None:
            if known != commitment:
                raise GuaranteeLost(f"step {step} was repeated with another sum; this is a bug, report it")
            return
        assert self._units_of_step is not None
        intended, names_in_order = self._units_of_step
        assert intended == (generation, step)
        names = set(zeroed)
        places = [place for place, name in enumerate(names_in_order) if name in names]
        assert len(places) == len(names)
        self._append("commit", generation=generation, step=step, update=commitment, zeroed=places)
        if self._num_open_rows >= self._segment_rows:
            self._seal()

    def prepare_release(self) -> str:
        """Seal the open segment; return the hash of the last record, for the privacy statement to quote.

        Only :meth:`release` may follow.
        """
        self._seal()
        return self.state.head

    def release(self, epsilon: float | None, delta: float, manifest: ReleaseManifest) -> None:
        """Record the release, whose manifest quotes the head of :meth:`prepare_release`, as the last record."""
        self._append(
            "release", epsilon=epsilon, delta=delta, num_charged=self.state.num_charged, manifest=manifest.body
        )

    def close(self) -> None:
        """Close the files."""
        self._log.close()
        self._rows.close()

    @property
    def _num_open_rows(self) -> int:
        return sum(map(len, self._open_rows))

    def _seal(self) -> None:
        """Move the rows of the open segment to a Parquet file, record it, and begin the next row file."""
        rows, state = np.concatenate(self._open_rows), self.state
        if not len(rows):  # only steps without any unit
            return
        index = len(state.segments)
        content = to_parquet(to_table(state.open_bodies, rows, state.zeroed))
        _write_new(segment_path(self._path, index), content)
        self._append("seal", segment=index, num_rows=len(rows), num_bytes=len(content), chunks=chunk_hashes(content))
        next_rows = _Appender(rows_path(self._path, index + 1))  # first: if it fails, close() still closes the old one
        self._rows.close()
        self._rows = next_rows
        self._open_rows = [np.zeros(0, dtype=ROW)]
        rows_path(self._path, index).unlink()  # a crash before this leaves it for _drop_leftovers

    def _append(self, kind: str, **fields: Any) -> None:
        """Check, write and apply the next record, and store its hash in the head file."""
        line = make_line(self.state, kind, fields)
        record = parse(self.state, line)  # what would be refused on reading is never written
        self._log.append(line, at=self._size)
        self._size += len(line)
        apply(self.state, record)
        self._head.write(self.state.num_records, self.state.head)


class NullLedger(Ledger):
    """A ledger that discards what steps record, for ranks other than 0 and for rehearsals.

    Only rank 0 of a job that records calls anything else of a ledger; here it fails, since there are no files.
    """

    def __init__(self) -> None:
        self.state = LedgerState()
        self.repair = ""

    @override
    def intend(self, generation: int, step: int, units: Sequence[tuple[str, int]]) -> None:
        pass

    @override
    def commit(self, generation: int, step: int, commitment: str, zeroed: Collection[str] = ()) -> None:
        pass

    @override
    def close(self) -> None:
        pass


@contextlib.contextmanager
def open_ledger(
    path: pathlib.Path,
    *,
    plan_fingerprint: str,
    records_per_unit: int,
    pseudonym_key: SecretKey,
    segment_rows: int = SEGMENT_ROWS,
    num_groups: int = 1,
) -> Iterator[Ledger]:
    """Open the log of a run for appending, or begin it; cut off what a crash left unfinished at its end.

    Args:
        path: the log.
        plan_fingerprint: of the run's plan and data.
        records_per_unit: k, the most records of a unit in a step.
        pseudonym_key: that pseudonyms are made with.
        segment_rows: contributions at which a segment is sealed.
        num_groups: groups of units that steps draw from in turn; 1 where all units may join a step.

    Raises:
        LedgerCorrupt: if anything but an unfinished tail is wrong, or the log belongs to another plan or key.
        RunBusy: if another process has it open.
        UnsafePath: if a file of it is a link, another user's or has a second name, or its directory is not private.
    """
    check_private_directory(path.parent)
    make_private_directory(directory_of(path))
    for file in (path, head_path(path)):
        _check_file(file)
    with opened_head(path) as head:  # locks the log
        # Check all that is there.
        state, end = replay(path) if path.exists() else (LedgerState(), 0)
        lag = check_head(path, state, end)
        for index, segment in enumerate(state.segments):
            _check_file(segment_path(path, index))
            check_segment_file(path, index, segment)
        _check_file(rows_path(path, len(state.segments)))
        open_rows, num_torn_row_bytes = read_open(path, state)
        if state.num_records:
            _check_owner(path, state, plan_fingerprint, pseudonym_key)
        if state.is_released and path.stat().st_size > end:
            raise LedgerCorrupt(f"{path}: bytes behind the release record, where nothing is ever written; restore it")

        # Mend what a crash left unfinished.
        num_torn_bytes = _cut(path, end) + _cut(rows_path(path, len(state.segments)), open_rows.nbytes)
        _drop_leftovers(path, len(state.segments))
        if lag:  # a crash came between the last record and its entry in the head file
            head.write(state.num_records, state.head)

        # Begin a new log, or record the repair.
        ledger = Ledger(path, state, pseudonym_key, head, open_rows, segment_rows)
        try:
            if state.num_records == 0:
                groups = {"num_groups": num_groups} if num_groups > 1 else {}
                ledger._append(
                    "begin",
                    schema=SCHEMA,
                    plan=ledger.blinded("plan", plan_fingerprint),
                    key_sha256=key_commitment(pseudonym_key),
                    records_per_unit=records_per_unit,
                    **groups,
                )
            if num_torn_bytes:
                ledger._append("repair", num_torn_bytes=num_torn_bytes, num_torn_row_bytes=num_torn_row_bytes)
                ledger.repair = (
                    f"the last write was torn: {num_torn_bytes} bytes that were never committed were cut off"
                )
            yield ledger
        finally:
            ledger.close()


def key_commitment(key: SecretKey) -> str:
    """Return the commitment to the pseudonym key in the first record, which proofs are checked against."""
    return hashlib.sha256(b"privtrain/ledger/2/key:" + key.reveal()).hexdigest()


def blinded_plan(key: SecretKey, plan_fingerprint: str) -> str:
    """Return the HMAC of the plan's fingerprint in the first record; see :meth:`Ledger.blinded`."""
    return key.derive("ledger plan", plan_fingerprint).hex()


def _check_owner(path: pathlib.Path, state: LedgerState, plan_fingerprint: str, key: SecretKey) -> None:
    """Raise unless the first record is of this key, plan and data set."""
    if state.key_sha256 != key_commitment(key):
        raise LedgerCorrupt(f"{path} was written under another pseudonym key; restore both from one backup")
    if state.plan != blinded_plan(key, plan_fingerprint):
        raise LedgerCorrupt(f"{path} belongs to another plan or data set")


def _body(
    key: SecretKey, generation: int, step: int, units: Sequence[tuple[str, int]]
) -> tuple[list[str], np.ndarray, str]:
    """Return the body of a step: (names of its units, their rows of :data:`ROW`, the Merkle root in hex).

    Names and rows are in the order of the tree. ``units``: (name, number of records) of each, in any order.
    """
    context = merkle.step_context(generation, step)
    pseudonyms = [bytes.fromhex(pseudonym(key, name)) for name, _ in units]
    hashes = merkle.row_hashes(context, b"".join(pseudonyms))
    order = sorted(range(len(units)), key=hashes.__getitem__)
    ordered_units = [units[i] for i in order]
    rows = np.zeros(len(units), dtype=ROW)
    rows["unit"] = np.frombuffer(b"".join(pseudonyms[i] for i in order), dtype=ROW["unit"])
    rows["records"] = [num_records for _, num_records in ordered_units]
    tree_rows = merkle.with_counts(b"".join(hashes[i] for i in order), rows["records"])
    return [name for name, _ in ordered_units], rows, merkle.root_of(tree_rows)


def _check_file(path: pathlib.Path) -> None:
    """Raise if a file is a link or another user's: what is written would go elsewhere."""
    if os.path.lexists(path):
        os.close(open_private_file(path, os.O_RDONLY))


def _cut(path: pathlib.Path, size: int) -> int:
    """Cut a file to ``size`` and return how many bytes went."""
    excess = path.stat().st_size - size if path.exists() else 0
    if excess > 0:
        with os.fdopen(open_private_file(path, os.O_RDWR), "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    return max(excess, 0)


def _drop_leftovers(path: pathlib.Path, num_segments: int) -> None:
    """Remove the row file of the last sealed segment, which a crash may have left behind."""
    if num_segments:
        rows_path(path, num_segments - 1).unlink(missing_ok=True)


def _write_new(path: pathlib.Path, content: bytes) -> None:
    """Write a private file and bring it onto the disk; nothing refers to the file yet, so it need not be atomic."""
    with os.fdopen(open_private_file(path, os.O_WRONLY | os.O_CREAT), "wb") as file:
        file.truncate()  # the content of an earlier try that a crash cut short
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


class _Appender:
    """A file that only grows, by one writer, each write on disk before the next."""

    def __init__(self, path: pathlib.Path) -> None:
        is_new = not path.exists()
        self._path = path
        self._descriptor = open_private_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if is_new:
            sync_directory(path.parent)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._descriptor).st_size

    def append(self, data: bytes, at: int) -> None:
        """Write ``data`` where the file ends, which must be ``at``."""
        # Network file systems may have no locks: this is where a second writer, or an append cut short, is noticed.
        if self.size != at:
            raise RunBusy(f"{self._path} changed under its writer: another job writes it, or a write failed half-way")
        view = memoryview(data)
        while view:
            view = view[os.write(self._descriptor, view) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
