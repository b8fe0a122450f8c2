"""Gradients that arrive in parts: each rank sees the SUM over its shard group of its own part of each tensor, no more.

:class:`ArrivingShards` is for a framework that hands out summed parts itself (FSDP2). :class:`ReducedShards` does the
reduce-scatter, where backward leaves whole gradients one tensor at a time (ZeRO 2 and 3): a few of them share a bucket,
and each is freed as soon as it is in. Both hook tensors by ``register_post_accumulate_grad_hook``, torch's public place
for this.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.group import reduce_scatter_flat
from privtrain.clipping.cooperative import GradientShards, Sink
from privtrain.errors import GuaranteeLost
from privtrain.privacy.layout import Layout, Slot

#: Coordinates of a bucket: 16 MiB of fp32. A larger tensor travels alone.
_BUCKET = 1 << 22


class ArrivingShards(GradientShards):
    """Hands over what arrives on hooked tensors while a block of :meth:`collecting` is open.

    Args:
        hooked: name → the tensor whose gradient arrives.
        layout: the parts that this rank holds, in the same names.
        group: the shard group; ``None`` for the whole job.
        device: where gradients are.
    """

    def __init__(
        self,
        hooked: Mapping[str, torch.Tensor],
        layout: Layout,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self.layout = layout
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._device = device
        self._group = group
        self._sink: Sink | None = None
        for slot in layout.slots:
            hooked[slot.name].register_post_accumulate_grad_hook(functools.partial(self._arrived, slot))

    @contextlib.contextmanager
    @override
    def collecting(self, sink: Sink) -> Iterator[None]:
        self._sink = sink
        try:
            yield
            self._flush()
        finally:
            self._sink = None

    @override
    def sum_over_group(self, vector: torch.Tensor) -> None:
        dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=self._group)

    def _arrived(self, slot: Slot, tensor: torch.Tensor) -> None:
        gradient, tensor.grad = tensor.grad, None
        if self._sink is None:
            raise GuaranteeLost(
                f"a gradient appeared on {slot.name!r} outside clipping; something else runs a backward"
            )
        assert gradient is not None
        with torch.no_grad():
            self._take(slot, gradient)

    def _take(self, slot: Slot, gradient: torch.Tensor) -> None:
        part: torch.Tensor = gradient.to_local()  # pyright: ignore[reportAttributeAccessIssue]
        self._hand_over(slot, part.flatten())

    def _hand_over(self, slot: Slot, part: torch.Tensor) -> None:
        assert self._sink is not None
        assert part.dtype == torch.float32
        self._sink(slot, part)

    def _flush(self) -> None:
        """Finish what is still on its way."""


class ReducedShards(ArrivingShards):
    """The same where whole gradients arrive; parts are equal, the last ones shorter (:func:`equal_part`)."""

    def __init__(
        self,
        hooked: Mapping[str, torch.Tensor],
        layout: Layout,
        group: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        super().__init__(hooked, layout, group, device)
        sizes = [equal_part(math.prod(slot.whole_shape), 0, self.size)[1] for slot in layout.slots]
        self._capacity = min(_BUCKET // self.size, sum(sizes))
        self._bucket: torch.Tensor | None = None
        self._pending: list[tuple[Slot, int]] = []
        self._used = 0

    def _take(self, slot: Slot, gradient: torch.Tensor) -> None:
        size = equal_part(gradient.numel(), 0, self.size)[1]
        if self._bucket is not None and self._used + size > self._bucket.shape[1]:
            self._flush()
        if self._bucket is None:
            shape = (self.size, max(self._capacity, size))
            self._bucket = torch.empty(shape, dtype=torch.float32, device=self._device)
        flat = gradient.flatten()
        for rank in range(self.size):
            first, count = equal_part(len(flat), rank, self.size)
            place = self._bucket[rank, self._used : self._used + size]
            place[:count].copy_(flat[first : first + count])
            place[count:].zero_()
        self._pending.append((slot, self._used))
        self._used += size

    def _flush(self) -> None:
        if self._used:
            assert self._bucket is not None
            summed = torch.empty(self._used, dtype=torch.float32, device=self._device)
            reduce_scatter_flat(summed, self._bucket[:, : self._used].reshape(-1), self._group)
            for slot, place in self._pending:
                self._hand_over(slot, summed[place : place + slot.num_coordinates])
        self._bucket, self._pending, self._used = None, [], 0


def equal_part(num_coordinates: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """(first, count) of a rank's part of a tensor cut into equal parts, of which the last may be short or empty."""
    size = -(-num_coordinates // num_ranks)
    first = min(rank * size, num_coordinates)
    return first, min(size, num_coordinates - first)
