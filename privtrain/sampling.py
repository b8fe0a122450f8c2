"""Which units join a step, and how they are dealt to ranks.

Public: the sampling probability, k, and this code. Secret: the key, and therefore who was drawn. Privacy amplification
by sampling assumes that the draw stays secret, so nothing here is logged outside ``secret/``.

The draw is global: a pure function of (secret, step), the same on every rank whatever their number, so that no unit can
be drawn twice and a resumed step is the same step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

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


class PoissonSampler:
    """Each unit joins each step independently with ``plan.sampling_prob``, bringing at most k random records.

    Which records a unit brings does not affect the guarantee: the unit is clipped once whatever it brings. It is drawn
    afresh each step, so over a run all of a user's records can be seen.

    Args:
        plan: gives the sampling probability and k.
        key: the secret of the run's current generation.
        num_records: number of records of every unit, in unit order.
    """

    def __init__(self, plan: PrivacyPlan, key: SecretKey, num_records: Sequence[int]) -> None:
        self._sampling_prob = plan.sampling_prob
        self._records_per_unit = plan.records_per_unit
        self._key = key
        self._num_records = tuple(num_records)

    def draw(self, step: int) -> list[DrawnUnit]:
        """The units of a step in increasing order; possibly none."""
        uniforms = self._key.stream("sample", step).uniform(len(self._num_records))
        return [
            DrawnUnit(int(u), self._records_of(int(u), step)) for u in (uniforms < self._sampling_prob).nonzero()[0]
        ]

    def _records_of(self, unit: int, step: int) -> tuple[int, ...]:
        stream = self._key.stream("records", step, unit)
        return tuple(stream.choose(self._num_records[unit], self._records_per_unit))


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
