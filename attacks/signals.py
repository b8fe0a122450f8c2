"""Per-token signals of the scored documents: the only thing that passes from the scoring stage to the analysis.

Scoring needs the models and a GPU; every attack and statistic needs only these numbers. A new attack that reads the
same signals costs no forward pass. The file holds token ids and stays in ``secret/``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.errors import AttackInputError
from privtrain.errors import DamagedFile
from privtrain.files import reading
from privtrain.files.atomic import sync_directory, temporary_of
from privtrain.files.private import make_private_directory
from privtrain.files.reading import sha256_of

SIGNALS_PATH = pathlib.Path("secret/attack/signals.parquet")
"""Where a run directory keeps its signals."""

REFERENCES_PATH = pathlib.Path("secret/attack/references")
"""Where it keeps the same documents' signals under other models, one file a model."""

HELD_IN = "held_in"
HELD_OUT = "held_out"
SIDES = (HELD_IN, HELD_OUT)

FRESH = "fresh"
"""The attacker's documents, never trained on: what user inference reads."""

TRAINING = "training"
"""Records that training could use: trained on if their owner is held in. Record membership reads these."""

CANARY = "canary"
"""What was planted: of an invented user the one text of its records, of a changed user their fresh documents."""

CANARY_REFERENCE = "canary_reference"
"""Secrets that were not planted, drawn like those that were: what a canary's rank is counted among."""

CONTROL_PREFIX = "control_prefix"
"""Training records whose first tokens gave way to another user's: what a model says without the right prompt."""

KINDS = (FRESH, TRAINING, CANARY, CANARY_REFERENCE, CONTROL_PREFIX)

SCHEMA_NAME = "privtrain/signals/3"

ARROW_FAULTS = (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError, EOFError, MemoryError)
"""What pyarrow raises on a damaged file."""

_ROWS_PER_BATCH = 256


