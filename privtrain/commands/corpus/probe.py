"""What a corpus is worth: a classifier trained on it, against the same one trained on the real records.

Both are measured on real records of held-out users. Private: it looks at the records, and ε does not cover it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

#: Records that are enough to train and to measure a classifier of words; evenly spaced where there are more.
MOST_RECORDS = 20_000
FEWEST_TESTS = 10

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


def measure(corpus: Labelled, training: Labelled, tests: Labelled) -> Utility | str:
    """Return the accuracies, or why there are none.

    Hashed words and pairs of words into a logistic regression: enough to tell whether labels and words go together.
    """
    training, tests = _thinned(training), _thinned(tests)
    for name, pairs, fewest in (
        ("the corpus", corpus, 2),
        ("held-in users' records", training, 2),
        ("held-out users' records", tests, FEWEST_TESTS),
    ):
        labels = {label for _, label in pairs}
        if len(pairs) < fewest or len(labels) < 2:
            return f"{name} hold {len(pairs)} labelled texts of {len(labels)} labels, too few to compare"
    frequent = max(sorted({label for _, label in training}), key=[label for _, label in training].count)
    return Utility(
        len(tests),
        _accuracy(corpus, tests),
        _accuracy(training, tests),
        sum(label == frequent for _, label in tests) / len(tests),
    )


def _accuracy(training: Labelled, tests: Labelled) -> float:
    from sklearn.feature_extraction.text import HashingVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    probe = make_pipeline(
        HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False),
        LogisticRegression(max_iter=1000, C=10.0),
    )
    probe.fit([text for text, _ in training], [label for _, label in training])
    return float(probe.score([text for text, _ in tests], [label for _, label in tests]))


def _thinned(pairs: Labelled) -> Labelled:
    return pairs[:: max(1, -(-len(pairs) // MOST_RECORDS))]
