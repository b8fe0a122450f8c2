"""Training units whose records are read and tokenised when a step draws them, for corpora larger than memory."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.records import Record
from privtrain.data.split import Split
from privtrain.data.units import Drawn, UnitData, example_name


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class UnitsOnDisk(UnitData):
    """The interface of :class:`~.units.UnitData`; only who the units are is in memory.

    How many records are cut or predict nothing is not counted: that would take tokenising them all.
    """

    corpus: Corpus
    split: Split
    encoder: Encoder
    unit: str

    @property
    def num_records(self) -> np.ndarray:
        """See :class:`~.units.UnitData`."""
        if self.unit == "example":
            return np.ones(len(self.names), dtype=np.int64)
        counts = map(len, self.split.training.values())
        return np.fromiter(counts, dtype=np.int64, count=len(self.split.training))

    def fetch(self, drawn: Drawn) -> list[list[Record]]:
        """See :class:`~.units.UnitData`. All texts are tokenised together."""
        places = [self._place(unit, number) for unit, numbers in drawn for number in numbers]
        encoded = iter(self.encoder.encode([self.corpus.records[user][index] for user, index in places]).records)
        return [[next(encoded) for _ in numbers] for _, numbers in drawn]

    def sha256(self) -> str:
        """Digest of all that decides every unit's name, tokens and targets."""
        digest = hashlib.sha256()
        for part in (self.corpus.manifest_sha256, self.encoder.sha256(), self.unit):
            digest.update(part.encode())
        for user, indices in self.split.training.items():
            name = user.encode("utf-8", errors="surrogatepass")
            digest.update(len(name).to_bytes(8, "little") + name + repr(tuple(indices)).encode())
        return digest.hexdigest()

    def _place(self, unit: int, number: int) -> tuple[str, int]:
        """User and index of a unit's record."""
        if isinstance(self.names, ExampleNames):
            return self.names.place(unit)
        user = self.names[unit]
        return user, self.split.training[user][number]


class ExampleNames(Sequence[str]):
    """The name of every training record, made when it is asked for."""

    def __init__(self, split: Split) -> None:
        self._training = split.training
        self._users = tuple(split.training)
        counts = np.fromiter(map(len, split.training.values()), dtype=np.int64, count=len(self._users))
        self._ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, unit: Any) -> Any:
        if isinstance(unit, slice):
            return tuple(self[i] for i in range(*unit.indices(len(self))))
        user, index = self.place(unit)
        return example_name(user, index)

    def place(self, unit: int) -> tuple[str, int]:
        """User and index of the unit's record."""
        if not 0 <= unit < len(self):
            raise IndexError(unit)
        position = bisect.bisect_right(self._ends, unit)
        user = self._users[position]
        first = int(self._ends[position - 1]) if position else 0
        return user, self._training[user][unit - first]


class _OfExamples(Sequence[Any]):
    """A property of every example, found when it is asked for."""

    def __init__(self, names: ExampleNames, of: Callable[[tuple[str, int]], Any]) -> None:
        self._names = names
        self._of = of

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, unit: Any) -> Any:
        if isinstance(unit, slice):
            return tuple(self[i] for i in range(*unit.indices(len(self))))
        return self._of(self._names.place(unit))


def units_on_disk(corpus: Corpus, split: Split, encoder: Encoder, *, unit: str) -> UnitsOnDisk:
    """The training units of a corpus that is read when it is asked for; arguments as of ``build_units``."""
    names, indices, owners = tuple(split.training), tuple(split.training.values()), tuple(split.training)
    if unit == "example":
        names = ExampleNames(split)
        indices, owners = _OfExamples(names, lambda place: (place[1],)), _OfExamples(names, lambda place: place[0])
    return UnitsOnDisk(
        names=names,
        records=(),
        num_truncated=None,
        num_without_target=None,
        indices=indices,
        owners=owners,
        corpus=corpus,
        split=split,
        encoder=encoder,
        unit=unit,
    )
