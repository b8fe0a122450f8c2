"""Bounds on the delta of a sum S of lattice laws, by one inverse Fourier transform of a tilted law.

S is the sum of the steps' losses in one direction, each moved onto a lattice of width h (:mod:`.lattice`). A *phase* is
a number of equal steps.

The law of S is tilted by e^(tS), its transform is the product of the steps' transforms, and the inverse transform of
length N gives the tilted law modulo the window N h, exactly. What is not in the window can fold into it, which only
adds to the upper end and is subtracted from the lower one, each by a Chernoff bound; so is the round-off of the
transforms. :mod:`accountants.methods.tilted` has the proofs (its points 2, 3, 4 and 6).
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np
from scipy import signal

from accountants.mixtures import Array
from accountants.numerics import lattice
from accountants.numerics.sum_transform import ComplexArray, SumTransform
from accountants.numerics.tails import UNIT
from accountants.numerics.window import Window

#: Changes of tilt tried in Chernoff bounds, in units of one over the window's length.
CHERNOFF = (24.0, 48.0, 96.0)
#: Most that the tilt times the distance below the window's centre may be: e^600 is still a float64 number.
LARGEST_LOG_WEIGHT = 600.0


class LatticePhase:
    """A step's lattice law, with how often the step was done."""

    def __init__(self, law: lattice.LatticeLaw, spacing: float, count: int) -> None:
        self.law, self.spacing, self.count = law, spacing, count
        with np.errstate(divide="ignore"):
            self.log_mass = np.log(law.mass)
        self.losses = law.origin + spacing * law.index

    def tilt(self, tilt: float) -> tuple[Array, float]:
        """Return the probabilities of the tilted law, and the log of its normaliser M(t)."""
        logs = self.log_mass + tilt * self.losses
        top = float(np.max(logs))
        weight = np.exp(logs - top)
        total = float(np.sum(weight))
        return weight / total, top + math.log(total)

    def transform(self, tilt: float, length: int) -> tuple[ComplexArray, float]:
        """Return the discrete Fourier transform of the tilted law folded to ``length``, and its log normaliser."""
        probability, log_moment = self.tilt(tilt)
        folded = np.bincount(self.law.index % length, weights=probability, minlength=length)
        return np.fft.rfft(folded), log_moment


def compose(phases: list[LatticePhase], tilt: float, length: int, low: float, reliable_from: float) -> Window:
    """Return bounds for the sum of all phases on a window of lattice points.

    Args:
        phases: of one spacing.
        tilt: t.
        length: N, the points of the window.
        low: the window starts at or just above it.
        reliable_from: the epsilon from which on the lower end must hold; the values are scaled to be moderate there.
    """
    spacing = phases[0].spacing
    law = _folded_law(phases, tilt, length)
    log_moment = law.log_moment

    # The lattice points of the window, and their probabilities; index 0 of the law stands for the loss `origin`.
    origin = math.fsum(phase.count * phase.law.origin for phase in phases)
    start = math.ceil((low - origin) / spacing)
    points = origin + spacing * (start + np.arange(length))
    probability = np.roll(law.probability, -(start % length))
    # Each value rests on those above it alone: points whose weights would leave float64's range are left out.
    first = int(np.argmax(tilt * (reliable_from - points) <= LARGEST_LOG_WEIGHT))
    points, probability = points[first:], probability[first:]

    # The probability that S lies above the window.
    top, window = float(points[-1]), length * spacing
    log_above = _log_above(phases, tilt, log_moment, top, window) + log_moment - tilt * top
    above = math.exp(min(log_above, 0.0))

    # What was folded into the window, from above and from below, adds to delta at most so much. As a multiple of delta
    # it may exceed 1: no cap but float64's.
    log_prefactor = log_moment - tilt * reliable_from
    log_peak = tilt * math.log(tilt) - (1 + tilt) * math.log1p(tilt)  # of e^(-tx) (1 - e^-x) over x
    log_folded = _log_above(phases, tilt, log_moment, reliable_from + window, window) + log_peak + log_prefactor
    folded = math.exp(log_folded) if log_folded <= 0 else math.inf
    folded += math.exp(-tilt * window) / -math.expm1(-tilt * window)

    num_steps = sum(phase.count for phase in phases)
    # Losses ascend, so the first or the last of a phase is the largest in size.
    largest = max(float(np.max(np.abs(phase.losses[[0, -1]]))) for phase in phases)
    return Window(
        points=points,
        upper_values=_hockey_sticks(np.maximum(probability + law.roundoff, 0.0), points, tilt, reliable_from),
        lower_values=_hockey_sticks(np.maximum(probability - law.roundoff, 0.0), points, tilt, reliable_from),
        log_scale=log_prefactor,
        margin=math.fsum(phase.count * phase.law.mass_error for phase in phases) + 8 * length * UNIT,
        shift=num_steps * lattice.LOSS_ERROR * max(1.0, largest),
        added=above + math.fsum(phase.count * phase.law.infinite_mass for phase in phases),
        removed=folded + math.fsum(phase.count * phase.law.moved_mass for phase in phases),
        reliable_from=reliable_from,
        num_steps=num_steps,
    )


