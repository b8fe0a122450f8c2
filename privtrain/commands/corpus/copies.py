"""How much of a corpus stands in the training data, as its owner counts it. Private: it looks at the records.

A **copy** holds so many consecutive tokens of one record (50, as Carlini et al. 2023, arXiv 2202.07646, and Lee et al.
2022, arXiv 2107.06499, count them). A **near copy** has most of its runs of five words in one record. The records of
held-out users, on whom nobody trained, are counted the same way: what they give is predictable and not memorised.

Records stream past an index of the corpus, so that memory follows the corpus and not the training data.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

#: Words of a run, the share of a text's runs that makes a near copy, and the fewest words of a text that can be one.
NUM_WORDS = 5
NEAR_SHARE = 0.8
FEWEST_WORDS = 10

_BASE = np.uint64(0x9E3779B97F4A7C15)
_CONFIDENCE = 0.95


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
        # A record's windows are looked up by their hashes first, as an array: almost none stands in the corpus.
        self._windows: dict[tuple[int, ...], list[int]] = {}
        for number, ids in enumerate(tokens):
            for start in range(len(ids) - num_tokens + 1):
                self._windows.setdefault(tuple(ids[start : start + num_tokens]), []).append(number)
        hashes = [_hashes(np.asarray(ids, dtype=np.int64), num_tokens) for ids in tokens]
        self._hashes = np.unique(np.concatenate([*hashes, np.empty(0, np.uint64)]))
        self._num_long = sum(len(ids) >= num_tokens for ids in tokens)
        self._words: dict[tuple[str, ...], list[int]] = {}
        self._num_runs: dict[int, int] = {}
        for number, text in enumerate(texts):
            words = text.split()
            if len(words) < FEWEST_WORDS:
                continue
            runs = _runs(words)
            self._num_runs[number] = len(runs)
            for run in runs:
                self._words.setdefault(run, []).append(number)

    def compare(self, records: Iterable[tuple[Sequence[int], str]]) -> Copies:
        """Return how much of the corpus stands in some records, each given as tokens and text."""
        copies: set[int] = set()
        near: set[int] = set()
        num_records = 0
        for tokens, text in records:
            num_records += 1
            copies |= self._copies_in(tokens)
            near |= self._near_in(text)
        return Copies(
            self._num_tokens,
            Rate.of(len(copies), self._num_long),
            Rate.of(len(near), len(self._num_runs)),
            num_records,
        )

    def _copies_in(self, tokens: Sequence[int]) -> set[int]:
        """Return the numbers of corpus texts that share a run of tokens with these."""
        hashes = _hashes(np.asarray(tokens, dtype=np.int64), self._num_tokens)
        numbers: set[int] = set()
        for start in np.flatnonzero(np.isin(hashes, self._hashes)).tolist():  # equal hashes, perhaps other tokens
            numbers.update(self._windows.get(tuple(tokens[start : start + self._num_tokens]), ()))
        return numbers

    def _near_in(self, text: str) -> set[int]:
        """Return the numbers of corpus texts of which ``NEAR_SHARE`` of the word runs stand in this text."""
        shared: collections.Counter[int] = collections.Counter()
        for run in _runs(text.split()):
            shared.update(self._words.get(run, ()))
        return {number for number, count in shared.items() if count >= NEAR_SHARE * self._num_runs[number]}


def _runs(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + NUM_WORDS]) for start in range(len(words) - NUM_WORDS + 1)}


def _hashes(tokens: np.ndarray, size: int) -> np.ndarray:
    """Return [max(0, n - size + 1)] uint64 hash of every run of tokens; equal runs have equal hashes."""
    if len(tokens) < size:
        return np.empty(0, np.uint64)
    powers = np.cumprod(np.full(size, _BASE, dtype=np.uint64), dtype=np.uint64)
    views = np.lib.stride_tricks.sliding_window_view((tokens + 1).astype(np.uint64), size)
    return (views * powers).sum(axis=1, dtype=np.uint64)
