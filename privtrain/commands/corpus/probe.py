"""What a corpus of sampled texts is worth: a classifier trained on it, against the same one trained on real records.

Both are measured on real records of held-out users. Private: this looks at the records, and ε does not cover it. The
classifier reads words; where the sentence model is installed, a second one reads sentence vectors, and the likeness of
corpus and real texts is measured too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from privtrain.commands.corpus import sentences
from privtrain.commands.corpus.balanced import BalancedAccuracy

#: Records that are enough to train and to measure a classifier of words; evenly spaced where there are more.
MOST_RECORDS = 20_000
FEWEST_TESTS = 10

#: Texts of each set (corpus, training records, held-out records) that are turned into vectors.
MOST_SENTENCES = 1_000

Item = TypeVar("Item")

Labelled = Sequence[tuple[str, str]]
"""(text, label) pairs."""


class HeldOutRecord(NamedTuple):
    """A record of a held-out user, with its label."""

    text: str
    label: str
    user: str


@dataclasses.dataclass(frozen=True)
class Utility:
    """Balanced accuracy on held-out users' records.

    Attributes:
        num_tests: records that it was measured on.
        num_users: their users.
        on_corpus: of the classifier trained on the corpus.
        on_records: of the same classifier trained on real records: the yardstick.
    """

    num_tests: int
    num_users: int
    on_corpus: BalancedAccuracy
    on_records: BalancedAccuracy

    @property
    def ratio(self) -> float | None:
        """``on_corpus`` over ``on_records``; None where the yardstick is at chance: a ratio of chances says nothing."""
        return self.on_corpus.value / self.on_records.value if self.on_records.is_above_chance else None


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How alike texts are to held-out users' records, by MAUVE: from 0 to 1 (see :func:`.sentences.mauve`).

    Attributes:
        num_texts: texts of each set that were compared.
        of_corpus: MAUVE of the corpus.
        of_records: MAUVE of as many real training records: about the most that a corpus could have.
    """

    num_texts: int
    of_corpus: float
    of_records: float


def measure(corpus: Labelled, training: Labelled, tests: Sequence[HeldOutRecord]) -> Utility | str:
    """Return the balanced accuracies of a classifier of words, or in words why there are none.

    It is a logistic regression on hashed words and pairs of words: enough to tell whether words and labels go together.

    Args:
        corpus: sampled texts with the labels that they were sampled for.
        training: real records that were trained on.
        tests: real records of held-out users.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False)
    return _measured(corpus, _thinned(training), _thinned(tests), hashed.transform)


def measure_sentences(corpus: Labelled, training: Labelled, tests: Sequence[HeldOutRecord]) -> Utility | str:
    """Return the accuracies as :func:`measure` does, with vectors of the MiniLM sentence model in place of words."""
    if not sentences.is_installed():
        return sentences.MISSING
    corpus, training = (_thinned(pairs, MOST_SENTENCES) for pairs in (corpus, training))
    return _measured(corpus, training, _thinned(tests, MOST_SENTENCES), sentences.embedded)


def measure_likeness(corpus: Sequence[str], training: Iterable[str], tests: Iterable[str]) -> Likeness | str:
    """Return how alike the corpus is to held-out users' records, beside how alike real training records are to them.

    Where this cannot be measured, return in words why.
    """
    if not sentences.is_installed():
        return sentences.MISSING
    sets = [list(corpus), list(training), list(tests)]
    num = min(MOST_SENTENCES, *map(len, sets))
    if num < FEWEST_TESTS:
        return f"one of the sets has {num} texts, too few to compare"
    # Equally many of each, evenly spaced: MAUVE depends on the size of the sets.
    spaced = [[texts[len(texts) * k // num] for k in range(num)] for texts in sets]
    of_corpus, of_training, of_tests = (sentences.embedded(texts) for texts in spaced)
    return Likeness(num, sentences.mauve(of_corpus, of_tests), sentences.mauve(of_training, of_tests))


def _measured(corpus: Labelled, training: Labelled, tests: Sequence[HeldOutRecord], features: Any) -> Utility | str:
    """Return balanced accuracies on the tests, or in words which of the three sets has too few labelled texts.

    ``features`` turns a list of texts into the matrix [texts, features] that the classifier reads.
    """
    for name, labels, fewest in (
        ("the corpus", [label for _, label in corpus], 2),
        ("held-in users' records", [label for _, label in training], 2),
        ("held-out users' records", [test.label for test in tests], FEWEST_TESTS),
    ):
        num_labels = len(set(labels))
        if len(labels) < fewest or num_labels < 2:
            return f"{name} hold {len(labels)} labelled texts of {num_labels} labels, too few to compare"
    test_features = features([test.text for test in tests])
    return Utility(
        len(tests),
        len({test.user for test in tests}),
        _balanced(_predicted(corpus, test_features, features), tests),
        _balanced(_predicted(training, test_features, features), tests),
    )


def _balanced(predicted: Sequence[str], tests: Sequence[HeldOutRecord]) -> BalancedAccuracy:
    """Return the balanced accuracy of the labels that a classifier names for the tests."""
    is_right = [label == test.label for label, test in zip(predicted, tests, strict=True)]
    return BalancedAccuracy.of(is_right, [test.label for test in tests], [test.user for test in tests])


def _predicted(training: Labelled, test_features: Any, features: Any) -> list[str]:
    """Train a logistic regression on labelled texts and return the label that it names for each test."""
    from sklearn.linear_model import LogisticRegression

    training_features = features([text for text, _ in training])
    # Features that no training text has would get weights of zero, in arrays that cost most of the time.
    used = np.union1d(training_features.nonzero()[1], [0])  # at least one column, even where no text has a word
    probe = LogisticRegression(max_iter=1000, C=10.0)
    probe.fit(training_features[:, used], [label for _, label in training])
    return [str(label) for label in probe.predict(test_features[:, used])]


def _thinned(items: Sequence[Item], most: int = MOST_RECORDS) -> Sequence[Item]:
    """Return at most ``most`` of the items, evenly spaced."""
    stride = max(1, math.ceil(len(items) / most))
    return items[::stride]
