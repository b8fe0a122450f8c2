"""The units' gradients of one microbatch, tensor by tensor, in whichever form is cheaper.

A tensor of shape [p, d] used by a linear layer has, for a unit of n tokens, a gradient of p·d numbers made of factors
of n·(p + d) numbers. One inequality decides, for each layer and batch:

    p·d ≤ n·(p + d)   →  multiply out, one gradient a unit: it takes no more memory than the factors, and its norm no
                         more operations than the Gram matrices. All of LoRA, biases, norms; large layers of long units.
    otherwise         →  keep the factors (book-keeping: Bu et al. 2022, arXiv 2210.00038), norms from Gram matrices in
                         float64, and the clipped sum of all units in one product.

Embeddings are always kept as factors: their memory grows with the rows touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from privtrain.clipping.factors import Lookup, Outer, add_multiplied, squared_norm, squared_norms
from privtrain.clipping.rules import Gradient
from privtrain.errors import UnsupportedLayer
from privtrain.layout import Layout, Slot


class UnitGradients:
    """Collects what the rules return during one backward pass.

    Args:
        layout: the trainable tensors.
        rows_of_unit: number of rows of each unit, in row order; a unit's rows lie next to each other.
        device: where the tensors are.
    """

    def __init__(self, layout: Layout, rows_of_unit: Sequence[int], device: torch.device) -> None:
        self._layout = layout
        self._counts = list(rows_of_unit)
        self._device = device
        self._num_units = len(self._counts)
        self._ends = [sum(self._counts[: i + 1]) for i in range(self._num_units)]
        owner = [unit for unit, count in enumerate(self._counts) for _ in range(count)]
        self._owner = torch.tensor(owner, dtype=torch.int64, device=device)
        self._dense: dict[str, torch.Tensor] = {}
        self._outers: dict[str, list[Outer]] = {}
        self._lookups: dict[str, list[Lookup]] = {}

    @property
    def num_rows(self) -> int:
        """Rows that belong to a unit."""
        return len(self._owner)

    def add(self, name: str, gradient: Gradient) -> None:
        """One more use of the tensor ``name``: contributions of all its uses are added before any norm is taken."""
        if isinstance(gradient, Lookup):
            if name in self._dense:
                self._add_dense(name, self._scattered(gradient, self._dense[name].shape))
            else:
                self._lookups.setdefault(name, []).append(gradient)
        elif isinstance(gradient, Outer):
            is_first = not (name in self._dense or name in self._outers or name in self._lookups)
            if name in self._dense or (is_first and self._is_cheap(gradient)):
                self._add_dense(name, self._multiplied(gradient))
            else:
                self._outers.setdefault(name, []).append(gradient)
        elif name in self._outers or name in self._lookups:
            raise UnsupportedLayer(f"tensor {name!r} is shared between layers whose gradients have different forms")
        else:
            self._add_dense(name, self._by_unit(gradient))

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[slots, units] squared norms in float64, and what they could be if no contributions cancelled."""
        squares = torch.zeros(len(self._layout.slots), self._num_units, dtype=torch.float64, device=self._device)
        uncancelled = torch.zeros_like(squares)
        for i, slot in enumerate(self._layout.slots):
            if slot.name in self._dense:
                squares[i] = squared_norms(self._dense[slot.name])
                continue
            outers, lookups = self._outers.get(slot.name, []), self._lookups.get(slot.name, [])
            if outers or lookups:
                for unit in range(self._num_units):
                    rows = self._rows(unit)
                    squares[i, unit], uncancelled[i, unit] = squared_norm(
                        [Outer(o.left[rows], o.right[rows]) for o in outers],
                        [Lookup(k.ids[rows], k.values[rows]) for k in lookups],
                    )
        return squares, uncancelled

    def unit(self, index: int) -> dict[str, torch.Tensor]:
        """The whole gradient of one unit, multiplied out: name → [*shape]. A tensor without a use is left out."""
        rows = self._rows(index)
        result = {name: value[index].clone() for name, value in self._dense.items()}
        for slot in self._layout.slots:
            outers, lookups = self._outers.get(slot.name, []), self._lookups.get(slot.name, [])
            if outers or lookups:
                out = torch.zeros(slot.shape, dtype=torch.float32, device=self._device)
                one = torch.ones(self._counts[index], device=self._device)
                cut = [Outer(o.left[rows], o.right[rows]) for o in outers]
                add_multiplied(out, cut, [Lookup(k.ids[rows], k.values[rows]) for k in lookups], one, masked=False)
                result[slot.name] = out
        return result

    def add_weighted(self, total: torch.Tensor, weights: torch.Tensor) -> None:
        """``total += Σ_u weight_u g_u``; a unit of weight zero adds nothing, whatever its gradient.

        Args:
            total: the flat sum.
            weights: [slots, units] float32.
        """
        masked = not bool((weights != 0).all())  # asked once: every question waits for the device
        for i, slot in enumerate(self._layout.slots):
            out = self._layout.view(total, slot)
            if slot.name in self._dense:
                value = self._dense[slot.name].flatten(1)
                value = torch.where((weights[i] != 0)[:, None], value, 0.0) if masked else value
                out.add_((weights[i] @ value).view(slot.shape))
            else:
                outers, lookups = self._outers.get(slot.name, []), self._lookups.get(slot.name, [])
                add_multiplied(out, outers, lookups, weights[i][self._owner], masked=masked)

    def _is_cheap(self, gradient: Outer) -> bool:
        p, d = gradient.left.shape[-1], gradient.right.shape[-1]
        num_tokens = gradient.left.shape[0] * gradient.left.shape[1]
        return self._num_units * p * d <= num_tokens * (p + d)

    def _multiplied(self, gradient: Outer) -> torch.Tensor:
        """[units, p, d]. Rows of a unit are joined first, so that no gradient of a single row is formed."""
        if len(set(self._counts)) == 1:
            left, right = (v.float().reshape(self._num_units, -1, v.shape[-1]) for v in (gradient.left, gradient.right))
            return torch.bmm(left.transpose(1, 2), right)
        parts = []
        for unit in range(self._num_units):
            rows = self._rows(unit)
            parts.append(gradient.left[rows].flatten(0, 1).float().T @ gradient.right[rows].flatten(0, 1).float())
        return torch.stack(parts)

    def _scattered(self, gradient: Lookup, shape: Sequence[int]) -> torch.Tensor:
        dense = torch.zeros(shape[0] * shape[1], shape[2], dtype=torch.float32, device=self._device)
        place = gradient.ids + self._owner[:, None] * shape[1]
        return dense.index_add_(0, place.flatten(), gradient.values.flatten(0, 1).float()).view(*shape)

    def _by_unit(self, per_row: torch.Tensor) -> torch.Tensor:
        if self._num_units == self.num_rows:
            return per_row.float()
        summed = per_row.new_zeros((self._num_units, *per_row.shape[1:]), dtype=torch.float32)
        return summed.index_add_(0, self._owner, per_row.float())

    def _add_dense(self, name: str, value: torch.Tensor) -> None:
        if name in self._dense:
            self._dense[name] += value
        else:
            self._dense[name] = value

    def _rows(self, unit: int) -> slice:
        return slice(self._ends[unit] - self._counts[unit], self._ends[unit])


def slots_by_tensor(layout: Layout) -> dict[int, Slot]:
    """The slot of each trainable tensor by identity: a tied tensor has one slot and several names."""
    return {id(layout.parameters[slot.name]): slot for slot in layout.slots}
