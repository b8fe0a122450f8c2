"""Which units join a step, and how they are dealt to ranks.

Public: the scheme (:mod:`privtrain.schemes`), k, and this code. Secret: the key, and therefore who was drawn. Privacy
amplification by sampling assumes that the draw stays secret, so nothing here is logged outside ``secret/``.

The draw is global: a pure function of (secret, step), the same on every rank whatever their number, so that no unit can
be drawn twice and a resumed step is the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from privtrain import fixed_point
from privtrain.errors import ConfigError, Fault
from privtrain.plan import PrivacyPlan
from privtrain.secret import SecretKey


@dataclasses.dataclass(frozen=True)
class DrawnUnit:
    """A unit that joined a step, with the records it contributes.

    Attributes:
        unit: index into the run's units.
        records: at most k distinct indices of that unit's records.
    """

    unit: int
    records: tuple[int, ...]


class UnitSampler:
    """The units of each step by the plan's scheme, each bringing at most k random records.

    Which records a unit brings does not affect the guarantee: the unit is clipped once whatever it brings. It is drawn
    afresh each step, so over a run all of a user's records can be seen.

    Args:
        plan: gives the scheme and k.
        key: the secret of the run's current generation.
        num_records: number of records of every unit, in unit order.
        first_step: the first step of the generation, with which its first epoch begins.

    Raises:
        ConfigError: if there are more units than the scheme has places for, or than a step can add up.
    """

    def __init__(
        self, plan: PrivacyPlan, key: SecretKey, num_records: Sequence[int] | np.ndarray, first_step: int = 0
    ) -> None:
        limit = plan.scheme.num_places
        if limit is not None and len(num_records) > limit:
            fault = f"given {limit}, but there are {len(num_records)} training units; raise it"
            raise ConfigError([Fault("privacy.max_num_units", fault)])
        check_step_size(plan, len(num_records))
        self._scheme = plan.scheme
        self._records_per_unit = plan.records_per_unit
        self._key = key
        self._num_records = np.asarray(num_records, dtype=np.int64)
        self._first_step = first_step
        self._drawn: tuple[int, list[np.ndarray]] | None = None

    def draw(self, step: int) -> list[DrawnUnit]:
        """The units of a step in increasing order; possibly none."""
        epoch, position = divmod(step - self._first_step, self._scheme.period)
        assert epoch >= 0, (step, self._first_step)
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = epoch, self._scheme.epoch(self._key, epoch, len(self._num_records))
        return [DrawnUnit(int(unit), self._records_of(int(unit), step)) for unit in self._drawn[1][position]]

    def _records_of(self, unit: int, step: int) -> tuple[int, ...]:
        stream = self._key.stream("records", step, unit)
        return tuple(stream.choose(int(self._num_records[unit]), self._records_per_unit))


def check_step_size(plan: PrivacyPlan, num_units: float) -> None:
    """Raise unless int64 holds the sum of any step: see :mod:`.clipping.exact_sum`.

    A draw's size spreads by at most √MAX_UNITS = 1448 about the expected one, and an overflow needs twice MAX_UNITS.

    Args:
        plan: gives the scheme.
        num_units: training units, or how many are expected.

    Raises:
        ConfigError: naming the key that decides.
    """
    num_drawn = plan.scheme.most_expected(num_units)
    if num_drawn > fixed_point.MAX_UNITS:
        key, how = plan.scheme.size_key
        raise ConfigError(
            [
                Fault(
                    f"privacy.{key}",
                    f"given {getattr(plan.scheme, key):g}; with {num_units:,.0f} training units a step draws "
                    f"{num_drawn:,.0f} of them, and integers hold the sum of {fixed_point.MAX_UNITS:,}: {how} it",
                )
            ]
        )


def deal(drawn: Sequence[DrawnUnit], costs: Sequence[int], num_ranks: int) -> list[list[DrawnUnit]]:
    """Deal whole units to ranks: counts differ by at most one, costs evened out by dealing back and forth.

    Args:
        drawn: the units of the step.
        costs: a positive cost for each of them: its longest record, so that rows of similar length share a microbatch.
        num_ranks: world size.

    Returns:
        For every rank its units, in decreasing cost, so that neighbours have similar lengths.
    """
    order = sorted(range(len(drawn)), key=lambda i: (-costs[i], drawn[i].unit))
    hands: list[list[DrawnUnit]] = [[] for _ in range(num_ranks)]
    for position, i in enumerate(order):
        round_number, seat = divmod(position, num_ranks)
        hands[seat if round_number % 2 == 0 else num_ranks - 1 - seat].append(drawn[i])
    return hands
