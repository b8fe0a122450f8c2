"""A tiny LoRA model, invented users and the brute-force clipped sum that everything is compared with."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from privtrain.clipping import PerUnitClipper, batched, clipper, exact_sum
from privtrain.clipping.clipper import RowLosses
from privtrain.clipping.rules import Gradient
from privtrain.config.model import LoraSection, ModelSection
from privtrain.data.microbatch import Packer
from privtrain.models.load import load_base
from privtrain.models.losses import row_losses
from privtrain.models.trainable import add_lora
from privtrain.privacy.layout import Layout

Users = Sequence[Sequence[np.ndarray]]


@functools.cache
def tiny_lora(directory: pathlib.Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Layout]:
    """The tiny model with LoRA away from its starting point, where half of the gradients are zero."""
    base = load_base(ModelSection(name_or_path=str(directory)), dtype)
    lora = LoraSection(rank=2, alpha=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = add_lora(base, lora, init_seed=0, public_name="tiny")
    layout = Layout.of(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layout.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train(), layout


def invented_users(num_users: int, most_records: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Users of 1 … k records of 2 … 16 tokens."""
    rng = np.random.default_rng(seed)
    return [
        [rng.integers(1, 250, size=rng.integers(2, 17)) for _ in range(1 + user % most_records)]
        for user in range(num_users)
    ]


def plain_unit_gradient(
    model: torch.nn.Module, layout: Layout, records: Sequence[np.ndarray], losses: RowLosses | None = None
) -> torch.Tensor:
    """One user's gradient by one plain backward: mean over its predicted tokens, no padding, no hooks."""
    num_predicted = sum(len(tokens) - 1 for tokens in records)
    loss = torch.zeros(())
    for tokens in records:
        ids = torch.from_numpy(tokens)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        loss = loss + (losses(ids, mask) if losses else row_losses(model, ids, mask)).sum()
    parameters = list(layout.parameters.values())
    gradients = torch.autograd.grad(loss / num_predicted, parameters, allow_unused=True)
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def clip(gradient: torch.Tensor, layout: Layout, clipping_norm: float, style: str) -> torch.Tensor:
    """The definition of each clipping style, for one unit's whole gradient."""
    if style == "automatic":
        return gradient * (clipping_norm / (gradient.norm() + 0.01))
    if style == "flat":
        return gradient * min(1.0, clipping_norm / float(gradient.norm()))
    clipped = gradient.clone()
    modules: dict[str, list[torch.Tensor]] = {}
    for slot in layout.slots:
        modules.setdefault(slot.name.rsplit(".", 1)[0], []).append(layout.view(clipped, slot))
    for parts in modules.values():
        norm = float(torch.cat([p.flatten() for p in parts]).norm())
        for part in parts:
            part *= min(1.0, clipping_norm / len(modules) ** 0.5 / norm) if norm else 1.0
    return clipped


def brute_force_sum(
    model: torch.nn.Module,
    layout: Layout,
    users: Users,
    clipping_norm: float,
    *,
    style: str = "flat",
    losses: RowLosses | None = None,
) -> torch.Tensor:
    """The definition: loop over users, one backward each, clip, add."""
    total = torch.zeros(layout.num_coordinates, dtype=torch.float64)
    for records in users:
        gradient = plain_unit_gradient(model, layout, records, losses).double()
        if torch.isfinite(gradient.norm()):
            total += clip(gradient, layout, clipping_norm, style)
    return total


def make_clipper(
    model: torch.nn.Module,
    layout: Layout,
    clipping_norm: float,
    losses: RowLosses | None = None,
    *,
    kept_share: float = 0.0,
    **options: str,
) -> PerUnitClipper:
    """A clipper whose two-pass route keeps nothing that it need not keep, unless told otherwise."""
    default = lambda ids, mask: row_losses(model, ids, mask)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clipper, "_KEPT_SHARE", kept_share)
        return PerUnitClipper(model, layout, clipping_norm, losses or default, torch.device("cpu"), **options)


def clipped_sum(
    clipper: PerUnitClipper, users: Users, microbatch_size: int, num_batches: int | None = None
) -> torch.Tensor:
    packer = Packer(microbatch_size, max_length=16, pad_id=0)
    clipper.reset()
    for batch in packer.pack(users, num_batches or packer.num_batches(users)):
        clipper.accumulate(batch)
    return exact_sum.as_float32(clipper.finish(), clipper.grid_exponent)


def squares_from_factors(num_units: int, shape: tuple[int, int], *uses: Gradient) -> tuple[torch.Tensor, torch.Tensor]:
    """[units] squared norms of one tensor by its factors, however small, and what they could be if none cancelled."""
    layout = Layout({"weight": torch.nn.Parameter(torch.zeros(shape))})
    gradients = batched.UnitGradients(layout, [1] * num_units, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "_is_cheap", lambda _: False)
        for use in uses:
            gradients.add("weight", use)
        squares, uncancelled = gradients.squares()
    return squares[0], uncancelled[0]


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())
