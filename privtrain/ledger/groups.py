"""Whether units stayed in their groups, where a run draws its steps from groups in turn (cyclic Poisson sampling)."""

from __future__ import annotations

import pathlib

import numpy as np

from privtrain.errors import LedgerCorrupt
from privtrain.ledger.bodies import ROW, each_segment
from privtrain.ledger.chain import LedgerState


def check_groups(log: pathlib.Path, state: LedgerState) -> None:
    """Raise unless all steps of a unit within a generation are whole rounds of the groups apart.

    The sensitivity of correlated noise rests on it: two steps nearer than the number of groups would move one row.

    Raises:
        LedgerCorrupt: naming the steps.
    """
    if state.num_groups == 1:
        return
    units, steps, generations = [], [], []
    for bodies, rows in each_segment(log, state):
        sizes = [body.num_units for body in bodies]
        units.append(np.ascontiguousarray(rows["unit"]))
        steps.append(np.repeat(np.array([body.step for body in bodies], dtype=np.int64), sizes))
        generations.append(np.repeat(np.array([body.generation for body in bodies], dtype=np.int64), sizes))
    unit = np.concatenate([np.zeros(0, dtype=ROW["unit"]), *units])
    step, generation = (np.concatenate([np.zeros(0, dtype=np.int64), *values]) for values in (steps, generations))
    number = np.unique(unit, return_inverse=True)[1]
    order = np.lexsort((step, number, generation))
    unit, step, generation = number[order], step[order], generation[order]
    is_same = (unit[1:] == unit[:-1]) & (generation[1:] == generation[:-1])
    wrong = np.flatnonzero(is_same & (np.diff(step) % state.num_groups != 0))
    if len(wrong):
        first, second = step[wrong[0]], step[wrong[0] + 1]
        raise LedgerCorrupt(
            f"{log}: a unit joined the steps {first} and {second} of generation {generation[wrong[0]]}, which draw "
            f"from different ones of {state.num_groups} groups: the guarantee of correlated noise does not hold"
        )
