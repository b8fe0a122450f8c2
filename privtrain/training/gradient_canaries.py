"""Gradient canaries: planted units whose gradient is a random direction, for an audit from inside.

The auditor, who knows the directions (:mod:`privtrain.data.directions`), tests from the model which of them took part.
A gradient canary is sampled, written to the ledger and accounted as every unit. In a step that draws it, its direction
takes the place of a gradient, ten times longer than the clipping norm, and goes through the clipper's own path for one
unit: norm, factor, grid, sum. So a canary moves the sum by at most the sensitivity of the plan, as any unit does.
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

#: Stands for a unit's position among those that the clipper runs rows of: a canary has no rows.
_NO_ROW = -1


class GradientCanaries:
    """The gradient canaries among the training units.

    Args:
        root_key: the run's, which the directions are drawn from.
        canaries: all planted users of the run; those that carry texts are ignored here.
        units: the training units.
    """

    def __init__(self, root_key: SecretKey, canaries: Iterable[Canary], units: UnitData) -> None:
        names = {canary.user for canary in canaries if not canary.is_text}
        self._key = root_key
        self._user_of: dict[int, str] = {}  # number of a unit → the canary user that it is
        if names:  # else not a walk over all owners, who may lie on disk
            self._user_of = {unit: owner for unit, owner in enumerate(units.owners) if owner in names}

    def apart(self, drawn: Sequence[DrawnUnit]) -> tuple[list[DrawnUnit], list[str]]:
        """Split the units of a step: return those with records to run, and the user ids of the gradient canaries."""
        with_records = [d for d in drawn if d.unit not in self._user_of]
        canary_users = [self._user_of[d.unit] for d in drawn if d.unit in self._user_of]
        return with_records, canary_users

    def add(self, clipper: PerUnitClipper, users: Iterable[str]) -> None:
        """Add the clipped directions of these canaries to a step's sum."""
        norm = RAW_NORM * clipper.clipping_norm
        for user in users:
            clipper.add_gradient(_NO_ROW, self._gradient(user, clipper.layout, norm))

    def _gradient(self, user: str, layout: Layout, norm: float) -> dict[str, torch.Tensor]:
        """Return a canary's gradient, name of the tensor → fp32: in every coordinate a random sign times one size.

        The size makes the norm over all tensors ``norm``.
        """
        size = norm / math.sqrt(layout.num_coordinates)
        tensors = {}
        for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
            # Signs are drawn block by block, so that the auditor can draw those of one block alone.
            parts = [
                signs(self._key, user, slot.name, block=block.number, num=block.num_coordinates)
                for block in blocks(slot.num_coordinates)
            ]
            values = torch.from_numpy(np.concatenate(parts)).to(parameter.device)
            tensors[slot.name] = values.float().mul_(size).view(slot.shape)
        return tensors


def check_placement(num_gradient_users: int, placement: Placement) -> None:
    """Raise if there are gradient canaries and the backend shards gradients: a direction stands for a whole gradient.

    Raises:
        ConfigError: then, also if there is only one process to shard over.
    """
    if num_gradient_users and placement.shards is not None:
        problem = f"{num_gradient_users} needs whole gradients, and this backend shards them, also in one process"
        raise ConfigError([Fault("canaries.num_gradient_users", f"{problem}; launch with ddp or zero1, or set 0")])
