"""One step's privacy loss, moved onto a lattice so that the guarantee can only get weaker, by a known amount.

P is the law of the step's outcome z without the unit, Q with it, and the loss log dQ/dP(z) increases in z. The function
``H(g) = sup_S Q(S) - g P(S)`` of ``g = e^eps`` is convex. Its chord through the lattice points
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

where delta' belongs to the lattice pair. :mod:`accountants.methods.tilted` turns the right half into a lower bound.

Accuracy. Masses under either law, and the parts of them that go to a cell's upper end, come from four-point
Gauss-Legendre rules on pieces of ``z`` so narrow that the densities' logarithms, whose slope is at most the distance
from the nearest mean, change by at most 1/4 (relative error (1/4)^8 (4!)^4 / (9 (8!)^3), below 1e-14). All integrands
are positive and each is the exponential of its own logarithm: where P underflows, Q need not. The callers add a law's
``mass_error`` a step to the logarithm of every probability, which grows with those logarithms, and ``LOSS_ERROR`` times
the largest loss a step to every loss. Densities below float64's range are zero here, less than 1e-300 in all.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from accountants.mixtures import Array, MixtureStep
from accountants.numerics.tails import UNIT

#: Relative error of a cell's mass that is allowed for, per step; that of the exponentials is added.
MASS_ERROR = 2e-14

#: Error of a loss relative to max(1, |loss|) that the callers allow for, per step.
LOSS_ERROR = 2e-15

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
#: Where the normal density leaves float64's range.
_REACH = 38.7
#: Pieces of quadrature in a step, at most.
_MAX_PIECES = 1 << 23


@dataclasses.dataclass(frozen=True)
class LatticeLaw:
    """A sub-probability law of a privacy loss in one direction on ``origin + spacing * index``.

    Attributes:
        origin: the loss at index 0.
        index: integer positions.
        mass: the untilted probability at each position, under the direction's first law.
        infinite_mass: probability of an infinite loss.
        moved_mass: a bound on the probability that was moved further than to the ends of its own cell.
        mass_error: a bound on the relative error of every mass.
    """

    origin: float
    index: np.typing.NDArray[np.int64]
    mass: Array
    infinite_mass: float
    moved_mass: float
    mass_error: float


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cells of one step between lattice points ``low + spacing * j``, j = 0..n, and the two tails.

    Attributes:
        points: the n + 1 lattice points.
        p_mass, q_mass: the n cells' masses.
        p_up, q_up: the parts of them that the chord sends to the cell's upper end; the rest goes to its lower end.
        log_p_low, log_q_low, log_p_high, log_q_high: logs of the masses that lie below and above all cells.
        mass_error: a bound on the masses' relative error.
    """

    points: Array
    p_mass: Array
    q_mass: Array
    p_up: Array
    q_up: Array
    log_p_low: float
    log_q_low: float
    log_p_high: float
    log_q_high: float
    mass_error: float


def build_cells(step: MixtureStep, low: float, spacing: float, num_cells: int) -> Cells:
    """Integrate P and Q over each cell of the loss, by Gauss-Legendre quadrature in ``z``.

    At an offset x above the cell's lower end the chord of length h sends (1 - e^-x) / (1 - e^-h) of Q, and
    (e^x - 1) / (e^h - 1) of P, to the cell's upper end.

    Args:
        step: the step.
        low: the loss at which the first cell begins.
        spacing: h, the width of a cell.
        num_cells: n.

    Raises:
        FloatingPointError: if the losses range so widely that too many pieces would be needed.
    """
    points = low + spacing * np.arange(num_cells + 1)
    # Where the quadrature's pieces of z lie, and to which cell each belongs.
    finer = math.ceil(8 * spacing)  # so that the loss changes by at most 1/8 in a piece
    if num_cells * finer > _MAX_PIECES:
        raise FloatingPointError("too wide a range of losses to integrate")
    all_edges = step.inverse_loss(low + spacing / finer * np.arange(num_cells * finer + 1))
    edges = all_edges[::finer]  # of cells, in z
    pieces = _pieces(step, all_edges)
    cell = np.searchsorted(edges, pieces[:-1], side="right") - 1  # number of each piece's cell
    left, half = pieces[:-1], np.diff(pieces) / 2
    start = points[cell]  # the loss at the lower end of each piece's cell

    # By piece, up to factors that follow below.
    p_mass, q_mass, p_up, q_up = (np.zeros_like(left) for _ in range(4))
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        z = left + half * (1 + node)
        loss = step.loss(z)
        log_density = -z * z / 2
        p, q = weight * np.exp(log_density), weight * np.exp(log_density + loss)
        expm1_minus_x = np.expm1(-np.clip(loss - start, 0.0, spacing))
        p_mass += p
        q_mass += q
        p_up -= p * expm1_minus_x / (1 + expm1_minus_x)  # e^x - 1 = -(e^-x - 1) / e^-x
        q_up -= q * expm1_minus_x
    scale = half / math.sqrt(2 * math.pi)
    p_mass, q_mass = (_by_cell(part * scale, cell, num_cells) for part in (p_mass, q_mass))
    p_up = _by_cell(p_up / math.expm1(spacing) * scale, cell, num_cells)
    q_up = _by_cell(q_up / -math.expm1(-spacing) * scale, cell, num_cells)

    first, last = float(edges[0]), float(edges[-1])
    # Rounding of an exponential is relative to its exponent: a loss, and the density's z²/2.
    largest_exponent = max(abs(points[0]), abs(points[-1])) + max(float(pieces[0]) ** 2, last**2) / 2
    return Cells(
        points=points,
        p_mass=p_mass,
        q_mass=q_mass,
        p_up=np.minimum(p_up, p_mass),
        q_up=np.minimum(q_up, q_mass),
        log_p_low=step.log_tail(first, under_q=False, above=False),
        log_q_low=step.log_tail(first, under_q=True, above=False),
        log_p_high=step.log_tail(last, under_q=False, above=True),
        log_q_high=step.log_tail(last, under_q=True, above=True),
        mass_error=MASS_ERROR + 4 * UNIT * float(largest_exponent),
    )


