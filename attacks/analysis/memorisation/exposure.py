"""Exposure (Carlini et al. 2019, arXiv 1802.08232): how far a planted secret climbed among secrets like it.

A canary of log-likelihood s has rank r = 1 + #{references at least as likely}: on a tie the reference ranks first, so
an exposure is never overstated. Its exposure is log2 N - log2 r, with N = references + 1. Had it not been trained on,
its rank would be uniform on 1..N (ties broken by coin), because its secret and the references are draws of one law; so
held-out canaries have a mean exposure known beforehand, about 1.44 bits, and are the control.

The largest exposure that N secrets can show is log2 N. Beyond it a skew-normal law is fitted to the references by
moments and its tail is used, where a Kolmogorov-Smirnov test does not refuse the fit: half of the references fit, the
other half judge, since a test on the fitted half would nearly always agree.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

import numpy as np
import scipy.stats

from attacks.analysis.arrays import FloatArray

MAX_BITS = 50.0
"""Skew-normal tails are computed no further: float64 has 53 bits."""

FIT_SIGNIFICANCE = 0.05
"""A fit is refused if its test has a smaller p-value."""

_MAX_SKEWNESS = 0.99

_NUM_NULL_DRAWS = 4999


@dataclasses.dataclass(frozen=True)
class Exposure:
    """One canary among its references.

    Attributes:
        bits: exposure, where a reference that ties ranks first.
        tied_bits: exposure averaged over the ranks that the canary could take among its ties. This one has the known
            expectation (:func:`null_mean`), so the control of held-out canaries uses it.
        num_secrets: N, the canary included.
        extrapolated_bits: exposure by the skew-normal tail, at most ``MAX_BITS``; None where the fit was refused.
        fit_p_value: p-value of the test of the fit; None with too few references.
    """

    bits: float
    tied_bits: float
    num_secrets: int
    extrapolated_bits: float | None
    fit_p_value: float | None


def exposure(score: float, references: FloatArray, *, extrapolate: bool = True) -> Exposure:
    """Return the exposure of a canary.

    Args:
        score: its log-likelihood.
        references: those of secrets that were not planted.
        extrapolate: whether to fit the tail; False where the references are all the secrets there are.

    Raises:
        ValueError: if a log-likelihood is not finite: NaN would rank first.
    """
    if not (math.isfinite(score) and np.isfinite(references).all()):
        raise ValueError("a log-likelihood of a secret is not finite")
    size = references.size + 1
    num_above, num_equal = int((references > score).sum()), int((references == score).sum())
    p_value, tail_bits = _tail(score, references) if extrapolate else (None, None)
    return Exposure(
        bits=math.log2(size) - math.log2(1 + num_above + num_equal),
        tied_bits=math.log2(size) - float(np.log2(1 + num_above + np.arange(num_equal + 1)).mean()),
        num_secrets=size,
        extrapolated_bits=tail_bits if p_value is not None and p_value >= FIT_SIGNIFICANCE else None,
        fit_p_value=p_value,
    )


def null_mean(num_secrets: int) -> float:
    """Return the mean exposure of a canary that was not trained on: its rank is uniform."""
    return float(_bits_by_rank(num_secrets).mean())


@functools.lru_cache(maxsize=8)
def null_means(nums_secrets: tuple[int, ...], *, is_shared: bool, seed: int = 0) -> FloatArray:
    """Simulate the mean exposure of canaries that were not trained on: the null law of the control.

    Args:
        nums_secrets: N for each canary.
        is_shared: whether all canaries are ranked among the same N - 1 references, whose own luck does not average out:
            the chances of the N ranks are then the gaps between uniform numbers.
        seed: of the draws; this randomness protects nobody.

    Returns:
        [draws], one mean over all canaries each.
    """
    rng, total = np.random.default_rng(seed), np.zeros(_NUM_NULL_DRAWS)
    for num_secrets, num_canaries in collections.Counter(nums_secrets).items():
        bits = _bits_by_rank(num_secrets)
        for number in range(_NUM_NULL_DRAWS):
            # Exponentials over their sum are distributed like the gaps between uniform numbers.
            gaps = rng.standard_exponential(num_secrets) if is_shared else np.ones(num_secrets)
            total[number] += rng.multinomial(num_canaries, gaps / gaps.sum()) @ bits
    return total / len(nums_secrets)


def _bits_by_rank(num_secrets: int) -> FloatArray:
    """Return the exposure of each rank, from the first to the last."""
    return math.log2(num_secrets) - np.log2(np.arange(1, num_secrets + 1))


def skew_normal(values: FloatArray) -> tuple[float, float, float]:
    """Return shape, location and scale of the skew-normal law with the values' first three moments.

    A skewness beyond what the family has (.995) is cut; the test of the fit then judges.
    """
    spread = float(values.std())
    skewness = float(np.clip(scipy.stats.skew(values), -_MAX_SKEWNESS, _MAX_SKEWNESS))
    # ``delta`` in (-1, 1) is the usual second form of the shape: shape = delta / sqrt(1 - delta^2). Its formula inverts
    # that of the skewness.
    power = abs(skewness) ** (2 / 3)
    delta_square = math.pi / 2 * power / (power + ((4 - math.pi) / 2) ** (2 / 3))
    delta = math.copysign(math.sqrt(delta_square), skewness)
    scale = spread / math.sqrt(1 - 2 * delta**2 / math.pi)
    location = float(values.mean()) - scale * delta * math.sqrt(2 / math.pi)
    return delta / math.sqrt(1 - delta**2), location, scale


def _tail(score: float, references: FloatArray) -> tuple[float | None, float | None]:
    """Return (p-value of the fit, exposure in bits by the fitted tail beyond ``score``); Nones with few references.

    The p-value is of a law fitted to every other reference and tested on the rest; the tail is of a law fitted to all.
    """
    fitted, judged = references[::2], references[1::2]
    if judged.size < 8 or float(np.ptp(fitted)) == 0.0:
        return None, None
    law_of_half = scipy.stats.skewnorm(*skew_normal(fitted))
    p_value = float(scipy.stats.kstest(judged, law_of_half.cdf).pvalue)
    law_of_all = scipy.stats.skewnorm(*skew_normal(references))
    share_above = max(float(law_of_all.sf(score)), 2.0**-MAX_BITS)
    return p_value, min(MAX_BITS, -math.log2(share_above))
