"""User ids, and record indices by user, in flat arrays: tens of bytes a user where a dictionary takes hundreds.

All parts stand one after another in one array, and a second array holds where each part ends: part i goes from
``ends[i - 1]`` (0 for the first) to ``ends[i]``, exclusive.
"""

from __future__ import annotations

import abc
import array
import bisect
from collections.abc import Callable, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from typing import Any, TypeVar

import numpy as np
from typing_extensions import override

V = TypeVar("V")

#: How users and texts become UTF-8: JSON may hold halves of surrogate pairs, which sort as in Python.
ERRORS = "surrogatepass"


class Names(Sequence[str]):
    """Distinct ids in the order in which they were added.

    Ids nearly always come sorted, and then take no dictionary: they are found by bisection. From the first that comes
    out of order on, ids are also kept in a dictionary.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes = bytearray()  # all ids as UTF-8
        self._ends = array.array("q")
        self._num_sorted = 0  # how many ids from the first on are sorted
        self._unsorted: dict[bytes, int] = {}  # the other ids → their place
        self._newest = b""
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Append an id that was not added before."""
        encoded = name.encode("utf-8", errors=ERRORS)
        is_first = not self._ends
        if not self._unsorted and (is_first or encoded > self._newest):
            self._num_sorted += 1
        else:
            self._unsorted[encoded] = len(self._ends)
        self._newest = encoded
        self._bytes += encoded
        self._ends.append(len(self._bytes))

    def place(self, name: str) -> int | None:
        """Return the place of an id, from 0 in the order of adding; ``None`` if it was not added."""
        wanted = name.encode("utf-8", errors=ERRORS)
        if wanted in self._unsorted:
            return self._unsorted[wanted]
        position = bisect.bisect_left(range(self._num_sorted), wanted, key=self._encoded)
        is_found = position < self._num_sorted and self._encoded(position) == wanted
        return position if is_found else None

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        return self._encoded(range(len(self))[index]).decode("utf-8", errors=ERRORS)

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends:
            yield self._bytes[start:end].decode("utf-8", errors=ERRORS)
            start = end

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.place(name) is not None

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Names):
            return self._ends == other._ends and self._bytes == other._bytes
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    def _encoded(self, place: int) -> bytes:
        """Return the id at a place, as UTF-8."""
        start = self._ends[place - 1] if place else 0
        return bytes(self._bytes[start : self._ends[place]])


class OrderedMapping(Mapping[str, V]):
    """A mapping whose items and values come in stored order, without a look-up by key for each."""

    @abc.abstractmethod
    def in_order(self) -> Iterator[tuple[str, V]]:
        """Yield every key with its value."""

    @override
    def items(self) -> ItemsView[str, V]:
        return _Items(self)

    @override
    def values(self) -> ValuesView[V]:
        return _Values(self)


class _Items(ItemsView[str, V]):
    """Items in stored order; the inherited iteration would look up every key."""

    _mapping: OrderedMapping[V]

    @override
    def __iter__(self) -> Iterator[tuple[str, V]]:
        return self._mapping.in_order()


class _Values(ValuesView[V]):
    """Values in stored order; the inherited iteration would look up every key."""

    _mapping: OrderedMapping[V]

    @override
    def __iter__(self) -> Iterator[V]:
        return (value for _, value in self._mapping.in_order())


class UserIndices(OrderedMapping[tuple[int, ...]]):
    """User → indices of some of that user's records; users in the order in which they were added."""

    def __init__(self, pairs: Iterable[tuple[str, Sequence[int]]] = ()) -> None:
        self.names = Names()
        self._indices = array.array("q")
        self._ends = array.array("q")
        for user, indices in pairs:
            self.add(user, indices)

    @classmethod
    def of(cls, mapping: Mapping[str, Sequence[int]]) -> UserIndices:
        """Return a mapping as this type; itself if it is of it already."""
        return mapping if isinstance(mapping, cls) else cls(mapping.items())

    def add(self, user: str, indices: Sequence[int]) -> None:
        """Append a user who was not added before."""
        self.names.add(user)
        self._indices.extend(indices)
        self._ends.append(len(self._indices))

    def at(self, place: int) -> tuple[int, ...]:
        """Return the record indices of the user at ``place``, from 0 in the order of adding."""
        start = self._ends[place - 1] if place else 0
        return tuple(self._indices[start : self._ends[place]])

    def counts(self) -> np.ndarray:
        """Return [users] number of indices of each."""
        return np.diff(np.array(self._ends, dtype=np.int64), prepend=0)

    def owner(self, entry: int) -> tuple[int, int]:
        """Return (place of the user, record index) of an entry, from 0 over the indices of all users in order."""
        if not 0 <= entry < len(self._indices):
            raise IndexError(entry)
        place = bisect.bisect_right(self._ends, entry)  # users before it end at or before the entry
        return place, self._indices[entry]

    @property
    def num_indices(self) -> int:
        """Indices of all users together."""
        return len(self._indices)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, user: str) -> tuple[int, ...]:
        place = self.names.place(user)
        if place is None:
            raise KeyError("no such user")  # an id is in no message
        return self.at(place)

    def __contains__(self, user: object) -> bool:
        return user in self.names

    @override
    def in_order(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        start = 0
        for user, end in zip(self.names, self._ends, strict=True):
            yield user, tuple(self._indices[start:end])
            start = end


class LazySequence(Sequence[Any]):
    """A sequence whose items are computed on access: item i is ``of(i)``."""

    def __init__(self, length: int, of: Callable[[int], Any]) -> None:
        self._length = length
        self._of = of

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        places = range(self._length)[index]
        return tuple(map(self._of, places)) if isinstance(places, range) else self._of(places)

    def __iter__(self) -> Iterator[Any]:
        return map(self._of, range(self._length))
