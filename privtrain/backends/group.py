"""The collectives that every backend of several processes shares."""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.base import Backend, all_equal, digest
from privtrain.privacy.layout import Slot

# torch 2.13 renamed these two; the old names warn.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

#: What may be added over ranks: bf16 would lose what the noise was measured for.
_SUMMED = (torch.float32, torch.int64)
#: Numbers the blocks of :meth:`ProcessGroup.main_alone` in this process; every rank counts the same ones.
_stretches = itertools.count()
#: Pauses between two looks of a rank that waits for rank 0.
_SHORTEST_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.005, 0.5


def all_gather_flat(gathered: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill ``gathered`` with every rank's ``mine``, in the order of the group's ranks."""
    _all_gather(gathered, mine, group=group)


def reduce_scatter_flat(mine: torch.Tensor, vector: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Fill ``mine`` with this rank's equal part of the SUM of ``vector`` over ranks: fp32, or int64 exactly.

    ``vector`` is overwritten.
    """
    assert vector.dtype == mine.dtype
    assert vector.dtype in _SUMMED
    if vector.device.type == "cpu":  # gloo's reduce-scatter is an all-reduce of a copy; this one needs no copy
        dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=group)
        mine.copy_(vector.view(dist.get_world_size(group), -1)[dist.get_rank(group)])
    else:
        _reduce_scatter(mine, vector, op=dist.ReduceOp.SUM, group=group)


class ProcessGroup(Backend):
    """The job's process group, which must be initialised."""

    kind: str

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    @override
    def describe(self) -> str:
        return f"{self.kind}, {self.world_size} processes on {self.device.type} ({dist.get_backend()})"

    @override
    def reduce(self, vector: torch.Tensor) -> None:
        assert vector.dtype in _SUMMED
        dist.all_reduce(vector, op=dist.ReduceOp.SUM)

    @override
    def _broadcast(self, value: bytes | None) -> bytes:
        size = torch.tensor([len(value) if value is not None else 0], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=0)  # the others must know how much to receive
        num_bytes = int(size)
        if value is None:
            payload = torch.empty(max(1, num_bytes), dtype=torch.uint8, device=self.device)
        else:
            sent = value or b"\0"  # at least one byte: an empty tensor is not sent
            payload = torch.frombuffer(bytearray(sent), dtype=torch.uint8).to(self.device)
        dist.broadcast(payload, src=0)
        return payload.cpu().numpy().tobytes()[:num_bytes]

    @override
    def barrier(self) -> None:
        dist.barrier()

    @contextlib.contextmanager
    @override
    def main_alone(self) -> Iterator[None]:
        """Return a block for work that rank 0 alone does: every rank enters it, and all leave it together.

        The other ranks leave the work to rank 0 and wait at the block's end until it is through. They poll the group's
        key-value store, since no collective's time-out runs there.
        """
        store, key = _store(), f"privtrain/main-alone/{next(_stretches)}"
        if self.is_main:
            try:
                yield
            finally:
                store.set(key, "over")
        else:
            yield
            pause = _SHORTEST_POLL_SECONDS
            while not store.check([key]):
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_POLL_SECONDS)
        self.barrier()  # rank 0 may keep the store: it must not leave before the others have looked

    @override
    def gather_digests(self, value: bytes) -> list[bytes]:
        mine = torch.frombuffer(bytearray(value), dtype=torch.uint8).to(self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        return [item.cpu().numpy().tobytes() for item in gathered]

    @override
    def in_sync(self, tensors: Sequence[torch.Tensor]) -> bool:
        return all_equal(self.gather_digests(digest(tensors)))

    @override
    def parameters_agree(self, model: torch.nn.Module) -> bool:
        return self.in_sync([p for p in model.parameters() if p.requires_grad])

    def assemble(self, slot: Slot, part: torch.Tensor, contributes: bool = True) -> torch.Tensor | None:
        """Return the whole of a tensor on rank 0's CPU from ranks that hold disjoint parts; ``None`` elsewhere.

        Each rank fills zeros with its part, and these are added up. The bits are added as integers, so that they arrive
        as they are (adding floats would turn -0.0 into 0.0).

        Args:
            slot: which coordinates of the tensor this rank holds.
            part: these coordinates, fp32.
            contributes: false for a rank whose part another one holds too.
        """
        assert part.dtype == torch.float32
        whole = torch.zeros(math.prod(slot.whole_shape), dtype=torch.float32, device=self.device)
        if contributes:
            whole[slot.first : slot.first + slot.num_coordinates] = part.detach().flatten().to(self.device)
        dist.reduce(whole.view(torch.int32), dst=0, op=dist.ReduceOp.SUM)
        return whole.cpu().view(slot.whole_shape) if self.rank == 0 else None

    @override
    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _store() -> dist.Store:
    """Return the key-value store that the job's process group was made with."""
    world = dist.group.WORLD
    assert world is not None
    return world.get_group_store()
