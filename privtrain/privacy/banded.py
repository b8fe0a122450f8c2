"""Strategy matrices of correlated noise: banded Toeplitz, with sensitivity, inverse, workload and predicted error.

**Mechanism.** With the clipped sums of T steps as the rows of S, what is released is a function of C S + σ X, where C
is lower triangular with b bands and X is standard normal. What training gets is S + σ C⁻¹ X: noise of later steps takes
back part of the noise of earlier ones, so sums over steps, which is what a model is made of, are less noisy.

**Sensitivity.** A unit that joins step t moves the rows t to t + b - 1 of C S by column t of C times its clipped
gradient: by at most the norm of the column times the clipping norm. Its steps are at least b apart
(:class:`privtrain.privacy.sampling.CyclicPoisson`), so no two of its steps move one row. Hence the run is ⌈T/b⌉
compositions of a Gaussian, one for each round of b steps, in each of which the unit joins with probability b·q
(Choquette-Choo et al. 2023, arXiv 2306.08153, theorem 4 and lemma 1; adaptive steps are covered, since C is lower
triangular: Denisov et al. 2022, arXiv 2202.08312, theorem 2.1).

**Auxiliary sums** that are released beside the gradient keep noise of their own in every step: the strategy of both
together has the blocks C and identity. A unit joins one step of a round. So in a round it moves the rows of C S by the
column norm times its gradient's bound, and one number of each sum by that sum's bound. Per unit of noise the squares
add up: a round is one Gaussian of 1/μ² = 1/μ_gradient² + Σ 1/μ_sum², as a step is where noise is independent. A
clipping norm that follows a released count is refused: later rows of a round would need noise for its largest norm.

**Relation.** The paper has zero-out. Here group and sample of a unit are coins of its own and the divisor is a constant
of the plan, so a unit that is removed is a unit whose gradients are zero: add-or-remove one has the same event.

**Choice of C.** Nothing here looks at data: C follows from the plan and the optimizer's settings. Toeplitz with first
coefficient 1, from the banded square root (Fichtenberger et al. 2022, arXiv 2202.11205; cut to b bands: Kalinin and
Lampert 2024, arXiv 2405.13763), then optimised for the workload (Choquette-Choo et al. 2023, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy import optimize, signal

from privtrain.config.privacy import MAX_BANDS
from privtrain.config.training import TrainingSection

#: Coefficients are whole multiples of 2**-FRACTION_BITS, so that C S is exact on a grid (:mod:`.correlated`).
FRACTION_BITS = 12
#: ``num_bands: auto`` tries no more.
_MOST_TRIED = 64
#: Coefficients stay below this, as integer arithmetic needs; the best ones are below 2.
_LARGEST = 8.0
#: Steps that the predicted error is computed from; longer runs are compressed to as many.
_MOST_STEPS = 2048


@dataclasses.dataclass(frozen=True)
class Strategy:
    """A lower-triangular Toeplitz matrix C with few bands.

    Attributes:
        coefficients: of the first column, from the diagonal on; the first is 1, all are multiples of
            2**-FRACTION_BITS. One alone is independent noise.

    Raises:
        ValueError: if these are no such coefficients.
    """

    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        values = self.coefficients
        if not isinstance(values, tuple) or not 1 <= len(values) <= MAX_BANDS or values[0] != 1.0:
            raise ValueError(f"a strategy has 1 to {MAX_BANDS} coefficients, the first of them 1")
        if not all(_is_coefficient(value) for value in values):
            raise ValueError(f"coefficients are multiples of 2**-{FRACTION_BITS} below {_LARGEST:g}")

    @classmethod
    def rounded(cls, coefficients: Sequence[float] | np.ndarray) -> Strategy:
        """Return the strategy whose coefficients are nearest to the given ones."""
        return cls(tuple(float(round(float(c) * 2**FRACTION_BITS)) / 2**FRACTION_BITS for c in coefficients))

    @property
    def num_bands(self) -> int:
        """b: a step's noise depends on that of the b - 1 steps before it."""
        return len(self.coefficients)

    @property
    def column_norm(self) -> float:
        """Sensitivity of C S to a unit of clipping norm 1 that joins steps at least ``num_bands`` apart, rounded up."""
        square = sum(Fraction(c) ** 2 for c in self.coefficients)
        norm = math.sqrt(square)  # of a fraction, in float64
        while Fraction(norm) ** 2 < square:
            norm = math.nextafter(norm, math.inf)
        return norm

    def matrix(self, num_steps: int) -> np.ndarray:
        """Return C: [steps, steps] float64."""
        column = np.zeros(num_steps)
        known = self.coefficients[:num_steps]
        column[: len(known)] = known
        return _toeplitz(column)

    def inverse_column(self, num_steps: int) -> np.ndarray:
        """Return the first column of C⁻¹, which is Toeplitz too: [steps] float64."""
        return _inverse_column(np.array(self.coefficients), num_steps)

    def error(self, workload: Workload) -> float:
        """Return the noise of the trained weights, as a root mean square over steps, per unit of σ: |A C⁻¹|_F / √T.

        A is the workload's matrix, T its number of steps. Multiply by σ, which is the noise multiplier times
        ``column_norm`` times the clipping norm.
        """
        # C⁻¹ is Toeplitz, so its first column d is all of it, and |A C⁻¹|²_F / T = dᵀ Q d with Q the workload's form.
        form = workload.form
        inverse = self.inverse_column(len(form))
        return math.sqrt(float(inverse @ form @ inverse))

    def noise_kept(self, workload: Workload) -> float:
        """Return how much of the steps' noise stays in the trained weights, relative to independent noise.

        The independent noise compared with is as large in the steps, in root mean square. In (0, 1] for strategies made
        to cancel noise; 1 for independent noise.
        """
        variances = np.cumsum(self.inverse_column(workload.num_steps) ** 2)  # of each step's noise, per unit of σ²
        noise_of_steps = math.sqrt(float(variances.mean()))
        return self.error(workload) / (INDEPENDENT.error(workload) * noise_of_steps)


