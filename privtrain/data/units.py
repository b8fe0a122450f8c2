"""From a split to privacy units: tokenised records, each owned by exactly one unit.

A unit is what is sampled and clipped: a user with all training records, or a single record (``example``).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.records import Record
from privtrain.data.selection import Selection
from privtrain.data.split import Split

#: What a step draws: (number of a unit, numbers of those of its records that are wanted) for each unit.
Drawn = Sequence[tuple[int, Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class UnitData:
    """The training units, in a fixed order that every rank shares.

    Attributes:
        names: name of each unit: the user's id, or ``user#record`` where the unit is the example. Private.
        records: per unit, its tokenised records; empty where they are not in memory: use :meth:`fetch`.
        num_truncated: how many records were cut at ``max_length``; None: not counted. Private.
        num_without_target: how many records predict nothing and so contribute zero; None: not counted. Private.
        indices: per unit, the indices (among its owner's records in the corpus) of the records that it holds, or holds
            pieces of. Private.
        owners: per unit, the user whose records they are; all units of a user stand together. Private.
    """

    names: Sequence[str]
    records: tuple[tuple[Record, ...], ...]
    num_truncated: int | None
    num_without_target: int | None = 0
    indices: Sequence[Sequence[int]] = ()
    owners: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def num_records(self) -> np.ndarray:
        """[units] number of records."""
        return np.fromiter(map(len, self.records), dtype=np.int64, count=len(self.records))

    def fetch(self, drawn: Drawn) -> list[list[Record]]:
        """Return the tokenised records that are wanted, a list for each unit."""
        return [[self.records[unit][number] for number in numbers] for unit, numbers in drawn]

    def sha256(self) -> str:
        """Return a digest of every unit's name, tokens and targets, each part preceded by its length."""
        digest = hashlib.sha256()
        for name, records in zip(self.names, self.records, strict=True):
            parts = [name.encode("utf-8", errors="surrogatepass")]
            for record in records:
                parts += [record.tokens.tobytes(), record.is_target.tobytes()]
            for part in parts:
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def example_name(user: str, index: int) -> str:
    """Return the unit's name where the unit is the example."""
    return f"{user}#{index}"


def build_units(corpus: Corpus, split: Split, encoder: Encoder, *, unit: str, cut: Selection | None = None) -> UnitData:
    """Tokenise the training records of ``split`` and group them by privacy unit.

    Args:
        corpus: the kept records.
        split: which of them are trained on.
        encoder: turns a record into tokens.
        unit: ``"user"`` groups a user's records; ``"example"`` makes each record a unit.
        cut: the run's selection. If its strategy is ``random_chunk``, each user's texts are joined and cut into pieces,
            of which at most ``cut.max_records`` are kept. Otherwise each record is tokenised by itself.
    """
    if cut is not None and cut.strategy == "random_chunk":
        pieces = [piece for user in split.training for piece in _pieces_of(user, corpus, split, encoder, cut)]
        return _grouped(pieces, unit)
    places = [(user, index) for user, indices in split.training.items() for index in indices]
    encoded = encoder.encode([corpus.records[user][index] for user, index in places])
    pieces = []
    for (user, index), record in zip(places, encoded.records, strict=True):
        pieces.append(_Piece(user, index, record, (index,)))
    return dataclasses.replace(
        _grouped(pieces, unit), num_truncated=encoded.num_truncated, num_without_target=encoded.num_without_target
    )


@dataclasses.dataclass(frozen=True)
class _Piece:
    """A tokenised record, or a chunk of a user's joined texts.

    Attributes:
        owner: the user.
        number: number of the piece among the user's: of a record its index, of a chunk its place in what is kept.
        record: the piece as tokens.
        indices: indices of the user's records that the piece holds text of.
    """

    owner: str
    number: int
    record: Record
    indices: tuple[int, ...]


def _pieces_of(user: str, corpus: Corpus, split: Split, encoder: Encoder, cut: Selection) -> list[_Piece]:
    """Return a user's chunks, at most ``cut.max_records`` of them drawn at random."""
    indices = split.training[user]
    chunks = encoder.chunks([corpus.records[user][index] for index in indices])
    if cut.max_records is not None:
        chosen = cut.key.stream("chunks", user).choose(len(chunks), cut.max_records)
        chunks = [chunks[number] for number in chosen]
    pieces = []
    for number, (record, places) in enumerate(chunks):
        indices_inside = tuple(indices[place] for place in places)  # of texts given to the encoder → of the user's
        pieces.append(_Piece(user, number, record, indices_inside))
    return pieces


def _grouped(pieces: Sequence[_Piece], unit: str) -> UnitData:
    """Make units of pieces: one for each user (``unit`` is ``"user"``), or one for each piece.

    Args:
        pieces: all pieces; those of a user stand next to each other.
        unit: ``"user"`` or ``"example"``.
    """
    # One item for each unit in all four lists.
    names: list[str] = []
    owners: list[str] = []
    records: list[list[Record]] = []
    indices: list[set[int]] = []
    for piece in pieces:
        if unit == "user" and owners and owners[-1] == piece.owner:
            records[-1].append(piece.record)
            indices[-1].update(piece.indices)
            continue
        names.append(piece.owner if unit == "user" else example_name(piece.owner, piece.number))
        owners.append(piece.owner)
        records.append([piece.record])
        indices.append(set(piece.indices))
    return UnitData(
        names=tuple(names),
        records=tuple(map(tuple, records)),
        num_truncated=0,
        indices=tuple(tuple(sorted(of_unit)) for of_unit in indices),
        owners=tuple(owners),
    )
