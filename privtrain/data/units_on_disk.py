"""Training units whose records are read and tokenised when a step draws them, for corpora larger than memory."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
from typing_extensions import override

from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.packed import LazySequence, UserIndices
from privtrain.data.records import Record
from privtrain.data.split import Split
from privtrain.data.units import Drawn, UnitData, example_name


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UnitsOnDisk(UnitData):
    """A :class:`~.units.UnitData` that keeps only users and record indices in memory.

    How many records are cut or predict nothing is not counted: that would take tokenising them all.

    Attributes:
        corpus: records by user, read from disk on access.
        training: user → indices of the records that are trained on.
        encoder: makes tokens of records.
        unit: ``user``: the units are the users of ``training``; ``example``: they are its records, numbered through
            user by user.
    """

    corpus: Corpus
    training: UserIndices
    encoder: Encoder
    unit: str

    @property
    @override
    def num_records(self) -> np.ndarray:
        return np.ones(len(self.names), dtype=np.int64) if self.unit == "example" else self.training.counts()

    @override
    def fetch(self, drawn: Drawn) -> list[list[Record]]:
        """Return the drawn units' records, a list for each unit; all are tokenised in one call."""
        texts: list[str] = []
        for unit, numbers in drawn:
            for number in numbers:
                user, index = self._locate(unit, number)
                texts.append(self.corpus.records[user][index])
        encoded = iter(self.encoder.encode(texts).records)
        return [list(itertools.islice(encoded, len(numbers))) for _, numbers in drawn]  # split again unit by unit

    def sha256(self) -> str:
        """Return a digest of all that decides every unit's name, tokens and targets, without tokenising anything."""
        digest = hashlib.sha256()
        for part in (self.corpus.manifest_sha256, self.encoder.sha256(), self.unit):
            digest.update(part.encode())
        for user, indices in self.training.items():
            name = user.encode("utf-8", errors="surrogatepass")
            digest.update(len(name).to_bytes(8, "little") + name + repr(indices).encode())
        return digest.hexdigest()

    def _locate(self, unit: int, number: int) -> tuple[str, int]:
        """Return (user, index in the corpus) of record ``number`` of a unit."""
        if self.unit == "user":
            return self.names[unit], self.training.at(unit)[number]
        return _record(self.training, unit)


class _Place(NamedTuple):
    """Where a record is in the corpus: its user, and its index among that user's records."""

    user: str
    index: int


def _record(training: UserIndices, number: int) -> _Place:
    """Return where training record ``number`` is, from 0 over all users' records in order."""
    place, index = training.owner(number)
    return _Place(training.names[place], index)


def units_on_disk(corpus: Corpus, split: Split, encoder: Encoder, *, unit: str) -> UnitsOnDisk:
    """Return the training units of a corpus on disk; the arguments are those of :func:`.units.build_units`."""
    training = UserIndices.of(split.training)
    if unit == "user":
        names = owners = training.names
        indices = LazySequence(len(training), training.at)
    else:  # every record is a unit, numbered through user by user
        num_units = training.num_indices
        owners = LazySequence(num_units, lambda number: _record(training, number).user)
        indices = LazySequence(num_units, lambda number: (_record(training, number).index,))
        names = LazySequence(num_units, lambda number: example_name(*_record(training, number)))
    return UnitsOnDisk(
        names=names,
        records=(),
        num_truncated=None,
        num_without_target=None,
        indices=indices,
        owners=owners,
        corpus=corpus,
        training=training,
        encoder=encoder,
        unit=unit,
    )
