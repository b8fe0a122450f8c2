"""What clipping met in a step, on one rank, for tracking and for sums that are released with the gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from privtrain.clipping import styles


@dataclasses.dataclass
class ClippingDiagnostics:
    """What happened on this rank in a step. Private: none of it is covered by ε.

    An *owner* is a unit, by its position among the rank's units of the step.

    Attributes:
        num_units: units that were added.
        num_clipped: those whose gradient was made smaller.
        num_nonfinite: those that counted as zero, since their loss or gradient is not finite.
        sum_norms: of the gradients of finite units, before clipping.
        shares_within: of each unit, from 0 to 1, how far it is within the clipping norm (:func:`.styles.within`).
        unit_losses: owner → its loss.
        nonfinite_owners: the owners that counted as zero.
    """

    num_units: int = 0
    num_clipped: int = 0
    num_nonfinite: int = 0
    sum_norms: float = 0.0
    shares_within: list[float] = dataclasses.field(default_factory=list)
    unit_losses: dict[int, float] = dataclasses.field(default_factory=dict)
    nonfinite_owners: list[int] = dataclasses.field(default_factory=list)

    @property
    def sum_losses(self) -> float:
        """Sum of the losses of units whose loss is finite."""
        return math.fsum(loss for loss in self.unit_losses.values() if math.isfinite(loss))

    def add_loss(self, owner: int, loss: float) -> None:
        """Add a row's part of its unit's loss."""
        self.unit_losses[owner] = self.unit_losses.get(owner, 0.0) + loss

    def is_lost(self, owners: Sequence[int]) -> torch.Tensor:
        """Return [units] whether a unit's loss is not finite, though its gradient may be: the unit counts as zero."""
        losses = [self.unit_losses.get(owner, 0.0) for owner in owners]
        return torch.tensor([not math.isfinite(loss) for loss in losses], dtype=torch.bool)

    def add_units(self, owners: Sequence[int], norms: np.ndarray, is_clipped: np.ndarray, clipping_norm: float) -> None:
        """Count units that were added.

        Args:
            owners: the units.
            norms: [units] norms of their whole gradients; infinite for those that count as zero.
            is_clipped: [units] whether any part of the gradient was made smaller.
            clipping_norm: C of the step.
        """
        is_finite = np.isfinite(norms)
        self.num_units += len(owners)
        self.num_clipped += int((is_clipped & is_finite).sum())
        self.num_nonfinite += int((~is_finite).sum())
        self.nonfinite_owners += [owners[unit] for unit in np.flatnonzero(~is_finite).tolist()]
        self.sum_norms += float(norms[is_finite].sum())
        self.shares_within += styles.within(torch.from_numpy(norms), clipping_norm).numpy().tolist()
