"""The two shapes that a large tensor's gradient comes in, kept as factors instead of being multiplied out.

A linear layer's weight has the gradient Σ_t l_t r_tᵀ (:class:`Outer`), an embedding Σ_t e(id_t) v_tᵀ
(:class:`Lookup`, e the unit vector). A tied tensor has both, and its gradient is their sum. For a unit with tokens t
(all its rows one after another) the squared norm follows without the gradient itself:

    ‖Σ_t l_t r_tᵀ‖² = Σ_{t,s} ⟨l_t, l_s⟩⟨r_t, r_s⟩           (ghost norm: Goodfellow 2015, arXiv 1510.01799;
    ⟨Σ_s l_s r_sᵀ, Σ_t e(i_t) v_tᵀ⟩ = Σ_{s,t} l_s[i_t] ⟨r_s, v_t⟩                     Li et al. 2021, arXiv 2110.05679)

These sums can cancel; :func:`squared_norms_of` says how they are taken so that a norm is never under-estimated by more
than a share of 1e-5, and by how much a unit's tokens cancel, so that callers can multiply such a unit out.

A *row* is a sequence of a microbatch, a *use* of a tensor one call of a layer that has it as its weight. The *Gram
matrix* of some vectors is that of their inner products.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

#: Features of which a float64 copy is made at a time.
_BLOCK = 4096
#: Numbers of a tensor that are worked on at a time: with their copies they stay in a CPU's cache; a GPU has kernels to
#: save. Fewer than torch cuts among threads.
_CPU_PIECE, _CPU_BLOCK, _LARGEST_BLOCK = 1 << 13, 1 << 17, 1 << 25
#: Features that an fp32 product of two token vectors runs over before float64 takes over: sums of like terms are
#: biased, the longer the more (measured on one CPU: by 80 units of 2⁻²⁴ over 4096 equal terms, by 42 over 2048).
_GRAM_BLOCK = 1024
#: Rounding of such a product, in units of 2⁻²⁴: so many times |⟨x, y⟩| (the bias, measured up to 43) plus so many times
#: ‖x‖‖y‖ (the rest, measured below 1). Then what adding up their products costs, in fp32 and in pairs.
_BIAS, _SCATTER, _SUMMING = 64.0, 1.0, 4.0
#: Largest error of a squared norm, as a share of it, that fp32 Gram matrices may leave; beyond it they are float64.
GRAM_TOLERANCE = 2e-5
#: A trace below this may have lost tokens to the end of fp32's range.
_SMALLEST_TRACE = 1e-20


@dataclasses.dataclass(frozen=True)
class Outer:
    """Per row Σ_t left_t right_tᵀ, the gradient of a [p, d] tensor: [rows, tokens, p] and [rows, tokens, d]."""

    left: torch.Tensor
    right: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Per row Σ_t e(ids_t) values_tᵀ, the gradient of a [vocabulary, d] tensor: [rows, tokens], [rows, tokens, d]."""

    ids: torch.Tensor
    values: torch.Tensor


class UnitNorms(NamedTuple):
    """What factors say of the units' gradients of one tensor, [units] each.

    Attributes:
        squares: float64 ‖Σ_t …‖², the squared norms.
        uncancelled: float64 (Σ_t of the tokens' own norms)²: what the squared norms could be if no tokens cancelled.
        errors: float64, how far rounding may have moved the squared norms; infinite where that is not known.
    """

    squares: torch.Tensor
    uncancelled: torch.Tensor
    errors: torch.Tensor


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """Switch off autocast, TF32 and bf16 inside fp32 products, whatever the job has switched on elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class GramCache:
    """Gram matrices of the tensors seen last: query, key and value projections, or gate and up, share their input."""

    def __init__(self) -> None:
        self._recent: list[tuple[tuple[object, ...], torch.Tensor, torch.Tensor]] = []

    def gram(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return [units, n, n] inner products of [units, n, features]: fp32, in blocks that are added up in float64."""
        # The same memory in the same shape, not written to since.
        key = (tokens.data_ptr(), tokens.shape, tokens.stride(), tokens.dtype, tokens._version)
        for known, _, gram in self._recent:
            if known == key:
                return gram
        gram = self._product(tokens)
        # Keep two: this one and the one before. Holding the tensor keeps its address from being given to another one.
        self._recent = [*self._recent[-1:], (key, tokens, gram)]
        return gram

    @staticmethod
    def _product(tokens: torch.Tensor) -> torch.Tensor:
        """Return [units, n, n] inner products; where features take several blocks, in float64."""
        pieces = [piece.float() for piece in tokens.split(_GRAM_BLOCK, dim=2)]
        gram = torch.bmm(pieces[0], pieces[0].transpose(1, 2))
        for piece in pieces[1:]:
            gram = gram.double() + torch.bmm(piece, piece.transpose(1, 2))
        return gram

    def clear(self) -> None:
        """Drop the tensors."""
        self._recent = []


