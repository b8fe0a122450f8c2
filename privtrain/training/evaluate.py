"""Perplexity on records of held-out users. Not covered by ε; released only if the config says that it may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from privtrain.backends import Backend
from privtrain.data.microbatch import Packer
from privtrain.models import row_losses


def held_out_loss(
    model: torch.nn.Module,
    records: Sequence[np.ndarray],
    backend: Backend,
    *,
    packer: Packer,
    autocast: torch.autocast,
    between_batches: Callable[[], None] = lambda: None,
) -> float | None:
    """Mean negative log-likelihood per token in nats, over all ranks; ``None`` without records.

    Every rank runs as many batches as the busiest one, and ``between_batches`` before each, where all ranks may talk.
    """
    if not records:
        return None
    shares = [[[tokens] for tokens in records[rank :: backend.world_size]] for rank in range(backend.world_size)]
    num_batches = max(packer.num_batches(share) for share in shares)
    sums = torch.zeros(2, dtype=torch.float32, device=backend.device)
    model.eval()
    with torch.no_grad():
        for batch in packer.pack(shares[backend.rank], num_batches):
            between_batches()
            moved = batch.to(backend.device)
            with autocast:
                losses = row_losses(model, moved.input_ids, moved.target_mask)
            sums += torch.stack([losses.sum(), moved.target_mask.sum()])
    model.train()
    backend.reduce(sums)
    return float(sums[0] / sums[1])


def perplexity(loss: float) -> float:
    """Exp of the mean loss, infinite where float64 ends."""
    return math.exp(loss) if loss < 700 else math.inf
