"""Find any one parameter of a run for a budget. Only certified upper bounds, covering both directions, may decide.

A cheap certified guide (:mod:`accountants.methods.tilted` at a loose tolerance) finds the root; the accountant that
will be quoted then confirms it, in one to three evaluations, and the last step is always rounding to the safe side: the
returned value was itself evaluated and spends at most the target.

Every function takes a family of events (any sampler, several phases) and any neighbouring relation, but
:func:`calibrate_noise_multiplier`, which builds Poisson-sampled steps. The accountant is by default the one that fits
(:func:`accountants.registry.fitting`).
"""

# pyright: strict, reportMissingTypeStubs=false
from __future__ import annotations

import math
from collections.abc import Callable

import dp_accounting

from accountants.api import certified_upper
from accountants.events import dp_sgd_event, poisson_counterpart
from accountants.methods.tilted import TiltedAccountant
from accountants.numerics.roots import bracketed_root
from accountants.protocol import Accountant, UnsupportedEventError
from accountants.registry import fitting, get_accountant

NeighboringRelation = dp_accounting.NeighboringRelation

#: Noise multipliers are rounded up to this many decimals: readable in a config, and on the safe side.
DECIMALS = 4

#: Values beyond these are not searched: smaller noise builds huge distributions and has no use.
SMALLEST_NOISE, LARGEST_NOISE = 0.05, 1e4
LARGEST_COUNT = 10_000_000
#: Counts above this number are found to one part in it.
_COUNT_PARTS = 10_000

#: How often a slow accountant is asked in one calibration.
_MOST_EVALUATIONS = 6

#: Value of the parameter that is sought -> the event of the run with this value.
MakeEvent = Callable[[float], dp_accounting.DpEvent]


class CalibrationError(ValueError):
    """No value in the searched range meets the target."""


