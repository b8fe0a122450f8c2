"""The audit of scores that are independent of each other by their making: gradient canaries in high dimension.

**Theorem.** Andrew, Kairouz, Oh, Oprea, McMahan and Suriyakumar 2023 (arXiv 2302.03098, section 3): canaries whose
updates are independent random directions in d dimensions, released in one sum with Gaussian noise; with k = o(d) of
them, their inner products with the sum are asymptotically independent and normal, and the epsilon of the two normal
laws, fitted in this one run, converges to the mechanism's.

**Assumptions.** d is much larger than the number of canaries and of steps; coins and directions are independent. Not
assumed: that the noise is as claimed, or normal.

**What decides.** Independence alone: an interval for the AUROC over independent canaries, against the largest AUROC
that the claimed curve allows any test.

**What is reported beside it.** The epsilon of the Gaussian curve that has the lower end of that interval for its AUROC.
It says "not this Gaussian", as the other bounds that are tied to a curve.
"""

from __future__ import annotations

import dataclasses
import math

import scipy.special

from accountants.methods import gdp
from attacks.analysis import statistics
from attacks.analysis.arrays import FloatArray
from attacks.analysis.statistics import Bound, Interval


@dataclasses.dataclass(frozen=True)
class Separation:
    """How well independent scores separate held-in from held-out canaries, against a claim.

    Attributes:
        auroc_lower: lower confidence bound of the AUROC.
        auroc_ceiling: that bound had all held-in canaries scored above all held-out ones.
        auroc_cap: the largest AUROC that the claim allows; None without a claim.
        epsilon: of the Gaussian curve with an AUROC of ``auroc_lower``, at the audit's delta.
        epsilon_ceiling: of the Gaussian curve with an AUROC of ``auroc_ceiling``.
    """

    auroc_lower: float
    auroc_ceiling: float
    auroc_cap: float | None
    epsilon: float
    epsilon_ceiling: float

    @property
    def is_excess(self) -> bool:
        """Whether more leaked than the claim allows."""
        return self.auroc_cap is not None and self.auroc_lower > self.auroc_cap

    @property
    def could_exceed(self) -> bool:
        """Whether this many canaries, perfectly separated, would have exceeded what the claim allows."""
        return self.auroc_cap is not None and self.auroc_ceiling > self.auroc_cap


def separation(
    held_in: FloatArray, held_out: FloatArray, claim: Bound | None, delta: float, significance: float
) -> Separation:
    """Compare the AUROC of independent scores with what a claim allows.

    Args:
        held_in: one score per canary in training, at least two.
        held_out: one score per canary left out, at least two.
        claim: the claimed privacy curve or pair; None without a claim.
        delta: at which the epsilons of the result are given.
        significance: error of the lower bound, one-sided.
    """
    level = 1.0 - 2.0 * significance  # of a two-sided interval with that error at each end
    lower = statistics.delong_interval(held_in, held_out, level).lower
    ceiling: Interval = statistics.perfect_separation(held_in.size, held_out.size, level)
    cap = None if claim is None else claim.max_auroc()
    return Separation(
        auroc_lower=lower,
        auroc_ceiling=ceiling.lower,
        auroc_cap=cap,
        epsilon=gaussian_epsilon(lower, delta),
        epsilon_ceiling=gaussian_epsilon(ceiling.lower, delta),
    )


def gaussian_epsilon(auroc: float, delta: float) -> float:
    """Return epsilon at delta of the mu-GDP curve with this AUROC, Φ(mu / sqrt(2)); 0 up to an AUROC of 1/2."""
    if auroc <= 0.5:
        return 0.0
    return gdp.gdp_epsilon(math.sqrt(2.0) * float(scipy.special.ndtri(auroc)), delta)
