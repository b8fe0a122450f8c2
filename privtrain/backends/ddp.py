"""Data parallelism by one all-reduce a logical step: no wrapper around the model, no hooks, no buckets.

The clipped sum of all trainable tensors is one flat int64 vector, so a step costs one collective.
"""

from __future__ import annotations

from privtrain.backends.base import ReplicatedBackend
from privtrain.backends.group import ProcessGroup


class DdpBackend(ProcessGroup, ReplicatedBackend):
    """Several ranks, each with all trainable tensors."""

    kind = "ddp"
