"""How much of a corpus stands in the training data, as its owner counts it. Private: it looks at the records.

A **copy** holds so many consecutive tokens of one record (50, as Carlini et al. 2023, arXiv 2202.07646, and Lee et al.
2022, arXiv 2107.06499, count them). A **near copy** has most of its runs of five words in one record. The records of
held-out users, on whom nobody trained, are counted the same way: what they give is predictable and not memorised.

Records stream past an index of the corpus, so that memory follows the corpus and not the training data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

#: Words of a run, the share of a text's runs that makes a near copy, and the fewest words of a text that can be one.
NUM_WORDS = 5
NEAR_SHARE = 0.8
FEWEST_WORDS = 10

_BASE = np.uint64(0x9E3779B97F4A7C15)
_CONFIDENCE = 0.95

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Rate:
    """A count with its exact interval.

    Attributes:
        num: texts of the kind.
        num_texts: texts that could have been.
        upper: upper end of the two-sided 95 % interval of Clopper and Pearson; texts are taken for independent draws.
    """

    num: int
    num_texts: int
    upper: float | None

    @classmethod
    def of(cls, num: int, num_texts: int) -> Rate:
        """Return the rate of a count; without texts nothing is known."""
        from scipy.stats import binomtest

        if num_texts == 0:
            return cls(num, 0, None)
        return cls(num, num_texts, float(binomtest(num, num_texts).proportion_ci(_CONFIDENCE, method="exact").high))


@dataclasses.dataclass(frozen=True)
class Copies:
    """What was found.

    Attributes:
        num_tokens: consecutive tokens that make a copy.
        copies: texts that hold a copy, of those that are long enough.
        near_copies: the same for near copies.
        num_records: records that the corpus was compared with.
    """

    num_tokens: int
    copies: Rate
    near_copies: Rate
    num_records: int


class CorpusIndex:
    """Which texts of a corpus hold a run of tokens, or of words, so that records can be looked up one by one.

    Args:
        tokens: of each text.
        texts: the same texts; those of fewer words than ``FEWEST_WORDS`` are in no near copy.
        num_tokens: consecutive tokens that make a copy.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], texts: Sequence[str], num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tokens = _RunIndex(tokens, num_tokens)
        words = [text.split() for text in texts]
        self._numbers: dict[str, int] = {}
        numbered = [
            [self._numbers.setdefault(word, len(self._numbers)) for word in found] if len(found) >= FEWEST_WORDS else []
            for found in words
        ]
        self._words = _RunIndex(numbered, NUM_WORDS)

    def compare(self, records: Iterable[tuple[Sequence[int], str]]) -> Copies:
        """Return how much of the corpus stands in some records, each given as tokens and text."""
        is_new = np.ones(len(self._tokens.owners), dtype=bool)
        is_near = np.zeros(len(self._words.num_runs), dtype=bool)
        num_records = 0
        for tokens, text in records:
            num_records += 1
            for places in self._tokens.places_of(tokens, is_new):
                is_new[places] = False
            # A word that the corpus lacks has a number that none of its words has.
            numbers = [self._numbers.get(word, len(self._numbers)) for word in text.split()]
            shared = [self._words.owners[places] for places in self._words.places_of(numbers)]
            if shared:
                counts = np.bincount(np.concatenate(shared), minlength=len(is_near))
                is_near |= (counts > 0) & (counts >= NEAR_SHARE * self._words.num_runs)
        return Copies(
            self._num_tokens,
            Rate.of(len(np.unique(self._tokens.owners[~is_new])), int((self._tokens.num_runs > 0).sum())),
            Rate.of(int(is_near.sum()), int((self._words.num_runs > 0).sum())),
            num_records,
        )


class _RunIndex:
    """Where each run of so many numbers stands in a list of texts, each given as numbers.

    Attributes:
        owners: [runs] int32 text of each, runs in the order of their hashes; a run that a text repeats is there once.
        num_runs: [texts] different runs of each.
    """

    def __init__(self, texts: Sequence[Sequence[int]], size: int) -> None:
        self._size = size
        arrays = [np.asarray(text, dtype=np.int64) for text in texts]
        self._numbers = np.concatenate([*arrays, np.empty(0, np.int64)])
        firsts = [_first_places(array, size) for array in arrays]
        self.num_runs = np.array([len(places) for places in firsts], dtype=np.int64)
        begins = np.cumsum([0, *map(len, arrays)])
        starts = [first + begin for first, begin in zip(firsts, begins.tolist(), strict=False)]
        hashes = [_hashes(array, size)[first] for array, first in zip(arrays, firsts, strict=True)]
        unordered = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = np.argsort(unordered, kind="stable")
        self._hashes = unordered[order]
        self._starts = np.concatenate([*starts, np.empty(0, np.int64)])[order]
        self.owners = np.repeat(np.arange(len(arrays), dtype=np.int32), self.num_runs)[order]

    def places_of(self, text: Sequence[int], is_wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[IntArray]:
        """Yield, for each different run of a text that stands in the index, its places there.

        Args:
            text: as numbers.
            is_wanted: [runs] places that are asked for; all, if it is not given.
        """
        array = np.asarray(text, dtype=np.int64)
        hashes = _hashes(array, self._size)
        begins = np.searchsorted(self._hashes, hashes, side="left")
        ends = np.searchsorted(self._hashes, hashes, side="right")
        if not (begins < ends).any():  # almost every record
            return
        for first in _first_places(array, self._size).tolist():
            places = np.arange(int(begins[first]), int(ends[first]))
            if is_wanted is not None:
                places = places[is_wanted[places]]
            # Equal hashes, perhaps of other numbers.
            there = self._numbers[self._starts[places][:, None] + np.arange(self._size)]
            if len(equal := places[(there == array[first : first + self._size]).all(axis=1)]):
                yield equal


def _first_places(numbers: IntArray, size: int) -> IntArray:
    """Return where each different run begins first, in order."""
    if len(numbers) < size:
        return np.empty(0, np.int64)
    runs = np.lib.stride_tricks.sliding_window_view(numbers, size)
    return np.sort(np.unique(runs, axis=0, return_index=True)[1])


def _hashes(tokens: IntArray, size: int) -> npt.NDArray[np.uint64]:
    """Return [max(0, n - size + 1)] uint64 hash of every run of tokens; equal runs have equal hashes."""
    if len(tokens) < size:
        return np.empty(0, np.uint64)
    powers = np.cumprod(np.full(size, _BASE, dtype=np.uint64), dtype=np.uint64)
    views = np.lib.stride_tricks.sliding_window_view((tokens + 1).astype(np.uint64), size)
    return (views * powers).sum(axis=1, dtype=np.uint64)