def _by_cell(values: Array, cell: np.typing.NDArray[np.int64], num_cells: int) -> Array:
    """Return the sum of the pieces' ``values`` over each cell; ``cell`` is the number of each piece's cell."""
    return np.bincount(cell, weights=values, minlength=num_cells).astype(np.float64, copy=False)


def _pieces(step: MixtureStep, edges: Array) -> Array:
    """Return increasing ``z`` between which four nodes of quadrature suffice: the edges, and more where there is mass.

    Args:
        step: P and the components of Q are normal laws around 0 and around its shifts.
        edges: increasing, in ``z``; the first may be minus infinity.
    """
    bottom, top = max(float(edges[0]), -_REACH), float(edges[-1])
    reach = min(max(-bottom, top - step.shifts[-1], 16.0), _REACH)
    grids: list[Array] = []
    end = bottom  # of what has a grid so far
    for mean in (0.0, *step.shifts):
        start, stop = max(end, mean - reach), min(mean + reach, top)
        if stop > start:
            # So narrow that a log density, whose slope is at most the reach, changes by at most 1/4 in a piece.
            grids.append(np.linspace(start, stop, math.ceil((stop - start) * 4 * reach) + 1))
            end = stop
    inside = edges[(edges > bottom) & (edges < top)]
    return np.unique(np.concatenate([[bottom, max(top, bottom)], inside, *grids]))


def dominating_law(cells: Cells, *, add: bool) -> LatticeLaw:
    """Return the law of the chord pair's loss: for remove that of the loss under Q, for add of its negative under P."""
    mass, up = (cells.p_mass, cells.p_up) if add else (cells.q_mass, cells.q_up)
    point_mass = np.zeros_like(cells.points)  # the probability at each lattice point
    point_mass[:-1] += mass - up
    point_mass[1:] += up
    # Mass beyond the end of small losses goes to the end point, which only raises its loss. Mass beyond the end of
    # large losses goes there as far as the other law has mass to match it, at the point's ratio; the rest is infinite.
    low = min(cells.log_p_low, cells.log_q_low - float(cells.points[0]))
    high = min(cells.log_q_high, cells.log_p_high + float(cells.points[-1]))
    if add:  # the loss is negated: what lies below the cells has the large losses
        point_mass[0] += math.exp(low)
        point_mass[-1] += math.exp(cells.log_p_high)
        infinite = _difference(cells.log_p_low, low)
        moved = math.exp(cells.log_p_low) + math.exp(cells.log_p_high)
    else:
        point_mass[0] += math.exp(cells.log_q_low)
        point_mass[-1] += math.exp(high)
        infinite = _difference(cells.log_q_high, high)
        moved = math.exp(cells.log_q_low) + math.exp(cells.log_q_high)
    sign = -1 if add else 1
    return LatticeLaw(
        origin=sign * float(cells.points[0]),
        index=sign * np.arange(len(point_mass)),
        mass=point_mass,
        infinite_mass=infinite,
        moved_mass=moved,
        mass_error=cells.mass_error,
    )


def _difference(log_larger: float, log_smaller: float) -> float:
    """Return ``exp(log_larger) - exp(log_smaller)``; 0 if the second is the larger one."""
    if log_larger == -math.inf:
        return 0.0
    return math.exp(log_larger) * -math.expm1(min(log_smaller - log_larger, 0.0))
