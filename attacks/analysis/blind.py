"""The blind baseline: can held-in and held-out users be told apart without any model?

A membership score on a split that differs by itself (other words, lengths, dates, languages) measures the split. Each
family of features gets a logistic regression at user level, its strength chosen inside each training fold (nested
cross-validation), and is judged on users it never saw. If its interval excludes 1/2 the whole report is confounded.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import scipy.sparse
import scipy.stats

from attacks.analysis import statistics
from attacks.analysis.arrays import BoolArray, FloatArray, IntArray
from attacks.analysis.features import Scored

Matrix = Any  # scipy.sparse.csr_matrix, whose stubs know too little of it

NUM_FOLDS = 5
_NUM_INNER_FOLDS = 3
_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
_MIN_USERS_A_FOLD = 2
_MAX_WORDS = 5000


@dataclasses.dataclass(frozen=True)
class BlindResult:
    """Cross-validated separation of held-in from held-out users by one family of model-free features.

    Attributes:
        auroc: mean over folds, on users held out of the fit.
        interval: of the AUROC, at a confidence level corrected for the number of families.
        num_features: columns of the feature matrix.
    """

    auroc: float
    interval: statistics.Interval
    num_features: int

    @property
    def separates(self) -> bool:
        """Whether the features alone separate the two groups: the whole interval lies above 0.5."""
        return self.interval.lower > 0.5


def blind_baseline(scored: Scored, seed: int) -> dict[str, BlindResult]:
    """Return how well each family of model-free features tells the sides apart; empty with too few users.

    Families are ``length_date_language`` and, where the signals hold token ids, ``bag_of_words``.
    """
    sides = [int(scored.is_held_in.sum()), int((~scored.is_held_in).sum())]
    if min(sides) < _MIN_USERS_A_FOLD * NUM_FOLDS:
        return {}
    families: dict[str, Matrix] = {"length_date_language": _traits(scored)}
    if scored.tokens is not None:
        families["bag_of_words"] = _bag_of_words(scored.tokens)
    # Either family may confound: the correction keeps the chance of a false alarm where one interval has it.
    level = 1.0 - (1.0 - statistics.CONFIDENCE_LEVEL) / len(families)
    return {
        name: cross_validate(features, scored.is_held_in, seed=seed, level=level) for name, features in families.items()
    }


def cross_validate(features: Matrix, is_held_in: BoolArray, *, seed: int, level: float) -> BlindResult:
    """Return how well one family of features separates the sides on users that the fit never saw.

    The AUROC is taken within each fold: scores of different fits are not comparable, and pooling them makes noise
    average below 1/2.

    Args:
        features: [users, columns].
        is_held_in: [users].
        seed: of the folds.
        level: confidence level of the interval.
    """
    from sklearn.model_selection import StratifiedKFold

    areas, variances = [], []
    folds = StratifiedKFold(NUM_FOLDS, shuffle=True, random_state=seed)
    for fitted, judged in folds.split(np.zeros(len(is_held_in)), is_held_in):
        scores = _scores(features, is_held_in, fitted, judged, seed)
        held_in, held_out = scores[is_held_in[judged]], scores[~is_held_in[judged]]
        areas.append(statistics.auroc(held_in, held_out))
        variances.append(_null_variance(held_in, held_out))
    # Fits that share users err together, so 1 / folds alone is too small. Nadeau and Bengio (2003) add the ratio of
    # test to training users, 1 / (folds - 1). Without it noise separates the sides in 6 to 9 % of samples, not in 2.5.
    area = float(np.mean(areas))
    error = float(np.sqrt(np.mean(variances) * (1.0 / NUM_FOLDS + 1.0 / (NUM_FOLDS - 1))))
    half = float(scipy.stats.norm.ppf((1.0 + level) / 2.0)) * error
    ends = statistics.Interval(max(0.0, area - half), min(1.0, area + half))
    return BlindResult(area, ends, int(features.shape[1]))


def _null_variance(held_in: FloatArray, held_out: FloatArray) -> float:
    """Return the variance that the AUROC would have if scores were random: Mann-Whitney's, which ties lower."""
    num = held_in.size + held_out.size
    _, ties = np.unique(np.concatenate([held_in, held_out]), return_counts=True)
    correction = float((ties**3 - ties).sum()) / (num * (num - 1))
    return (num + 1 - correction) / (12.0 * held_in.size * held_out.size)


