"""Gaussian noise for every release, gradients and metrics: exact sum in, point of a public grid out.

**What is released.** The sum is an integer vector S on the grid h = 2**exponent, exact (:mod:`.fixed_point`). What
leaves is Y = round((S·h + σX) / g), times g: X is a vector of independent standard normal numbers and g =
2**:func:`noise_exponent` a coarser public grid, about σ / 2**20.

**Why that is the Gaussian mechanism.** For the plan's neighbouring relation one unit moves S·h by at most the
sensitivity that the plan states, C (1 + 1e-5) for a gradient and 1/2 for an auxiliary sum. So S·h + σX with real X
is the Gaussian mechanism of the accountant, and rounding its result to a grid that depends on public constants alone is
post-processing. This needs Y to be *that* rounding: float64 cannot compute S·h + σX, and rounding what it computes
would release the round-off (Mironov 2012, "On significance of the least significant bits for differential privacy";
Haney et al. 2022, arXiv 2207.13793).

**Why Y is exact.** X = Φ⁻¹(U) for a uniform U with infinitely many digits (:mod:`.normal`). S is split in integers into
a multiple of g / h and a remainder, so float64 computes a number t below about 2**24 with a known error: that of
X's margin and six roundings. Where t is further than that from every half-integer, rounding it is certain. Elsewhere
(about once in ten million coordinates) U is compared with Φ at the half-integer in higher precision, with more digits
of U if that does not decide. So the law of Y is the rounded Gaussian's, in every coordinate, step and metric: there is
no failure probability to charge. Y depends on no library's or processor's last bit.

**What is assumed.** That ChaCha20 and HMAC-SHA-256 under a secret key look random (the digits of U are theirs), that
ndtri keeps its margin (tested, and checked at the start), and that mpmath computes Φ to the digits it is asked for.

The noise is a pure function of (:class:`StepNoise`, tensor name, coordinate), and any run of it is cheap to draw alone
(:mod:`.digits`): a rank that owns a run draws that run and nothing else. It is drawn where the sum is, and no device
changes a bit of it: the digits are integers, X is checked to keep its margin on the device, and Y is exact whatever X
is within that.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction

import torch

from privtrain.privacy import normal
from privtrain.privacy.digits import Chunk, digits, for_each_chunk
from privtrain.privacy.layout import Layout, Slot
from privtrain.privacy.secret import SecretKey

#: The public grid of what is released is this many binary digits below the noise's standard deviation.
_DIGITS = 20
#: Bound on the relative rounding of t's terms in float64, with room: six roundings of 2**-53 each.
_ROUNDING = 2.0**-50
_ALL_DIGITS = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class StepNoise:
    """The key of all noise of one step over one sum. Only :func:`privtrain.privacy.sum_digest.bind` makes it."""

    key: SecretKey


def noise_exponent(stddev: float, exponent: int) -> int:
    """Return the exponent of the public grid that is released, given the noise and the exponent of the sum's grid.

    Between σ·2**-21 and σ·2**-20, but never finer than the sum's.
    """
    if stddev == 0:
        return exponent
    return max(exponent, math.frexp(stddev)[1] - 1 - _DIGITS)


def noised(
    total: torch.Tensor, *, exponent: int, stddev: float, noise: StepNoise, name: str, first: int = 0
) -> torch.Tensor:
    """Release an exact sum, or a part of one, with Gaussian noise, as [n] float64 Y·g: see the module.

    Args:
        total: [n] int64 S, in units of 2**exponent; every rank that noises a coordinate must have the same integer.
        exponent: of the sum's grid, a public constant.
        stddev: σ; with 0 nothing is private and the sum itself comes back.
        noise: the key of this step and sum.
        name: of the tensor or metric, different for every vector of the step.
        first: coordinate of the tensor that ``total`` begins at.

    Raises:
        ValueError: if ``stddev`` is no standard deviation.
    """
    released = torch.empty(len(total), dtype=torch.float64, device=total.device)
    # Digits of noise are keyed by name and coordinate. How long the whole tensor is does not count: here it ends with
    # the part.
    end = first + len(total)
    slot = Slot(name=name, shape=(len(total),), start=0, first=first, whole_shape=(end,))
    _release(total, [slot], released, exponent=exponent, stddev=stddev, noise=noise)
    return released


def noised_vector(
    total: torch.Tensor, layout: Layout, *, exponent: int, stddev: float, noise: StepNoise
) -> torch.Tensor:
    """Release the flat fp32 sum of trainable tensors, or of this rank's parts: :func:`noised`, tensor by tensor.

    Call it once a step, after the reduction. Ranks that hold the whole vector all get the same bits; a rank that holds
    parts of tensors draws the noise of its own coordinates, block by block, and no more.

    Args:
        total: the flat int64 sum.
        layout: its tensors, or the parts of them that this rank holds.
        exponent: of the sum's grid.
        stddev: noise_multiplier times the sensitivity of the whole sum.
        noise: the key of this step and sum.
    """
    vector = torch.empty(layout.num_coordinates, dtype=torch.float32, device=total.device)
    _release(total, layout.slots, vector, exponent=exponent, stddev=stddev, noise=noise)
    return vector


def _release(
    total: torch.Tensor,
    slots: Iterable[Slot],
    released: torch.Tensor,
    *,
    exponent: int,
    stddev: float,
    noise: StepNoise,
) -> None:
    """Fill ``released`` with the sum and its noise, chunk by chunk; ``slots`` say whose coordinates these are."""
    if not 0 <= stddev < math.inf:
        raise ValueError(f"stddev is {stddev}; a standard deviation is finite and not negative")
    assert total.dtype == torch.int64
    rounding = ExactRounding(exponent, stddev, total.device) if stddev else None

    def draw(chunk: Chunk) -> None:
        part = total[chunk.place]
        if rounding is None:
            released[chunk.place] = part.double().mul_(2.0**exponent)
        else:
            released[chunk.place] = rounding.apply(part, chunk, noise)

    for_each_chunk(slots, total.device, draw)


class ExactRounding:
    """Exact rounding round((S·h + σX) / g), for one σ and pair of grids.

    With S = a·2**shift + r in integers, it is a + round(t), where t = r·2**-shift + (σ/g)·X.

    Args:
        exponent: of the sum's grid h.
        stddev: σ, not zero.
        device: where sums are.

    Raises:
        GuaranteeLost: if arithmetic on the device does not keep the margins.
    """

    def __init__(self, exponent: int, stddev: float, device: torch.device) -> None:
        normal.check_quantiles(device)
        self._exponent, self._stddev = exponent, stddev
        self._released_exponent = noise_exponent(stddev, exponent)  # of g
        self._shift = self._released_exponent - exponent
        self._scale = math.ldexp(stddev, -self._released_exponent)  # σ/g

        def error_of_t(margin: float, reach: float) -> float:
            """Return a bound on the error of float64 t where |X| is at most ``reach`` and known within ``margin``."""
            return self._scale * margin + _ROUNDING * (self._scale * reach + 2)

        self._near_error = error_of_t(normal.NEAR_MARGIN, normal.NEAR)
        self._far_error = error_of_t(normal.FAR_MARGIN, normal.FAR)

    def apply(self, total: torch.Tensor, chunk: Chunk, noise: StepNoise) -> torch.Tensor:
        """Return Y·g in float64 for the sum of a chunk."""
        whole, rest = self._split(total)
        bits = digits(noise.key, "noise", chunk, total.device)
        x = normal.quantiles(bits)
        t = rest.double().mul_(2.0**-self._shift).add_(x, alpha=self._scale)
        nearest = t.round()
        doubtful = self._doubtful(x, (t - nearest).abs_())
        whole += nearest.long()
        if len(doubtful):
            # Round these few exactly, and put what comes out in the place of float64's.
            decided: list[int] = []
            for index in doubtful.tolist():
                name, coordinate = chunk.coordinate(index)
                first_bits = int(bits[index]) & _ALL_DIGITS  # int64 read as unsigned
                decided.append(
                    self._decide(
                        rest=int(rest[index]),
                        first_bits=first_bits,
                        t=float(t[index]),
                        noise=noise,
                        name=name,
                        coordinate=coordinate,
                    )
                )
            whole[doubtful] += torch.tensor(decided, device=total.device) - nearest[doubtful].long()
        return whole.double().mul_(2.0**self._released_exponent)

    def _split(self, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a and r of S = a·2**shift + r, with 0 ≤ r < 2**shift."""
        if self._shift > 62:  # int64 has no such power of two, and the sum is smaller: r may be negative then
            return torch.zeros_like(total), total
        return total >> self._shift, total & ((1 << self._shift) - 1)

    def _doubtful(self, x: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Return the indices where float64 t may round to another integer than the exact value.

        Args:
            x: float64 X of each coordinate.
            distance: of t from the nearest integer; close to 1/2 it is close to a half-integer.
        """
        candidates = distance >= 0.5 - self._far_error
        lowest, highest = torch.stack(torch.aminmax(x)).tolist()
        if max(-lowest, highest) > normal.FAR:  # there no error is known
            candidates |= x.abs() > normal.FAR
        indices = candidates.nonzero().flatten()
        # Near 0, where X is known better, most of these are certain after all.
        is_certain = (x[indices].abs() <= normal.NEAR) & (distance[indices] < 0.5 - self._near_error)
        return indices[~is_certain]

    def _decide(self, *, rest: int, first_bits: int, t: float, noise: StepNoise, name: str, coordinate: int) -> int:
        """Return the integer nearest to one coordinate's exact t, using as many digits of U as needed.

        Args:
            rest: r.
            first_bits: the first 64 digits of U, as an unsigned integer.
            t: its value in float64.
            noise: the key of the further digits.
            name: the tensor.
            coordinate: the coordinate in it.
        """

        def more(number: int) -> int:
            """Return the 64 digits of U that come after the first 64 and ``number`` times 64 more."""
            return int(noise.key.stream("more noise", name, coordinate).uint64(number + 1)[number])

        def is_under(n: int) -> bool:
            """Return whether t rounds to n or less."""
            # t < n + 1/2  <=>  X < ((n + 1/2)·2**shift - r)·h / σ, of integers and the float64 that σ is.
            edge = Fraction(((2 * n + 1) << self._shift) - 2 * rest, 2) * Fraction(2) ** self._exponent
            return normal.is_below(first_bits, more, edge / Fraction(self._stddev))

        return normal.nearest(t, is_under)
