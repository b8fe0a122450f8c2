"""Correlated noise: each step's noise takes back part of the noise of the b - 1 steps before it, exactly.

With strategy C (:mod:`.banded`: banded, Toeplitz, c_0 = 1, coefficients multiples of 2**-F), S_t the exact sum of step
t on the grid h, and σ the plan's noise multiplier times the column norm times the sensitivity:

    z_t = round((σ X_t - u_t) / g) · g + u_t          fresh noise, rounded exactly by :class:`.noise.ExactRounding`
    w_t = round((z_t - Σ_j c_j w_{t-j}) / h) · h      noise of the step
    Y_t = S_t + w_t                                   what is released, rounded to fp32

X_t is standard normal and exact to as many digits as the rounding needs; g is the public grid of that rounding, about
σ / 2**20; u_t is uniform on the multiples of h / 2**F below g. Both are drawn under the key of step t.

**Why that is the matrix mechanism.** Let M_t = (C S)_t + σ X_t, the Gaussian mechanism that is accounted for, with s =
(C S)_t, a multiple of h / 2**F. Then u' = (s + u_t) mod g is uniform on the same multiples and independent of S and X,
and s + z_t = round((M_t - u') / g) · g + u': a function of M_t and of a coin that knows nothing. By induction over t,

    Y_t = S_t + w_t = round((S_t + z_t - Σ_j c_j (Y_{t-j} - S_{t-j})) / h) · h
                    = round((s + z_t - Σ_j c_j Y_{t-j}) / h) · h,

since S_t is on h and commutes with the rounding, and s = S_t + Σ_j c_j S_{t-j}. So Y_t is a function of M_t, of that
coin and of what was released before: post-processing, without any error to charge. It needs all of this to be exact, so
it is done in integers, of 2**-F grid steps; and S_t may depend on all releases before it, as training does.

**Why no checkpoint holds history.** w is a function of keys alone, never of S: it is drawn again from the key of the
generation and the commitments to its sums in the ledger (:func:`privtrain.privacy.sum_digest.chained_noise`), bit for
bit on any number of ranks. Each commitment binds the one before it. So two copies of a run whose sums differed once
never share fresh noise again, also where a later sum is the same: else the noise would cancel and leave c_j times the
old difference in clear.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from privtrain.errors import GuaranteeLost
from privtrain.privacy.banded import FRACTION_BITS, Strategy
from privtrain.privacy.digits import Chunk, digits, for_each_chunk
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import ExactRounding, StepNoise, noise_exponent

_HALF_BITS = 32
#: Noise stays below this in grid steps, and so does every sum: see :mod:`privtrain.clipping.exact_sum`.
_ROOM = 1 << 61


class _GridSteps(NamedTuple):
    """Numbers as multiples of the grid step h, for more bits than int64 has: whole + rest / 2**F, 0 <= rest < 2**F."""

    whole: torch.Tensor
    rest: torch.Tensor


class NoiseHistory:
    """The noise w of the last b - 1 steps on this rank's coordinates, as int64 in steps of the sum's grid h.

    F is ``FRACTION_BITS``: finer parts are counted in 2**-F of a grid step.

    Args:
        strategy: C, of at least two bands.
        layout: the coordinates, as they are noised and stepped here.
        device: where the sums are.
        exponent: of the sums' grid.
        stddev: σ.

    Attributes:
        num_steps: steps whose noise was drawn.
    """

    def __init__(
        self, strategy: Strategy, layout: Layout, device: torch.device, *, exponent: int, stddev: float
    ) -> None:
        assert strategy.num_bands > 1
        assert stddev > 0
        self._layout, self._exponent, self._stddev = layout, exponent, stddev
        # The coefficients c_1, c_2, … as integers, in 2**-F.
        integers = [round(c * 2**FRACTION_BITS) for c in strategy.coefficients[1:]]
        self._coefficients = torch.tensor(integers, dtype=torch.int64, device=device)
        # A ring: the noise of step t is in row t mod (b - 1).
        self._last = torch.zeros(len(integers), layout.num_coordinates, dtype=torch.int64, device=device)
        self.num_steps = 0

    def release(self, total: torch.Tensor, noise: StepNoise) -> torch.Tensor:
        """Return the fp32 vector of the next step: the exact sum with the step's noise.

        Args:
            total: the flat int64 sum, laid out as the history.
            noise: the key of this step and of the sums so far.
        """
        return (total + self.advance(noise)).double().mul_(2.0**self._exponent).float()

    def advance(self, noise: StepNoise) -> torch.Tensor:
        """Draw the next step's noise w, [coordinates] int64 in grid steps, and keep it for the steps that follow.

        On resuming, the noise of earlier steps is drawn again by this, without their sums.

        Raises:
            GuaranteeLost: if the noise outgrows the integers that it is counted in.
        """
        place = self.num_steps % len(self._last)
        # Coefficient j = 1, 2, … belongs to the noise of j steps ago: the rows of the ring in that order.
        rows = [(self.num_steps - j) % len(self._last) for j in range(1, 1 + len(self._last))]
        order = torch.tensor(rows, device=self._last.device)
        vector = torch.empty(self._layout.num_coordinates, dtype=torch.int64, device=self._last.device)
        rounding = ExactRounding(self._exponent - FRACTION_BITS, self._stddev, self._last.device)

        def draw(chunk: Chunk) -> None:
            """Fill a chunk of the vector with z_t less Σ_j c_j w_{t-j}, rounded to the grid."""
            fresh = self._fresh(noise, chunk, rounding)
            taken = self._taken_back(self._last[:, chunk.place][order])
            vector[chunk.place] = _rounded_difference(fresh, taken)

        for_each_chunk(self._layout.slots, self._last.device, draw)
        if len(vector) and int(vector.abs().max()) >= _ROOM:
            raise GuaranteeLost(
                f"the noise of step {self.num_steps} is too large to be counted exactly; set another privacy.num_bands "
                f"than {len(self._last) + 1}"
            )
        self._last[place] = vector
        self.num_steps += 1
        return vector

    def _fresh(self, noise: StepNoise, chunk: Chunk, rounding: ExactRounding) -> _GridSteps:
        """Return z of a chunk's coordinates.

        ``rounding`` has the grid h / 2**F, and rounds to g = 2**bits of its steps.
        """
        fine = self._exponent - FRACTION_BITS  # h / 2**F is 2**fine
        bits = noise_exponent(self._stddev, fine) - fine
        offset = _top_bits(digits(noise.key, "offset", chunk, self._last.device), bits)  # u, in steps of h / 2**F
        rounded = rounding.apply(-offset, chunk, noise)
        points = rounded.mul_(2.0 ** -(fine + bits)).long()  # in steps of g
        if bits < FRACTION_BITS:  # g is finer than h
            fine_steps = (points << bits) + offset
            return _GridSteps(fine_steps >> FRACTION_BITS, fine_steps & ((1 << FRACTION_BITS) - 1))
        # In whole steps of h at once: steps of h / 2**F might not fit into int64.
        whole = (points << (bits - FRACTION_BITS)) + (offset >> FRACTION_BITS)
        return _GridSteps(whole, offset & ((1 << FRACTION_BITS) - 1))

    def _taken_back(self, last: torch.Tensor) -> _GridSteps:
        """Return Σ_j c_j w_{t-j}.

        Args:
            last: [bands - 1, n] the noise w of earlier steps, that of the last step first.
        """
        coefficients = self._coefficients[:, None]
        # By the halves of w, since whole products have up to 75 bits.
        low = (coefficients * (last & ((1 << _HALF_BITS) - 1))).sum(0)
        high = (coefficients * (last >> _HALF_BITS)).sum(0)
        whole = (high << (_HALF_BITS - FRACTION_BITS)) + (low >> FRACTION_BITS)
        return _GridSteps(whole, low & ((1 << FRACTION_BITS) - 1))


def _rounded_difference(fresh: _GridSteps, taken: _GridSteps) -> torch.Tensor:
    """Return ``fresh`` less ``taken``, rounded to whole grid steps."""
    half = 1 << (FRACTION_BITS - 1)  # of a grid step: the shift rounds down
    return fresh.whole - taken.whole + ((fresh.rest - taken.rest + half) >> FRACTION_BITS)


def _top_bits(drawn: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the first ``bits`` of 64 binary digits, as int64 below 2**bits."""
    return (drawn >> (64 - bits)) & ((1 << bits) - 1) if bits else torch.zeros_like(drawn)
