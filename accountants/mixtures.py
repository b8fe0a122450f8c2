"""The normal form of an event: independent steps, each a Gaussian against a mixture of shifted Gaussians.

Every mechanism here that adds Gaussian noise to a clipped sum compares, for the worst neighbouring pair under
add-or-remove-one (and zero-out, which coincides with it for a plain sum), two laws of one real number,

    P = N(0, 1)        and        Q = sum_i p_i N(mu_i, 1),      mu_i = sensitivity_i / noise standard deviation >= 0:

``p = (1 - q, q)`` for a unit that is sampled with probability ``q`` (Mironov, Talwar, Zhang 2019, arXiv 1908.10530),
one shift for the plain Gaussian mechanism, and binomial weights for a unit with several records (Charles et al. 2024,
arXiv 2407.07737). The privacy loss is the increasing function ``loss(z) = log dQ/dP(z)`` and everything that an
accountant needs (moments, quantiles, discretisations) is a one-dimensional integral over ``z``.
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import dp_accounting
import numpy as np
import numpy.typing as npt
from scipy import special

from accountants.answer import UnsupportedEventError
from accountants.numerics.roots import bracketed_root
from accountants.numerics.tails import log_sum
from accountants.validation import WEIGHTS_ERROR, check_event

Array = npt.NDArray[np.floating[Any]]

#: Points of ``z`` that are evaluated together: so few that of many shifts only some matter within a block.
_BLOCK = 2048
#: A shift counts at a point if its density there is at least e^-46 of the largest one.
_NEGLIGIBLE = 46.0
#: Exponents beyond it are handled apart: e^300 and its square are still float64 numbers.
_FAR = 300.0
#: Shifts lie between this and its inverse, so that float64 holds their squares.
_SMALLEST_SHIFT = 1e-100


@dataclasses.dataclass(frozen=True, order=True)
class MixtureStep:
    """One step: standard normal noise, shifted by ``shifts[i]`` with probability ``probs[i]``.

    Attributes:
        shifts: increasing, not negative, the last one positive.
        probs: positive, of sum one.
    """

    shifts: tuple[float, ...]
    probs: tuple[float, ...]

    def __post_init__(self) -> None:
        assert len(self.shifts) == len(self.probs) > 0, self
        assert self.shifts[0] >= 0, self
        assert self.shifts[-1] > 0, self
        assert min(self.probs) > 0, self
        assert abs(math.fsum(self.probs) - 1) <= WEIGHTS_ERROR, self
        assert all(low < high for low, high in zip(self.shifts, self.shifts[1:], strict=False)), self

    @property
    def infimum(self) -> float:
        """The greatest lower bound of the loss: log of the probability that the unit contributes nothing."""
        if self.shifts[0] > 0:
            return -math.inf
        # Of a probability near 1 the complement has the digits.
        return math.log(self.probs[0]) if self.probs[0] < 0.5 else math.log1p(-math.fsum(self.probs[1:]))

    def loss(self, z: Array) -> Array:
        """Return ``log dQ/dP`` at ``z``, with an absolute error of a few units in the last place of max(1, loss)."""
        if self.shifts[0] == 0 and len(self.shifts) == 2:
            return self._poisson_loss(z)
        if len(self.shifts) == 1:
            return self.shifts[0] * z - self.shifts[0] ** 2 / 2
        return self._loss_and_slope(z)[0]

    def slope(self, z: float) -> float:
        """Return the loss's derivative at ``z``, which is the mean of the shift given that the outcome is ``z``."""
        at_z = np.array([z])
        *others, shift = self.shifts
        if not others:
            return shift
        if others == [0.0]:
            # The shift times the probability that the unit was sampled, given z.
            log_joint = shift * (z - shift / 2) + math.log(self.probs[1])
            log_prob = log_joint - float(self.loss(at_z)[0])
            return shift * math.exp(min(log_prob, 0.0))
        _, slope = self._loss_and_slope(at_z)
        return float(slope[0])

    def _loss_and_slope(self, z: Array) -> tuple[Array, Array]:
        """Return the loss and its derivative at many ``z``, block by block; quick where ``z`` is sorted."""
        loss, slope = np.empty_like(z), np.empty_like(z)
        for first in range(0, z.size, _BLOCK):
            block = slice(first, first + _BLOCK)
            loss[block], slope[block] = self._block(z[block])
        return loss, slope

    def _block(self, z: Array) -> tuple[Array, Array]:
        """Return loss and derivative of one block, leaving out shifts that are negligible over all of its ``z``.

        A shift mu of probability p adds p exp(mu z - mu²/2) to e^loss, so these terms decide what is negligible.
        """
        shifts, probs, log_probs = self._arrays
        # The terms' logarithms at the smallest and at the largest z. A larger shift matters most at the upper end, a
        # smaller one at the lower end.
        at_lowest = log_probs + shifts * np.min(z) - shifts**2 / 2
        at_highest = log_probs + shifts * np.max(z) - shifts**2 / 2
        first = int(np.flatnonzero(at_lowest > np.max(at_lowest) - _NEGLIGIBLE)[0])
        last = int(np.flatnonzero(at_highest > np.max(at_highest) - _NEGLIGIBLE)[-1])
        kept = slice(first, max(last, first) + 1)
        exponents = shifts[kept, None] * z - (shifts[kept, None] ** 2 / 2)
        logs = exponents + log_probs[kept, None]
        top = np.max(logs, axis=0)
        weights = np.exp(logs - top)
        total = np.sum(weights, axis=0)
        loss = top + np.log(total)
        # Near 0 the logarithm of a sum of weights would lose the loss's digits.
        near = np.flatnonzero((np.max(exponents, axis=0) < _FAR) & (loss > -0.5) & (loss < 1))
        if near.size:
            left_out = math.fsum(probs) - math.fsum(probs[kept])
            loss[near] = np.log1p(probs[kept] @ np.expm1(exponents[:, near]) - left_out)
        return loss, (shifts[kept] @ weights) / total

    @functools.cached_property
    def _arrays(self) -> tuple[Array, Array, Array]:
        probs = np.asarray(self.probs)
        return np.asarray(self.shifts), probs, np.log(probs)

    def _poisson_loss(self, z: Array) -> Array:
        """Return the loss of shifts 0 and mu, log(1 - p + p e^x) with x = mu z - mu²/2, so that it keeps its digits."""
        prob, mu = self.probs[1], self.shifts[1]
        exponent = mu * z - mu * mu / 2
        # The first keeps the digits of a small loss, also where a small probability meets a large exponent.
        near = np.log1p(prob * np.expm1(np.minimum(exponent, _FAR)))
        far = exponent + math.log(prob) + np.log1p((1 - prob) / prob * np.exp(-np.maximum(exponent, _FAR)))
        loss = np.where(exponent < _FAR, near, far)
        if prob <= 0.5:
            return loss
        # Far below 0 the logarithm's argument would be a difference of nearly equal numbers.
        low = np.logaddexp(math.log(self.probs[0]), math.log(prob) + np.minimum(exponent, 0.0))
        return np.where(exponent < -0.5, low, loss)

    def inverse_loss(self, loss: Array) -> Array:
        """Return the ``z`` at which the loss has given increasing values; minus infinity at or below its infimum."""
        if len(self.shifts) == 1:
            return loss / self.shifts[0] + self.shifts[0] / 2
        inside = loss > self.infimum
        values = loss[inside]
        if self.shifts[0] == 0 and len(self.shifts) == 2:
            prob, mu = self.probs[1], self.shifts[1]
            # Solve 1 - p + p e^x = e^loss for x, in a form for loss < 30 and in one that does not overflow above.
            # expm1(loss)/prob > -1 mathematically; rounding at the infimum must not leave the domain of log1p.
            near = np.log1p(np.maximum(np.expm1(np.minimum(values, 30.0)) / prob, -1 + 2**-53))
            far = values - math.log(prob) + np.log1p(-(1 - prob) * np.exp(-np.maximum(values, 30.0)))
            roots = np.where(values < 30, near, far) / mu + mu / 2
        else:
            roots = self._invert_numerically(values)
        return np.concatenate([np.full(int(np.count_nonzero(~inside)), -math.inf), roots])

    def _invert_numerically(self, values: Array) -> Array:
        """Return the ``z`` of each of the ascending loss values, by Newton steps that fall back to bisection.

        Each root lies between its ``left`` and ``right``, which every evaluation brings closer.
        """
        low, high = -40.0, 1.0
        while values.size and float(self.loss(np.array([high]))[0]) < values[-1]:
            high *= 2
        grid = np.linspace(low, high, 4096)
        left = np.full_like(values, low)
        right = np.full_like(values, high)
        roots = np.interp(values, self.loss(grid), grid)
        unsettled = np.arange(values.size)
        for _ in range(60):
            if not unsettled.size:
                break
            z = roots[unsettled]
            loss, slope = self._loss_and_slope(z)
            excess = loss - values[unsettled]
            right[unsettled] = np.where(excess > 0, z, right[unsettled])
            left[unsettled] = np.where(excess > 0, left[unsettled], z)
            newton = z - excess / np.maximum(slope, 1e-300)
            within = (newton >= left[unsettled]) & (newton <= right[unsettled])
            roots[unsettled] = np.where(within, newton, (left[unsettled] + right[unsettled]) / 2)
            # Newton's error is of the order of the square of its last step.
            unsettled = unsettled[~within | (np.abs(newton - z) >= 1e-8)]
        return np.maximum.accumulate(roots) if roots.size else roots

    def tail_quantile(self, log_tail: float) -> float:
        """Return a ``z`` that Q exceeds with a log probability of at most ``log_tail``, and close to it."""
        shifts, _, log_probs = self._arrays

        def excess(z: float) -> float:
            return log_sum(log_probs + special.log_ndtr(shifts - z)) - log_tail

        reach = -float(special.ndtri_exp(min(log_tail, -1.0)))
        high = reach + self.shifts[-1]  # right if all of Q had the largest shift
        if len(self.shifts) == 1 or excess(0.0) <= 0:
            return high
        return min(bracketed_root(excess, 0.0, high + 1e-9, xtol=1e-4) + 1e-3, high)

    def log_tail(self, z: float, *, under_q: bool, above: bool) -> float:
        """Return log of the probability, under Q or else P, of lying above ``z``, or else below."""
        sign = 1.0 if above else -1.0
        if not under_q:
            return float(special.log_ndtr(-sign * z))
        shifts, _, log_probs = self._arrays
        return log_sum(log_probs + special.log_ndtr(sign * (shifts - z)))


