"""One step's privacy loss, moved onto a lattice so that the guarantee can only get weaker, by a known amount.

The function ``H(g) = sup_S Q(S) - g P(S)`` of ``g = e^eps`` is convex. Its chord through the lattice points
``g_j = exp(a_j)``, ``a_j = a_0 + j h``, belongs to a discrete pair: the mass of each cell ``a_j <= loss < a_(j+1)`` is
split between the cell's two ends so that both its Q-mass and its P-mass are kept (Doroshenko et al. 2022, arXiv
2207.04380, "connect the dots"). Chords lie above a convex function, so the pair dominates (P, Q), in both directions at
once, and domination survives composition (Zhu, Dong, Wang 2022, arXiv 2106.08567, theorem 10). What lies beyond the
lattice goes to its end points, with the rest at infinite loss.

How much weaker. With w = e^(-loss), the split is a fair bet: a step at offset x = loss - a_j moves to w e^x or w
e^(x-h), with mean w. Among all x in [0, h], every such bet is below, in the convex order, the product of two
independent variables with values e^(h/2), e^(-h/2) and mean one: splitting the bet's two outcomes further onto e^h, 1,
e^(-h) leaves a three-point law of mean one, such laws are ordered by their mass at e^h, and that mass is
(1-e^(x-h))(e^x-1)/((e^x-e^(x-h))(e^h-1)), largest at x = h/2, where it is 1/(1+e^(h/2))^2. The product does not depend
on the loss, the hockey-stick divergence is convex in w, and so after n steps

    delta(eps) <= delta'(eps) <= E[delta(eps - Xi)],     Xi = h (Binomial(2n, 1/(1+e^(-h/2))) - n),

where delta' belongs to the lattice pair. :mod:`accountants.tilted` turns the right half into a lower bound.

Accuracy. Masses come from four-point Gauss-Legendre rules on cells narrower than 1/64 in ``z`` (relative error below
1e-14 for |z| < 15) and from differences of normal distribution functions on wider ones. The callers add ``MASS_ERROR``
a step to the logarithm of every probability and ``LOSS_ERROR`` times the largest loss a step to every loss.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from accountants.mixtures import Array, MixtureStep

#: Relative error of a cell's mass that the callers allow for, per step.
MASS_ERROR = 2e-14

#: Error of a loss relative to max(1, |loss|) that the callers allow for, per step.
LOSS_ERROR = 2e-15

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_NARROW = 1 / 64


@dataclasses.dataclass(frozen=True)
class LatticeLaw:
    """A sub-probability law of a privacy loss in one direction on ``origin + spacing * index``.

    Attributes:
        origin: the loss at index 0.
        index: integer positions.
        mass: the untilted probability at each position, under the direction's first law.
        infinite_mass: probability of an infinite loss.
        moved_mass: a bound on the probability that was moved further than to the ends of its own cell.
    """

    origin: float
    index: np.typing.NDArray[np.int64]
    mass: Array
    infinite_mass: float
    moved_mass: float


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of one step between lattice points ``low + spacing * j``, j = 0..n, and the two tails.

    Attributes:
        points: the n + 1 lattice points.
        p_mass, q_mass: the n cells' masses.
        q_up: the part of each cell's Q-mass that the chord sends to the cell's upper end.
        p_low, q_low, p_high, q_high: masses of the tails.
    """

    points: Array
    p_mass: Array
    q_mass: Array
    q_up: Array
    p_low: float
    q_low: float
    p_high: float
    q_high: float


def build_cells(step: MixtureStep, low: float, spacing: float, num_cells: int) -> Cells:
    """Integrate P and Q over each cell of the loss."""
    points = low + spacing * np.arange(num_cells + 1)
    edges = step.inverse_loss(points)
    p_mass, q_mass, q_up = _wide_cells(step, points, edges, spacing)
    width = np.diff(edges)
    narrow = width < _NARROW
    if narrow.any():
        left, half, start = edges[:-1][narrow], width[narrow] / 2, points[:-1][narrow]
        p, q, up = (np.zeros_like(left) for _ in range(3))
        for node, weight in zip(_NODES, _WEIGHTS, strict=True):
            z = left + half * (1 + node)
            density = np.exp(-z * z / 2) * half * (weight / math.sqrt(2 * math.pi))
            above = step.loss(z) - start
            q_density = density * np.exp(above)
            p += density
            q += q_density
            up -= q_density * np.expm1(-above)
        scale = np.exp(start)
        p_mass[narrow], q_mass[narrow], q_up[narrow] = p, q * scale, up * scale / -math.expm1(-spacing)
    ends = edges[[0, -1]]
    return Cells(
        points,
        p_mass,
        q_mass,
        np.clip(q_up, 0.0, q_mass),
        float(step.cdf(ends, False)[0]),
        float(step.cdf(ends, True)[0]),
        float(step.survival(ends, False)[1]),
        float(step.survival(ends, True)[1]),
    )


def _wide_cells(step: MixtureStep, points: Array, edges: Array, spacing: float) -> tuple[Array, Array, Array]:
    """Masses by differences of distribution functions, from whichever side loses fewer digits."""
    masses: list[Array] = []
    for under_q in (False, True):
        below, above = np.diff(step.cdf(edges, under_q)), -np.diff(step.survival(edges, under_q))
        masses.append(np.maximum(np.where(edges[1:] < (step.shifts[-1] if under_q else 0), below, above), 0.0))
    p_mass, q_mass = masses
    q_up = (q_mass - np.exp(points[:-1]) * p_mass) / -math.expm1(-spacing)
    return p_mass, q_mass, q_up


def dominating_law(cells: Cells, *, add: bool) -> LatticeLaw:
    """The law of the chord pair's loss: under Q of the loss, or with ``add`` under P of its negative."""
    q_mass = np.zeros_like(cells.points)
    q_mass[:-1] += cells.q_mass - cells.q_up
    q_mass[1:] += cells.q_up
    q_mass[0] += cells.q_low
    at_top = min(cells.p_high * math.exp(cells.points[-1]), cells.q_high)
    q_mass[-1] += at_top
    index = np.arange(len(q_mass))
    if not add:
        moved = cells.q_low + cells.q_high
        return LatticeLaw(float(cells.points[0]), index, q_mass, max(cells.q_high - at_top, 0.0), moved)
    below = max(cells.p_low - cells.q_low * math.exp(-cells.points[0]), 0.0)
    moved = cells.p_low + cells.p_high
    return LatticeLaw(-float(cells.points[0]), -index, q_mass * np.exp(-cells.points), below, moved)