def _scores(features: Matrix, labels: BoolArray, fitted: IntArray, judged: IntArray, seed: int) -> FloatArray:
    """Fit on some users and return the scores of others; inner folds choose how strongly the fit is regularised.

    Args:
        features: [users, columns].
        labels: [users] whether the user is held in.
        fitted: row numbers of the users to fit on.
        judged: row numbers of the users to score.
        seed: of the inner folds.
    """
    from sklearn.model_selection import StratifiedKFold

    inner = StratifiedKFold(_NUM_INNER_FOLDS, shuffle=True, random_state=seed)
    areas = dict.fromkeys(_STRENGTHS, 0.0)  # sum of AUROCs over the inner folds, by strength
    for train, test in inner.split(fitted, labels[fitted]):
        is_in = labels[fitted[test]]
        for strength in _STRENGTHS:
            scores = _fit_and_score(features, labels, fitted[train], fitted[test], strength)
            areas[strength] += statistics.auroc(scores[is_in], scores[~is_in])
    best = max(areas, key=lambda strength: areas[strength])
    return _fit_and_score(features, labels, fitted, judged, best)


def _fit_and_score(
    features: Matrix, labels: BoolArray, fitted: IntArray, judged: IntArray, strength: float
) -> FloatArray:
    """Fit a logistic regression on some users and return its scores of others.

    Columns are scaled to unit variance over the fitted users; constant columns are dropped by a scale of 0.

    Args:
        features: [users, columns].
        labels: [users] whether the user is held in.
        fitted: row numbers of the users to fit on.
        judged: row numbers of the users to score.
        strength: inverse of the penalty; small values regularise more.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.utils.sparsefuncs import mean_variance_axis

    train = features[fitted]
    moments: Any = mean_variance_axis(train, axis=0)
    _, variances = moments
    spread = np.sqrt(variances)
    scales = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    scale = scipy.sparse.diags(scales)
    # The penalty is per column: as many columns as a vocabulary has need as much more of it.
    model = LogisticRegression(C=strength / features.shape[1], solver="liblinear", random_state=0)
    model.fit(train @ scale, labels[fitted])
    return np.asarray(model.decision_function(features[judged] @ scale), dtype=np.float64)


def _bag_of_words(tokens: Matrix) -> Matrix:
    """Return log counts of the commonest tokens that some but not all users have; each user's row has length 1."""
    num_users = np.asarray((tokens > 0).sum(axis=0)).ravel()
    useful = np.flatnonzero((num_users >= 2) & (num_users < tokens.shape[0]))
    commonest_first = useful[np.argsort(-num_users[useful], kind="stable")]
    chosen = np.sort(commonest_first[:_MAX_WORDS])
    if not chosen.size:
        return scipy.sparse.csr_matrix((tokens.shape[0], 1))
    counts: Matrix = tokens[:, chosen]
    counts = counts.log1p()
    norms = np.sqrt(np.asarray(counts.multiply(counts).sum(axis=1)).ravel())
    scaled = scipy.sparse.diags(1.0 / np.maximum(norms, 1e-12)) @ counts
    return scipy.sparse.csr_matrix(scaled)


def _traits(scored: Scored) -> Matrix:
    """Return [users, columns] of length, compressibility, date and language.

    Sizes stand twice, as they are and as logarithms; a language is a column of zeros and ones.
    """
    columns = []
    for name, values in scored.traits.items():
        filled = np.where(np.isnan(values), np.nanmean(values), values)
        centred = filled - filled.mean()
        columns.append(centred)
        if name != "date":
            columns.append(np.log1p(np.maximum(filled, 0.0)))
    columns += [
        np.array([language == name for language in scored.languages], dtype=np.float64)
        for name in sorted(set(scored.languages))
    ]
    return scipy.sparse.csr_matrix(np.stack(columns, axis=1))
