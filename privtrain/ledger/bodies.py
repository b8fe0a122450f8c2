"""The bodies of the steps: which units contributed to each step, by pseudonym, and with how many records.

A unit is a user or a record, by ``privacy.unit``. A row is a unit's contribution to one step: 20 bytes, its pseudonym
and its number of records. Rows are in the order of the steps' intent records in the log, and within a step in the order
of its Merkle tree, whose root the intent record holds.

Rows of the latest steps lie in the *open segment*, ``rows-NNNNNNNN.bin``. When there are enough, the segment is
*sealed*: its rows are written to ``segment-NNNNNNNN.parquet``, a record in the log takes that file's hashes, and the
row file is removed. Each file is whole and on disk before the record that speaks of it. So a crash leaves either rows
too many, which are cut off, or a file that nothing speaks of, which is written again.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from privtrain.errors import LedgerCorrupt
from privtrain.ledger import merkle
from privtrain.ledger.chain import Body, LedgerState, Segment

#: A contribution in an open segment.
ROW = np.dtype([("unit", f"V{merkle.PSEUDONYM_BYTES}"), ("records", "<u4")])
#: A sealed file is hashed in pieces of this size, so that damage has a place.
CHUNK_BYTES = 1 << 20

_WIDTH = merkle.PSEUDONYM_BYTES

_SCHEMA = pa.schema(
    [
        ("generation", pa.int32()),
        ("step", pa.int32()),
        ("unit", pa.uuid()),
        ("records", pa.int32()),
        ("zeroed", pa.bool_()),
    ]
)

#: (generation, step) → positions in the step's rows of the units that counted as zero, see :attr:`LedgerState.zeroed`.
Zeroed = Mapping[tuple[int, int], Sequence[int]]


def directory_of(log: pathlib.Path) -> pathlib.Path:
    """Return where the bodies of a log are."""
    return log.with_suffix("")


def rows_path(log: pathlib.Path, segment: int) -> pathlib.Path:
    """Return the row file of an open segment."""
    return directory_of(log) / f"rows-{segment:08d}.bin"


def segment_path(log: pathlib.Path, segment: int) -> pathlib.Path:
    """Return the file of a sealed segment."""
    return directory_of(log) / f"segment-{segment:08d}.parquet"


def to_table(bodies: Sequence[Body], rows: np.ndarray, zeroed: Zeroed) -> pa.Table:
    """Return a table with one row a contribution: generation, step, unit (pseudonym), records, zeroed.

    Args:
        bodies: steps, in order.
        rows: [contributions] of :data:`ROW`, step after step.
        zeroed: whose gradient was not finite, so that they contributed zero.
    """
    sizes = [body.num_units for body in bodies]
    is_zeroed = np.zeros(len(rows), dtype=bool)
    start = 0
    for body in bodies:
        places = np.array(zeroed.get((body.generation, body.step), ()), dtype=np.int64)
        is_zeroed[start + places] = True
        start += body.num_units
    # Columns are made from their bytes, without a Python object for each value.
    units = np.ascontiguousarray(rows["unit"])
    storage = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_WIDTH), len(rows), [None, pa.py_buffer(units.tobytes())])
    columns = [
        _column(np.repeat(np.array([body.generation for body in bodies], dtype=np.int32), sizes)),
        _column(np.repeat(np.array([body.step for body in bodies], dtype=np.int32), sizes)),
        pa.ExtensionArray.from_storage(pa.uuid(), storage),
        _column(rows["records"].astype(np.int32)),
        pa.Array.from_buffers(
            pa.bool_(), len(is_zeroed), [None, pa.py_buffer(np.packbits(is_zeroed, bitorder="little"))]
        ),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _column(values: np.ndarray) -> pa.Array:
    """Return int32 as a column; ``pa.array`` would import pandas, for which every job would wait."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values.tobytes())])


def to_parquet(table: pa.Table) -> bytes:
    """Return a segment as the bytes of a Parquet file."""
    buffer = io.BytesIO()
    # Not pseudonyms: they are random, so a dictionary or a range of them would take space and help no query.
    repetitive: Any = ["generation", "step", "records"]
    pq.write_table(table, buffer, compression="zstd", use_dictionary=repetitive, write_statistics=repetitive)
    return buffer.getvalue()


def chunk_hashes(content: bytes) -> list[str]:
    """Return SHA-256 of every piece of a file."""
    return [hashlib.sha256(content[i : i + CHUNK_BYTES]).hexdigest() for i in range(0, len(content), CHUNK_BYTES)]


def read_open(log: pathlib.Path, state: LedgerState) -> tuple[np.ndarray, int]:
    """Return the open segment's checked rows, and the number of bytes of an unfinished write after them.

    Raises:
        LedgerCorrupt: naming file, offset and record of the first rows that are missing or changed.
    """
    path = rows_path(log, len(state.segments))
    content = path.read_bytes() if path.exists() else b""
    num_recorded = ROW.itemsize * sum(body.num_units for body in state.open_bodies)
    if len(content) < num_recorded:
        raise LedgerCorrupt(f"{path}: ends at byte {len(content)}; the records in {log} speak of {num_recorded} bytes")
    rows = np.frombuffer(content[:num_recorded], dtype=ROW)
    _check_rows(path, state.open_bodies, rows, ROW.itemsize, state.records_per_unit)
    return rows, len(content) - num_recorded


