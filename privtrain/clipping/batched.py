"""The units' gradients of one microbatch, tensor by tensor, in whichever form is cheaper.

A tensor of shape [p, d] used by a linear layer has, for a unit of n tokens, a gradient of p·d numbers made of factors
of n·(p + d) numbers, whose norm takes 2n²(p + d) operations from Gram matrices and 2n·p·d multiplied out. One
inequality decides, for each layer and batch:

    p·d ≤ 1.25 n·(p + d)  →  multiply out, one gradient a unit. All of LoRA, biases, norms; large layers of long units.
                             (Where nothing is kept it is 1, not 1.25.)
    otherwise             →  keep the factors (book-keeping: Bu et al. 2022, arXiv 2210.00038), norms from Gram
                             matrices, and the clipped sum of all units in one product.

Embeddings are always kept as factors: their memory grows with the rows touched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from privtrain.clipping import exact_sum
from privtrain.clipping.factors import GramCache, Lookup, Outer, add_multiplied, squared_norms, squared_norms_of
from privtrain.clipping.rules import Gradient
from privtrain.errors import GuaranteeLost, UnsupportedLayer
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
        self._measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._released: set[str] = set()
        self._grams = GramCache()

    @property
    def num_rows(self) -> int:
        """Rows that belong to a unit."""
        return len(self._owner)

    @property
    def num_units(self) -> int:
        """Units of the microbatch."""
        return self._num_units

    @property
    def released(self) -> frozenset[str]:
        """Tensors of which only the norms are left."""
        return frozenset(self._released)

    def add(self, name: str, gradient: Gradient, *, keep: bool = True) -> None:
        """One more use of the tensor ``name``: contributions of all its uses are added before any norm is taken.

        Args:
            name: the tensor's slot.
            gradient: what the rule returned.
            keep: whether the gradient is needed once its norm is known.
        """
        if name in self._measured:
            raise GuaranteeLost(f"tensor {name!r} is used again after its norm was taken; this is a bug, report it")
        if isinstance(gradient, Lookup):
            if name in self._dense:
                self._add_dense(name, self._scattered(gradient, self._dense[name].shape))
            else:
                self._lookups.setdefault(name, []).append(gradient)
        elif isinstance(gradient, Outer):
            is_first = not (name in self._dense or name in self._outers or name in self._lookups)
            if name in self._dense or (is_first and self._is_cheap(gradient, keep=keep)):
                self._add_dense(name, self._multiplied(gradient))
            else:
                self._outers.setdefault(name, []).append(gradient)
        elif name in self._outers or name in self._lookups:
            raise UnsupportedLayer(f"tensor {name!r} is shared between layers whose gradients have different forms")
        else:
            self._add_dense(name, self._by_unit(gradient))

    def measure(self, name: str) -> None:
        """Take the norms of a tensor all of whose uses have been added."""
        if name in self._dense:
            square = squared_norms(self._dense[name])
            self._measured[name] = square, torch.zeros_like(square)
            return
        outers, lookups = self._outers.get(name, []), self._lookups.get(name, [])
        if not (outers or lookups):
            zero = torch.zeros(self._num_units, dtype=torch.float64, device=self._device)
            self._measured[name] = zero, zero
        elif len(set(self._counts)) == 1:
            cut = [Outer(self._lines(o.left), self._lines(o.right)) for o in outers]
            self._measured[name] = squared_norms_of(
                cut, [Lookup(self._lines(k.ids), self._lines(k.values)) for k in lookups], self._grams
            )
        else:
            parts = [squared_norms_of(*self._of_unit(name, unit), GramCache()) for unit in range(self._num_units)]
            squares, uncancelled = zip(*parts, strict=True)
            self._measured[name] = torch.cat(squares), torch.cat(uncancelled)

    def release(self, name: str) -> None:
        """Keep the norms of a tensor alone."""
        self.measure(name)
        self._released.add(name)
        for kept in (self._dense, self._outers, self._lookups):
            kept.pop(name, None)

    def forget(self) -> None:
        """Let everything go that is not a norm."""
        for kept in (self._dense, self._outers, self._lookups):
            kept.clear()

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[slots, units] squared norms in float64, and what they could be if no contributions cancelled."""
        for slot in self._layout.slots:
            if slot.name not in self._measured:
                self.measure(slot.name)
        self._grams.clear()
        squares, uncancelled = zip(*(self._measured[slot.name] for slot in self._layout.slots), strict=True)
        return torch.stack(squares), torch.stack(uncancelled)

    def unit(self, index: int) -> dict[str, torch.Tensor]:
        """The whole gradient of one unit, multiplied out: name → [*shape]. A tensor without a use is left out."""
        result = {name: value[index].clone() for name, value in self._dense.items()}
        for slot in self._layout.slots:
            outers, lookups = self._of_unit(slot.name, index)
            if outers or lookups:
                out = torch.zeros(slot.shape, dtype=torch.float32, device=self._device)
                add_multiplied(out, outers, lookups)
                result[slot.name] = out
        return result

    def add_weighted(self, total: torch.Tensor, weights: torch.Tensor) -> None:
        """``total += Σ_u trunc(weight_u g_u)`` over what was kept; a unit of weight zero adds nothing, NaN or not.

        Args:
            total: the flat sum, int64.
            weights: [slots, units] of :func:`.exact_sum.on_grid`.
        """
        for i, slot in enumerate(self._layout.slots):
            out = self._layout.view(total, slot)
            if slot.name in self._dense:
                exact_sum.add_units(out, self._dense[slot.name], weights[i])
            elif slot.name in self._outers or slot.name in self._lookups:
                for unit in weights[i].nonzero().flatten().tolist():
                    value = torch.zeros(slot.shape, dtype=torch.float32, device=self._device)
                    add_multiplied(value, *self._of_unit(slot.name, unit))
                    exact_sum.add_unit(out, value, float(weights[i, unit]))

    def add_now(self, out: torch.Tensor, gradient: Gradient, weights: torch.Tensor) -> None:
        """``out += Σ_u trunc(weight_u g_u)`` for one use that is not kept.

        Args:
            out: the tensor's part of the sum, int64.
            gradient: what the rule returned.
            weights: [units] of :func:`.exact_sum.on_grid`.
        """
        for unit in weights.nonzero().flatten().tolist():
            value = torch.zeros(out.shape, dtype=torch.float32, device=self._device)
            self.add_unit(value, gradient, unit)
            exact_sum.add_unit(out, value, float(weights[unit]))

    def add_unit(self, out: torch.Tensor, gradient: Gradient, unit: int) -> None:
        """``out += g_unit`` for one use that is not kept, in fp32."""
        rows = self._rows(unit)
        if isinstance(gradient, Outer):
            add_multiplied(out, [Outer(gradient.left[rows], gradient.right[rows])], [])
        elif isinstance(gradient, Lookup):
            add_multiplied(out, [], [Lookup(gradient.ids[rows], gradient.values[rows])])
        else:
            out.add_(gradient[rows].float().sum(dim=0))

    def by_row(self, by_unit: torch.Tensor) -> torch.Tensor:
        """[units] → [rows of units]."""
        return by_unit[self._owner]

    def _is_cheap(self, gradient: Outer, *, keep: bool) -> bool:
        p, d = gradient.left.shape[-1], gradient.right.shape[-1]
        num_tokens = gradient.left.shape[0] * gradient.left.shape[1]
        return self._num_units * p * d <= (1.25 if keep else 1) * num_tokens * (p + d)

    def _multiplied(self, gradient: Outer) -> torch.Tensor:
        """[units, p, d]. Rows of a unit are joined first, so that no gradient of a single row is formed."""
        if len(set(self._counts)) == 1:
            left, right = (self._lines(value).float() for value in (gradient.left, gradient.right))
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

    def _lines(self, value: torch.Tensor) -> torch.Tensor:
        """[rows, tokens, …] → [units, all tokens of the unit, …], where every unit has as many rows."""
        return value.reshape(self._num_units, -1, *value.shape[2:])

    def _of_unit(self, name: str, unit: int) -> tuple[list[Outer], list[Lookup]]:
        """One unit's own factors, all its tokens in a line: [1, tokens, …]."""
        rows = self._rows(unit)
        line = lambda value: value[rows].flatten(0, 1)[None]  # noqa: E731
        outers = [Outer(line(o.left), line(o.right)) for o in self._outers.get(name, [])]
        return outers, [Lookup(line(k.ids), line(k.values)) for k in self._lookups.get(name, [])]

    def _rows(self, unit: int) -> slice:
        return slice(self._ends[unit] - self._counts[unit], self._ends[unit])


def slots_by_tensor(layout: Layout) -> dict[int, Slot]:
    """The slot of each trainable tensor by identity: a tied tensor has one slot and several names."""
    return {id(layout.parameters[slot.name]): slot for slot in layout.slots}
