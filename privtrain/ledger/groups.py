"""Whether units stayed in their groups, where a run draws its steps from groups in turn (cyclic Poisson sampling)."""

from __future__ import annotations

import pathlib

import numpy as np

from privtrain.errors import LedgerCorrupt
from privtrain.ledger.bodies import ROW, each_segment
from privtrain.ledger.chain import LedgerState


def check_groups(log: pathlib.Path, state: LedgerState) -> None:
    """Raise unless each unit joined only the steps of its own group.

    Steps take the groups in turn, so within a generation all steps of a unit are a multiple of ``num_groups`` apart.
    The sensitivity of correlated noise rests on this distance.

    Raises:
        LedgerCorrupt: naming the first two steps of a unit that are not.
    """
    if state.num_groups == 1:
        return
    units, steps, generations = [], [], []
    for bodies, rows in each_segment(log, state):
        sizes = [body.num_units for body in bodies]
        units.append(np.ascontiguousarray(rows["unit"]))
        steps.append(np.repeat(np.array([body.step for body in bodies], dtype=np.int64), sizes))
        generations.append(np.repeat(np.array([body.generation for body in bodies], dtype=np.int64), sizes))
    # One entry a contribution; the empty arrays in front give a type where there is none.
    pseudonym = np.concatenate([np.zeros(0, dtype=ROW["unit"]), *units])
    step = np.concatenate([np.zeros(0, dtype=np.int64), *steps])
    generation = np.concatenate([np.zeros(0, dtype=np.int64), *generations])
    _, unit = np.unique(pseudonym, return_inverse=True)  # numbers, since raw bytes cannot be sorted beside them
    order = np.lexsort((step, unit, generation))  # by generation, then unit, then step
    unit, step, generation = unit[order], step[order], generation[order]
    # Whether an entry and the next one are two steps of one unit in one generation, and how far these are apart.
    is_same_unit = (unit[1:] == unit[:-1]) & (generation[1:] == generation[:-1])
    distance = np.diff(step)
    wrong = np.flatnonzero(is_same_unit & (distance % state.num_groups != 0))
    if len(wrong):
        first, second = step[wrong[0]], step[wrong[0] + 1]
        raise LedgerCorrupt(
            f"{log}: a unit joined the steps {first} and {second} of generation {generation[wrong[0]]}, which draw "
            f"from different ones of {state.num_groups} groups: the guarantee of correlated noise does not hold"
        )
