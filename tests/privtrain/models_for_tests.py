"""A tiny LoRA model, invented users and the brute-force clipped sum that everything is compared with."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np
import torch

from privtrain.config.schema import LoraSection, ModelSection
from privtrain.layout import Layout
from privtrain.models import add_lora, load_base, row_losses

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


def plain_unit_gradient(model: torch.nn.Module, layout: Layout, records: Sequence[np.ndarray]) -> torch.Tensor:
    """One user's gradient by one plain backward: mean over its predicted tokens, no padding, no hooks."""
    num_predicted = sum(len(tokens) - 1 for tokens in records)
    loss = torch.zeros(())
    for tokens in records:
        ids = torch.from_numpy(tokens)[None]
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        loss = loss + row_losses(model, ids, mask).sum()
    gradients = torch.autograd.grad(loss / num_predicted, list(layout.parameters.values()))
    return torch.cat([g.flatten() for g in gradients])


def brute_force_sum(model: torch.nn.Module, layout: Layout, users: Users, clipping_norm: float) -> torch.Tensor:
    """The definition: loop over users, one backward each, clip, add."""
    total = torch.zeros(layout.num_coordinates, dtype=torch.float64)
    for records in users:
        gradient = plain_unit_gradient(model, layout, records).double()
        norm = gradient.norm()
        if torch.isfinite(norm):
            total += gradient * min(1.0, clipping_norm / float(norm))
    return total
