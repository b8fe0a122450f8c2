"""The bodies of the steps: who contributed, by pseudonym, and how much.

While a segment is open its rows lie in ``rows-NNNNNNNN.bin``, 20 bytes each (pseudonym, records), in the order of the
intents and within a step in the order of the Merkle tree. When there are enough, they are written to
``segment-NNNNNNNN.parquet``, a record in the chain takes that file's hashes, and the row file is removed. Each file is
whole and on disk before the record that speaks of it, so a crash leaves either rows too many, which are cut off, or a
file that nothing speaks of, which is written again.
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
    """Return the rows of these bodies as columns.

    Args:
        bodies: steps, in order.
        rows: [contributions] of :data:`ROW`.
        zeroed: places in a step of the users who counted as zero.
    """
    sizes = [body.num_units for body in bodies]
    flags = np.zeros(len(rows), dtype=bool)
    start = 0
    for body in bodies:
        flags[[start + place for place in zeroed.get((body.generation, body.step), ())]] = True
        start += body.num_units
    units = np.ascontiguousarray(rows["unit"])
    storage = pa.FixedSizeBinaryArray.from_buffers(pa.binary(_WIDTH), len(rows), [None, pa.py_buffer(units.tobytes())])
    columns = [
        _column(np.repeat(np.array([body.generation for body in bodies], dtype=np.int32), sizes)),
        _column(np.repeat(np.array([body.step for body in bodies], dtype=np.int32), sizes)),
        pa.ExtensionArray.from_storage(pa.uuid(), storage),
        _column(rows["records"].astype(np.int32)),
        pa.Array.from_buffers(pa.bool_(), len(flags), [None, pa.py_buffer(np.packbits(flags, bitorder="little"))]),
    ]
    return pa.table(columns, schema=_SCHEMA)


def _column(values: np.ndarray) -> pa.Array:
    """Return int32 as a column; ``pa.array`` would import pandas, for which every job would wait."""
    return pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values.tobytes())])


def to_parquet(table: pa.Table) -> bytes:
    """Return a segment as Parquet; the random pseudonyms are not dictionary-encoded."""
    buffer = io.BytesIO()
    small: Any = ["generation", "step", "records"]
    pq.write_table(table, buffer, compression="zstd", use_dictionary=small, write_statistics=small)
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
    size = ROW.itemsize * sum(body.num_units for body in state.open_bodies)
    if len(content) < size:
        raise LedgerCorrupt(f"{path}: ends at byte {len(content)}; the records in {log} speak of {size} bytes")
    rows = np.frombuffer(content[:size], dtype=ROW)
    _check_rows(path, state.open_bodies, rows, ROW.itemsize, state.records_per_unit)
    return rows, len(content) - size


def check_segment_file(log: pathlib.Path, index: int, segment: Segment) -> bytes:
    """Read a sealed file, checking that every byte is what was sealed.

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
    """Return the rows of a sealed segment, checked: bytes, steps, flags, roots, order and contribution bound.

    Raises:
        LedgerCorrupt: naming file and step.
    """
    path = segment_path(log, index)
    content = check_segment_file(log, index, segment)
    rows = np.zeros(segment.num_rows, dtype=ROW)
    try:
        table = pq.read_table(pa.BufferReader(content))
        if table.num_rows == len(rows):
            rows["unit"] = _units(table)
            rows["records"] = table.column("records").to_numpy()
        expected = to_table(segment.bodies, rows, state.zeroed)
        others = ["generation", "step", "zeroed"]
        is_whole = table.schema.equals(_SCHEMA) and table.select(others).equals(expected.select(others))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise LedgerCorrupt(f"{path}: not a segment ({error})") from None
    if not is_whole:
        raise LedgerCorrupt(f"{path}: byte 0: its columns are not those of steps {_steps(segment.bodies)}")
    _check_rows(path, segment.bodies, rows, 1, state.records_per_unit)
    return rows


def _steps(bodies: Sequence[Body]) -> str:
    return f"{bodies[0].step} to {bodies[-1].step}" if bodies else "none"


def _units(table: pa.Table) -> np.ndarray:
    """Return [rows] of 16-byte pseudonyms."""
    column = table.column("unit")
    if column.null_count:
        raise ValueError("a missing pseudonym")
    pieces = []
    for chunk in column.chunks:
        buffer = chunk.storage.buffers()[1]
        pieces.append(np.frombuffer(buffer, dtype=ROW["unit"])[chunk.offset : chunk.offset + len(chunk)])
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=ROW["unit"])


def _check_rows(path: pathlib.Path, bodies: Sequence[Body], rows: np.ndarray, row_bytes: int, limit: int) -> None:
    """Check the steps' rows, one after another, against the Merkle roots of their intents.

    Args:
        path: of the file, for the message.
        bodies: the steps in the order of their rows.
        rows: pseudonym and number of records of every unit of every step.
        row_bytes: size of a row where the file has bytes to point at, 1 where it has rows.
        limit: most records of a unit in a step.
    """
    units = np.ascontiguousarray(rows["unit"]).tobytes()
    counts = np.ascontiguousarray(rows["records"])
    is_within = (counts >= 1) & (counts <= limit)
    start = 0
    for body in bodies:
        end = start + body.num_units
        problem = _problem(
            body, units[start * _WIDTH : end * _WIDTH], counts[start:end], bool(is_within[start:end].all()), limit
        )
        if problem:
            unit = "byte" if row_bytes > 1 else "row"
            raise LedgerCorrupt(
                f"{path}: {unit} {start * row_bytes}: step {body.step} of generation {body.generation} "
                f"(record {body.record}): {problem}"
            )
        start = end


def _problem(body: Body, pseudonyms: bytes, counts: np.ndarray, is_within: bool, limit: int) -> str | None:
    """Return what is wrong with a step's rows against its record; None if nothing."""
    rows = merkle.rows_of(merkle.step_context(body.generation, body.step), pseudonyms, counts)
    if merkle.root_of(rows) != body.root:
        return "its users are not those that the record was written with"
    if not is_within:
        return f"a unit with more than {limit} records, or none"
    return None if merkle.are_sorted(rows) else "a unit twice in one step, or units out of order"


def each_segment(log: pathlib.Path, state: LedgerState) -> Iterator[tuple[tuple[Body, ...], np.ndarray]]:
    """Yield (bodies, rows) of every sealed segment and then of the open one, each checked."""
    for index, segment in enumerate(state.segments):
        yield segment.bodies, read_segment(log, index, segment, state)
    yield tuple(state.open_bodies), read_open(log, state)[0]


def charged_units(log: pathlib.Path, state: LedgerState) -> Iterator[tuple[str, int]]:
    """Yield (pseudonym, records) of every contribution to every charged step, from checked bodies."""
    for _, rows in each_segment(log, state):
        units, width = np.ascontiguousarray(rows["unit"]).tobytes().hex(), 2 * _WIDTH
        yield from ((units[i * width : (i + 1) * width], n) for i, n in enumerate(rows["records"].tolist()))
