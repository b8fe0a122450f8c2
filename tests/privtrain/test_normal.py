"""A normal number with as many digits as a question needs: within its margin in float64, and never wrong when asked."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis
import mpmath
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from privtrain.errors import GuaranteeLost
from privtrain.privacy import normal

MP = mpmath.mp.clone()
MP.prec = 160


def series_cdf(z: Fraction, num_bits: int) -> int:
    """floor-ish 2**num_bits Φ(z) in integers alone: 1/2 + φ(z) Σ z**(2n+1) / (2n+1)!!, all terms of one sign."""
    if z < 0:
        return (1 << num_bits) - series_cdf(-z, num_bits)
    work = num_bits + 120
    scaled = int(z * 2**work)
    square = scaled * scaled >> work
    term, total, n = scaled, scaled, 1
    while term:
        term = (term * square >> work) // (2 * n + 1)
        total, n = total + term, n + 1
    with mpmath.workprec(work + 40):  # exp and pi of integers are what mpmath is asked for here, not erfc
        density = int(
            mpmath.floor(mpmath.ldexp(mpmath.exp(-(mpmath.mpf(z.numerator) ** 2) / z.denominator**2 / 2), work))
        )
        density = int(density / mpmath.sqrt(2 * mpmath.pi))
    return ((1 << work >> 1) + (density * total >> work)) >> (work - num_bits)


def quantiles(bits: np.ndarray) -> np.ndarray:
    return normal.quantiles(torch.from_numpy(bits.view(np.int64))).numpy()


def error_of(bits: int, x: float, *, end: int) -> float:
    """How far x is from Φ⁻¹ at an end of the interval that the digits leave; a Newton step from x is exact enough."""
    p = MP.mpf(bits + end) / 2**64
    if not 0 < p < 1:
        return 0.0
    return float(abs((MP.ncdf(x) - p) / MP.npdf(x)))


def dense_bits(num: int) -> np.ndarray:
    """Digits at evenly spaced quantiles within FAR, on both sides, with the ends of ndtri's three pieces."""
    x = np.linspace(-normal.FAR, 0, num // 2)
    p = np.concatenate([[float(MP.ncdf(v)) for v in x], np.exp(-2) * (1 + np.linspace(-1e-13, 1e-13, 9))])
    lower = np.array([int(v * 2**64) for v in p if 0 < v < 0.5], dtype=np.uint64)
    return np.concatenate([lower, ~lower])


@pytest.mark.parametrize("num", [3_000, pytest.param(200_000, marks=pytest.mark.campaign)])
def test_quantiles_are_well_within_their_margins(num):
    bits = dense_bits(num)
    worst = {normal.NEAR: 0.0, normal.FAR: 0.0}
    for chosen, x in zip(bits.tolist(), quantiles(bits).tolist(), strict=True):
        reach = normal.NEAR if abs(x) <= normal.NEAR else normal.FAR
        worst[reach] = max(worst[reach], error_of(chosen, x, end=0), error_of(chosen, x, end=1))
    assert worst[normal.NEAR] < normal.NEAR_MARGIN / 3
    assert worst[normal.FAR] < normal.FAR_MARGIN / 2


def test_quantiles_are_antisymmetric_and_finite_at_the_ends():
    bits = np.array([0, 1, 2**62, 2**63 - 1], dtype=np.uint64)
    assert np.array_equal(quantiles(bits), -quantiles(~bits))
    assert quantiles(bits)[0] == pytest.approx(-9.16, abs=0.01)


def test_a_wrong_ndtri_is_refused(monkeypatch):
    """Off by one part in 10**12, as a float32 detour or a fast approximation would be."""
    original = torch.special.ndtri
    monkeypatch.setattr(torch.special, "ndtri", lambda p: original(p) * (1 + 1e-12))
    normal.check_quantiles.cache_clear()
    with pytest.raises(GuaranteeLost, match="ndtri on cpu is wrong"):
        normal.check_quantiles(torch.device("cpu"))
    monkeypatch.undo()
    normal.check_quantiles(torch.device("cpu"))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    z=st.fractions(-9, 9, max_denominator=10**9), offset=st.integers(-3, 3), tail=st.integers(0, 2**64 - 1)
)
def test_comparison_is_right_within_a_digit_of_the_edge(z, offset, tail):
    """Digits that agree with Φ(z) to the 64th or differ by a little: the next 64 decide. Φ by integers is the judge."""
    exact = series_cdf(z, 128)
    first = min(max((exact >> 64) + offset, 0), 2**64 - 1)
    asked = []

    def more(number: int) -> int:
        asked.append(number)
        return tail if number == 0 else 2**63

    if abs((first << 64 | tail) - exact) > 4:
        assert normal.is_below(first, more, z) == ((first << 64 | tail) < exact)
        assert set(asked) <= {0, 1}


def test_long_equal_digits_are_drawn_until_they_differ():
    z = Fraction(3, 7)
    exact = series_cdf(z, 320)
    for last, expected in ((exact - 2**20, True), (exact + 2**20, False)):
        digits = [last >> 64 * place & (2**64 - 1) for place in range(4, -1, -1)]
        assert normal.is_below(digits[0], lambda number, digits=digits: digits[number + 1], z) is expected


@hypothesis.given(answer=st.integers(-(10**12), 10**12), estimate=st.floats(-1e6, 1e6))
def test_the_nearest_integer_is_found_from_any_estimate(answer, estimate):
    num_asked = 0

    def is_under(n: int) -> bool:
        nonlocal num_asked
        num_asked += 1
        return n >= answer

    assert normal.nearest(estimate, is_under) == answer
    assert num_asked <= 4 + 2 * math.log2(2 + abs(answer - estimate))
