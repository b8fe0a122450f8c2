"""What a corpus of sampled texts is worth: a classifier trained on it, against the same one trained on real records.

Both are measured on real records of held-out users. Private: this looks at the records, and ε does not cover it. The
classifier reads words; where the sentence model is installed, a second one reads sentence vectors, and the likeness of
corpus and real texts is measured too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from privtrain.commands.corpus import sentences

#: Records that are enough to train and to measure a classifier of words; evenly spaced where there are more.
MOST_RECORDS = 20_000
FEWEST_TESTS = 10

#: Texts of each set (corpus, training records, held-out records) that are turned into vectors.
MOST_SENTENCES = 1_000

Labelled = Sequence[tuple[str, str]]
"""(text, label) pairs."""


@dataclasses.dataclass(frozen=True)
class Utility:
    """Accuracy on held-out users' records.

    Attributes:
        num_tests: records that it was measured on.
        on_corpus: accuracy of the classifier trained on the corpus.
        on_records: accuracy of the same classifier trained on real records.
        most_frequent: accuracy of always naming the label that is the most frequent among real training records.
    """

    num_tests: int
    on_corpus: float
    on_records: float
    most_frequent: float


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


def measure(corpus: Labelled, training: Labelled, tests: Labelled) -> Utility | str:
    """Return the accuracies of a classifier of words, or in words why there are none.

    It is a logistic regression on hashed words and pairs of words: enough to tell whether words and labels go together.

    Args:
        corpus: sampled texts with the labels that they were sampled for.
        training: real records that were trained on.
        tests: real records of held-out users.
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


def _measured(corpus: Labelled, training: Labelled, tests: Labelled, features: Any) -> Utility | str:
    """Return accuracies on the tests, or in words which of the three sets has too few labelled texts.

    ``features`` turns a list of texts into the matrix [texts, features] that the classifier reads.
    """
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
    training_labels = [label for _, label in training]
    frequent = max(sorted(set(training_labels)), key=training_labels.count)  # sorted: ties go to the first by name
    return Utility(
        len(tests),
        _accuracy(corpus, test_features, test_labels, features),
        _accuracy(training, test_features, test_labels, features),
        sum(label == frequent for label in test_labels) / len(tests),
    )


def _accuracy(training: Labelled, test_features: Any, test_labels: Sequence[str], features: Any) -> float:
    """Train a logistic regression on labelled texts and return the share of tests whose label it names."""
    from sklearn.linear_model import LogisticRegression

    training_features = features([text for text, _ in training])
    # Features that no training text has would get weights of zero, in arrays that cost most of the time.
    used = np.union1d(training_features.nonzero()[1], [0])  # at least one column, even where no text has a word
    probe = LogisticRegression(max_iter=1000, C=10.0)
    probe.fit(training_features[:, used], [label for _, label in training])
    return float(probe.score(test_features[:, used], test_labels))


def _thinned(pairs: Labelled, most: int = MOST_RECORDS) -> Labelled:
    """Return at most ``most`` of the pairs, evenly spaced."""
    stride = max(1, math.ceil(len(pairs) / most))
    return pairs[::stride]
