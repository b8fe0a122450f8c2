"""Statistics of an attack's scores: pure numpy and scipy, higher score = more member-like, known answers in the tests.

Every function takes one score per *user* on each side. Scores of documents are not independent within a user, so
intervals over documents would be too narrow.
"""

from attacks.analysis.statistics.bootstrap import (
    NUM_RESAMPLES,
    bootstrap_interval,
    bounded_mean_interval,
    mean_exposure_interval,
)
from attacks.analysis.statistics.bounds import Bound, CurveBound, DpBound, auroc_cap, tpr_cap
from attacks.analysis.statistics.delong import PairedDifference, delong_interval, paired_difference
from attacks.analysis.statistics.interval import CONFIDENCE_LEVEL, Interval, clopper_pearson, perfect_separation
from attacks.analysis.statistics.mann_whitney import Placements, auroc, delong_variance
from attacks.analysis.statistics.multiplicity import false_discovery_rate, fewest_discoveries, holm, rank_p_values
from attacks.analysis.statistics.permutation import auroc_p_value
from attacks.analysis.statistics.roc import OperatingPoint, rate_interval, roc_points, tpr_at_fpr

__all__ = [
    "CONFIDENCE_LEVEL",
    "NUM_RESAMPLES",
    "Bound",
    "CurveBound",
    "DpBound",
    "Interval",
    "OperatingPoint",
    "PairedDifference",
    "Placements",
    "auroc",
    "auroc_cap",
    "auroc_p_value",
    "bootstrap_interval",
    "bounded_mean_interval",
    "clopper_pearson",
    "delong_interval",
    "delong_variance",
    "false_discovery_rate",
    "fewest_discoveries",
    "holm",
    "mean_exposure_interval",
    "paired_difference",
    "perfect_separation",
    "rank_p_values",
    "rate_interval",
    "roc_points",
    "tpr_at_fpr",
    "tpr_cap",
]