@dataclasses.dataclass(frozen=True)
class Composition:
    """Independent steps with their counts, in an order that does not depend on how the event was written.

    Attributes:
        phases: pairs of a step and a positive count; all plain Gaussian steps are merged into one step of count one,
            which is exact because normal noise at standard deviations ``s_j`` composes to ``1 / sqrt(sum 1/s_j^2)``.
        non_private: whether some part releases its input in the clear.
    """

    phases: tuple[tuple[MixtureStep, int], ...]
    non_private: bool = False

    @property
    def num_steps(self) -> int:
        """The total count."""
        return sum(count for _, count in self.phases)


def composition(event: dp_accounting.DpEvent) -> Composition:
    """Return the normal form of an event for add-or-remove-one.

    Raises:
        UnsupportedEventError: if some part is not Gaussian noise on a (Poisson-sampled or mixture) sum; by name.
        ValueError: if the event is malformed, or its noise beyond float64.
    """
    check_event(event)
    counts: Counter[MixtureStep] = Counter()
    non_private = _collect(event, 1, counts)
    plain = [(step, count) for step, count in counts.items() if len(step.shifts) == 1]
    phases = [(step, count) for step, count in counts.items() if len(step.shifts) > 1]
    if plain:
        shift = math.sqrt(math.fsum(count * step.shifts[0] ** 2 for step, count in plain))
        phases.append((MixtureStep((shift,), (1.0,)), 1))
    return Composition(tuple(sorted(phases)), non_private)


