"""Root finding by bracketing."""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from scipy import optimize


def bracketed_root(
    function: Callable[[float], float], low: float, high: float, *, xtol: float = 1e-12, rtol: float = 1e-14
) -> float:
    """Return a root of a continuous function between two points at which its signs differ (Brent's method)."""
    solver = cast(Any, optimize).brentq
    return float(solver(function, low, high, xtol=xtol, rtol=rtol, maxiter=2000))
