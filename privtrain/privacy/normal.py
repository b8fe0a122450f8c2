"""Standard normal numbers of unlimited precision, computed to as many digits as a comparison needs.

X = Φ⁻¹(U), where U is uniform on (0, 1) with the binary digits of a key stream: 64 at first, then 64 at a time.
:func:`quantiles` gives X in float64 within a stated margin. :func:`is_below` decides X < z without error, by comparing
the digits of U with Φ(z) in as high a precision as it takes (Ziv 1991, "Fast evaluation of elementary mathematical
functions with correctly rounded last bit").
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import torch

from privtrain.errors import GuaranteeLost

#: Up to this |x|, :func:`quantiles` is within ``NEAR_MARGIN`` of every X that the 64 digits allow. See there.
NEAR, NEAR_MARGIN = 3.0, 2.0**-46
#: The same further out, where 64 digits of U say less about X. Beyond ``FAR`` nothing is promised.
FAR, FAR_MARGIN = 6.0, 2.0**-36

_SIGN = -(1 << 63)
#: Digits of U that come at a time, and digits that Φ is computed to beyond those it is compared in.
_CHUNK_BITS, _GUARD_BITS = 64, 32


def quantiles(bits: torch.Tensor) -> torch.Tensor:
    """Return X in float64, in the shape and on the device of the first 64 binary digits of U.

    What the margins rest on, for X anywhere in the interval that the digits leave: half that interval's width, at most
    2**-65 / φ(x), which is 2**-57 at 3 and 2**-37.6 at 6; rounding U to float64, at most 1.3 * 2**-52; and the error of
    ``torch.special.ndtri``, three rational approximations (Cephes) with 4.6e-16 to 7.2e-16 relative error, so 2**-48.6
    at 3 and 2**-47.6 at 6. The sum stays three times below each margin. Devices may differ in the last bits, within the
    margins. The tests compare it with mpmath densely, and :func:`check_quantiles` the installed ndtri of a device at
    points that cover all three approximations.

    Args:
        bits: int64 of any shape, read as unsigned.
    """
    # min(U, 1 - U), which float64 holds to its last digit where it is small: bits of the upper half are flipped.
    folded = bits.bitwise_xor(bits >> 63).double().add_(0.5).mul_(2.0**-64)
    x = torch.special.ndtri(folded)
    x.view(torch.int64).bitwise_xor_(bits & _SIGN)  # the sign bit of the float: X is positive in the upper half
    return x


@functools.cache
def check_quantiles(device: torch.device) -> None:
    """Compare :func:`quantiles` with Φ at 80 points, once for each device of a process.

    Raises:
        GuaranteeLost: if the device's ndtri is further off than a quarter of the margins.
    """
    mp = mpmath.mp.clone()
    mp.prec = 160
    # U = bits / 2**64 from 2**-2 down to 2**-30, where X is about -6.
    bits = (2.0 ** (64 - torch.arange(2, 30, 0.35, dtype=torch.float64))).long()
    for chosen, x in zip(bits.tolist(), quantiles(bits.to(device)).tolist(), strict=True):
        # What X is off by is what Φ(X) is off by, over Φ's slope.
        error = abs(mp.ncdf(x) - (mp.mpf(chosen) + 0.5) / 2**64) / mp.npdf(x)
        if not error <= (NEAR_MARGIN if abs(x) <= NEAR else FAR_MARGIN) / 4:
            raise GuaranteeLost(
                f"torch.special.ndtri on {device} is wrong by {float(error):.3g} at {x:g}, too much for exact noise; "
                "install another torch"
            )


def is_below(first: int, more: Callable[[int], int], z: Fraction) -> bool:
    """Return whether X < z, for certain: whether U < Φ(z).

    Compares their leading binary digits, as integers; while they are within one of each other, 64 more are drawn.

    Args:
        first: the first 64 digits of U as an integer.
        more: number n → the n-th next 64 digits, from 0; it must give the same ones whenever it is asked.
        z: where to compare.
    """
    digits, num_digits = first, _CHUNK_BITS
    mp = mpmath.mp.clone()
    while True:
        # z to `prec` digits moves Φ by at most |z| φ(z) 2**-prec; the guard covers that and mpmath's own rounding.
        mp.prec = num_digits + _GUARD_BITS
        bound = int(mp.floor(mp.ldexp(_cdf(mp, z), num_digits)))
        if digits < bound - 1:
            return True
        if digits > bound + 1:
            return False
        num_more = num_digits // _CHUNK_BITS - 1  # how often more digits were drawn so far
        digits = digits << _CHUNK_BITS | more(num_more)
        num_digits += _CHUNK_BITS


def _cdf(mp: Any, z: Fraction) -> Any:
    """Return Φ(z), to the digits that ``mp`` is set to."""
    return mp.ncdf(mp.mpf(z.numerator) / mp.mpf(z.denominator))


def nearest(estimate: float | int, is_under: Callable[[int], bool]) -> int:
    """Return the smallest integer n for which ``is_under(n)``; fast if that is near ``estimate``.

    ``is_under`` is false for all smaller integers and true from there on. The search doubles its reach from the
    estimate until the answer is between ``low`` (false) and ``high`` (true), then bisects.
    """
    n = math.floor(estimate)
    reach = 1
    if is_under(n):
        while is_under(n - reach):
            n, reach = n - reach, 2 * reach
        low, high = n - reach, n
    else:
        while not is_under(n + reach):
            n, reach = n + reach, 2 * reach
        low, high = n, n + reach
    while high - low > 1:
        middle = (low + high) // 2
        if is_under(middle):
            high = middle
        else:
            low = middle
    return high
