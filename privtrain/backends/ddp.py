"""Data parallelism by one all-reduce a logical step: no wrapper around the model, no hooks, no buckets.

The clipped sum of all trainable tensors is one flat fp32 vector, so a step costs one collective.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from privtrain.backends.base import ReplicatedBackend, all_equal, digest


class DdpBackend(ReplicatedBackend):
    """Several ranks, each with all trainable tensors. The process group must be initialised.

    Args:
        device: this rank's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """See :class:`privtrain.backends.base.Backend`."""
        return self.rank == 0

    def describe(self) -> str:
        """See :class:`privtrain.backends.base.Backend`."""
        return f"ddp, {self.world_size} processes on {self.device.type} ({dist.get_backend()})"

    def reduce(self, vector: torch.Tensor) -> None:
        """See :class:`privtrain.backends.base.Backend`."""
        assert vector.dtype == torch.float32
        dist.all_reduce(vector, op=dist.ReduceOp.SUM)

    def broadcast_bytes(self, value: bytes | None) -> bytes:
        """See :class:`privtrain.backends.base.Backend`."""
        size = torch.tensor([len(value) if value is not None else 0], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0)
        if value is not None:
            payload = torch.frombuffer(bytearray(value or b"\0"), dtype=torch.uint8).to(self.device)
        else:
            payload = torch.empty(max(1, int(size)), dtype=torch.uint8, device=self.device)
        dist.broadcast(payload, src=0)
        return payload.cpu().numpy().tobytes()[: int(size)]

    def barrier(self) -> None:
        """See :class:`privtrain.backends.base.Backend`."""
        dist.barrier()

    def gather_digests(self, value: bytes) -> list[bytes]:
        """See :class:`privtrain.backends.base.Backend`."""
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        return [item.cpu().numpy().tobytes() for item in gathered]

    def in_sync(self, tensors: Sequence[torch.Tensor]) -> bool:
        """See :class:`privtrain.backends.base.Backend`."""
        return all_equal(self.gather_digests(digest(tensors)))

    def close(self) -> None:
        """See :class:`privtrain.backends.base.Backend`."""
        if dist.is_initialized():
            dist.destroy_process_group()