def _is_coefficient(value: object) -> bool:
    """Return whether ``value`` is a float below ``_LARGEST`` in size, and a multiple of 2**-FRACTION_BITS."""
    return type(value) is float and abs(value) < _LARGEST and (value * 2**FRACTION_BITS).is_integer()


INDEPENDENT = Strategy((1.0,))


@dataclasses.dataclass(frozen=True)
class Workload:
    """The linear part of the optimizer: what the noise of steps amounts to in the weights (A, lower triangular).

    m_t = momentum · m_{t-1} + (1 - momentum) · g_t and θ_t = (1 - decay · s_t) · θ_{t-1} - s_t · m_t. Division by
    AdamW's second moment is not linear and is taken as constant.

    :meth:`of` leaves AdamW's momentum out: a strategy made for it puts its noise into fast alternations, which momentum
    averages away, and the second moment does not. On a softmax regression (ε 4, 200 steps, 4 to 40 bands, learning rate
    tuned for each) it was no better than one made for the schedule alone, with three times the noise in each step.

    Attributes:
        step_sizes: s_t, relative to the largest.
        momentum: share of the last step's average that is kept.
        decay: weight decay times the largest learning rate.
    """

    step_sizes: tuple[float, ...]
    momentum: float = 0.0
    decay: float = 0.0

    @classmethod
    def of(cls, num_steps: int, training: TrainingSection | None = None) -> Workload:
        """Return the workload of a run's optimizer and learning-rate schedule; plain sums over steps without one.

        A run of more than ``_MOST_STEPS`` steps is compressed to so many, each with the weight decay of several.
        """
        num = min(num_steps, _MOST_STEPS)
        if training is None:
            return cls((1.0,) * num)
        scale = num_steps / num
        rates = [training.learning_rate_at(int(i * scale), num_steps) / training.learning_rate for i in range(num)]
        decay = training.weight_decay * training.learning_rate * scale
        return cls(tuple(rates), decay=min(decay, 1.0))

    @property
    def num_steps(self) -> int:
        """Steps that the error is computed from."""
        return len(self.step_sizes)

    def matrix(self) -> np.ndarray:
        """Return A, [steps, steps]: row t is what each step's gradient amounts to in the weights after step t.

        The optimizer's two recursions, run on vectors with an entry for each step's gradient.
        """
        rows = np.zeros((self.num_steps, self.num_steps))
        velocity, weights = np.zeros(self.num_steps), np.zeros(self.num_steps)
        for t, size in enumerate(self.step_sizes):
            velocity *= self.momentum
            velocity[t] += 1 - self.momentum
            weights = (1 - self.decay * size) * weights + size * velocity
            rows[t] = weights
        return rows

    @property
    def form(self) -> np.ndarray:
        """Return the matrix Q for which dᵀ Q d = |A D|²_F / T, with D lower triangular, Toeplitz, of first column d.

        So a strategy's squared error is a quadratic form of the first column of its inverse.
        """
        return _form(self)

    @property
    def signal(self) -> float:
        """Return how far gradients of 1 move the weights, as a root mean square over steps."""
        return float(np.sqrt(np.mean(np.square(self.matrix().sum(axis=1)))))


@functools.lru_cache(maxsize=8)
def _form(workload: Workload) -> np.ndarray:
    """Return the matrix Q of :attr:`Workload.form`: [steps, steps]."""
    rows = workload.matrix()
    gram = rows.T @ rows / workload.num_steps
    # Column s of D is d moved down by s, so Q[k, l] is the sum over s of gram[s + k, s + l].
    form = np.zeros_like(gram)
    for offset in range(len(gram)):
        sums = np.cumsum(np.diagonal(gram, offset)[::-1])[::-1]
        index = np.arange(len(sums))
        form[index, index + offset] = form[index + offset, index] = sums
    form.setflags(write=False)
    return form


def square_root(num_bands: int, damping: float = 1.0) -> np.ndarray:
    """Return the first ``num_bands`` coefficients of (1 - x)^(-1/2), the k-th times ``damping ** k``."""
    coefficients = np.ones(num_bands)
    for k in range(1, num_bands):
        coefficients[k] = coefficients[k - 1] * (2 * k - 1) / (2 * k) * damping
    return coefficients