def squared_norms(values: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of each ``values[i]``, in float64, which holds it for every finite fp32 gradient.

    Over 3e7 numbers a plain fp32 norm was measured 4e-4 too small, which is sensitivity; and it is infinite from 1e19
    on. In pieces, since the float64 copy of a large tensor would not stay in the cache.
    """
    flat = values.flatten(1)
    pieces = flat.split(_CPU_PIECE if flat.device.type == "cpu" else _LARGEST_BLOCK, dim=1)
    squares = [torch.linalg.vector_norm(piece, dim=1, dtype=torch.float64).square() for piece in pieces]
    # Pieces of a row lie together: the order in which torch adds up a column depends on the column's place.
    return squares[0] if len(squares) == 1 else torch.stack(squares, dim=1).sum(dim=1)


def grouped_squared_norms(group: torch.Tensor) -> torch.Tensor:
    """Return [rows, tensors] squared norms in float64 of small tensors of one shape, [rows, tensors, *shape].

    Some tensors at a time, so that their float64 copies stay in the cache.
    """
    block_size = _CPU_BLOCK if group.device.type == "cpu" else _LARGEST_BLOCK
    size_of_one = max(1, group[:, 0].numel())  # numbers of one tensor, all rows together
    parts = group.flatten(2).split(max(1, block_size // size_of_one), dim=1)
    squares = [torch.linalg.vector_norm(part, dim=2, dtype=torch.float64).square() for part in parts]
    return squares[0] if len(squares) == 1 else torch.cat(squares, dim=1)


def squared_norms_of(outers: Sequence[Outer], lookups: Sequence[Lookup], grams: GramCache) -> UnitNorms:
    """Return each unit's squared norm of one tensor, what it could be without cancellation, and a bound on its error.

    The entries of the Gram matrices L = (⟨l_t, l_s⟩) and R = (⟨r_t, r_s⟩) are fp32 products. If rounding puts
    L_ts off by at most 2⁻²⁴ (64 |L_ts| + ‖l_t‖‖l_s‖), and R_ts likewise, then S = Σ_ts L_ts R_ts is off by at most

        E = 2⁻²⁴ Σ_ts (132 |L_ts R_ts| + ‖r_t‖‖r_s‖ |L_ts| + ‖l_t‖‖l_s‖ |R_ts|).

    The constants are measured, with a margin, on aligned, repeated, cancelling and random tokens; a test compares E
    with the truth on all of these (it was 100 times too large on a real model). Where tokens leave fp32's range, E is
    infinite. Where E is too large, the caller takes :func:`squared_norm_float64` instead: products of fp32 numbers are
    exact there, and rounding is at most 1e-10 of the second value. Whether it is, is not looked at here, so that a
    caller waits for the device once for many tensors, and may compare E with the norm of a unit's whole gradient.

    Args:
        outers: every use of the tensor in a linear layer; here "rows" are units, each with all its tokens in a line.
        lookups: every use of the tensor as an embedding, likewise.
        grams: shared between tensors.
    """
    lookup_square, lookup_length = _lookup_squares(outers, lookups)
    if not outers:  # lookups alone are summed in float64
        return UnitNorms(lookup_square, lookup_length.square(), torch.zeros_like(lookup_square))
    outer_square, outer_length, error = _outer_squares(_joined(outers), grams)
    square = outer_square + lookup_square
    return UnitNorms(square.clamp(min=0), (lookup_length + outer_length).square(), error)


def squared_norm_float64(outers: Sequence[Outer], lookups: Sequence[Lookup]) -> torch.Tensor:
    """Return [] the squared norm of one unit's gradient of one tensor, from float64 Gram matrices.

    Args:
        outers: the unit's uses in linear layers, at least one, each [1, tokens, …].
        lookups: its uses as an embedding, likewise.
    """
    lookup_square, _ = _lookup_squares(outers, lookups)
    return (_outer_squares_float64(_joined(outers)) + lookup_square)[0].clamp(min=0)


def _joined(outers: Sequence[Outer]) -> Outer:
    """Return several linear uses of a tensor as one, the tokens of each behind those of the one before."""
    if len(outers) == 1:
        return outers[0]
    left = torch.cat([outer.left.float() for outer in outers], dim=1)
    right = torch.cat([outer.right.float() for outer in outers], dim=1)
    return Outer(left, right)


def _outer_squares(outer: Outer, grams: GramCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return what fp32 Gram matrices L = (⟨l_t, l_s⟩) and R = (⟨r_t, r_s⟩) say of each unit's Σ_t l_t r_tᵀ.

    Returns:
        [units] each: its squared norm Σ_ts L_ts R_ts; Σ_t ‖l_t‖‖r_t‖, the sum of the tokens' own norms; and E of
        :func:`squared_norms_of`, a bound on the first one's error.
    """
    left, right = grams.gram(outer.left), grams.gram(outer.right)
    # Of each token, from the diagonal: L_tt = ‖l_t‖².
    norms_left, norms_right = (gram.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt() for gram in (left, right))
    product = left * right
    square = product.sum(dim=(1, 2)).double()  # added up in fp32, where torch sums in pairs
    length = (norms_left.double() * norms_right).sum(dim=1)

    # L_ts is off by a bias, in proportion to |L_ts|, and by a scatter, in proportion to ‖l_t‖‖l_s‖; R_ts likewise. So
    # their product has the bias twice, and each one's scatter times the other one.
    sum_of_sizes = product.abs_().sum(dim=(1, 2)).double()  # Σ_ts |L_ts R_ts|
    scatter = _sum_by_norms(left, norms_right) + _sum_by_norms(right, norms_left)
    error = 2.0**-24 * ((2 * _BIAS + _SUMMING) * sum_of_sizes + _SCATTER * scatter)
    # A trace, Σ_t ‖l_t‖² or Σ_t ‖r_t‖², may be tiny because squares were rounded to 0: then E bounds nothing.
    trace_left, trace_right = norms_left.square().sum(dim=1), norms_right.square().sum(dim=1)
    is_in_range = (trace_left > _SMALLEST_TRACE) & (trace_right > _SMALLEST_TRACE)
    return square, length, error.masked_fill(~is_in_range, torch.inf)


def _sum_by_norms(gram: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """Return [units] Σ_ts norm_t |gram_ts| norm_s."""
    norms = norms.to(gram.dtype)
    return (torch.bmm(gram.abs(), norms[:, :, None])[:, :, 0] * norms).sum(dim=1).double()


def _outer_squares_float64(outer: Outer) -> torch.Tensor:
    """Return [units] S, as in :func:`squared_norms_of`, in float64."""
    left, right = (_gram_float64(side) for side in (outer.left, outer.right))
    return (left * right).sum(dim=(1, 2))


def _gram_float64(tokens: torch.Tensor) -> torch.Tensor:
    """Return [units, n, n] inner products of [units, n, features], in float64.

    By pieces of features: a vocabulary's width in float64 would be the largest tensor of the step.
    """
    gram = torch.zeros(*tokens.shape[:2], tokens.shape[1], dtype=torch.float64, device=tokens.device)
    for piece in tokens.split(_BLOCK, dim=2):
        wide = piece.double()
        gram.baddbmm_(wide, wide.transpose(1, 2))
    return gram


def _lookup_squares(outers: Sequence[Outer], lookups: Sequence[Lookup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what uses as an embedding add, by unit: to the squared norm, and to the sum of the tokens' own norms.

    The first includes the cross terms with uses in linear layers, the second formula of the module.
    """
    if not lookups:
        zero = torch.zeros(len(outers[0].left), dtype=torch.float64, device=outers[0].left.device)
        return zero, zero
    ids = torch.cat([lookup.ids for lookup in lookups], dim=1)
    values = torch.cat([lookup.values for lookup in lookups], dim=1).double()
    square = torch.stack([_lookup_square(own_ids, own) for own_ids, own in zip(ids, values, strict=True)])
    for outer in outers:
        # picked[s, t] is l_s[i_t].
        picked = outer.left.gather(2, ids[:, None, :].expand(-1, outer.left.shape[1], -1)).double()
        square = square + 2 * (picked * torch.bmm(outer.right.double(), values.transpose(1, 2))).sum(dim=(1, 2))
    return square, values.norm(dim=2).sum(dim=1)


def _lookup_square(ids: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return the squared norm of one unit's Σ_t e(id_t) v_tᵀ: tokens of the same id are added up first."""
    _, summed = _summed(ids, values)
    return summed.square().sum()


def _summed(ids: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Add up values of equal ids, in shapes that no value decides, so that nobody waits for the device.

    For ids (7, 3, 7) and values (a, b, c) the result is (3, 7, 7) and (b, a + c, 0).

    Returns:
        [tokens] the ids, ascending, each once, then the last one again and again; [tokens, features] sums, then zeros.
    """
    ordered, order = ids.sort(stable=True)
    # 1 where an id differs from the one before; summed up, that numbers the ids from 0.
    is_new = torch.ones_like(ordered)
    is_new[1:] = ordered[1:] != ordered[:-1]
    place = is_new.cumsum(0) - 1
    touched = ordered[-1:].expand(len(ids)).scatter(0, place, ordered)
    return touched, torch.zeros_like(values).index_add_(0, place, values[order])


def row_blocks(outer: Outer) -> list[slice]:
    """Return slices of the rows of a [p, d] tensor whose blocks a CPU's cache holds; of one device by p and d."""
    p, d = outer.left.shape[-1], outer.right.shape[-1]
    block_size = _CPU_BLOCK if outer.left.device.type == "cpu" else _LARGEST_BLOCK
    num_rows = max(1, block_size // d)
    return [slice(start, min(start + num_rows, p)) for start in range(0, p, num_rows)]


class Product:
    """One unit's gradient of one tensor, multiplied out in fp32, block by block: the same bits whoever asks for them.

    Args:
        outers: the unit's uses in linear layers, at least one, each with all its tokens in a line.
        lookups: its uses as an embedding, likewise.
    """

    def __init__(self, outers: Sequence[Outer], lookups: Sequence[Lookup]) -> None:
        # A matmul kernel may round by its operands' alignment, and a unit can begin anywhere in its microbatch. Copies
        # are all aligned alike. The left side is copied block by block.
        self._lefts = [outer.left.flatten(0, 1) for outer in outers]  # [tokens, p]
        self._rights = [outer.right.flatten(0, 1).to(torch.float32, copy=True) for outer in outers]  # [tokens, d]
        self._lookup = summed_lookups(lookups) if lookups else None
        self.blocks = row_blocks(outers[0])  # all uses have the tensor's shape [p, d]

    def block(self, rows: slice, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return some rows, [rows, d]; in ``out``, which begins where an allocation of its own would, if it is given.

        Args:
            rows: one of ``blocks``.
            out: [rows, d] float32.
        """
        total: torch.Tensor | None = None
        for whole_left, right in zip(self._lefts, self._rights, strict=True):
            left = whole_left[:, rows].to(torch.float32, copy=True).contiguous()
            if total is None:
                total = torch.mm(left.T, right, out=out)
            else:
                total.add_(torch.mm(left.T, right))
        assert total is not None
        if self._lookup is not None:
            touched, summed = self._lookup
            if len(self.blocks) > 1:
                # Ids ascend: those within the block follow one another.
                ends = torch.tensor([rows.start, rows.stop], device=touched.device)
                start, stop = torch.searchsorted(touched, ends).tolist()
                touched, summed = touched[start:stop] - rows.start, summed[start:stop]
            total.index_add_(0, touched, summed)
        return total


def summed_lookups(lookups: Sequence[Lookup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of the tensor that one unit touches, ascending, and its gradient in each.

    [tokens] and [tokens, d] float32, whatever the number of rows: behind them the last row comes again and again, with
    zeros.
    """
    ids = torch.cat([lookup.ids.flatten() for lookup in lookups])
    values = torch.cat([lookup.values.flatten(0, 1).float() for lookup in lookups])
    return _summed(ids, values)


def add_multiplied(out: torch.Tensor, outers: Sequence[Outer], lookups: Sequence[Lookup]) -> None:
    """Add one unit's gradient of one tensor, multiplied out of its uses, to ``out``, in fp32."""
    if outers:
        product = Product(outers, lookups)
        for rows in product.blocks:
            out[rows].add_(product.block(rows))
    elif lookups:
        out.index_add_(0, *summed_lookups(lookups))
