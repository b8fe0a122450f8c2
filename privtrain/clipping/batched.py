"""The units' gradients of one microbatch, tensor by tensor, in whichever form is cheaper.

A tensor of shape [p, d] used by a linear layer has, for a row of n tokens, a gradient of p·d numbers made of factors
of n·(p + d) numbers, whose norm takes 2n²(p + d) operations from Gram matrices and 2n·p·d multiplied out. One
inequality decides, for each layer and width of rows:

    p·d ≤ 1.25 n·(p + d)  →  multiply out, one gradient a row. All of LoRA, biases, norms; large layers of long rows.
    otherwise             →  keep the factors (book-keeping: Bu et al. 2022, arXiv 2210.00038), norms from Gram
                             matrices, and each unit multiplied out block by block as it is added.

Embeddings are always kept as factors: their memory grows with the rows touched.

A gradient of numbers is *dense* here, one of factors an :class:`~.factors.Outer` (linear layers) or a
:class:`~.factors.Lookup` (embeddings). A tensor has a *use* for each call of a layer that it belongs to.

A norm from factors is *doubtful* where rounding may be too large a part of it (:func:`.factors.squared_norms_of`). It
is *settled*, that is measured anew in float64, when doubts are looked at: together for all tensors, since looking waits
for the device; of a tensor whose gradients are dropped, before they are.

**A unit's numbers are its own, bit for bit.** Nothing here is computed in a shape, or by a path, that the other units
of the microbatch decide. What is computed for all rows at once is so for all rows of the microbatch, padding included,
whose number is a constant; a unit's rows are then added one after another. What joins the rows of a unit is computed
for that unit alone. Which of the two it is depends on the unit's own number of rows.
Whether a product that was formed for a norm is kept, or formed again, does depend on the others; it is the same
:class:`~.factors.Product`, of the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from privtrain.clipping import exact_sum
from privtrain.clipping.factors import (
    GRAM_TOLERANCE,
    GramCache,
    Lookup,
    Outer,
    Product,
    add_multiplied,
    grouped_squared_norms,
    squared_norm_float64,
    squared_norms,
    squared_norms_of,
    summed_lookups,
)
from privtrain.clipping.rules import Gradient
from privtrain.errors import GuaranteeLost, UnsupportedLayer
from privtrain.privacy.layout import Layout, Slot

#: Coordinates of the largest tensor that is measured and added together with others of its shape.
_SMALL = 1 << 18
#: Numbers, a multiple of which lies between the products of two units: 512 bytes, as far as any kernel looks.
_ALIGNED = 128


class UnitGradients:
    """Collects what the rules return during one backward pass.

    Args:
        layout: the trainable tensors.
        rows_of_unit: number of rows of each unit, in row order; a unit's rows lie next to each other, and rows without
            a unit come last.
        device: where the tensors are.
        first_row: the first row of the first unit; rows before it are without a unit too.
    """

    def __init__(self, layout: Layout, rows_of_unit: Sequence[int], device: torch.device, first_row: int = 0) -> None:
        self._layout = layout
        self._counts = list(rows_of_unit)
        self._device = device
        self._num_units = len(self._counts)
        #: Of each unit, its first row and the row after its last.
        self._firsts: list[int] = []
        self._ends: list[int] = []
        row = first_row
        for count in self._counts:
            self._firsts.append(row)
            row += count
            self._ends.append(row)
        #: The rows that belong to a unit.
        self.rows = slice(first_row, row)
        #: Units of one row.
        self._singles = [unit for unit, count in enumerate(self._counts) if count == 1]
        #: [rows] the first row of each row's unit; for a row without a unit the row itself. Made when it is needed.
        self._first_of_row: torch.Tensor | None = None
        self._first_rows = torch.tensor(self._firsts, dtype=torch.int64).to(device, non_blocking=True)
        #: By the tensor's name: [rows, *shape] until its norms are taken, then [units, *shape].
        self._dense: dict[str, torch.Tensor] = {}
        self._outers: dict[str, list[Outer]] = {}
        self._lookups: dict[str, list[Lookup]] = {}
        #: Small tensors of one shape, units first, [units, tensors, *shape]; ``_dense`` has views of them.
        self._groups: list[tuple[list[str], torch.Tensor]] = []
        #: Squared norms, and what they could be without cancellation, [units] each.
        self._measured: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        #: By the tensor's name, if its norms come from factors: [units], how far rounding may have moved the squared
        #: norms. Stays on the device until it is looked at for all tensors together.
        self._errors: dict[str, torch.Tensor] = {}
        self._zero = torch.zeros(self._num_units, dtype=torch.float64, device=device)
        #: Of the tensors whose norms were taken from factors: [units] squared norms of the products that were added.
        self._added: dict[str, torch.Tensor] = {}
        self._grams = GramCache()

    @property
    def num_rows(self) -> int:
        """Rows that belong to a unit."""
        return sum(self._counts)

    @property
    def num_units(self) -> int:
        """Units of the microbatch."""
        return self._num_units

    def add(self, name: str, gradient: Gradient) -> None:
        """Add one more use of the tensor ``name``. Its norms are taken later, when all its uses have been added.

        Args:
            name: the tensor's slot.
            gradient: what the rule returned.
        """
        if name in self._measured:
            raise GuaranteeLost(f"tensor {name!r} is used again after its norm was taken; this is a bug, report it")
        if isinstance(gradient, Lookup):
            if name in self._dense:  # a tied tensor, whose head was multiplied out
                self._add_dense(name, self._scattered(gradient, self._dense[name].shape))
            else:
                self._lookups.setdefault(name, []).append(gradient)
        elif isinstance(gradient, Outer):
            # The first use decides the form, and later ones keep to it, so that all can be added up.
            is_first = not (name in self._dense or name in self._outers or name in self._lookups)
            if name in self._dense or (is_first and _is_cheap(gradient)):
                self._add_dense(name, self._multiplied(gradient))
            else:
                self._outers.setdefault(name, []).append(gradient)
        elif name in self._outers or name in self._lookups:
            raise UnsupportedLayer(f"tensor {name!r} is shared between layers whose gradients have different forms")
        else:
            self._add_dense(name, self._by_unit(gradient))

    def complete(self, name: str) -> None:
        """Note that all uses of a tensor have been added: take its norms, of a small one later together with others."""
        if name not in self._dense or self._dense[name][0].numel() > _SMALL:
            self.measure(name)

    def measure(self, name: str) -> None:
        """Take the norms of a tensor now, whose uses have all been added.

        A dense one has its units' gradients; one of factors is measured by :func:`squared_norms_of`, units of one row
        all together and each of the others by itself. With all its rows in a line, a unit may be cheaper to multiply
        out; where every unit is, the products are kept in place of the factors.
        """
        if name in self._dense:
            dense = self._dense[name]
            self._measured[name] = self._of_units(squared_norms(dense)), self._zero
            self._dense[name] = self._of_units(dense)
            return

        # All units are filled in below, in place. An unused tensor stays zero.
        squares, uncancelled = self._zero.clone(), self._zero.clone()
        self._measured[name] = squares, uncancelled
        outers, lookups = self._outers.get(name, []), self._lookups.get(name, [])
        if not (outers or lookups):
            return
        errors = self._zero.clone()
        self._errors[name] = errors

        if self._singles:
            rows = [self._firsts[unit] for unit in self._singles]
            by_row = squared_norms_of(outers, lookups, self._grams)
            squares[self._singles] = by_row.squares[rows]
            uncancelled[self._singles] = by_row.uncancelled[rows]
            errors[self._singles] = by_row.errors[rows]

        products: list[torch.Tensor] = []
        for unit, num_rows in enumerate(self._counts):
            if num_rows < 2:  # measured above
                continue
            own_outers, own_lookups = self._of_unit(name, unit)
            # A unit has more tokens than each of its rows, so it may be cheaper to multiply out than a row is.
            if not lookups and len(outers) == 1 and _is_cheap(own_outers[0]):
                product = Product(own_outers, own_lookups)
                blocks = [product.block(block) for block in product.blocks]
                for block in blocks:
                    squares[unit] += squared_norms(block[None])[0]
                products.append(torch.cat(blocks))
            else:
                of_unit = squared_norms_of(own_outers, own_lookups, GramCache())
                squares[unit] = of_unit.squares[0]
                uncancelled[unit] = of_unit.uncancelled[0]
                errors[unit] = of_unit.errors[0]
        if products and len(products) == self._num_units:
            self._dense[name] = torch.stack(products)
            del self._outers[name]

    def drop(self, name: str) -> None:
        """Take the norms of a tensor and drop its gradients."""
        self.measure(name)
        if name in self._errors:  # without its gradients it could not be settled later
            squares, _ = self._measured[name]
            is_doubtful = is_inexact(squares, self._errors[name])
            self._settle_tensor(name, is_doubtful.cpu().numpy())
        self._dense.pop(name, None)
        self._outers.pop(name, None)
        self._lookups.pop(name, None)

    def squares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return [slots, units] squared norms in float64, and what they could be if no contributions cancelled.

        Settles the doubtful ones, which waits for the device.
        """
        squares, _, errors = self.squares_and_errors()
        self.settle(is_inexact(squares, errors).cpu().numpy())
        squares, uncancelled, _ = self.squares_and_errors()
        return squares, uncancelled

    def squares_and_errors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return :meth:`squares` as fp32 gives them, and how far rounding may have moved each: [slots, units] all."""
        self._measure_groups()
        for slot in self._layout.slots:
            if slot.name not in self._measured:
                self.measure(slot.name)
        self._grams.clear()
        measured = [self._measured[slot.name] for slot in self._layout.slots]
        squares = torch.stack([square for square, _ in measured])
        uncancelled = torch.stack([length for _, length in measured])
        errors = torch.stack([self._errors.get(slot.name, self._zero) for slot in self._layout.slots])
        return squares, uncancelled, errors

    def settle(self, doubts: np.ndarray) -> None:
        """Measure the doubtful norms anew, in float64.

        Args:
            doubts: [slots, units] bool on the CPU; only where :meth:`squares_and_errors` has an error.
        """
        for slot, is_doubtful in zip(self._layout.slots, doubts, strict=True):
            self._settle_tensor(slot.name, is_doubtful)

    def _settle_tensor(self, name: str, is_doubtful: np.ndarray) -> None:
        """Measure one tensor's norms in float64 where ``is_doubtful``, [units] bool."""
        squares, _ = self._measured[name]
        for unit in np.flatnonzero(is_doubtful).tolist():
            outers, lookups = self._of_unit(name, unit)
            squares[unit] = squared_norm_float64(outers, lookups)
            self._errors[name][unit] = 0.0

    def _measure_groups(self) -> None:
        """Take the norms of small dense tensors, all of one shape at once; their [rows, …] become [units, …]."""
        by_shape: dict[torch.Size, list[str]] = {}
        for slot in self._layout.slots:
            value = self._dense.get(slot.name)
            if value is not None and slot.name not in self._measured and value[0].numel() <= _SMALL:
                by_shape.setdefault(value.shape, []).append(slot.name)
        for names in by_shape.values():
            if len(names) == 1:  # nothing to share a kernel with; measured by itself afterwards
                continue
            group = torch.stack([self._dense.pop(name) for name in names], dim=1)
            # Norms also of rows without a unit: a microbatch always has as many rows, so kernels have one shape.
            squares = self._of_units(grouped_squared_norms(group))
            group = self._of_units(group)
            self._groups.append((names, group))
            for i, name in enumerate(names):
                self._measured[name] = squares[:, i], self._zero
                self._dense[name] = group[:, i]

    def unit(self, index: int) -> dict[str, torch.Tensor]:
        """Return the whole gradient of one unit, multiplied out: name → [*shape]; unused tensors are left out."""
        parts = {slot.name: self.tensor_of_unit(slot, index) for slot in self._layout.slots}
        return {name: part for name, part in parts.items() if part is not None}

    def tensor_of_unit(self, slot: Slot, index: int) -> torch.Tensor | None:
        """Return one unit's gradient of one tensor, multiplied out: [*shape]; ``None`` if the tensor was not used."""
        if slot.name in self._dense:
            return self._dense[slot.name][index].clone()
        outers, lookups = self._of_unit(slot.name, index)
        if not (outers or lookups):
            return None
        result = torch.zeros(slot.shape, dtype=torch.float32, device=self._device)
        add_multiplied(result, outers, lookups)
        return result

    def add_weighted(self, total: torch.Tensor, weights: torch.Tensor) -> None:
        """Add ``Σ_u trunc(weight_u g_u)`` of what was kept to ``total``; weight zero adds nothing, NaN or not.

        Args:
            total: the flat sum, int64.
            weights: [slots, units] of :func:`.exact_sum.on_grid`.
        """
        outs = {slot.name: self._layout.view(total, slot) for slot in self._layout.slots}
        index_of = {slot.name: i for i, slot in enumerate(self._layout.slots)}
        for names, group in self._groups:
            weights_of_group = weights[[index_of[name] for name in names]]
            exact_sum.add_groups([outs.pop(name) for name in names], group, weights_of_group)
        for name, out in outs.items():  # tensors that no group has added
            self.add_kept(name, out, weights[index_of[name]])

    def add_kept(self, name: str, out: torch.Tensor, weights: torch.Tensor) -> None:
        """Add one kept tensor like :meth:`add_weighted`: ``out`` is its part of the sum, ``weights`` are [units]."""
        if name in self._dense:
            exact_sum.add_units(out, self._dense[name], weights)
        else:
            units = np.flatnonzero(weights.numpy()).tolist()
            factors = [self._of_unit(name, unit) for unit in units]
            self._note_added(name, units, _add_factors(out, factors, weights[units]))

    def add_now(self, name: str, out: torch.Tensor, gradient: Gradient, weights: torch.Tensor) -> None:
        """Add ``Σ_u trunc(weight_u g_u)`` of a tensor's only use, which a second pass has brought back.

        These must be the numbers whose norm was taken. Where a gradient was multiplied out to take its norm, it is
        multiplied out here too, in the same products and order: where the rows of a unit cancel, another order leaves
        another rest, which the unit's factor would blow up beyond the norm.

        Args:
            name: the tensor's slot.
            out: the tensor's part of the sum, int64.
            gradient: what the rule returned.
            weights: [units] of :func:`.exact_sum.on_grid`.
        """
        if self._is_dense(gradient):
            exact_sum.add_units(out, self._of_units(self._dense_form(gradient)), weights)
        else:
            units = np.flatnonzero(weights.numpy()).tolist()
            factors = [self._cut(gradient, unit) for unit in units]
            self._note_added(name, units, _add_factors(out, factors, weights[units]))

    def add_unit(self, out: torch.Tensor, gradient: Gradient, unit: int) -> None:
        """Add one unit's gradient of a tensor's only use, which a second pass has brought back, to ``out``: in fp32."""
        if self._is_dense(gradient):
            out.add_(self._dense_form(gradient)[self._firsts[unit]])
        else:
            add_multiplied(out, *self._cut(gradient, unit))

    def added_squares(self, squares: torch.Tensor) -> torch.Tensor | None:
        """Return ``squares`` with the norms of the products that were really added in place of those from factors.

        Args:
            squares: [slots, units] squared norms, of :meth:`squares`.

        Returns:
            [slots, units]; ``None`` if no product was added, since dense tensors are measured as they are added.
        """
        if not self._added:
            return None
        index_of = {slot.name: i for i, slot in enumerate(self._layout.slots)}
        measured_when_added = torch.stack(list(self._added.values())).cpu()
        added = squares.clone()
        added[[index_of[name] for name in self._added]] = measured_when_added
        return torch.where(added == -1.0, squares, added)  # -1: a unit that was not added

    def _note_added(self, name: str, units: Sequence[int], squares: torch.Tensor) -> None:
        """Note the squared norms of the products that were added for ``units``; -1 stands for all others."""
        if units:
            added = torch.full((self._num_units,), -1.0, dtype=torch.float64, device=self._device)
            added[torch.tensor(units).to(self._device, non_blocking=True)] = squares
            self._added[name] = added

    def rows_of(self, chosen: torch.Tensor) -> torch.Tensor:
        """Return the places of some units' rows among the rows of all units; ``chosen`` is [units] bool, on the CPU."""
        is_row_chosen = np.repeat(chosen.numpy(), self._counts)
        places = np.flatnonzero(is_row_chosen)
        return torch.from_numpy(places).to(self._device, non_blocking=True)

    def _is_dense(self, gradient: Gradient) -> bool:
        """Return whether a tensor with this only use is kept multiplied out."""
        return isinstance(gradient, torch.Tensor) or (isinstance(gradient, Outer) and _is_cheap(gradient))

    def _dense_form(self, gradient: Gradient) -> torch.Tensor:
        """Return [rows, *shape]: the gradient multiplied out, each unit's sum in the place of its first row."""
        assert not isinstance(gradient, Lookup)
        return self._multiplied(gradient) if isinstance(gradient, Outer) else self._by_unit(gradient)

    def _multiplied(self, gradient: Outer) -> torch.Tensor:
        """Return [rows, p, d]: every row multiplied out, then each unit's sum in the place of its first row."""
        return self._by_unit(torch.bmm(gradient.left.float().transpose(1, 2), gradient.right.float()))

    def _scattered(self, gradient: Lookup, shape: Sequence[int]) -> torch.Tensor:
        """Return [rows, p, d]: a lookup multiplied out, then each unit's sum in the place of its first row.

        ``shape`` is [rows, p, d].
        """
        num_rows, p, d = shape
        dense = torch.zeros(num_rows * p, d, dtype=torch.float32, device=self._device)
        # Token t of row r adds to row id_t of its own matrix, which is row r · p + id_t of all matrices together.
        row_starts = torch.arange(num_rows, device=self._device)[:, None] * p
        dense.index_add_(0, (row_starts + gradient.ids).flatten(), gradient.values.flatten(0, 1).float())
        return self._by_unit(dense.view(num_rows, p, d))

    def _by_unit(self, per_row: torch.Tensor) -> torch.Tensor:
        """Return [rows, …] with each unit's sum over its rows, one after another, in the place of its first row."""
        value = per_row.float()
        if len(self._singles) == self._num_units:  # every unit is one row: nothing to add up
            return value
        if self._first_of_row is None:
            first_of_row = np.arange(len(value))
            first_of_row[self.rows] = np.repeat(self._firsts, self._counts)
            self._first_of_row = torch.from_numpy(first_of_row).to(self._device, non_blocking=True)
        return torch.zeros_like(value).index_add_(0, self._first_of_row, value)

    def _of_units(self, by_row: torch.Tensor) -> torch.Tensor:
        """Return [units, …] of [rows, …]: what stands in the place of each unit's first row.

        ``by_row`` is what :meth:`_by_unit` returned, or the norms of its rows.
        """
        if len(self._singles) == self._num_units:  # every row of a unit is a first one: a view will do
            return by_row[self.rows]
        return by_row.index_select(0, self._first_rows)

    def _add_dense(self, name: str, value: torch.Tensor) -> None:
        """Add a use's dense gradient to what the tensor has so far."""
        # Never in place: a layer over [rows, features] hands over a gradient of autograd, which others may share.
        self._dense[name] = self._dense[name] + value if name in self._dense else value

    def _of_unit(self, name: str, unit: int) -> tuple[list[Outer], list[Lookup]]:
        """Return one unit's own factors of a tensor, by use, all the unit's tokens in a line: [1, tokens, …]."""
        uses: list[Gradient] = [*self._outers.get(name, []), *self._lookups.get(name, [])]
        own_outers: list[Outer] = []
        own_lookups: list[Lookup] = []
        for use in uses:
            outers, lookups = self._cut(use, unit)
            own_outers += outers
            own_lookups += lookups
        return own_outers, own_lookups

    def _cut(self, gradient: Gradient, unit: int) -> tuple[list[Outer], list[Lookup]]:
        """Return one use's factors for a unit, its tokens in a line: a list of one Outer, or else of one Lookup."""
        if isinstance(gradient, Outer):
            return [Outer(self._in_a_line(gradient.left, unit), self._in_a_line(gradient.right, unit))], []
        assert isinstance(gradient, Lookup)
        return [], [Lookup(self._in_a_line(gradient.ids, unit), self._in_a_line(gradient.values, unit))]

    def _in_a_line(self, value: torch.Tensor, unit: int) -> torch.Tensor:
        """Return the tokens of all of a unit's rows, one after another: [1, tokens, …] of [rows, tokens, …]."""
        return value[self._firsts[unit] : self._ends[unit]].flatten(0, 1)[None]


