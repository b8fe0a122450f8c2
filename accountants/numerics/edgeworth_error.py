"""The explicit error of a first-order Edgeworth expansion for sums of identical variables.

Derumigny, Girard, Guyonvarch 2024 (Sankhya A; arXiv 2101.05780, theorem 2.3 and its remainder): for independent
identically distributed X with K3 = E|X - EX|^3/s^3, K4 = E(X - EX)^4/s^4, skewness l3 and K3~ = K3 + E|X - EX|/s, the
distribution function of the standardised sum of n differs from its first-order expansion by at most the expression
below, uniformly, for every free parameter e in (0, 1/3). No continuity is assumed. The leading term 0.1995 K3~/sqrt(n)
cannot be removed without it; it is what makes the interval vacuous.

For steps that differ, the triangle inequality: the expansion differs from the normal law by at most |skewness|/6 max
phi(z)|z^2 - 1| = |skewness|/(6 sqrt(2 pi)), and the normal law from the truth by the bound of Berry and Esseen. That
holds for identical steps too; the smaller counts.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math
from collections.abc import Sequence

from scipy import special

from accountants.numerics.cumulants import Moments

#: Values of the free parameter e that are tried.
_GRID = (0.02, 0.05, 0.08, 0.1, 0.12, 0.15, 0.2)
#: A constant of the theorem's remainder.
_C = 1.0253
#: Below it the law is one point to float64, and its quotients mean nothing.
_SMALLEST_VARIANCE = 1e-150
#: Times the skewness: the largest first-order term of the expansion.
_LARGEST_TERM = 1 / (6 * math.sqrt(2 * math.pi))


def sup_error(steps: Sequence[tuple[Moments, int]]) -> float:
    """Return the bound on the error of the first-order expansion of a sum of independent steps with their counts.

    It may exceed 1, which says nothing.
    """
    variance = math.fsum(count * moments.variance for moments, count in steps)
    if variance < _SMALLEST_VARIANCE:
        return math.inf
    skew = math.fsum(count * moments.third for moments, count in steps) / variance**1.5
    best = normal_error(steps) + _LARGEST_TERM * abs(skew)  # the triangle inequality
    if len(steps) == 1:  # the theorem is about identical steps
        moments, count = steps[0]
        best = min(best, *(_bound(moments, float(count), free) for free in _GRID))
    return best


def normal_error(steps: Sequence[tuple[Moments, int]]) -> float:
    """Return Berry and Esseen's bound on the distance of a standardised sum's distribution from the normal one.

    For identical steps 0.33554 (K3 + 0.415) / sqrt(n) (Shevtsova 2011, arXiv 1111.6554), in general 0.56 sum E|X_i|^3 /
    (sum Var X_i)^(3/2) (Shevtsova 2010).
    """
    variance = math.fsum(count * moments.variance for moments, count in steps)
    if variance < _SMALLEST_VARIANCE:
        return math.inf
    best = 0.56 * math.fsum(count * moments.absolute_third for moments, count in steps) / variance**1.5
    if len(steps) == 1:
        moments, count = steps[0]
        k3 = moments.absolute_third / moments.variance**1.5
        best = min(best, 0.33554 * (k3 + 0.415) / math.sqrt(count))
    return best


def _bound(moments: Moments, n: float, e: float) -> float:
    """Return the bound of theorem 2.3 (see the module) for n steps and free parameter e; k3, k4, kt are K3, K4, K3~."""
    m2, m3, m4, _ = moments.central
    scale = math.sqrt(m2)
    k3, k4, skew = moments.absolute_third / scale**3, m4 / m2**2, abs(m3) / scale**3
    kt = k3 + moments.absolute[0] / scale
    f = 1 - 3 * e
    e3 = math.exp(e * e / 6 + (e / (2 * f)) ** 2)
    main = (
        0.1995 * kt / math.sqrt(n)
        + (0.031 * kt**2 + 0.327 * k4 * (1 / 12 + 1 / (4 * f * f)) + 0.054 * skew * kt + 0.037 * e3 * skew**2) / n
    )
    return main + _remainder(n, e, k3, k4, skew, kt, e3)


def _remainder(n: float, e: float, k3: float, k4: float, skew: float, kt: float, e3: float) -> float:
    """Return the theorem's remainder terms, which fall faster than 1/n; arguments as in :func:`_bound`.

    Written term by term as in the paper; the names are the paper's.
    """
    f = 1 - 3 * e
    p2 = (
        48 * e * math.sqrt(k4 / n)
        + 4 * e * e * k4 / n
        + 96 * math.sqrt(2 * e) * skew / (k4 * n) ** 0.25
        + 32 * e * skew**2 / math.sqrt(k4 * n)
        + 16 * math.sqrt(2) * k4**0.25 * skew * e**1.5 / n**0.75
    )
    exponent = e * e * (1 / 6 + 1 / (2 * f * f) + 2 * p2 / (576 * f * f))
    if exponent > 600:
        return math.inf
    e2 = math.exp(exponent)
    b = k4 / 12 + 1 / (4 * f * f) + p2 / (576 * f * f)
    bar = (_C / (2 * math.pi * f * f)) * (
        8 * math.gamma(4) * k4 / (24 * n**2)
        + 16 * math.gamma(5) * k4**2 / (576 * n**3)
        + math.sqrt(2) * math.gamma(1.5) * skew / (6 * n**1.5)
        + 8 * math.gamma(4) * skew**2 / (36 * n**2)
        + 2**3.5 * math.gamma(4.5) * k4 * skew / (72 * n**2.5)
    ) + (_C / math.pi) * e2 * b * (16 * math.gamma(5) / (8 * n**2) + 2**3.5 * math.gamma(4.5) * skew / (12 * n**1.5))
    cut = min(math.sqrt(2 * e) * (n / k4) ** 0.25, 2 * math.sqrt(n) / kt)
    return (
        81.2376 * kt**4 / (16 * math.pi**4 * n**2)
        + 4.3394 * skew * kt**3 / (8 * math.pi**3 * n**2)
        + bar
        + 1.306 * (e2 - e3) * skew**2 / (36 * n)
        + skew / math.sqrt(n) * (_upper_gamma(1.5, cut) - _upper_gamma(1.5, 2 * math.sqrt(n) / kt))
        + _C
        * 2**2.5
        * k3
        / (3 * math.pi * math.sqrt(n))
        * (_upper_gamma(1.5, cut**2 / 8) - _upper_gamma(1.5, n / (2 * kt**2)))
    )


def _upper_gamma(a: float, x: float) -> float:
    """Return the upper incomplete gamma function of a at x."""
    return float(special.gammaincc(a, x)) * math.gamma(a)
