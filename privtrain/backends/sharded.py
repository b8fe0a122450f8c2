"""What the sharding backends share: which parts a rank steps, and how state leaves and enters them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.base import Placement, digest, step_optimizer
from privtrain.backends.group import ProcessGroup
from privtrain.backends.split import SplitStep
from privtrain.clipping import GradientShards
from privtrain.privacy.layout import Layout, Slot


class ShardedBackend(ProcessGroup):
    """Each rank noises and steps its own parts of the trainable tensors. Subclasses say which, and where they live.

    ``_split`` is set where all ranks hold the trainable tensors whole, and only the step is in parts; ``_shards`` where
    gradients are in parts too.
    """

    _split: SplitStep | None = None
    _shards: GradientShards | None = None

    @property
    def is_contributor(self) -> bool:
        """Whether this rank's parts count when tensors are put together; false on all but one replica."""
        return True

    @override
    def place(self, model: torch.nn.Module) -> Placement:
        raise NotImplementedError

    @override
    def reduce_total(self, total: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the SUM; that of sharded gradients was added up as they were clipped."""
        return self._split.reduce_total(total) if self._split is not None else total

    @override
    def apply(self, vector: torch.Tensor, layout: Layout, optimizer: torch.optim.Optimizer, divide_by: float) -> None:
        step_optimizer(vector, layout, optimizer, divide_by)
        self.publish()

    @override
    def publish(self) -> None:
        if self._split is not None:
            self._split.publish()

    @override
    def whole(self, slot: Slot, part: torch.Tensor) -> torch.Tensor | None:
        # Where only the step is split, it is over all ranks, and no two hold the same part: all contribute.
        return self.assemble(slot, part, contributes=self._split is not None or self.is_contributor)

    @override
    def sum_parts(self, vector: torch.Tensor) -> None:
        """Replace ``vector`` by its sum over the ranks whose parts are one copy: the shard group, or all ranks."""
        if self._shards is not None:
            self._shards.sum_over_group(vector)
        else:
            dist.all_reduce(vector, op=dist.ReduceOp.SUM)

    @override
    def combined_digest(self, value: bytes) -> bytes:
        return digest([torch.frombuffer(bytearray(item), dtype=torch.uint8) for item in self.gather_digests(value)])
