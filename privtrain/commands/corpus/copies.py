"""How much of a corpus of sampled texts stands in the training data. Private: this looks at the records.

A **copy** is a text that holds so many consecutive tokens of one record (50, as Carlini et al. 2023, arXiv 2202.07646,
and Lee et al. 2022, arXiv 2107.06499, count them). A **near copy** is a text of which most runs of five words stand in
one record. A **run** is a number of consecutive tokens or words; a text of n words has n - 4 runs of five. The records
of held-out users, on whom nothing was trained, are counted the same way: what is copied from them is predictable and
not memorised.

Records stream past an index of the corpus, so that memory follows the corpus and not the training data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

#: Words of a run.
NUM_WORDS = 5
#: A text is a near copy if at least this share of its runs stands in one record.
NEAR_SHARE = 0.8
#: Shorter texts are never near copies.
FEWEST_WORDS = 10

#: Base of the polynomial hash of a run, modulo 2^64: odd, so that multiplying by it loses no bit.
_BASE = np.uint64(0x9E3779B97F4A7C15)
_CONFIDENCE = 0.95

IntArray = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Rate:
    """How many texts are copies, with the exact upper end of the rate.

    Attributes:
        num: texts that are copies (or near copies).
        num_texts: texts that are long enough to be one.
        upper: upper end of the two-sided 95 % interval of Clopper and Pearson for the rate; texts are taken for
            independent draws. None without texts.
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
    """How many texts of a corpus are copies of some records.

    Attributes:
        num_tokens: consecutive tokens of a record in a text that make it a copy.
        copies: texts that are copies, of those that are long enough.
        near_copies: texts that are near copies, of those that are long enough.
        num_records: records that the corpus was compared with.
    """

    num_tokens: int
    copies: Rate
    near_copies: Rate
    num_records: int