def _list_of(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


# Columns that hold one value a token -> (type in the file, type in memory).
_TOKEN_COLUMNS: Mapping[str, tuple[pa.DataType, Any]] = {
    "target_logp": (pa.float32(), np.float32),
    "base_logp": (pa.float32(), np.float32),
    "target_correct": (pa.bool_(), np.bool_),
    "target_mean": (pa.float32(), np.float32),
    "target_variance": (pa.float32(), np.float32),
    "target_sampled_logp": (pa.float32(), np.float32),
    "base_correct": (pa.bool_(), np.bool_),
    "base_mean": (pa.float32(), np.float32),
    "base_variance": (pa.float32(), np.float32),
    "base_sampled_logp": (pa.float32(), np.float32),
    "token_ids": (pa.int32(), np.int32),
    "sensitive": (pa.bool_(), np.bool_),
}
_REQUIRED_TOKEN_COLUMNS = ("target_logp", "base_logp")
_SCALAR_COLUMNS = {
    "user": pa.string(),
    "document": pa.string(),
    "side": pa.string(),
    "kind": pa.string(),
    "num_tokens": pa.int32(),
    "num_bytes": pa.int32(),
    "zlib_bytes": pa.int32(),
    "user_num_records": pa.int32(),
    "user_num_bytes": pa.int64(),
    "date": pa.float64(),
    "language": pa.string(),
}
_NULLABLE = ("date", "language")
_VARIANTS = pa.map_(pa.string(), pa.float64())

SCHEMA = pa.schema(
    [
        *(pa.field(name, kind, nullable=name in _NULLABLE) for name, kind in _SCALAR_COLUMNS.items()),
        pa.field("variants", _VARIANTS, nullable=False),
        *(
            pa.field(name, _list_of(kind), nullable=name not in _REQUIRED_TOKEN_COLUMNS)
            for name, (kind, _) in _TOKEN_COLUMNS.items()
        ),
    ],
    metadata={"schema": SCHEMA_NAME},
)

# A float32 log-softmax may end a rounding error above zero; anything more is not a log-probability.
_MAX_LOGP = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentSignals:
    """The signals of one document. Every array has one entry per scored token, in document order.

    Attributes:
        user: pseudonym of the document's owner, another one than the ledger's.
        document: identifier of the document, unique within its user.
        side: ``"held_in"`` if the owner's records were trained on, else ``"held_out"``.
        target_logp: log-probability in nats of each scored token under the fine-tuned model.
        base_logp: the same tokens under the exact model that fine-tuning started from.
        kind: ``"fresh"``, ``"training"``, ``"canary"``, ``"canary_reference"`` or ``"control_prefix"``.
        target_correct: whether the token is the fine-tuned model's most likely one.
        target_mean: mean of log p over the vocabulary under p itself, at the token's place.
        target_variance: its variance under p.
        target_sampled_logp: log-probability of the token where text is drawn from the model by the sampling scheme of
            the scoring; -inf if it cannot be drawn.
        base_correct, base_mean, base_variance, base_sampled_logp: the same under the base.
        token_ids: the tokens themselves.
        sensitive: whether any character of the token lies in a labelled span.
        num_bytes: UTF-8 bytes of the text.
        zlib_bytes: bytes of its zlib compression.
        user_num_records: records that training could use of this owner, whatever the side.
        user_num_bytes: bytes of text in them.
        date: days since some epoch, where the data have a date.
        language: of the text, where it was given or guessed.
        variants: name of a re-written text to the mean log-probability of its tokens under the fine-tuned model.

    Raises:
        ValueError: if the side is unknown, the arrays differ in length or are empty, or a value is no log-probability.
    """

    user: str
    document: str
    side: str
    target_logp: npt.NDArray[np.float32]
    base_logp: npt.NDArray[np.float32]
    kind: str = FRESH
    target_correct: npt.NDArray[np.bool_] | None = None
    target_mean: npt.NDArray[np.float32] | None = None
    target_variance: npt.NDArray[np.float32] | None = None
    target_sampled_logp: npt.NDArray[np.float32] | None = None
    base_correct: npt.NDArray[np.bool_] | None = None
    base_mean: npt.NDArray[np.float32] | None = None
    base_variance: npt.NDArray[np.float32] | None = None
    base_sampled_logp: npt.NDArray[np.float32] | None = None
    token_ids: npt.NDArray[np.int32] | None = None
    sensitive: npt.NDArray[np.bool_] | None = None
    num_bytes: int = 0
    zlib_bytes: int = 0
    user_num_records: int = 0
    user_num_bytes: int = 0
    date: float | None = None
    language: str | None = None
    variants: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side is none of {', '.join(SIDES)}")
        if self.kind not in KINDS:
            raise ValueError(f"kind is none of {', '.join(KINDS)}")
        if not self.user or not self.document:
            raise ValueError("a document without a name or an owner")
        for name, (_, dtype) in _TOKEN_COLUMNS.items():
            # Convert here, once: rows are built from tensors, lists and slices of a file.
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        shapes = {name: getattr(self, name).shape for name in _TOKEN_COLUMNS if getattr(self, name) is not None}
        if self.target_logp.ndim != 1 or not self.num_tokens or len(set(shapes.values())) != 1:
            raise ValueError("expected two lists of the same tokens, at least one, and as many of everything else")
        self._check_values()

    def _check_values(self) -> None:
        """Raise ValueError unless log-probabilities are at most 0, and all numbers finite where they must be."""
        for name, logp in (("target_logp", self.target_logp), ("base_logp", self.base_logp)):
            if not np.isfinite(logp).all() or logp.max() > _MAX_LOGP:
                raise ValueError(
                    f"{name} of document {self.document!r} of user {self.user!r} ({self.kind}) holds a value that is "
                    "NaN, infinite or above 0; expected log-probabilities in nats"
                )
        for name in ("target_mean", "target_variance", "base_mean", "base_variance"):
            moment = getattr(self, name)
            if moment is not None and not np.isfinite(moment).all():
                raise ValueError(f"{name} holds a value that is NaN or infinite; expected moments of log p")
        for name in ("target_sampled_logp", "base_sampled_logp"):
            sampled = getattr(self, name)
            # A token that cannot be drawn has -inf; NaN fails the comparison.
            if sampled is not None and not (sampled <= _MAX_LOGP).all():
                raise ValueError(f"{name} holds a value that is NaN or above 0; expected log-probabilities in nats")
        if min(self.num_bytes, self.zlib_bytes, self.user_num_records, self.user_num_bytes) < 0:
            raise ValueError("a number of bytes or records is negative")
        if self.date is not None and not math.isfinite(self.date):
            raise ValueError("date is NaN or infinite")
        if not all(math.isfinite(mean) and mean <= _MAX_LOGP for mean in self.variants.values()):
            raise ValueError("variants holds a value that is NaN, infinite or above 0; expected means of log p")

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens."""
        return self.target_logp.size


def write_signals(path: pathlib.Path, rows: Iterable[DocumentSignals]) -> None:
    """Write the signals: the same rows in any order give the same bytes, and a crash leaves no half file.

    Args:
        path: the parquet file to replace; missing directories are made, readable by their owner alone.
        rows: one per document.

    Raises:
        ValueError: if a document occurs twice or a user stands on both sides.
    """
    ordered = sorted(rows, key=lambda row: (row.side, row.user, row.document))
    checked = _Checker()
    for row in ordered:
        checked.add(row)
    checked.finish()
    with _atomic_writer(path) as writer:
        writer.write_table(to_table(ordered))


def join_signals(
    target: pathlib.Path, parts: Sequence[pathlib.Path], digests: Sequence[str]
) -> list[tuple[str, str, str, str]]:
    """Join parts into one file, a part in memory at a time.

    Args:
        target: the signals file to write.
        parts: signals files, each of some of the documents.
        digests: SHA-256 that each part must have.

    Returns:
        (user, document, kind, side) of every document, in the order of the parts.

    Raises:
        DamagedFile: if a part is missing or has another digest.
        AttackInputError: if a document is in two parts, or a user on both sides.
    """
    checked = _Checker()
    keys = []
    with _atomic_writer(target) as writer:
        for part, digest in zip(parts, digests, strict=True):
            with reading.opened(part) as file:
                if sha256_of(file, part) != digest:
                    raise DamagedFile(part, "changed while it was joined", "run the same command again")
                for row in rows_of(file, part):
                    checked.add(row)
                    keys.append((row.user, row.document, row.kind, row.side))
                file.seek(0)
                writer.write_table(pq.read_table(file))
        try:
            checked.finish()
        except ValueError as error:
            raise AttackInputError(f"{target.parent} holds parts that contradict each other: {error}") from error
    return keys


def iterate_signals(path: pathlib.Path) -> Iterator[DocumentSignals]:
    """Read and check the signals in the file's order, some hundred documents in memory at a time.

    This checks the form only. Whether the run's own scoring wrote the file is for :mod:`attacks.reporting.record`.

    Yields:
        One entry per document.

    Raises:
        AttackInputError: if the file is missing.
        DamagedFile: if the file has another schema, or holds rows that cannot be used.
    """
    if not path.exists():
        raise AttackInputError(
            f"no signals at {path}: expected the file that scoring writes; run next: attacks score RUN"
        )
    with reading.opened(path, remedy=_REMEDY) as file:
        yield from rows_of(file, path)


_REMEDY = "run next: attacks score RUN"


def rows_of(file: BinaryIO, path: pathlib.Path, remedy: str = _REMEDY) -> Iterator[DocumentSignals]:
    """Yield the signals of a file that is open already, checked; see :func:`iterate_signals`.

    Args:
        file: positioned at its start.
        path: of the file, for error messages.
        remedy: what an error tells the user to do.
    """
    checked = _Checker()
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            named = (schema.metadata or {}).get(b"schema", b"none").decode("ascii", errors="replace")
            if named != SCHEMA_NAME or not schema.equals(SCHEMA):
                raise DamagedFile(
                    path, f"has schema {named!r} with {len(schema.names)} columns; expected {SCHEMA_NAME!r}", remedy
                )
            for batch in table.iter_batches(_ROWS_PER_BATCH):
                for row in _rows(batch, path, checked.num_rows, remedy):
                    checked.add(row)
                    yield row
    except ARROW_FAULTS as error:
        raise DamagedFile(path, f"is not a readable parquet file ({type(error).__name__})", remedy) from None
    try:
        checked.finish()
    except ValueError as error:
        raise DamagedFile(path, f"holds signals that cannot be used: {error}", remedy) from None


def to_table(rows: Sequence[DocumentSignals]) -> pa.Table:
    """Return the rows as a table of ``SCHEMA``, in their order."""
    columns: list[pa.Array] = []
    for name, kind in _SCALAR_COLUMNS.items():
        columns.append(pa.array([getattr(row, name) for row in rows], kind))
    columns.append(pa.array([sorted(row.variants.items()) for row in rows], _VARIANTS))
    for name, (kind, dtype) in _TOKEN_COLUMNS.items():
        columns.append(_list_array([getattr(row, name) for row in rows], kind, dtype))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _list_array(parts: Sequence[npt.NDArray[Any] | None], kind: pa.DataType, dtype: type) -> pa.Array:
    """Return one arrow column with a list of token values for each document; None becomes a null.

    No Python object is made per token: a list column is all values in a row and the offsets where lists begin.
    """
    sizes = [0 if part is None else part.size for part in parts]
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} tokens in all; expected at most {np.iinfo(np.int32).max} in one write")
    values = np.concatenate([np.zeros(0, dtype), *(part for part in parts if part is not None)])
    mask = pa.array([part is None for part in parts], pa.bool_())
    return pa.ListArray.from_arrays(
        pa.array(offsets.astype(np.int32)), pa.array(values, kind), type=_list_of(kind), mask=mask
    )


def _rows(batch: pa.RecordBatch, path: pathlib.Path, num_before: int, remedy: str) -> Iterator[DocumentSignals]:
    """Yield the rows of a batch as :class:`DocumentSignals`.

    Args:
        batch: some rows of the file.
        path: of the file, for error messages.
        num_before: rows of the file before this batch, so that an error can number the row.
        remedy: what an error tells the user to do.

    Raises:
        DamagedFile: at the first invalid row.
    """
    batch.validate(full=True)  # offsets that point outside of the values
    scalars = {name: batch.column(name).to_pylist() for name in _SCALAR_COLUMNS}
    variants = batch.column("variants").to_pylist()
    tokens = {}
    for name in _TOKEN_COLUMNS:
        column = batch.column(name)  # a list of values a row: all values, and the offsets where each row begins
        offsets = column.offsets.to_numpy()
        values = column.values.to_numpy(zero_copy_only=False)
        is_valid = column.is_valid().to_pylist()
        tokens[name] = [
            values[start:end] if valid else None
            for start, end, valid in zip(offsets[:-1], offsets[1:], is_valid, strict=True)
        ]
    for number in range(batch.num_rows):
        fields: dict[str, Any] = {name: column[number] for name, column in scalars.items()}
        num_tokens = fields.pop("num_tokens")
        fields |= {name: column[number] for name, column in tokens.items()}
        try:
            row = DocumentSignals(**fields, variants=dict(variants[number]))
            if row.num_tokens != num_tokens:
                raise ValueError("num_tokens differs from the number of log-probabilities")
        except (ValueError, TypeError) as error:  # TypeError: a null where none can be
            line = num_before + number + 1
            raise DamagedFile(path, f"row {line} cannot be used: {error}", remedy, line=line) from None
        yield row


class _Checker:
    """Refuses a file in which a document counts twice or a user is both member and non-member.

    ``add`` takes each row as it passes; ``finish`` raises once all have passed.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._documents: set[tuple[str, str]] = set()
        self._users: dict[str, set[str]] = {side: set() for side in SIDES}

    def add(self, row: DocumentSignals) -> None:
        self.num_rows += 1
        self._documents.add((row.user, row.document))
        self._users[row.side].add(row.user)

    def finish(self) -> None:
        """Raise ValueError if a document occurred twice, or a user on both sides."""
        num_repeated = self.num_rows - len(self._documents)
        if num_repeated:
            raise ValueError(f"{num_repeated} documents occur more than once")
        num_shared = len(self._users[HELD_IN] & self._users[HELD_OUT])
        if num_shared:
            raise ValueError(f"{num_shared} users stand on both sides; a user is held in or held out, never both")


@contextlib.contextmanager
def _atomic_writer(path: pathlib.Path) -> Iterator[pq.ParquetWriter]:
    """Yield a writer of a temporary file, which replaces ``path`` once it is whole and on disk.

    If the block raises, the temporary file is removed and ``path`` stays as it was.
    """
    make_private_directory(path.parent)
    temporary = temporary_of(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
                yield writer
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)
