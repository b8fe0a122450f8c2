"""Cumulants of the privacy loss to order five, accurately.

A step compares P = N(0, 1) with a mixture Q of shifted Gaussians (:mod:`accountants.mixtures`). In the direction
*remove* the loss is log dQ/dP, with first law Q and second law P; in *add* it is -log dQ/dP, with first law P.

Central moments on one composite Gauss-Legendre grid: raw moments of nearly constant losses cancel (at sampling
probability 4e-5 a general quadrature at an absolute tolerance of 1e-8 is 4 % off in the third cumulant). Steps add;
heterogeneous phases are sums.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from accountants.mixtures import Array, Composition, MixtureStep

_PANELS = 125
_PANEL_NODES, _PANEL_WEIGHTS = np.polynomial.legendre.leggauss(16)
#: A composite rule of 2000 nodes on [0, 1].
_NODES = ((np.arange(_PANELS)[:, None] + (1 + _PANEL_NODES) / 2) / _PANELS).ravel()
_WEIGHTS = np.tile(_PANEL_WEIGHTS / (2 * _PANELS), _PANELS)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Moments of one step's loss in one direction under one law.

    Attributes:
        mean: the expectation.
        central: central moments 2 to 5.
        absolute: E|X - EX| and E|X - EX|^3.
        log_normaliser: log E[exp(tilt * loss)], 0 up to rounding without a tilt.
    """

    mean: float
    central: tuple[float, float, float, float]
    absolute: tuple[float, float]
    log_normaliser: float

    @property
    def variance(self) -> float:
        """The second central moment."""
        return self.central[0]

    @property
    def third(self) -> float:
        """The third central moment."""
        return self.central[1]

    @property
    def absolute_third(self) -> float:
        """E|X - EX|^3."""
        return self.absolute[1]


def step_moments(
    step: MixtureStep,
    *,
    add: bool,
    first_law: bool,
    tilt: float = 0.0,
    limits: tuple[float, float] | None = None,
) -> Moments:
    """Return moments of the directed loss.

    Args:
        step: one step.
        add: whether the direction is *add*: loss -log dQ/dP, first law P; otherwise log dQ/dP, first law Q.
        first_law: under the direction's first law, or under its second.
        tilt: exponential tilt applied to the law.
        limits: the stretch of ``z`` that counts; by default all that float64 can see.
    """
    low, high = limits or (-14.0, 14.0 + step.shifts[-1])
    log_normal, log_ratio = _tabulated(step, low, high)
    sign = -1.0 if add else 1.0
    under_q = add != first_law  # Q is the first law of remove and the second of add
    logs = log_normal + (tilt * sign + float(under_q)) * log_ratio
    top = float(np.max(logs))  # taken out, so that no exponential overflows
    weight = _WEIGHTS * np.exp(logs - top)
    total = float(np.sum(weight))
    log_normaliser = top + math.log(total * (high - low) / math.sqrt(2 * math.pi))
    return _moments(sign * log_ratio, weight / total, log_normaliser)


@functools.lru_cache(maxsize=64)
def _tabulated(step: MixtureStep, low: float, high: float) -> tuple[Array, Array]:
    """Return log of the normal density, without its constant, and log dQ/dP at the nodes: the same for every tilt."""
    z = low + (high - low) * _NODES
    loss = step.loss(z)
    loss.setflags(write=False)
    return -z * z / 2, loss


def _moments(loss: Array, weight: Array, log_normaliser: float) -> Moments:
    """Return the moments of a law with these values of the loss and weights of sum one."""
    mean = float(weight @ loss)
    centred = loss - mean
    # Products, not powers: numpy's general power takes ten times as long.
    square, size = centred * centred, np.abs(centred)
    weighted = weight * square
    cubed = weighted * centred
    central = float(np.sum(weighted)), float(np.sum(cubed)), float(cubed @ centred), float(cubed @ square)
    return Moments(mean, central, (float(weight @ size), float(weighted @ size)), log_normaliser)


def sum_cumulants(composed: Composition, *, add: bool, first_law: bool) -> tuple[float, float, float, float, float]:
    """Return cumulants 1 to 5 of the total loss of all steps, in one direction under its first or second law."""
    totals = np.zeros(5)
    for step, count in composed.phases:
        moments = step_moments(step, add=add, first_law=first_law)
        m2, m3, m4, m5 = moments.central
        totals += count * np.array([moments.mean, m2, m3, m4 - 3 * m2 * m2, m5 - 10 * m3 * m2])
    k1, k2, k3, k4, k5 = (float(value) for value in totals)
    if not (k2 > 0 and math.isfinite(k5)):
        raise ValueError(f"an expansion needs a variance that float64 sees, not {k2:g}; use 'tilted'")
    return k1, k2, k3, k4, k5
