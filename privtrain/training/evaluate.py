"""Loss and accuracy on records of held-out users. Not covered by ε; released only if the config says that it may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from privtrain.backends import Backend
from privtrain.data.microbatch import Packer
from privtrain.data.records import Record
from privtrain.models.losses import Objective


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """How the model does on held-out records.

    Attributes:
        loss: mean negative log-likelihood per predicted token, or per label, in nats.
        accuracy: share of labels that are the model's first choice; 0 for language models.
    """

    loss: float
    accuracy: float


def evaluate(
    model: torch.nn.Module,
    records: Sequence[Record],
    backend: Backend,
    *,
    objective: Objective,
    packer: Packer,
    autocast: torch.autocast,
    between_batches: Callable[[], None] = lambda: None,
) -> HeldOut | None:
    """Score the records over all ranks; ``None`` if they predict nothing.

    Every rank runs as many batches as the busiest one, and ``between_batches`` before each, where all ranks may talk.
    """
    shares = [[[record] for record in records[rank :: backend.world_size]] for rank in range(backend.world_size)]
    num_batches = max(packer.num_batches(share) for share in shares)
    sums = torch.zeros(3, dtype=torch.float32, device=backend.device)
    model.eval()
    with torch.no_grad():
        for batch in packer.pack(shares[backend.rank], num_batches):
            between_batches()
            moved = batch.to(backend.device)
            with autocast:
                losses = objective.losses(model, moved.input_ids, moved.target_mask)
                num_correct = objective.num_correct(model, moved.input_ids, moved.target_mask)
            sums += torch.stack([losses.sum(), num_correct, moved.target_mask.sum()])
    model.train()
    backend.reduce(sums)
    loss, num_correct, num_targets = sums.tolist()
    return HeldOut(loss / num_targets, num_correct / num_targets) if num_targets else None


def perplexity(loss: float) -> float:
    """Exp of the mean loss, infinite where float64 ends."""
    return math.exp(loss) if loss < 700 else math.inf
