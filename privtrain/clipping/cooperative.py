"""The joint unit: all ranks of a shard group work on one unit at a time, and none ever holds its gradient whole.

For layers without a rule, and units with more rows than a microbatch (:mod:`.sharded`).

The ranks share out the unit's rows. The backend adds up their gradients and leaves each rank its own part of the sum;
the parts' squared norms are added over the group (one small all-reduce a unit), and each rank scales its part by the
same factor and adds it to its part of the total. That is exact for any layer, for records that span microbatches, and
for every clipping style, because the norm is of the very numbers that are added. Which rank runs which row, and in what
order a backend adds up the ranks' parts, rounds a unit's own gradient (fp32), as its rows alone decide: not the unit's
mates, but the number of ranks does. So the clipped sum has the same bits on every rank and in every repetition, is
bound by C whatever the ranks, and may differ in last bits from that of another number of ranks.

Two ways to the same sum: keep the unit's part until its norm is known (one backward pass, memory for two parts: unit
and total), or, on the ``two_pass`` route, take each tensor's norm as it arrives and let it go, then run the unit again
and add what arrives with the factor now known (memory for one part). The second pass takes the norms again, and a unit
that came out longer than the first time stops the job.

A unit that is not finite has no mates here, in no tensor, and counts as zero.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from privtrain.clipping import exact_sum, refusals, styles
from privtrain.clipping.clipper import ClippingDiagnostics, RowLosses
from privtrain.clipping.factors import exact_fp32, squared_norms
from privtrain.data.microbatch import Microbatch
from privtrain.errors import GuaranteeLost
from privtrain.privacy.fixed_point import SLACK
from privtrain.privacy.layout import Layout, Slot

#: Called once a tensor with this rank's part of it in the slot's shape, fp32.
Sink = Callable[[Slot, torch.Tensor], None]

#: How much longer than the first time a unit may come out of the second pass: the rest of 1e-5 is for rounding.
_SAME_NORM = 9e-6


class GradientShards(Protocol):
    """One rank's parts of a gradient, as a backend hands them over.

    Attributes:
        layout: the parts that this rank holds.
        rank: this rank in its shard group.
        size: ranks in the shard group.
        weights: name → the model's own tensor, whatever this rank holds of it.
        repeats_backward: whether one graph allows several backward passes. DeepSpeed's stage 3 gathers weights once a
            forward pass and once for its backward pass, and not again.
    """

    layout: Layout
    rank: int
    size: int
    weights: Mapping[str, torch.nn.Parameter]
    repeats_backward: bool

    def collecting(self, sink: Sink) -> contextlib.AbstractContextManager[None]:
        """Return a block in which each rank runs one backward pass; ``sink`` gets this rank's part of their SUM."""
        ...

    def reshard(self) -> None:
        """Bring each weight back into parts, also after an interrupted pass or one without a backward pass."""
        ...

    def scattered(self, total: torch.Tensor, *, once: bool) -> SumOfParts:
        """Return what adds whole tensors of all ranks to ``total``, this rank's part of the sum (int64).

        Args:
            total: flat.
            once: whether they may all wait for the end of the step, 8 bytes a coordinate, to be sent once.
        """
        ...

    def sum_over_group(self, vector: torch.Tensor) -> None:
        """Replace ``vector`` by its sum over the shard group."""
        ...