@functools.lru_cache(maxsize=64)
def best_strategy(num_bands: int, workload: Workload) -> Strategy:
    """Return the banded Toeplitz strategy with the least :func:`relative_error`, of at most one band a step.

    Minimised from the damped square roots by BFGS, then by Newton's method, so that machines agree to far more digits
    than are kept; never worse than the best square root.
    """
    num_bands = min(num_bands, workload.num_steps)
    if num_bands == 1:
        return INDEPENDENT
    # The first coefficient is 1; the others are free.
    starts = [Strategy.rounded(square_root(num_bands, damping)) for damping in (1.0, 0.95, 0.8, 0.5)]
    start = min(starts, key=lambda strategy: relative_error(strategy, workload))
    form = workload.form
    with np.errstate(all="ignore"):  # a step too far overflows, and is taken back
        free = optimize.minimize(_loss, start.coefficients[1:], args=(form,), jac=True, method="BFGS").x
        free = _polished(free, form)
    if not np.isfinite(free).all() or np.abs(free).max() >= _LARGEST - 1:
        return start
    best = Strategy.rounded([1.0, *free])
    return best if relative_error(best, workload) < relative_error(start, workload) else start


def relative_error(strategy: Strategy, workload: Workload) -> float:
    """Return the predicted noise of the trained weights at noise multiplier 1 and clipping norm 1."""
    return strategy.column_norm * strategy.error(workload)


def tried_bands(num_steps: int, sampling_prob: float) -> list[int]:
    """Return the numbers of bands that ``num_bands: auto`` compares.

    For each power of two the largest divisor of ``num_steps`` up to that, so that rounds of the bands come out even,
    as long as a group's units can be drawn with ``num_bands`` times ``sampling_prob``.
    """
    largest = min(_MOST_TRIED, num_steps, math.floor(1 / sampling_prob))
    tried = {1}
    for power in range(1, 1 + _MOST_TRIED.bit_length()):
        candidates = range(1, min(largest, 1 << power) + 1)
        # Both conditions hold for 1. The second one again: round-off can make 1 / sampling_prob too large.
        allowed = [b for b in candidates if num_steps % b == 0 and b * sampling_prob <= 1]
        tried.add(max(allowed))
    return sorted(tried)


class _Loss(NamedTuple):
    """A function's value and gradient at one point."""

    value: float
    slope: np.ndarray


def _loss(free: np.ndarray, form: np.ndarray) -> _Loss:
    """Return the logarithm of the squared relative error, and its gradient by the free coefficients.

    Args:
        free: all coefficients but the first, which is 1.
        form: Q of the workload.
    """
    coefficients = np.concatenate([[1.0], free])
    inverse = _inverse_column(coefficients, len(form))
    along = form @ inverse
    error_square, norm_square = float(inverse @ along), float(coefficients @ coefficients)
    # d(C⁻¹) = -C⁻¹ dC C⁻¹, and all are Toeplitz: a change of coefficient k moves C⁻¹'s column by minus that of C⁻¹C⁻¹,
    # k places down.
    inverse_twice = signal.fftconvolve(inverse, inverse)[: len(form)]
    slope_of_error = [
        -2 * float(along[k:] @ inverse_twice[: len(form) - k]) / error_square for k in range(1, len(coefficients))
    ]
    value = math.log(error_square) + math.log(norm_square) if 0 < error_square < math.inf else math.inf
    return _Loss(value, slope=np.array(slope_of_error) + 2 * free / norm_square)


def _polished(point: np.ndarray, form: np.ndarray) -> np.ndarray:
    """Return the minimum of :func:`_loss` next to ``point``, by two steps of Newton's method.

    Where a step would be large or undefined, the point reached so far comes back.
    """
    width = 1e-5  # over which gradients are compared, to get the curvature
    for _ in range(2):
        moves = width * np.eye(len(point))  # one coordinate each
        rises = [_loss(point + move, form).slope - _loss(point - move, form).slope for move in moves]
        curvature = np.array(rises) / (2 * width)
        if not np.isfinite(curvature).all():
            return point
        step = np.linalg.solve((curvature + curvature.T) / 2, _loss(point, form).slope)
        if not np.abs(step).max() < 0.05:
            return point
        point = point - step
    return point


def _inverse_column(coefficients: np.ndarray, num_steps: int) -> np.ndarray:
    """Return the first column of C⁻¹ from the band of C: the impulse response of the inverse filter."""
    impulse = np.zeros(num_steps)
    impulse[0] = 1.0
    return np.asarray(signal.lfilter([1.0], coefficients, impulse))


def _toeplitz(column: np.ndarray) -> np.ndarray:
    """Return the lower-triangular Toeplitz matrix with this first column."""
    steps = np.arange(len(column))
    lag = steps[:, None] - steps[None, :]
    return np.where(lag >= 0, column[np.maximum(lag, 0)], 0.0)
