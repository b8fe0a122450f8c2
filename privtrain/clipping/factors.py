"""The two shapes that a large tensor's gradient comes in, kept as factors instead of being multiplied out.

A linear layer's weight has the gradient Σ_t l_t r_tᵀ (:class:`Outer`), an embedding Σ_t e(id_t) v_tᵀ
(:class:`Lookup`, e the unit vector). A tied tensor has both, and its gradient is their sum. For a unit with tokens t
(all its rows one after another) the squared norm follows without the gradient itself:

    ‖Σ_t l_t r_tᵀ‖² = Σ_{t,s} ⟨l_t, l_s⟩⟨r_t, r_s⟩           (ghost norm: Goodfellow 2015, arXiv 1510.01799;
    ⟨Σ_s l_s r_sᵀ, Σ_t e(i_t) v_tᵀ⟩ = Σ_{s,t} l_s[i_t] ⟨r_s, v_t⟩                     Li et al. 2021, arXiv 2110.05679)

These sums can cancel. They are therefore taken in float64, where products of fp32 numbers are exact and rounding is at
most 1e-10 of what the tokens could add up to: (Σ_t ‖l_t‖‖r_t‖)². :func:`squared_norm` returns that too, so that
callers can see cancellation and multiply such a unit out: a norm is never under-estimated.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch

#: Numbers that are summed in fp32 before float64 takes over.
_BLOCK = 4096


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


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32, no bf16 inside fp32 products, whatever the job has switched on elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def squared_norms(values: torch.Tensor) -> torch.Tensor:
    """Squared norm of each ``values[i]``, in float64.

    Summed in blocks: over 3e7 numbers a plain fp32 norm was measured 4e-4 too small, which is sensitivity.
    """
    flat = values.flatten(1)
    whole = flat.shape[1] // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(flat[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)), dim=2)
    rest = torch.linalg.vector_norm(flat[:, whole:], dim=1)
    return blocks.double().square().sum(dim=1) + rest.double().square()


def squared_norm(outers: Sequence[Outer], lookups: Sequence[Lookup]) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared norm of one unit's gradient of one tensor, and the square that it could have without cancellation.

    Args:
        outers: the unit's own rows, every use of the tensor in a linear layer.
        lookups: the unit's own rows, every use of the tensor as an embedding.
    """
    left, right = _tokens([o.left for o in outers]), _tokens([o.right for o in outers])
    ids, values = _ids(lookups), _tokens([k.values for k in lookups])
    square = ((left @ left.T) * (right @ right.T)).sum()
    length = (left.norm(dim=1) * right.norm(dim=1)).sum()
    if ids.numel():
        touched, place = ids.unique(return_inverse=True)
        rows = values.new_zeros(len(touched), values.shape[1]).index_add_(0, place, values)
        square = square + rows.square().sum()
        length = length + values.norm(dim=1).sum()
        if left.numel():
            square = square + 2 * (left[:, ids] * (right @ values.T)).sum()
    return square.clamp(min=0), length.square()


def add_multiplied(
    out: torch.Tensor, outers: Sequence[Outer], lookups: Sequence[Lookup], weight: torch.Tensor, *, masked: bool
) -> None:
    """``out += Σ_rows weight_row · gradient_row``, in fp32.

    Args:
        out: where it is added.
        outers: uses in linear layers.
        lookups: uses as an embedding.
        weight: [rows].
        masked: whether some weights are zero; those rows add nothing, NaN or not.
    """
    # 0 · NaN is NaN, so a row of weight zero is masked out, not multiplied away.
    left_out = (weight == 0)[:, None, None]

    def clean(value: torch.Tensor) -> torch.Tensor:
        return torch.where(left_out, 0.0, value.float()) if masked else value.float()

    for outer in outers:
        left, right = clean(outer.left), clean(outer.right)
        # Scale the narrower factor: the wider one may have a vocabulary's width.
        if left.shape[-1] < right.shape[-1]:
            left = left * weight[:, None, None]
        else:
            right = right * weight[:, None, None]
        out.addmm_(left.flatten(0, 1).T, right.flatten(0, 1))
    for lookup in lookups:
        values = clean(lookup.values) * weight[:, None, None]
        out.index_add_(0, lookup.ids.flatten(), values.flatten(0, 1))


def _tokens(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if not parts:
        return torch.zeros(0, 0, dtype=torch.float64)
    return torch.cat([part.flatten(0, -2) for part in parts]).double()


def _ids(lookups: Sequence[Lookup]) -> torch.Tensor:
    return torch.cat([k.ids.flatten() for k in lookups]) if lookups else torch.zeros(0, dtype=torch.int64)
