"""From a split to privacy units: tokenised records, each owned by exactly one unit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.records import Record
from privtrain.data.selection import Selection
from privtrain.data.split import Split


@dataclasses.dataclass(frozen=True)
class UnitData:
    """The training units, in a fixed order that every rank shares.

    Attributes:
        names: unit identifiers: user ids, or ``user#record`` where the unit is the example. Private.
        records: per unit, its tokenised records.
        num_truncated: records cut at ``max_length``. Private.
        num_without_target: records that predict nothing and so contribute zero. Private.
        owners: per unit, the user whose records they are. Private.
    """

    names: tuple[str, ...]
    records: tuple[tuple[Record, ...], ...]
    num_truncated: int
    num_without_target: int = 0
    owners: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def sha256(self) -> str:
        """Digest of every unit's name, tokens and targets."""
        digest = hashlib.sha256()
        for name, records in zip(self.names, self.records, strict=True):
            arrays = [array.tobytes() for record in records for array in (record.tokens, record.is_target)]
            for part in (name.encode("utf-8", errors="surrogatepass"), *arrays):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def example_name(user: str, index: int) -> str:
    """The unit's name where the unit is the example."""
    return f"{user}#{index}"


def build_units(corpus: Corpus, split: Split, encoder: Encoder, *, unit: str, cut: Selection | None = None) -> UnitData:
    """Tokenise the training records of ``split`` and group them by privacy unit.

    Args:
        corpus: the kept records.
        split: which of them are trained on.
        encoder: turns a record into tokens.
        unit: ``"user"`` groups a user's records; ``"example"`` makes each record a unit.
        cut: the run's selection, for ``random_chunk``: a user's texts are cut into pieces, and where the unit is the
            example at most k of them are kept. Without it, or for any other strategy, records are as they come.
    """
    if cut is not None and cut.strategy == "random_chunk":
        chunks = {
            user: _chunks_of(user, [corpus.records[user][i] for i in indices], encoder, cut)
            for user, indices in split.training.items()
        }
        return _grouped([(u, i, c) for u, found in chunks.items() for i, c in enumerate(found)], unit, 0, 0)
    owners = [(user, index) for user, indices in split.training.items() for index in indices]
    encoded = encoder.encode([corpus.records[u][i] for u, i in owners])
    owned = [(user, index, record) for (user, index), record in zip(owners, encoded.records, strict=True)]
    return _grouped(owned, unit, encoded.num_truncated, encoded.num_without_target)


def _chunks_of(user: str, texts: Sequence[str], encoder: Encoder, cut: Selection) -> list[Record]:
    chunks = encoder.chunks(texts)
    if cut.max_records is None:
        return chunks
    return [chunks[i] for i in cut.key.stream("chunks", user).choose(len(chunks), cut.max_records)]


def _grouped(
    owned: Sequence[tuple[str, int, Record]], unit: str, num_truncated: int, num_without_target: int
) -> UnitData:
    """Units from (user, index, record), the records of a user next to each other."""
    names: list[str] = []
    owners: list[str] = []
    grouped: list[list[Record]] = []
    for user, index, record in owned:
        if unit == "user" and owners and owners[-1] == user:
            grouped[-1].append(record)
            continue
        names.append(user if unit == "user" else example_name(user, index))
        owners.append(user)
        grouped.append([record])
    return UnitData(tuple(names), tuple(map(tuple, grouped)), num_truncated, num_without_target, tuple(owners))