def _collect(event: dp_accounting.DpEvent, count: int, counts: Counter[MixtureStep]) -> bool:
    """Add the steps of ``count`` times the event to ``counts``; return whether a part of it has no noise at all."""
    match event:
        case dp_accounting.NoOpDpEvent():
            return False
        case dp_accounting.NonPrivateDpEvent():
            return count > 0
        case dp_accounting.SelfComposedDpEvent():
            return _collect(event.event, count * event.count, counts) if event.count else False
        case dp_accounting.ComposedDpEvent():
            return any([_collect(part, count, counts) for part in event.events])  # a list: every part is counted
        case dp_accounting.GaussianDpEvent():
            return _add(counts, count, event.noise_multiplier, [1.0], [1.0])
        case dp_accounting.PoissonSampledDpEvent(event=dp_accounting.GaussianDpEvent() as inner):
            q = event.sampling_probability
            return _add(counts, count, inner.noise_multiplier, [0.0, 1.0], [1 - q, q])
        case dp_accounting.dp_event.MixtureOfGaussiansDpEvent():
            return _add(counts, count, event.standard_deviation, event.sensitivities, event.sampling_probs)
        case _:
            raise UnsupportedEventError(f"{type(event).__name__} has no form as Gaussian noise on a sampled sum")


def _add(
    counts: Counter[MixtureStep],
    count: int,
    noise: float,
    sensitivities: Sequence[float],
    probs: Sequence[float],
) -> bool:
    """Add ``count`` steps of Gaussian noise on a sum to ``counts``; return whether they are without noise.

    Args:
        counts: step → how often it was done so far.
        count: how often this one was done.
        noise: standard deviation of the noise.
        sensitivities: by how much the unit moves the sum, one value for each case.
        probs: the probability of each case.
    """
    merged: dict[float, float] = {}  # sensitivity → probability of all its cases
    for sensitivity, prob in zip(sensitivities, probs, strict=True):
        if prob > 0:
            merged[float(sensitivity)] = merged.get(float(sensitivity), 0.0) + float(prob)
    total = math.fsum(merged.values())
    if abs(total - 1) > 2**-51:
        # The rounding of many weights is spread over them; a sampling probability and its complement stay as they are.
        merged = {sensitivity: prob / total for sensitivity, prob in merged.items()}
    pairs = sorted(merged.items())
    largest = max(merged, default=0.0)
    if largest == 0:
        return False  # the unit never moves the sum: nothing is released about it
    if noise == 0:
        return True
    if not _SMALLEST_SHIFT < largest / noise < 1 / _SMALLEST_SHIFT:
        raise ValueError(f"a sensitivity of {largest:g} with noise {noise:g} leaves float64's range")
    counts[MixtureStep(tuple(s / noise for s, _ in pairs), tuple(p for _, p in pairs))] += count
    return False