class CorpusIndex:
    """Which texts of a corpus hold a run of tokens, or of words, so that records can be looked up one by one.

    Args:
        tokens: token ids of each text.
        texts: the same texts; those of fewer words than ``FEWEST_WORDS`` are never near copies.
        num_tokens: consecutive tokens of a record in a text that make it a copy.
    """

    def __init__(self, tokens: Sequence[Sequence[int]], texts: Sequence[str], num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._tokens = _RunIndex(tokens, num_tokens)
        self._numbers: dict[str, int] = {}  # word → its number, in order of first appearance
        numbered_texts = []
        for text in texts:
            words = text.split()
            if len(words) < FEWEST_WORDS:
                words = []
            numbered_texts.append([self._numbers.setdefault(word, len(self._numbers)) for word in words])
        self._words = _RunIndex(numbered_texts, NUM_WORDS)

    def compare(self, records: Iterable[tuple[Sequence[int], str]]) -> Copies:
        """Return how many texts of the corpus are copies of some records, each record given as (tokens, text)."""
        is_uncopied = np.ones(len(self._tokens.texts_of_runs), dtype=bool)  # entries of the index of tokens
        is_near_copy = np.zeros(len(self._words.num_runs), dtype=bool)  # texts
        num_records = 0
        for tokens, text in records:
            num_records += 1
            # Runs that another record was found to hold need no second look.
            for entries in self._tokens.entries_of(tokens, is_uncopied):
                is_uncopied[entries] = False
            # A word that the corpus lacks has a number that none of its words has.
            numbers = [self._numbers.get(word, len(self._numbers)) for word in text.split()]
            texts_sharing_a_run = [self._words.texts_of_runs[entries] for entries in self._words.entries_of(numbers)]
            if texts_sharing_a_run:
                num_shared_runs = np.bincount(np.concatenate(texts_sharing_a_run), minlength=len(is_near_copy))
                is_near_copy |= (num_shared_runs > 0) & (num_shared_runs >= NEAR_SHARE * self._words.num_runs)
        copied_texts = np.unique(self._tokens.texts_of_runs[~is_uncopied])
        return Copies(
            self._num_tokens,
            Rate.of(len(copied_texts), int((self._tokens.num_runs > 0).sum())),
            Rate.of(int(is_near_copy.sum()), int((self._words.num_runs > 0).sum())),
            num_records,
        )


class _RunIndex:
    """Finds runs in a list of texts, each given as numbers (token ids, or numbers of words).

    The index has one entry for each different run of each text. Entries are sorted by the hash of their run, so that a
    run's entries are found by bisection.

    Args:
        texts: each as numbers.
        size: numbers of a run.

    Attributes:
        texts_of_runs: [entries] int32 number of the text that the entry's run stands in.
        num_runs: [texts] how many different runs each text has.
    """

    def __init__(self, texts: Sequence[Sequence[int]], size: int) -> None:
        self._size = size
        arrays = [np.asarray(text, dtype=np.int64) for text in texts]
        self._numbers = np.concatenate([*arrays, np.empty(0, np.int64)])  # all texts, one after the other
        starts_in_text = [_first_places(array, size) for array in arrays]
        self.num_runs = np.array([len(starts) for starts in starts_in_text], dtype=np.int64)
        text_begins = np.cumsum([0, *map(len, arrays)])  # in _numbers; one more than there are texts
        starts = [first + begin for first, begin in zip(starts_in_text, text_begins.tolist(), strict=False)]
        hashes = [_hashes(array, size)[first] for array, first in zip(arrays, starts_in_text, strict=True)]
        unordered = np.concatenate([*hashes, np.empty(0, np.uint64)])
        order = np.argsort(unordered, kind="stable")
        self._hashes = unordered[order]
        self._starts = np.concatenate([*starts, np.empty(0, np.int64)])[order]  # of each entry's run, in _numbers
        self.texts_of_runs = np.repeat(np.arange(len(arrays), dtype=np.int32), self.num_runs)[order]

    def entries_of(self, text: Sequence[int], is_wanted: npt.NDArray[np.bool_] | None = None) -> Iterator[IntArray]:
        """Yield, for each different run of another text that the index holds, the numbers of the run's entries.

        Args:
            text: as numbers.
            is_wanted: [entries] which entries to look for; all, if it is not given.
        """
        array = np.asarray(text, dtype=np.int64)
        hashes = _hashes(array, self._size)
        begins = np.searchsorted(self._hashes, hashes, side="left")
        ends = np.searchsorted(self._hashes, hashes, side="right")
        if not (begins < ends).any():  # so it is for almost every record: no run is shared
            return
        for first in _first_places(array, self._size).tolist():
            entries = np.arange(int(begins[first]), int(ends[first]))
            if is_wanted is not None:
                entries = entries[is_wanted[entries]]
            # Hashes are equal; compare the runs themselves, which may still differ.
            runs = self._numbers[self._starts[entries][:, None] + np.arange(self._size)]
            is_equal = (runs == array[first : first + self._size]).all(axis=1)
            if is_equal.any():
                yield entries[is_equal]


def _first_places(numbers: IntArray, size: int) -> IntArray:
    """Return the place where each different run of ``size`` numbers begins for the first time, in increasing order."""
    if len(numbers) < size:
        return np.empty(0, np.int64)
    runs = np.lib.stride_tricks.sliding_window_view(numbers, size)
    _, first_places = np.unique(runs, axis=0, return_index=True)
    return np.sort(first_places)


def _hashes(tokens: IntArray, size: int) -> npt.NDArray[np.uint64]:
    """Return [max(0, n - size + 1)] uint64 hash of every run of tokens; equal runs have equal hashes."""
    if len(tokens) < size:
        return np.empty(0, np.uint64)
    powers = np.cumprod(np.full(size, _BASE, dtype=np.uint64), dtype=np.uint64)
    # + 1, so that a token 0 counts too.
    views = np.lib.stride_tricks.sliding_window_view((tokens + 1).astype(np.uint64), size)
    return (views * powers).sum(axis=1, dtype=np.uint64)