def check_segment_file(log: pathlib.Path, index: int, segment: Segment) -> bytes:
    """Return the content of the sealed file number ``index``, checking that every byte is what was sealed.

    Raises:
        LedgerCorrupt: naming the first piece that is missing or changed.
    """
    path = segment_path(log, index)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise LedgerCorrupt(f"{path} is gone; restore it from a backup") from None
    hashes = chunk_hashes(content)
    for i, chunk in enumerate(segment.chunks):
        if i >= len(hashes) or hashes[i] != chunk:
            start = i * CHUNK_BYTES
            end = min(start + CHUNK_BYTES, segment.num_bytes)
            raise LedgerCorrupt(f"{path}: bytes {start} to {end} are not what was sealed; restore it from a backup")
    if len(content) != segment.num_bytes:
        raise LedgerCorrupt(f"{path}: has trailing data after byte {segment.num_bytes}, where it was sealed")
    return content


def read_segment(log: pathlib.Path, index: int, segment: Segment, state: LedgerState) -> np.ndarray:
    """Return the rows, [contributions] of :data:`ROW`, of the sealed segment number ``index``, all checked.

    Checked are the file's bytes, the columns of steps and zeroed units, and what :func:`_check_rows` checks.

    Raises:
        LedgerCorrupt: naming file and step.
    """
    path = segment_path(log, index)
    content = check_segment_file(log, index, segment)
    rows = np.zeros(segment.num_rows, dtype=ROW)
    try:
        table = pq.read_table(pa.BufferReader(content))
        if table.num_rows == len(rows):  # another number fails the comparison below
            rows["unit"] = _units(table)
            rows["records"] = table.column("records").to_numpy()
        expected = to_table(segment.bodies, rows, state.zeroed)
        from_log = ["generation", "step", "zeroed"]  # columns that repeat what the log's records say
        is_as_logged = table.schema.equals(_SCHEMA) and table.select(from_log).equals(expected.select(from_log))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise LedgerCorrupt(f"{path}: not a segment ({error})") from None
    if not is_as_logged:
        raise LedgerCorrupt(f"{path}: byte 0: its columns are not those of steps {_steps(segment.bodies)}")
    _check_rows(path, segment.bodies, rows, 1, state.records_per_unit)
    return rows


def _steps(bodies: Sequence[Body]) -> str:
    return f"{bodies[0].step} to {bodies[-1].step}" if bodies else "none"


def _units(table: pa.Table) -> np.ndarray:
    """Return [rows] of 16-byte pseudonyms, straight from Arrow's buffers, without a Python object for each."""
    column = table.column("unit")
    if column.null_count:
        raise ValueError("a missing pseudonym")
    pieces = []
    for chunk in column.chunks:
        buffer = chunk.storage.buffers()[1]  # the values; number 0 is the bitmap of nulls
        pieces.append(np.frombuffer(buffer, dtype=ROW["unit"])[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=ROW["unit"])


def _check_rows(path: pathlib.Path, bodies: Sequence[Body], rows: np.ndarray, row_bytes: int, limit: int) -> None:
    """Check each step's rows: Merkle root of its intent, order, no unit twice, 1 to ``limit`` records of a unit.

    Args:
        path: of the file, for the message.
        bodies: the steps in the order of their rows.
        rows: [contributions] of :data:`ROW`.
        row_bytes: size of a row in the file, to name the byte of a fault; 1 for Parquet, to name the row instead.
        limit: most records of a unit in a step.

    Raises:
        LedgerCorrupt: naming the first step that does not hold, and where it begins in the file.
    """
    units = np.ascontiguousarray(rows["unit"]).tobytes()
    counts = np.ascontiguousarray(rows["records"])
    is_within = (counts >= 1) & (counts <= limit)
    start = 0
    for body in bodies:
        end = start + body.num_units
        all_within = bool(is_within[start:end].all())
        problem = _problem(body, units[start * _WIDTH : end * _WIDTH], counts[start:end], all_within, limit)
        if problem:
            unit = "byte" if row_bytes > 1 else "row"
            raise LedgerCorrupt(
                f"{path}: {unit} {start * row_bytes}: step {body.step} of generation {body.generation} "
                f"(record {body.record}): {problem}"
            )
        start = end


def _problem(body: Body, pseudonyms: bytes, counts: np.ndarray, all_within: bool, limit: int) -> str | None:
    """Return in words what is wrong with a step's rows; ``None`` if nothing.

    Args:
        body: what the step's intent record says.
        pseudonyms: of its units, one after another.
        counts: [units] their numbers of records.
        all_within: whether all ``counts`` are from 1 to ``limit``.
        limit: most records of a unit in a step.
    """
    rows = merkle.rows_of(merkle.step_context(body.generation, body.step), pseudonyms, counts)
    if merkle.root_of(rows) != body.root:
        return "its users are not those that the record was written with"
    if not all_within:
        return f"a unit with more than {limit} records, or none"
    if not merkle.are_sorted(rows):
        return "a unit twice in one step, or units out of order"
    return None


def each_segment(log: pathlib.Path, state: LedgerState) -> Iterator[tuple[tuple[Body, ...], np.ndarray]]:
    """Yield (bodies, rows) of every sealed segment and then of the open one, each checked.

    The rows are those of the segment's first body, then of its second, and so on, ``num_units`` of each.

    Raises:
        LedgerCorrupt: naming file and step of what does not hold.
    """
    for index, segment in enumerate(state.segments):
        yield segment.bodies, read_segment(log, index, segment, state)
    open_rows, _ = read_open(log, state)
    yield tuple(state.open_bodies), open_rows


def charged_units(log: pathlib.Path, state: LedgerState) -> Iterator[tuple[str, int]]:
    """Yield (pseudonym in hex, records) of every contribution to every charged step, from checked bodies."""
    num_digits = 2 * _WIDTH
    for _, rows in each_segment(log, state):
        digits = np.ascontiguousarray(rows["unit"]).tobytes().hex()  # of all pseudonyms, one after another
        for i, num_records in enumerate(rows["records"].tolist()):
            yield digits[i * num_digits : (i + 1) * num_digits], num_records
