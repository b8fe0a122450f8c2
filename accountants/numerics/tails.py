"""Normal tails in log space, with bounds on their round-off: the one home of both.

Everything about a tail goes through the ratio of Mills, ``m(x) = P(N > x) / phi(x)``. It falls slowly (like 1/x), so
that what two tails have in common, the density, cancels by hand rather than by subtraction, and nothing underflows.
"""

# pyright: strict, reportMissingTypeStubs=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import special

Array = npt.NDArray[np.floating[Any]]

#: Half the distance from 1 to the next float64: the relative error of one rounding.
UNIT = 2.0**-53
LOG_ROOT_TWO_PI = 0.5 * math.log(2 * math.pi)
_LOG_ROOT_HALF_PI = 0.5 * math.log(math.pi / 2)
#: Below it the tail is 1 to float64, and ``erfcx`` would soon overflow.
_LEFT = -20.0


def log_mills(x: Array) -> Array:
    """Return ``log(P(N > x) / phi(x))``, with an absolute error of at most ``mills_error(x)``."""
    right = _LOG_ROOT_HALF_PI + np.log(special.erfcx(np.maximum(x, _LEFT) / math.sqrt(2)))
    return np.where(x >= _LEFT, right, x * x / 2 + LOG_ROOT_TWO_PI)


def mills_error(values: Array) -> Array:
    """Return the error of :func:`log_mills` where it gives ``values``: twice the largest found at 60 digits."""
    return 16 * UNIT * (1 + np.abs(values))


def log_difference(gap: Array) -> Array:
    """Return ``log(1 - e^-gap)``; minus infinity for a gap of 0 or less."""
    gap = np.maximum(gap, 0.0)
    with np.errstate(divide="ignore"):
        return np.where(gap > 0.7, np.log1p(-np.exp(-gap)), np.log(-np.expm1(-gap)))


def log_sum(logs: Array) -> float:
    """Return ``log sum exp``; minus infinity for nothing."""
    top = float(np.max(logs, initial=-math.inf))
    return top if math.isinf(top) else top + math.log(float(np.sum(np.exp(logs - top))))
