"""From a split to privacy units: tokenised records, each owned by exactly one unit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.records import Record
from privtrain.data.split import Split

#: Units by number, each with the numbers of those of its records that are wanted.
Drawn = Sequence[tuple[int, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class UnitData:
    """The training units, in a fixed order that every rank shares.

    Attributes:
        names: unit identifiers: user ids, or ``user#record`` where the unit is the example. Private.
        records: per unit, its tokenised records; :meth:`fetch` also serves units that are not in memory.
        num_truncated: records cut at ``max_length``. Private.
        num_without_target: records that predict nothing and so contribute zero. Private.
        indices: per unit, which records of its owner they are. Private.
    """

    names: Sequence[str]
    records: tuple[tuple[Record, ...], ...]
    num_truncated: int | None
    num_without_target: int | None = 0
    indices: Sequence[Sequence[int]] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_records(self) -> np.ndarray:
        """[units] number of records."""
        return np.fromiter(map(len, self.records), dtype=np.int64, count=len(self.records))

    def fetch(self, drawn: Drawn) -> list[list[Record]]:
        """The tokenised records that are wanted, unit by unit."""
        return [[self.records[unit][number] for number in numbers] for unit, numbers in drawn]

    def sha256(self) -> str:
        """Digest of every unit's name, tokens and targets."""
        digest = hashlib.sha256()
        for name, records in zip(self.names, self.records, strict=True):
            arrays = [array.tobytes() for record in records for array in (record.tokens, record.is_target)]
            for part in (name.encode("utf-8", errors="surrogatepass"), *arrays):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def build_units(corpus: Corpus, split: Split, encoder: Encoder, *, unit: str) -> UnitData:
    """Tokenise the training records of ``split`` and group them by privacy unit.

    Args:
        corpus: the kept records.
        split: which of them are trained on.
        encoder: turns a record into tokens.
        unit: ``"user"`` groups a user's records; ``"example"`` makes each record a unit.
    """
    owners = [(user, index) for user, indices in split.training.items() for index in indices]
    encoded = encoder.encode([corpus.records[u][i] for u, i in owners])
    names: list[str] = []
    grouped: list[list[Record]] = []
    indices: list[list[int]] = []
    for (user, index), record in zip(owners, encoded.records, strict=True):
        if unit == "example":
            names.append(f"{user}#{index}")
            grouped.append([record])
            indices.append([index])
        elif names and names[-1] == user:
            grouped[-1].append(record)
            indices[-1].append(index)
        else:
            names.append(user)
            grouped.append([record])
            indices.append([index])
    counts = (encoded.num_truncated, encoded.num_without_target)
    return UnitData(tuple(names), tuple(map(tuple, grouped)), *counts, tuple(map(tuple, indices)))
