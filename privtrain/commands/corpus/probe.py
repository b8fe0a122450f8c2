"""What a corpus is worth: a classifier trained on it, against the same one trained on the real records.

Both are measured on real records of held-out users. Private: it looks at the records, and ε does not cover it. Of words
always; of sentence vectors too, and with how alike both sets of texts are, where the sentence model is installed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from privtrain.commands.corpus import sentences

#: Records that are enough to train and to measure a classifier of words; evenly spaced where there are more.
MOST_RECORDS = 20_000
FEWEST_TESTS = 10

#: Texts of each side that are turned into vectors.
MOST_SENTENCES = 1_000

Labelled = Sequence[tuple[str, str]]
"""(text, label) pairs."""


@dataclasses.dataclass(frozen=True)
class Utility:
    """Accuracy on held-out users' records.

    Attributes:
        num_tests: records that it was measured on.
        on_corpus: of the classifier trained on the corpus.
        on_records: of the one trained on real records.
        most_frequent: of always naming the label that is the most frequent among real training records.
    """

    num_tests: int
    on_corpus: float
    on_records: float
    most_frequent: float


@dataclasses.dataclass(frozen=True)
class Likeness:
    """MAUVE of texts against held-out users' records.

    Attributes:
        num_texts: of each side.
        of_corpus: of the corpus.
        of_records: of as many real training records: about the most that a corpus could have.
    """

    num_texts: int
    of_corpus: float
    of_records: float


def measure(corpus: Labelled, training: Labelled, tests: Labelled) -> Utility | str:
    """Return the accuracies, or why there are none.

    Hashed words and pairs of words into a logistic regression: enough to tell whether labels and words go together.
    """
    from sklearn.feature_extraction.text import HashingVectorizer

    hashed = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False)
    return _measured(corpus, _thinned(training), _thinned(tests), hashed.transform)


def measure_sentences(corpus: Labelled, training: Labelled, tests: Labelled) -> Utility | str:
    """Return the accuracies as :func:`measure` does, with vectors of the MiniLM sentence model in place of words."""
    if not sentences.is_installed():
        return sentences.MISSING
    corpus, training, tests = (_thinned(pairs, MOST_SENTENCES) for pairs in (corpus, training, tests))
    return _measured(corpus, training, tests, sentences.embedded)


def measure_likeness(corpus: Sequence[str], training: Iterable[str], tests: Iterable[str]) -> Likeness | str:
    """Return how alike the corpus is to held-out users' records, beside how alike real training records are."""
    if not sentences.is_installed():
        return sentences.MISSING
    sides = [list(corpus), list(training), list(tests)]
    num = min(MOST_SENTENCES, *map(len, sides))
    if num < FEWEST_TESTS:
        return f"one of the sets has {num} texts, too few to compare"
    one, real, held_out = (sentences.embedded([side[len(side) * k // num] for k in range(num)]) for side in sides)
    return Likeness(num, sentences.mauve(one, held_out), sentences.mauve(real, held_out))


def _measured(corpus: Labelled, training: Labelled, tests: Labelled, features: Any) -> Utility | str:
    """Return accuracies on the tests, or in words which side has too few labelled texts."""
    for name, pairs, fewest in (
        ("the corpus", corpus, 2),
        ("held-in users' records", training, 2),
        ("held-out users' records", tests, FEWEST_TESTS),
    ):
        labels = {label for _, label in pairs}
        if len(pairs) < fewest or len(labels) < 2:
            return f"{name} hold {len(pairs)} labelled texts of {len(labels)} labels, too few to compare"
    test_features = features([text for text, _ in tests])
    test_labels = [label for _, label in tests]
    frequent = max(sorted({label for _, label in training}), key=[label for _, label in training].count)
    return Utility(
        len(tests),
        _accuracy(corpus, test_features, test_labels, features),
        _accuracy(training, test_features, test_labels, features),
        sum(label == frequent for label in test_labels) / len(tests),
    )


def _accuracy(training: Labelled, test_features: Any, test_labels: Sequence[str], features: Any) -> float:
    from sklearn.linear_model import LogisticRegression

    training_features = features([text for text, _ in training])
    # What no training text has would have weights of zero, in arrays that cost most of the time.
    used = np.union1d(training_features.nonzero()[1], [0])  # one column even where no text has a word
    probe = LogisticRegression(max_iter=1000, C=10.0)
    probe.fit(training_features[:, used], [label for _, label in training])
    return float(probe.score(test_features[:, used], test_labels))


def _thinned(pairs: Labelled, most: int = MOST_RECORDS) -> Labelled:
    return pairs[:: max(1, -(-len(pairs) // most))]