def calibrate_noise_multiplier(
    *,
    target_epsilon: float,
    target_delta: float,
    sampling_prob: float,
    num_steps: int,
    accountant: str | None = None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """Return the smallest noise multiplier, rounded up, whose certified epsilon does not exceed the target.

    Args:
        target_epsilon: epsilon > 0 for the relation.
        target_delta: delta in the accountant's range.
        sampling_prob: Poisson sampling probability per unit and step.
        num_steps: the number of steps, at least 1.
        accountant: the accountant that certifies; estimates are refused. By default the one that fits.
        relation: the neighbouring relation.

    Returns:
        The noise multiplier (noise standard deviation over clipping norm), with at most four decimals.

    Raises:
        CalibrationError: if the target cannot be met below a noise multiplier of 1e4.
        NotCertifiedError: if the accountant gives estimates, or covers one direction only.
        ValueError: if an argument is outside its range.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    return calibrate_noise(
        lambda noise: dp_sgd_event(noise_multiplier=noise, sampling_prob=sampling_prob, num_steps=num_steps),
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
        relation=relation,
    )


def calibrate_noise(
    make_event: MakeEvent,
    *,
    target_epsilon: float,
    target_delta: float,
    accountant: str | None = None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """Return the smallest noise multiplier whose certified epsilon is within the target, rounded up to four decimals.

    As :func:`calibrate_noise_multiplier`, for any family of events: ``make_event`` gives the event of a noise
    multiplier. It may build several phases, each with its own multiple of the noise.
    """
    judge = _Judge(
        make_event,
        example=1.0,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
        relation=relation,
    )
    step = 10.0**-DECIMALS

    def find(aim: float) -> float:
        """Return the noise at which the guide's epsilon is ``aim``, to half a step, or the least noise tried."""
        low, high = _noise_bracket(judge.guide, aim)
        if low == high:  # the least noise tried
            return low
        return _log_root(judge, aim, low, high, xtol=step / 2 / high)

    def find_rounded_up(aim: float) -> float:
        return math.ceil(find(aim) / step) * step

    if judge.is_slow:  # no search over single steps: each try takes seconds
        return _few_evaluations(judge, find_rounded_up, smaller_is_better=True)
    guess = math.ceil(find(target_epsilon) / step - 1e-9)  # in steps; a whole number of them stays, despite round-off

    def is_allowed(index: int) -> bool:
        noise = round(index * step, DECIMALS)
        return noise >= SMALLEST_NOISE and judge.allows(noise)

    index = _first_allowed(is_allowed, guess)
    return round(index * step, DECIMALS)


def calibrate_probability(
    make_event: MakeEvent,
    *,
    target_epsilon: float,
    target_delta: float,
    accountant: str | None = None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
) -> float:
    """Return the largest sampling probability within the target, rounded down to four significant digits.

    ``make_event`` gives the event of a probability; the other arguments are those of
    :func:`calibrate_noise_multiplier`.

    Raises:
        CalibrationError: if the target cannot be met above a probability of 1e-9.
    """
    judge = _Judge(
        lambda q: make_event(min(q, 1.0)),
        example=0.5,  # at 1 nothing is sampled, and the event may be of a simpler kind
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
        relation=relation,
    )
    if judge.allows(1.0):
        return 1.0
    low = 1e-9
    if judge.guide(low) > target_epsilon:
        raise CalibrationError(f"target_epsilon={target_epsilon} needs a sampling probability below {low:g}")

    def find(aim: float) -> float:
        """Return the probability at which the guide's epsilon is ``aim``."""
        if judge.guide(1.0) <= aim:
            return 1.0
        return _log_root(judge, aim, low, 1.0, xtol=1e-4)

    def find_rounded_down(aim: float) -> float:
        return _four_digits_down(find(aim))

    if judge.is_slow:  # no search over single digits: each try takes seconds
        return _few_evaluations(judge, find_rounded_down, smaller_is_better=False)
    root = find(target_epsilon)
    digits = 3 - math.floor(math.log10(root))
    unit = 10.0**-digits
    index = math.floor(root / unit)
    # The largest allowed index is wanted, and the search is for the smallest: indices are mirrored at the guess.
    mirrored = _first_allowed(lambda i: judge.allows(round((2 * index - i) * unit, digits)), index)
    return round((2 * index - mirrored) * unit, digits)


def _four_digits_down(value: float) -> float:
    """Return a positive value rounded down to four significant digits."""
    digits = 3 - math.floor(math.log10(value))
    return round(math.floor(value * 10.0**digits) * 10.0**-digits, digits)


def calibrate_count(
    make_event: MakeEvent,
    *,
    name: str,
    target_epsilon: float,
    target_delta: float,
    accountant: str | None = None,
    relation: NeighboringRelation = NeighboringRelation.ADD_OR_REMOVE_ONE,
    largest: int = LARGEST_COUNT,
) -> int:
    """Return the largest count (of steps, epochs, records) within the target; beyond 10,000, to one part in 10,000.

    Args:
        make_event: the event of a count; epsilon must grow with it.
        name: of the count, for messages.
        target_epsilon: epsilon > 0 for the relation.
        target_delta: delta in the accountant's range.
        accountant: the accountant that certifies; by default the one that fits.
        relation: the neighbouring relation.
        largest: the end of the search.

    Raises:
        CalibrationError: if a count of one exceeds the target, or one of ``largest`` does not.
    """
    judge = _Judge(
        lambda n: make_event(int(n)),
        example=1,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        accountant=accountant,
        relation=relation,
    )
    if judge.guide(1) > target_epsilon and not judge.allows(1):
        raise CalibrationError(f"target_epsilon={target_epsilon} is exceeded by {name}=1")

    def find(aim: float) -> int:
        """Return the largest count at which the guide's epsilon is at most ``aim``, by doubling and bisection."""
        low, high = 1, 2
        while judge.guide(high) <= aim:
            if high == largest:
                raise CalibrationError(f"target_epsilon={target_epsilon} is not reached by {name}={largest}")
            low, high = high, min(2 * high, largest)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if judge.guide(middle) <= aim else (low, middle)
        return low

    if judge.is_slow:
        return int(_few_evaluations(judge, find, smaller_is_better=False))
    low = find(target_epsilon)
    unit = max(1, low // _COUNT_PARTS)  # counts are tried in multiples of it
    guess = low // unit
    # The largest allowed multiple is wanted, and the search is for the smallest: multiples are mirrored at the guess. A
    # count of 0 is taken for allowed, so that the search ends.
    mirrored = _first_allowed(lambda i: i >= 2 * guess or judge.allows((2 * guess - i) * unit), guess)
    if mirrored >= 2 * guess:
        raise CalibrationError(f"target_epsilon={target_epsilon} is exceeded by {name}={unit}")
    return (2 * guess - mirrored) * unit


def _log_root(judge: _Judge, aim: float, low: float, high: float, xtol: float) -> float:
    """Return the parameter in [low, high] at which ``judge.guide`` equals ``aim``.

    The logarithm of epsilon is close to a straight line over that of the parameter, so few evaluations are needed.

    Args:
        judge: gives the guide.
        aim: the epsilon wanted.
        low: a parameter on one side.
        high: a parameter on the other side.
        xtol: tolerance, relative to the parameter.
    """

    def log_excess(log_parameter: float) -> float:
        return math.log(max(judge.guide(math.exp(log_parameter)), 1e-300) / aim)

    return math.exp(bracketed_root(log_excess, math.log(low), math.log(high), xtol=xtol))


def _few_evaluations(judge: _Judge, find: Callable[[float], float], *, smaller_is_better: bool) -> float:
    """Return the best value found within the target, for events that take seconds to minutes to account for.

    ``find`` gives the parameter at which the guide's epsilon is a given aim. The guide's curve has nearly the shape of
    the accountant's, at another size. So the aim is corrected by how far the accountant's epsilon is off, until that
    is at least 99.5 % of the target.
    """
    target = aim = judge.target
    spent_by: dict[float, float] = {}  # value tried → the accountant's epsilon
    spent = math.inf
    for _ in range(_MOST_EVALUATIONS):
        value = find(aim)
        if value in spent_by:
            break
        spent = spent_by[value] = judge.spent(value)
        if 0.995 * target <= spent <= target or spent == 0:
            break
        if math.isinf(spent):
            aim *= 0.5
        else:
            aim *= 0.998 * target / spent  # a little below the target, since what exceeds it is of no use
    allowed = [value for value, epsilon in spent_by.items() if epsilon <= target]
    if not allowed:
        raise CalibrationError(f"target_epsilon={target} was not met; the last value tried spends {spent:.4g}")
    return min(allowed) if smaller_is_better else max(allowed)


def _first_allowed(allows: Callable[[int], bool], guess: int) -> int:
    """Return the smallest allowed index, by doubling strides from a guess near it and then bisection.

    ``allows`` is false below some index and true from there on.
    """
    stride = 1
    if allows(guess):
        high = guess
        while high - stride > 0 and allows(high - stride):
            high, stride = high - stride, 2 * stride
        low = max(high - stride, 0)  # index 0 itself is never tried
    else:
        low = guess
        while not allows(low + stride):
            low, stride = low + stride, 2 * stride
        high = low + stride
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if allows(middle) else (middle, high)
    return high


class _Judge:
    """Epsilon of a family of events as a function of the parameter that is sought.

    Twice: by the accountant that decides, and by a cheap guide that is near it. The guide is the tilted accountant, or
    the deciding one where that is cheap too (``rdp``) or where the tilted one has no analysis.

    Attributes:
        target: the epsilon that must not be exceeded.
        is_slow: whether the accountant takes seconds for an event. The guide is then asked about plain Poisson sampling
            at the same rate instead.
    """

    def __init__(
        self,
        make_event: MakeEvent,
        *,
        example: float,
        target_epsilon: float,
        target_delta: float,
        accountant: str | None,
        relation: NeighboringRelation,
    ) -> None:
        _check_target(target_epsilon)
        # `example` is a value of the parameter whose event has the kind of all the others.
        event = make_event(example)
        self._make_event, self.target, self._delta = make_event, target_epsilon, target_delta
        self._accountant = get_accountant(accountant or fitting(event, relation.name)[0])
        self._relation = relation
        self._guide: Accountant = self._accountant if self._accountant.name == "rdp" else TiltedAccountant()
        self.is_slow = poisson_counterpart(event) is not event

    def allows(self, value: float) -> bool:
        """Return whether the certified epsilon at a value of the parameter stays within the target."""
        return self.spent(value) <= self.target

    def spent(self, value: float) -> float:
        """Return the certified epsilon at a value of the parameter."""
        answer = self._accountant.epsilon(self._make_event(value), self._delta, self._relation)
        return certified_upper(answer, self._relation)

    def guide(self, value: float) -> float:
        """Return an epsilon near the one of :meth:`spent`, quickly.

        Where the guide has no analysis of the event, the accountant takes its place from then on.
        """
        event = poisson_counterpart(self._make_event(value))
        try:
            return self._guide.epsilon(event, self._delta, self._relation).upper
        except UnsupportedEventError:
            self._guide = self._accountant
            return certified_upper(self._guide.epsilon(event, self._delta, self._relation), self._relation)


def _check_target(target_epsilon: float) -> None:
    if not 0 < target_epsilon < math.inf:
        raise ValueError(f"target_epsilon={target_epsilon} must be positive and finite")


def _noise_bracket(spent: Callable[[float], float], target_epsilon: float) -> tuple[float, float]:
    """Return two noise multipliers around the one that spends ``target_epsilon``, a factor of two apart.

    The smallest one tried comes back twice if it is enough. The walk begins at 1: tiny noise builds huge distributions.
    """
    high = 1.0
    while spent(high) > target_epsilon:
        high *= 2
        if high > LARGEST_NOISE:
            raise CalibrationError(f"target_epsilon={target_epsilon} needs a noise multiplier above {LARGEST_NOISE:g}")
    low = high / 2
    while low > SMALLEST_NOISE and spent(low) <= target_epsilon:
        low, high = low / 2, low
    return (low, high) if spent(low) > target_epsilon else (low, low)
