"""Data parallelism by two collectives a logical step: no wrapper around the model, no hooks, no buckets.

The clipped sum of all trainable tensors is one flat int64 vector: one all-reduce. Each rank noises its run of it: one
all-gather.
"""

from __future__ import annotations

import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.base import ReplicatedBackend
from privtrain.backends.noise_share import SharedNoise


class DdpBackend(SharedNoise, ReplicatedBackend):
    """Several ranks, each with all trainable tensors."""

    kind = "ddp"

    @override
    def holders(self) -> dist.ProcessGroup | None:
        """Return all ranks: each holds the whole reduced sum."""
        return dist.group.WORLD
