"""The public fixed-point grid of all sums over units: integers, so that addition is exact in any order.

A clipped contribution is rounded towards zero to a multiple of ``2**exponent`` and added as int64. Rounding towards
zero never lengthens a vector, and integer addition has no rounding, so the sum of a step does not depend on the order
of the units, on microbatches, ranks or backends, and one unit moves it by no more than its own contribution.
"""

from __future__ import annotations

import math

#: Bits of a clipping norm's worth below the binary point: the grid is between C * 2**-41 and C * 2**-40.
FRACTION_BITS = 40
# A unit adds at most 2**41 to a coordinate, so int64 holds the sum of ``privtrain.config.privacy.MAX_UNITS`` units.

#: How much longer than its bound a clipped contribution may be, relative to it: what rounding in factors, products and
#: norms adds at most (:mod:`privtrain.clipping.exact_sum`). The noise is scaled for that.
SLACK = 1e-5


def grid_exponent(clipping_norm: float) -> int:
    """Return the exponent e of the grid 2**e for contributions of norm at most C = ``clipping_norm``.

    2**e is 2**-40 times the largest power of two that is at most C.
    """
    return math.frexp(clipping_norm)[1] - 1 - FRACTION_BITS
