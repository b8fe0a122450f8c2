"""Per-token signals of the attacker's documents: the only thing that passes from the scoring stage to the analysis.

Scoring needs the models and a GPU; every attack and statistic needs only these numbers. A new attack that reads the
same signals costs no GPU time.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from attacks.errors import AttackInputError
from privtrain.rundir import make_private_directory, write_atomically

SIGNALS_PATH = pathlib.Path("secret/attack/signals.parquet")
"""Where a run directory keeps its signals."""

HELD_IN = "held_in"
HELD_OUT = "held_out"
SIDES = (HELD_IN, HELD_OUT)

SCHEMA_NAME = "privtrain/signals/1"
SCHEMA = pa.schema(
    [
        pa.field("user", pa.string(), nullable=False),
        pa.field("document", pa.string(), nullable=False),
        pa.field("side", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("target_logp", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
        pa.field("base_logp", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ],
    metadata={"schema": SCHEMA_NAME},
)

# A float32 log-softmax may end a rounding error above zero; anything more is not a log-probability.
_MAX_LOGP = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentSignals:
    """The signals of one attacker document, none of whose text was trained on.

    Attributes:
        user: pseudonym of the document's owner.
        document: identifier of the document, unique within its user.
        side: ``"held_in"`` if the owner's other documents were trained on, else ``"held_out"``.
        target_logp: log-probability in nats of each scored token under the fine-tuned model, in document order.
        base_logp: the same tokens under the exact model that fine-tuning started from.

    Raises:
        ValueError: if the side is unknown, the two lists differ in length or are empty, or a value is no
        log-probability.
    """

    user: str
    document: str
    side: str
    target_logp: npt.NDArray[np.float32]
    base_logp: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side is {self.side!r}; expected one of {', '.join(SIDES)}")
        for name in ("target_logp", "base_logp"):
            # Rows are built from tensors, lists and file slices alike.
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float32))
        if self.target_logp.ndim != 1 or self.target_logp.shape != self.base_logp.shape or not self.num_tokens:
            raise ValueError(
                f"target_logp has shape {self.target_logp.shape} and base_logp {self.base_logp.shape}; "
                "expected two lists of the same tokens, at least one"
            )
        for name, logp in (("target_logp", self.target_logp), ("base_logp", self.base_logp)):
            if not np.isfinite(logp).all() or logp.max() > _MAX_LOGP:
                raise ValueError(
                    f"{name} holds a value that is NaN, infinite or above 0; expected log-probabilities in nats"
                )

    @property
    def num_tokens(self) -> int:
        """Number of scored tokens."""
        return self.target_logp.size


def write_signals(path: pathlib.Path, rows: Iterable[DocumentSignals]) -> None:
    """Writes the signals: the same rows in any order give the same bytes, and a crash leaves no half file.

    Args:
        path: the parquet file to replace; missing directories are made, readable by their owner alone.
        rows: one per attacker document.

    Raises:
        ValueError: if a document occurs twice or a user stands on both sides.
    """
    ordered = sorted(rows, key=lambda row: (row.side, row.user, row.document))
    _check_rows(ordered)
    num_tokens = np.array([row.num_tokens for row in ordered], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(num_tokens, dtype=np.int64)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]} tokens in all; expected at most {np.iinfo(np.int32).max} in one file")
    table = pa.Table.from_arrays(
        [
            pa.array([row.user for row in ordered], pa.string()),
            pa.array([row.document for row in ordered], pa.string()),
            pa.array([row.side for row in ordered], pa.string()),
            pa.array(num_tokens),
            _list_array(offsets, [row.target_logp for row in ordered], SCHEMA.field("target_logp").type),
            _list_array(offsets, [row.base_logp for row in ordered], SCHEMA.field("base_logp").type),
        ],
        schema=SCHEMA,
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    make_private_directory(path.parent)
    write_atomically(path, buffer.getvalue(), mode=0o600)


def read_signals(path: pathlib.Path) -> list[DocumentSignals]:
    """Reads and checks the signals, sorted by (side, user, document).

    Args:
        path: a file written by ``write_signals``.

    Returns:
        One entry per attacker document.

    Raises:
        AttackInputError: if the file is missing, is of another schema, or holds rows that cannot be scored.
    """
    if not path.is_file():
        raise AttackInputError(
            f"no signals at {path}: expected the file that scoring writes; run next: attacks score RUN"
        )
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise AttackInputError(
            f"{path} is not a readable parquet file ({error}); run next: attacks score RUN"
        ) from error
    found = (table.schema.metadata or {}).get(b"schema", b"none").decode()
    if found != SCHEMA_NAME or not table.schema.equals(SCHEMA):
        raise AttackInputError(
            f"{path} has schema {found!r} with columns {table.schema.names}; expected {SCHEMA_NAME!r} "
            f"with columns {SCHEMA.names}; run next: attacks score RUN"
        )
    try:
        rows = _rows(table.combine_chunks())
        _check_rows(rows)
    except ValueError as error:
        raise AttackInputError(
            f"{path} holds signals that cannot be used: {error}; run next: attacks score RUN"
        ) from error
    return rows


def _list_array(
    offsets: npt.NDArray[np.int64], parts: Sequence[npt.NDArray[np.float32]], kind: pa.DataType
) -> pa.Array:
    """Joins the documents' values into one arrow list column without a Python object per token."""
    values = np.concatenate([np.zeros(0, np.float32), *parts])
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values), type=kind)


def _rows(table: pa.Table) -> list[DocumentSignals]:
    """Cuts the columns of a checked table into rows that share its memory."""
    columns = []
    for name in ("target_logp", "base_logp"):
        column = table.column(name).combine_chunks()
        offsets = column.offsets.to_numpy()
        columns.append(np.split(column.flatten().to_numpy(), (offsets[1:-1] - offsets[0])) if len(column) else [])
    names = (table.column(name).to_pylist() for name in ("user", "document", "side"))
    rows = [DocumentSignals(*values) for values in zip(*names, *columns, strict=True)]
    if [row.num_tokens for row in rows] != table.column("num_tokens").to_pylist():
        raise ValueError("num_tokens differs from the number of log-probabilities")
    return rows


def _check_rows(rows: Sequence[DocumentSignals]) -> None:
    """Refuses a file in which a document counts twice or a user is both member and non-member."""
    documents = collections.Counter((row.user, row.document) for row in rows)
    num_repeated = sum(count > 1 for count in documents.values())
    if num_repeated:
        raise ValueError(f"{num_repeated} documents occur more than once")
    sides = {side: {row.user for row in rows if row.side == side} for side in SIDES}
    num_shared = len(sides[HELD_IN] & sides[HELD_OUT])
    if num_shared:
        raise ValueError(f"{num_shared} users stand on both sides; a user is held in or held out, never both")
