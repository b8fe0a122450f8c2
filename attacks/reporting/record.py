"""The record of a scoring: a sealed file beside the signals that says which target, documents and settings they are of.

Signals are the per-token log-probabilities that ``attacks score`` writes (``signals.parquet``); the record lies beside
them (``signals.json``). "Sealed" is authenticated by a key of the run. The record holds the signals' size and SHA-256,
so its seal covers both. It is written last: signals without a record that fits are not there. Whoever reads signals of
a run reads them through here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from attacks.errors import AttackInputError
from attacks.scoring import target as targets
from attacks.signals import ARROW_FAULTS, REFERENCES_PATH, SIGNALS_PATH, DocumentSignals, rows_of
from privtrain.errors import DamagedFile
from privtrain.files import reading
from privtrain.files.reading import sha256_of
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import SEAL, read_sealed_file, write_sealed

SCHEMA_NAME = "privtrain/scoring/2"
PART_SCHEMA_NAME = "privtrain/scoring-part/2"


@dataclasses.dataclass(frozen=True)
class Scoring:
    """A signals file with its record, whose seal was checked; the file is compared with it whenever it is read.

    Attributes:
        run: whose key seals the record.
        path: of the signals.
        facts: content of the record.
        remedy: what an error about damaged signals tells the user to do.
    """

    run: RunDirectory
    path: pathlib.Path
    facts: Mapping[str, Any]
    remedy: str

    @property
    def seal(self) -> str:
        """The record's seal: it changes with anything in the record or in the signals."""
        return self.facts[SEAL]

    def rows(self) -> Iterator[DocumentSignals]:
        """Yield the signals, in the file's order.

        Raises:
            DamagedFile: if they are not those of the record.
        """
        with self._opened() as file:
            yield from rows_of(file, self.path, self.remedy)

    def columns(self, names: Sequence[str], kind: str | None = None) -> pa.Table:
        """Return some columns of all rows, or of the rows of one kind of document; raises as :meth:`rows`."""
        filters = None if kind is None else [("kind", "==", kind)]
        with self._opened() as file:
            try:
                return pq.read_table(file, columns=list(names), filters=filters)
            except ARROW_FAULTS as error:
                raise DamagedFile(self.path, f"is not readable ({type(error).__name__})", self.remedy) from None

    def check(self) -> None:
        """Raise unless the signals are those of the record."""
        with self._opened():
            pass

    @contextlib.contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        """Yield the open signals file once its size and digest are found to be those of the record."""
        with reading.opened(self.path, remedy=self.remedy) as file:
            # First its size: hashing a file that was made huge takes hours.
            is_whole = os.fstat(file.fileno()).st_size == self.facts["signals_num_bytes"]
            # Hashed through the handle that is read: no other file can take its place in between.
            if not is_whole or sha256_of(file, self.path) != self.facts["signals_sha256"]:
                raise DamagedFile(
                    self.path, "is not the file that was sealed: it was altered or damaged after scoring", self.remedy
                )
            yield file


def record_path(signals_path: pathlib.Path) -> pathlib.Path:
    """Return where the record of signals is."""
    return signals_path.with_suffix(".json")


def write_scoring(
    run: RunDirectory, path: pathlib.Path, facts: Mapping[str, Any], *, schema: str = SCHEMA_NAME
) -> None:
    """Write the sealed record of a signals file that has just been written.

    Args:
        run: whose key seals it.
        path: the signals.
        facts: what the record says of them; their size and SHA-256 are added.
        schema: name of the record's format.
    """
    with reading.opened(path) as file:
        written = {"signals_sha256": sha256_of(file, path), "signals_num_bytes": os.fstat(file.fileno()).st_size}
    write_sealed(run, record_path(path), {"schema": schema, **facts, **written})


def read_scoring(
    run: RunDirectory, path: pathlib.Path | None = None, *, schema: str = SCHEMA_NAME, remedy: str | None = None
) -> Scoring:
    """Return the scoring of a run, its record checked; the signals are checked whenever they are read.

    Args:
        run: the attacked run.
        path: the signals; those of the run's own model if None.
        schema: name of the format that the record must have.
        remedy: what an error tells the user to do.

    Raises:
        AttackInputError: if there are no signals.
        DamagedFile: if the record is missing or not as it was sealed.
    """
    path = path or run.root / SIGNALS_PATH
    remedy = f"run next: attacks score {run.root}" if remedy is None else remedy
    if not path.exists() and not record_path(path).exists():
        raise AttackInputError(f"{run.root} has no {path.relative_to(run.root)}: expected a scored run; {remedy}")
    facts = read_sealed_file(run, record_path(path), schema=schema, remedy=remedy)
    return Scoring(run, path, facts, remedy)


def read_references(run: RunDirectory, own: Scoring) -> list[Scoring]:
    """Return the scorings of the same documents under shadow models, each comparable with the run's own.

    Args:
        run: the attacked run.
        own: the scoring under its own model.

    Raises:
        DamagedFile: if one is not as it was sealed.
        AttackInputError: if one is of another base model, tokenizer or precision, or of a model that is there already.
    """
    scorings: list[Scoring] = []
    models = {_weights_of(own): own.path}  # digest of weights -> signals under them
    folder = run.root / REFERENCES_PATH
    names = sorted({path.stem for path in folder.glob("shadow-*") if path.suffix in (".parquet", ".json")})
    for name in names:
        path = folder / f"{name}.parquet"
        again = f"delete it, and score the shadow again: attacks score SHADOW --documents-of {run.root}"
        scoring = read_scoring(run, path, remedy=again)
        for what in ("base", "precision"):
            ours, theirs = (item.facts["target"].get(what) for item in (own, scoring))
            if ours != theirs:
                raise AttackInputError(f"{path} was scored under another {what} than {own.path}; {again}")
        model = _weights_of(scoring)
        if model in models:
            raise AttackInputError(f"{path} is of the same model as {models[model]}: it is no shadow of it; delete it")
        models[model] = path
        scorings.append(scoring)
    return scorings


def _weights_of(scoring: Scoring) -> str:
    """Return a digest of the released weights alone: a copy of a model under another name is the same model."""
    released = scoring.facts["target"]["released"]
    weights = {name: value for name, value in released.items() if name.endswith((".safetensors", ".bin"))}
    return targets.digest_of(weights or released)