class SumOfParts(Protocol):
    """An int64 sum in parts, to which every rank of a shard group contributes whole tensors in the same order."""

    def contribution(self, name: str) -> contextlib.AbstractContextManager[torch.Tensor]:
        """Yield an int64 tensor of the tensor's own shape: what the block adds to it joins the sum."""
        ...

    def reset(self) -> None:
        """Forget what is still here, and the order of contributions."""
        ...

    def flush(self) -> None:
        """Send what is still here, before ``total`` is read; every rank at the same place."""
        ...

    def check_order(self) -> None:
        """Raise on every rank unless all contributed in the same order since the last time."""
        ...


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of one unit; the fields are those of :class:`~privtrain.data.microbatch.Microbatch`."""

    input_ids: torch.Tensor
    target_mask: torch.Tensor
    row_weight: torch.Tensor

    def __len__(self) -> int:
        return len(self.row_weight)

    @classmethod
    def of(cls, batch: Microbatch, rows: Sequence[int]) -> _Rows:
        return cls(batch.input_ids[rows], batch.target_mask[rows], batch.row_weight[rows])

    @classmethod
    def joined(cls, parts: Sequence[_Rows]) -> _Rows:
        """Join parts of a unit's rows: they have the same width in every microbatch."""
        ids = torch.cat([part.input_ids for part in parts])
        mask = torch.cat([part.target_mask for part in parts])
        weight = torch.cat([part.row_weight for part in parts])
        return cls(ids, mask, weight)

    def share_of(self, rank: int, size: int) -> tuple[_Rows, bool]:
        """Return the rows of one of ``size`` ranks, and whether it has any.

        A rank without rows gets the last one at weight zero, since all ranks must take part in a pass.
        """
        mine = list(range(rank, len(self), size))
        has_rows = bool(mine)
        if not has_rows:
            mine = [len(self) - 1]
        row_weight = self.row_weight[mine] * float(has_rows)
        return _Rows(self.input_ids[mine], self.target_mask[mine], row_weight), has_rows

    def cut(self, first: int, stop: int) -> _Rows:
        return _Rows(self.input_ids[first:stop], self.target_mask[first:stop], self.row_weight[first:stop])


