"""The cooperative unit: all ranks of a shard group work on one unit at a time, and none ever holds its gradient whole.

The ranks share out the unit's rows. The backend adds up their gradients and leaves each rank its own part of the sum;
the parts' squared norms are added over the group (one small all-reduce a unit), and each rank scales its part by the
same factor and adds it to its part of the total. That is exact for any layer, for records that span microbatches, and
for every clipping style, because the norm is of the very numbers that are added.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch

from privtrain.clipping import refusals, styles
from privtrain.clipping.clipper import ClippingDiagnostics, RowLosses
from privtrain.clipping.factors import exact_fp32, squared_norms
from privtrain.data.microbatch import Microbatch
from privtrain.errors import GuaranteeLost
from privtrain.layout import Layout


class GradientShards(Protocol):
    """One rank's parts of a gradient, as a backend keeps them.

    Attributes:
        layout: the parts that this rank holds.
        gradient: the sum so far over the ranks' backward passes since it was last cleared, flat fp32.
        rank: this rank in its shard group.
        size: ranks in the shard group.
    """

    layout: Layout
    gradient: torch.Tensor
    rank: int
    size: int

    def collecting(self) -> contextlib.AbstractContextManager[None]:
        """Within the block each rank of the group runs one backward pass; their SUM is added to ``gradient``."""
        ...

    def sum_over_group(self, vector: torch.Tensor) -> None:
        """Replace ``vector`` by its sum over the shard group."""
        ...


class CooperativeClipper:
    """Accumulates this rank's part of Σ_u clip(g_u); the interface of :class:`~.clipper.PerUnitClipper`.

    Guarantee: as there. Every rank of the group takes the same decisions, since it sees the same summed norms.

    Args:
        model: the model that ``row_losses`` runs.
        shards: the backend's parts of a gradient.
        clipping_norm: C > 0.
        row_losses: see :data:`~.clipper.RowLosses`.
        device: where ``total`` lives.
        style: ``"flat"``, ``"per_layer"`` or ``"automatic"``.

    Raises:
        UnsupportedLayer: if a layer shares statistics between units.
    """

    route = "cooperative"

    def __init__(
        self,
        model: torch.nn.Module,
        shards: GradientShards,
        clipping_norm: float,
        row_losses: RowLosses,
        device: torch.device,
        style: str = "flat",
    ) -> None:
        refusals.refuse_coupled_units(model)
        self.layout = shards.layout
        self.total = self.layout.zeros(device)
        self.diagnostics = ClippingDiagnostics()
        self._shards = shards
        self.clipping_norm = clipping_norm
        self._row_losses = row_losses
        self._device = device
        self._style = style
        self._groups = styles.groups(style, self.layout)
        self._open: int | None = None
        self._loss = 0.0

    @property
    def sensitivity(self) -> float:
        """Largest change of the whole sum when one unit is added or removed: C in every style."""
        return self.clipping_norm

    def reset(self) -> None:
        """Begin a step."""
        self.total.zero_()
        self.diagnostics = ClippingDiagnostics()
        self._open = None

    def accumulate(self, batch: Microbatch) -> None:
        """Add the units that end in ``batch``, which is the same on every rank of the group."""
        if self._open is not None and batch.owners[:1] != (self._open,):
            raise GuaranteeLost("a unit's rows are not contiguous across microbatches; this is a bug, report it")
        owner = batch.owner.tolist()
        for index, unit in enumerate(batch.owners):
            if self._open is None:
                self._shards.gradient.zero_()
                self._loss = 0.0
            self._add_rows(batch, [row for row, place in enumerate(owner) if place == index])
            continues = batch.last_continues and index == len(batch.owners) - 1
            self._open = unit if continues else None
            if not continues:
                self._add_unit(unit)

    def finish(self) -> torch.Tensor:
        """End the step and return this rank's part of the clipped sum.

        Raises:
            GuaranteeLost: if a unit was left open.
        """
        if self._open is not None:
            raise GuaranteeLost("the last unit of the step was never closed; this is a bug, report it")
        return self.total

    def _add_rows(self, batch: Microbatch, rows: list[int]) -> None:
        """One row a rank and pass; a rank without a row runs the last with weight zero, since all must take part."""
        for start in range(0, len(rows), self._shards.size):
            position = start + self._shards.rank
            has_row = position < len(rows)
            row = slice(rows[min(position, len(rows) - 1)], rows[min(position, len(rows) - 1)] + 1)
            weight = batch.row_weight[row] * float(has_row)
            with self._shards.collecting():
                loss = (self._row_losses(batch.input_ids[row], batch.target_mask[row]) * weight).sum()
                loss.backward()
            if has_row:
                self._loss += float(loss.detach())

    def _add_unit(self, owner: int) -> None:
        """Scale the unit's gradient by the factor of its whole norm and add this rank's part."""
        gradient = self._shards.gradient
        with exact_fp32(self._device):
            parts = torch.zeros(len(self.layout.slots) + 1, 1, dtype=torch.float64, device=self._device)
            for i, slot in enumerate(self.layout.slots):
                if slot.num_coordinates:
                    parts[i] = squared_norms(self.layout.view(gradient, slot)[None])
            parts[-1] = self._loss
            self._shards.sum_over_group(parts)
            squares = parts[:-1]
            norms = styles.group_norms(squares, self._groups)
            factors = styles.factors(self._style, norms, self.clipping_norm)
            whole = float(squares.sum().sqrt())
            is_finite = whole < float("inf")
            if not is_finite:
                self.diagnostics.nonfinite_owners.append(owner)
            if self._shards.rank == 0:
                self.diagnostics.num_units += 1
                self.diagnostics.add_loss(owner, float(parts[-1]))
                self.diagnostics.num_clipped += int(bool((factors < 1).any()) and is_finite)
                self.diagnostics.num_nonfinite += int(not is_finite)
                self.diagnostics.sum_norms += whole if is_finite else 0.0
                self.diagnostics.sum_within += float(styles.within(norms.new_tensor([whole]), self.clipping_norm).sum())
            if not bool((factors > 0).all()):
                return
            per_slot = factors.float()[torch.tensor(self._groups, device=self._device)]
            for i, slot in enumerate(self.layout.slots):
                self.layout.view(self.total, slot).addcmul_(self.layout.view(gradient, slot), per_slot[i])
