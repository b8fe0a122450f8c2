"""Units whose update is a random direction, for an audit from inside (:mod:`privtrain.data.directions`).

Such a unit is sampled, written to the ledger and accounted as every unit. In a step that draws it its direction takes
the place of a gradient, ten times longer than the clipping norm, and goes through the clipper's own path for one unit:
norm, factor, grid, sum. So one of them moves the sum by at most the sensitivity of the plan, as anybody does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from privtrain.backends import Placement
from privtrain.clipping import PerUnitClipper
from privtrain.data.canaries import Canary
from privtrain.data.directions import RAW_NORM, blocks, signs
from privtrain.data.units import UnitData
from privtrain.errors import ConfigError, Fault
from privtrain.privacy.layout import Layout
from privtrain.privacy.sampling import DrawnUnit
from privtrain.privacy.secret import SecretKey

_NO_ROW = -1
"""In place of a unit's position among those whose rows run: it has none."""


class GradientCanaries:
    """The gradient canaries among the training units.

    Args:
        root_key: the run's, which the directions are drawn from.
        canaries: all of the run.
        units: the training units.
    """

    def __init__(self, root_key: SecretKey, canaries: Iterable[Canary], units: UnitData) -> None:
        names = {canary.user for canary in canaries if not canary.is_text}
        self._key = root_key
        self._user_of = {n: owner for n, owner in enumerate(units.owners) if owner in names} if names else {}

    def apart(self, drawn: Sequence[DrawnUnit]) -> tuple[list[DrawnUnit], list[str]]:
        """Return the units with rows to run, and the drawn canaries' ids."""
        rows = [unit for unit in drawn if unit.unit not in self._user_of]
        return rows, [self._user_of[unit.unit] for unit in drawn if unit.unit in self._user_of]

    def add(self, clipper: PerUnitClipper, users: Iterable[str]) -> None:
        """Add the clipped directions of these canaries to a step's sum."""
        norm = RAW_NORM * clipper.clipping_norm
        for user in users:
            clipper.add_gradient(_NO_ROW, self._gradient(user, clipper.layout, norm))

    def _gradient(self, user: str, layout: Layout, norm: float) -> dict[str, torch.Tensor]:
        """Return a canary's gradient: its random signs at norm ``norm``, name → tensor."""
        size = norm / math.sqrt(layout.num_coordinates)
        tensors = {}
        for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
            parts = [signs(self._key, user, slot.name, number, num) for number, _, num in blocks(slot.num_coordinates)]
            values = torch.from_numpy(np.concatenate(parts)).to(parameter.device)
            tensors[slot.name] = values.float().mul_(size).view(slot.shape)
        return tensors


def check_placement(num_gradient_users: int, placement: Placement) -> None:
    """Raise where a unit's gradient is in parts: a direction takes the place of a whole one.

    Raises:
        ConfigError: if there are gradient canaries and the backend shards gradients, be it over a single process.
    """
    if num_gradient_users and placement.shards is not None:
        problem = f"{num_gradient_users} needs whole gradients, and this backend shards them, also in one process"
        raise ConfigError([Fault("canaries.num_gradient_users", f"{problem}; launch with ddp or zero1, or set 0")])