class CooperativeClipper:
    """A :class:`~.clipper.PerUnitClipper` for sharded gradients: each rank accumulates its part of Σ_u clip(g_u).

    Guarantee: as for ``PerUnitClipper``. All ranks of the group decide alike, since they see the same summed norms.

    Args:
        model: the model that ``row_losses`` runs.
        shards: the backend's description of this rank's part of each gradient.
        clipping_norm: C > 0.
        row_losses: (input_ids, target_mask) → [rows] losses, each of its own row alone.
        device: where ``total`` lives.
        style: ``"flat"``, ``"per_layer"`` or ``"automatic"``.
        route: ``"two_pass"`` holds no unit's gradient, for twice the passes; a unit with more rows than a microbatch on
            every rank is still held. Any other value: one pass.

    Raises:
        UnsupportedLayer: if a layer shares statistics between units.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        shards: GradientShards,
        clipping_norm: float,
        row_losses: RowLosses,
        device: torch.device,
        style: str = "flat",
        route: str = "auto",
    ) -> None:
        refusals.refuse_coupled_units(model)
        self.layout = shards.layout
        self.total = self.layout.zeros(device, torch.int64)
        self.diagnostics = ClippingDiagnostics()
        self.route = "two_pass" if route == "two_pass" else "cooperative"
        self.clipping_norm = clipping_norm
        self.fallback_reason = ""  # it has no other route to go
        self._shards = shards
        self._row_losses = row_losses
        self._device = device
        self._style = style
        self._groups = styles.groups(style, self.layout)
        self._index_of = {slot.name: i for i, slot in enumerate(self.layout.slots)}
        self._gradient: torch.Tensor | None = None  # this rank's part of one unit's gradient
        self._open: int | None = None  # the unit whose rows continue in the next microbatch
        self._rows: list[_Rows] = []  # its rows so far
        self._loss = 0.0  # this rank's part of the present unit's loss

    @property
    def sensitivity(self) -> float:
        """Largest change of the whole sum when one unit is added or removed: C (1 + 1e-5) in every style."""
        return self.clipping_norm * (1 + SLACK)

    @property
    def grid_exponent(self) -> int:
        """``total`` is in units of 2**grid_exponent."""
        return styles.grid_exponent(self._style, self.clipping_norm)

    def settle(self, route: str) -> None:
        """Keep to a route that the self-test found."""
        self.route = route

    def reset(self) -> None:
        """Begin a step."""
        self.total.zero_()
        self.diagnostics = ClippingDiagnostics()
        self._open, self._rows = None, []

    def accumulate(self, batch: Microbatch) -> None:
        """Add the units that end in ``batch``, which is the same on every rank of the group."""
        if self._open is not None and batch.owners[:1] != (self._open,):
            raise GuaranteeLost("a unit's rows are not contiguous across microbatches; this is a bug, report it")
        unit_of_row = batch.owner.tolist()  # an index of batch.owners; negative for padding
        most_rows = len(unit_of_row) * self._shards.size  # of a pass of the group: a microbatch on every rank
        for index, owner in enumerate(batch.owners):
            self._rows.append(_Rows.of(batch, [row for row, unit in enumerate(unit_of_row) if unit == index]))
            continues = batch.last_continues and index == len(batch.owners) - 1
            self._open = owner if continues else None
            if not continues:
                rows, self._rows = _Rows.joined(self._rows), []
                self._add_unit(owner, rows, most_rows=most_rows)

    def finish(self) -> torch.Tensor:
        """End the step and return this rank's part of the clipped sum: int64, in units of 2**``grid_exponent``.

        Raises:
            GuaranteeLost: if a unit was left open.
        """
        if self._open is not None:
            raise GuaranteeLost("the last unit of the step was never closed; this is a bug, report it")
        return self.total

    def _add_unit(self, owner: int, rows: _Rows, *, most_rows: int) -> None:
        """Add one unit, in two passes if that is the route and each rank's rows fit into one pass, else in one.

        Over several passes a tensor's norm could not be taken as it arrives: it arrives in pieces.
        """
        self._loss = 0.0
        if self.route == "two_pass" and len(rows) <= most_rows:
            self._add_in_two_passes(owner, rows)
        else:
            self._add_kept(owner, rows)

    def _add_kept(self, owner: int, rows: _Rows) -> None:
        """Add one unit in one pass over its rows: keep this rank's part of the gradient until the norm is known.

        Each rank runs one row at a time, so that few activations are in memory beside the gradient.
        """
        if self._gradient is None:
            self._gradient = self.layout.zeros(self._device)
        gradient, size = self._gradient.zero_(), self._shards.size

        def keep(slot: Slot, part: torch.Tensor) -> None:
            """Add this rank's part of a pass's gradient of one tensor."""
            self.layout.view(gradient, slot).add_(part)

        for first in range(0, len(rows), size):  # a row for each rank
            self._run(rows.cut(first, first + size), keep)
        with exact_fp32(self._device):
            squares = self._zero_squares()
            for i, slot in enumerate(self.layout.slots):
                if slot.num_coordinates:
                    squares[i] = squared_norms(self.layout.view(gradient, slot)[None])
            weights, _ = self._weights(squares, owner)
            if weights is not None:
                for i, slot in enumerate(self.layout.slots):
                    exact_sum.add_unit(self.layout.view(self.total, slot), self.layout.view(gradient, slot), weights[i])
        if self.route == "two_pass":  # few units come here on this route: do not hold memory for the next one
            self._gradient = None

    def _add_in_two_passes(self, owner: int, rows: _Rows) -> None:
        """Add one unit in two passes over its rows: the first takes norms, the second adds scaled parts to the total.

        Both draw the same dropout.
        """
        first_squares, measure = self._measuring()
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # the second pass begins at the same random state
            self._run(rows, measure)
        weights, norms = self._weights(first_squares, owner)
        if weights is None:
            return

        second_squares, measure_again = self._measuring()

        def add(slot: Slot, part: torch.Tensor) -> None:
            """Take the norm of a slot's part once more, and add the part."""
            measure_again(slot, part)
            exact_sum.add_unit(self.layout.view(self.total, slot), part, weights[self._index_of[slot.name]])

        self._run(rows, add, counts_loss=False)
        self._shards.sum_over_group(second_squares)
        second_norms = styles.group_norms(second_squares, self._groups)
        if not bool((second_norms <= norms * (1 + _SAME_NORM)).all()):  # also where one is NaN
            raise GuaranteeLost(
                "a unit's gradient was longer in the second of two passes over the same rows (kernels that are not "
                "deterministic); set performance.clipping_route: auto"
            )

    def _measuring(self) -> tuple[torch.Tensor, Sink]:
        """Return this rank's squared norms by slot, zero at first, and the sink that fills them in one pass.

        Each slot must arrive whole: of pieces the squared norms would not add up.
        """
        squares, arrived = self._zero_squares(), set[str]()

        def measure(slot: Slot, part: torch.Tensor) -> None:
            """Store the squared norm of this rank's part of a slot, or raise if the slot arrived before."""
            if slot.name in arrived:
                raise GuaranteeLost(f"{slot.name!r} arrived in pieces; set performance.clipping_route: auto")
            arrived.add(slot.name)
            if slot.num_coordinates:
                with exact_fp32(self._device):
                    squares[self._index_of[slot.name]] = squared_norms(part[None])

        return squares, measure

    def _run(self, rows: _Rows, sink: Sink, *, counts_loss: bool = True) -> None:
        """Run one forward and backward pass of this rank over its share of the rows."""
        mine, has_rows = rows.share_of(self._shards.rank, self._shards.size)
        with self._shards.collecting(sink):
            loss = (self._row_losses(mine.input_ids, mine.target_mask) * mine.row_weight).sum()
            loss.backward()
        if has_rows and counts_loss:
            self._loss += float(loss.detach())

    def _weights(self, squares: torch.Tensor, owner: int) -> tuple[list[float] | None, torch.Tensor]:
        """Add up the unit's squared norms over the group, count the unit, and return its weights and norms.

        Args:
            squares: [slots, 1] squared norms of this rank's parts.
            owner: the unit.

        Returns:
            Each slot's weight in grid steps (``None`` where the unit counts as zero), and the unit's [groups, 1] norms.
        """
        summed = torch.cat([squares, squares.new_tensor([[self._loss]])])  # the loss travels along: one all-reduce
        self._shards.sum_over_group(summed)
        squares, loss = summed[:-1], float(summed[-1])
        if not math.isfinite(loss):  # a loss that is not a number may have a gradient that is
            squares = torch.full_like(squares, torch.inf)
        norms = styles.group_norms(squares, self._groups)
        factors = styles.factors(self._style, norms, self.clipping_norm).cpu()  # one wait for all that is asked below
        self._count(owner, loss, whole_norm=float(squares.sum().sqrt()), is_clipped=bool((factors < 1).any()))
        if not bool((factors > 0).all()):  # 0 for a unit that is not finite
            return None, norms
        by_group = exact_sum.on_grid(factors.flatten(), self.grid_exponent).tolist()
        return [by_group[group] for group in self._groups], norms

    def _count(self, owner: int, loss: float, *, whole_norm: float, is_clipped: bool) -> None:
        """Add a unit to the diagnostics: once in the group, but that it is not finite on every rank.

        Args:
            owner: the unit.
            loss: over the group.
            whole_norm: of the unit's gradient over all tensors; infinite if its loss is not finite.
            is_clipped: whether a factor of the unit is below 1.
        """
        is_finite = whole_norm < math.inf  # false for NaN too
        if not is_finite:
            self.diagnostics.nonfinite_owners.append(owner)
        if self._shards.rank == 0:
            self.diagnostics.num_units += 1
            self.diagnostics.add_loss(owner, loss)
            self.diagnostics.num_clipped += int(is_clipped and is_finite)
            self.diagnostics.num_nonfinite += int(not is_finite)
            self.diagnostics.sum_norms += whole_norm if is_finite else 0.0
            within = styles.within(torch.tensor([whole_norm], dtype=torch.float64), self.clipping_norm)
            self.diagnostics.shares_within += within.tolist()

    def _zero_squares(self) -> torch.Tensor:
        return torch.zeros(len(self.layout.slots), 1, dtype=torch.float64, device=self._device)