def is_inexact(squares: torch.Tensor, errors: torch.Tensor) -> torch.Tensor:
    """Return whether ``errors`` of squared norms are too large a share of them; also where they are not known.

    Squared norms that do not come from fp32 Gram matrices have errors of zero, and are exact whatever they are.
    """
    return (errors != 0) & ~(errors <= GRAM_TOLERANCE * squares)


def _is_cheap(gradient: Outer) -> bool:
    """Return whether a row's gradient is multiplied out and not kept as factors: the module's inequality.

    Each row of ``gradient`` has the same number of tokens; a unit given alone counts as one row.
    """
    p, d, num_tokens = gradient.left.shape[-1], gradient.right.shape[-1], gradient.left.shape[1]
    return p * d <= 1.25 * num_tokens * (p + d)


def _add_factors(
    out: torch.Tensor, units: Sequence[tuple[list[Outer], list[Lookup]]], weights: torch.Tensor
) -> torch.Tensor:
    """Add ``Σ_u trunc(weight_u g_u)`` to ``out`` block by block, so that a block stays in the cache for all units.

    Args:
        out: a tensor's part of the sum, int64.
        units: each unit's factors of the tensor: linear uses and lookups.
        weights: [units] float32 of :func:`.exact_sum.on_grid`, none of them zero.

    Returns:
        [units] float64 ‖trunc(weight_u g_u)‖² / weight_u², of the very integers that were added.
    """
    squares = torch.zeros(len(units), dtype=torch.float64, device=out.device)  # in grid steps
    if not units:
        return squares
    linear_uses, _ = units[0]  # all units have the same uses
    if linear_uses:
        products = [Product(outers, lookups) for outers, lookups in units]
        blocks = products[0].blocks  # the same for all units
        buffer = _aligned(len(units), out[blocks[0]].numel(), out.device)  # the first block is the largest
        for block in blocks:
            shape = out[block].shape
            of_units = buffer[:, : shape.numel()].unflatten(1, shape)  # [units, *shape]
            for product, of_unit in zip(products, of_units, strict=True):
                product.block(block, of_unit)
            squares += exact_sum.add_measured(out[block], of_units, weights)
    else:  # an embedding alone: only the rows that a unit's ids touch
        for i, (_, lookups) in enumerate(units):
            if lookups:
                touched, summed = summed_lookups(lookups)
                part = torch.zeros(summed.shape, dtype=torch.int64, device=out.device)
                squares[i] = exact_sum.add_measured(part, summed[None], weights[i : i + 1])[0]
                out.index_add_(0, touched, part)
    return squares / weights.to(out.device, torch.float64, non_blocking=True).square()


def _aligned(num_units: int, size: int, device: torch.device) -> torch.Tensor:
    """Return [num_units, size or more] float32, in which each unit's part is aligned as an allocation of its own."""
    padded = -(-size // _ALIGNED) * _ALIGNED  # rounded up to a multiple
    return torch.empty(num_units, padded, dtype=torch.float32, device=device)


def slots_by_tensor(layout: Layout) -> dict[int, Slot]:
    """Return the slot of each trainable tensor by identity: a tied tensor has one slot and several names."""
    return {id(layout.parameters[slot.name]): slot for slot in layout.slots}
