"""Closed forms at many digits with mpmath: a reference that shares no code, and no formula, with the accountants.

A step is ``(shifts, probs)``: P = N(0, 1) against Q = sum_i p_i N(shift_i, 1), as exact rationals of the floats given.
The weight of a shift of 0 is one minus the others', so that a sampling probability is exact. Differences are taken as
they stand; the working precision grows until that is harmless.
"""

import mpmath as mp

DIGITS = 60


def _cdf(x):
    return mp.erfc(-x / mp.sqrt(2)) / 2


def _step(shifts, probs):
    shifts, probs = [mp.mpf(s) for s in shifts], [mp.mpf(p) for p in probs]
    if shifts[0] == 0:
        probs[0] = 1 - mp.fsum(probs[1:])
    return shifts, [p / mp.fsum(probs) for p in probs]


def _loss(shifts, probs, z):
    return mp.log(mp.fsum(p * mp.exp(s * z - s * s / 2) for s, p in zip(shifts, probs, strict=True)))


def _cutting_point(shifts, probs, loss):
    """Where the loss takes a value; None at or below its infimum."""
    if shifts[0] == 0 and loss <= mp.log(probs[0]):
        return None
    if len(shifts) == 1:
        return loss / shifts[0] + shifts[0] / 2
    if len(shifts) == 2 and shifts[0] == 0:
        return mp.log((mp.exp(loss) - probs[0]) / probs[1]) / shifts[1] + shifts[1] / 2
    low, high = mp.mpf(-1), mp.mpf(1)
    while _loss(shifts, probs, low) > loss:
        low *= 2
    while _loss(shifts, probs, high) < loss:
        high *= 2
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if _loss(shifts, probs, middle) < loss else (low, middle)
    return mp.findroot(lambda z: _loss(shifts, probs, z) - loss, (low, high), solver="anderson", tol=mp.eps**1.5)


def _signed_delta(shifts, probs, epsilon, add):
    z = _cutting_point(shifts, probs, -epsilon if add else epsilon)
    if z is None:
        return mp.mpf(0), mp.mpf(0)
    sign = 1 if add else -1
    under_p = _cdf(sign * z)
    under_q = mp.fsum(p * _cdf(sign * (z - s)) for s, p in zip(shifts, probs, strict=True))
    first, second = (under_p, under_q) if add else (under_q, under_p)
    return first - mp.exp(epsilon) * second, first


def _to_sixty_digits(signed):
    """The value of ``signed() = (value, first term)`` at a precision at which their cancelling leaves 60 digits."""
    digits = DIGITS + 40
    while digits < 10_000:
        with mp.workdps(digits):
            value, first = signed()
            if value == first or value > first * mp.mpf(10) ** (DIGITS + 20 - digits):
                return value
        digits *= 2
    raise ArithmeticError("the difference cancels to ten thousand digits")


def step_delta(shifts, probs, epsilon, *, add):
    """Delta of one step in one direction at an exact float ``epsilon``, to 60 digits."""
    return _to_sixty_digits(lambda: _signed_delta(*_step(shifts, probs), mp.mpf(epsilon), add))


def worst_delta(shifts, probs, epsilon):
    """The larger of both directions."""
    return max(step_delta(shifts, probs, epsilon, add=add) for add in (False, True))


def gaussian_delta(shift_squared, epsilon):
    """Delta of any composition of plain Gaussian steps, whose squared shifts sum to ``shift_squared`` (an mpf)."""

    def signed():
        shift = mp.sqrt(shift_squared)
        x = mp.mpf(epsilon) / shift
        first = _cdf(shift / 2 - x)
        return first - mp.exp(mp.mpf(epsilon)) * _cdf(-shift / 2 - x), first

    return _to_sixty_digits(signed)