class _FoldedLaw(NamedTuple):
    """The tilted law of S modulo the window of ``length`` lattice points."""

    probability: Array  # [length], number r that of the losses `origin + spacing * (r + j * length)` for all integers j
    roundoff: float  # a bound on the error of every probability
    log_moment: float  # log M(t), the log of the law's normaliser


def _folded_law(phases: list[LatticePhase], tilt: float, length: int) -> _FoldedLaw:
    """Return the tilted law of S modulo the window, by the inverse of its transform."""
    transform = SumTransform(length // 2 + 1)
    error = 8 * UNIT * (math.log2(length) + 2)  # of a value of a step's transform, whose magnitude is at most 1
    for phase in phases:
        values, log_moment = phase.transform(tilt, length)
        transform.add(values, error, log_moment, phase.count)
    probability = np.fft.irfft(np.exp(transform.log_transform), length)
    # Each probability is a mean over all frequencies, of which half are stored.
    roundoff = 2 / length * float(np.exp(transform.log_envelope) @ (transform.relative_error + error))
    return _FoldedLaw(probability, roundoff, transform.log_moment)


def _hockey_sticks(probability: Array, points: Array, tilt: float, centre: float) -> Array:
    """Return delta, V(eps) = E[(1 - e^(eps - S))_+], at every eps of ``points``, over M(tilt) e^(-tilt centre).

    ``probability`` is the tilted law at ``points``, which ascend by h; e^(tilt (centre - s)) turns it back into S's own
    law, over the same factor. V is 0 at the last point, and from there down

        V(s_r) = e^-h V(s_(r+1)) + (1 - e^-h) P(S >= s_(r+1)):

    positive terms only, where the usual difference of two sums would cancel.
    """
    spacing = points[1] - points[0]
    weight = probability * np.exp(tilt * (centre - points))
    # P(S >= s) for s from the last point down to the second: what V takes at the point below s.
    at_least = np.cumsum(weight[:0:-1])
    # The filter's output i is (1 - e^-h) times its input i plus e^-h times its output i - 1, at first 0.
    descending: Array = cast(Any, signal).lfilter([-math.expm1(-spacing)], [1.0, -math.exp(-spacing)], at_least)
    return np.append(descending[::-1], 0.0)


def _log_above(phases: list[LatticePhase], tilt: float, log_moment: float, edge: float, window: float) -> float:
    """Return log of a Chernoff bound on the probability, under the law tilted by ``tilt``, that S exceeds ``edge``."""
    best = 0.0
    for exponent in CHERNOFF:
        change = exponent / window
        changed_moments: list[float] = []
        for phase in phases:
            _, log_of_step = phase.tilt(tilt + change)
            changed_moments.append(phase.count * log_of_step)
        best = min(best, math.fsum(changed_moments) - log_moment - change * edge)
    return best
