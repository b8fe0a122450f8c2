"""Gradients that arrive in parts: each rank sees the SUM over its shard group of its own part of each tensor, no more.

:class:`ArrivingShards` is for a framework that hands out summed parts itself (FSDP2). :class:`ReducedShards` does the
reduce-scatter, where backward leaves whole gradients one tensor at a time (ZeRO 2 and 3): a few of them share a bucket,
and each is freed as soon as it is in. Both hook tensors by ``register_post_accumulate_grad_hook``, torch's public place
for this.

:class:`ScatteredSum` is for sums of clipped contributions, integers that each rank has whole, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.group import reduce_scatter_flat
from privtrain.clipping.cooperative import GradientShards, Sink
from privtrain.errors import GuaranteeLost
from privtrain.privacy.layout import Layout, Slot

#: Coordinates of a bucket, which is sent at once: 16 MiB of fp32, 32 MiB of int64. A larger tensor is sent alone.
BUCKET = 1 << 22
#: A number that stands for the order in which tensors came stays below this: squares add up over ranks in int64.
_ORDERS = (1 << 20) - 3


class ArrivingShards(GradientShards):
    """Hands over what arrives on hooked tensors while a block of :meth:`collecting` is open.

    Args:
        hooked: name → the tensor whose gradient arrives.
        layout: the parts that this rank holds, in the same names.
        group: the shard group; ``None`` for the whole job.
        device: where gradients are.
        reshard: makes sure that no weight is whole outside a pass; nothing to do by default.
    """

    #: Whether one graph allows several backward passes: whether weights are gathered in each of them.
    repeats_backward = True

    def __init__(
        self,
        hooked: Mapping[str, torch.nn.Parameter],
        layout: Layout,
        group: dist.ProcessGroup | None,
        device: torch.device,
        reshard: Callable[[], None] = lambda: None,
    ) -> None:
        self.layout = layout
        self.weights = hooked
        self.reshard = reshard
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._device = device
        self._group = group
        self._sink: Sink | None = None
        # Called whenever a backward pass has left its gradient on the tensor.
        for slot in layout.slots:
            hooked[slot.name].register_post_accumulate_grad_hook(functools.partial(self._arrived, slot))

    @contextlib.contextmanager
    @override
    def collecting(self, sink: Sink) -> Iterator[None]:
        """Hand what arrives on the hooked tensors within the block to ``sink``."""
        self._sink = sink
        try:
            yield
            self._flush()
        finally:
            self._sink = None

    @override
    def sum_over_group(self, vector: torch.Tensor) -> None:
        dist.all_reduce(vector, op=dist.ReduceOp.SUM, group=self._group)

    @override
    def scattered(self, total: torch.Tensor, *, once: bool) -> ScatteredSum:
        return ScatteredSum(total, self.layout, self._part_size, self.size, self._group, once=once)

    def _part_size(self, slot: Slot) -> int:
        """Return how many coordinates a rank's part of a tensor has; the last ranks' parts may have fewer or none.

        FSDP gives ranks equally many rows.
        """
        rows, *others = slot.whole_shape or (1,)
        return -(-rows // self.size) * math.prod(others)

    def _arrived(self, slot: Slot, tensor: torch.Tensor) -> None:
        """Take the gradient that autograd left on a hooked tensor; outside of :meth:`collecting`, raise."""
        gradient, tensor.grad = tensor.grad, None
        if self._sink is None:
            raise GuaranteeLost(
                f"a gradient appeared on {slot.name!r} outside clipping; something else runs a backward"
            )
        assert gradient is not None
        with torch.no_grad():
            self._take(slot, gradient)

    def _take(self, slot: Slot, gradient: torch.Tensor) -> None:
        """Hand over this rank's part of a gradient, which FSDP has added up over ranks."""
        part: torch.Tensor = gradient.to_local()  # pyright: ignore[reportAttributeAccessIssue]
        self._hand_over(slot, part.flatten())

    def _hand_over(self, slot: Slot, part: torch.Tensor) -> None:
        """Give a summed part to the sink of the present block."""
        assert self._sink is not None
        assert part.dtype == torch.float32
        self._sink(slot, part)

    def _flush(self) -> None:
        """Hand over what is still on its way: nothing, where gradients arrive summed."""


class ReducedShards(ArrivingShards):
    """:class:`ArrivingShards` of whole gradients, which are reduced here; parts as of :func:`equal_part`.

    ``repeats_backward``: whether one graph allows several backward passes. Not under DeepSpeed's stage 3, which gathers
    weights for one backward pass only.
    """

    def __init__(
        self,
        hooked: Mapping[str, torch.nn.Parameter],
        layout: Layout,
        group: dist.ProcessGroup | None,
        device: torch.device,
        *,
        repeats_backward: bool = True,
    ) -> None:
        super().__init__(hooked, layout, group, device)
        self.repeats_backward = repeats_backward
        sizes = [part_size(slot.num_whole_coordinates, self.size) for slot in layout.slots]
        self._capacity = min(BUCKET // self.size, sum(sizes))  # coordinates of each rank in a bucket
        #: [ranks, coordinates]: of each tensor in it, every rank's part in that rank's row.
        self._bucket: torch.Tensor | None = None
        #: The tensors in it, and the first coordinate of each in a row.
        self._pending: list[tuple[Slot, int]] = []
        self._used = 0  # coordinates of a row that are taken

    @override
    def _part_size(self, slot: Slot) -> int:
        """Return how many coordinates a rank's part of a tensor has; the last parts may have fewer or none."""
        return part_size(slot.num_whole_coordinates, self.size)

    @override
    def _take(self, slot: Slot, gradient: torch.Tensor) -> None:
        """Lay every rank's part of a gradient into the bucket; a bucket without room is sent first."""
        size = part_size(gradient.numel(), self.size)
        if self._bucket is not None and self._used + size > self._bucket.shape[1]:
            self._flush()
        if self._bucket is None:
            shape = (self.size, max(self._capacity, size))
            self._bucket = torch.empty(shape, dtype=torch.float32, device=self._device)
        flat = gradient.flatten()
        for rank in range(self.size):
            first, count = equal_part(len(flat), rank, self.size)
            row = self._bucket[rank, self._used : self._used + size]
            row[:count].copy_(flat[first : first + count])
            row[count:].zero_()
        self._pending.append((slot, self._used))
        self._used += size

    def _flush(self) -> None:
        """Reduce-scatter the bucket and hand over this rank's parts."""
        if self._used:
            assert self._bucket is not None
            summed = torch.empty(self._used, dtype=torch.float32, device=self._device)
            reduce_scatter_flat(summed, self._bucket[:, : self._used].reshape(-1), self._group)
            for slot, first in self._pending:
                self._hand_over(slot, summed[first : first + slot.num_coordinates])
        self._bucket, self._pending, self._used = None, [], 0


class ScatteredSum:
    """This rank's part of an int64 sum to which the ranks contribute whole tensors, one after another.

    A rank holds its part, one whole tensor and a bucket of whole tensors that wait to be sent. What is contributed to a
    waiting tensor is added to it in the bucket. So a model that fits into the bucket is sent once a step; a larger one
    once a microbatch, or once a step with ``once``, where the memory is spent. Integers are added, so no order changes
    a bit. All ranks of the group contribute to the same slots in the same order, so they send the same tensors at the
    same place.

    Args:
        total: this rank's parts of the sum, flat, laid out as ``layout``.
        layout: of the parts.
        part_size: slot → coordinates of a part: rank r has so many of the tensor's from r times this on, or what is
            left.
        size: ranks in the group.
        group: the shard group.
        once: whether every tensor waits for the end of the step, 8 bytes a coordinate of the whole tensors.
    """

    def __init__(
        self,
        total: torch.Tensor,
        layout: Layout,
        part_size: Callable[[Slot], int],
        size: int,
        group: dist.ProcessGroup | None,
        *,
        once: bool = False,
    ) -> None:
        self._total = total
        self._layout = layout
        self._part_size = part_size
        self._size = size
        self._group = group
        self._index_of = {slot.name: i for i, slot in enumerate(layout.slots)}
        #: Whole tensors on their way, by index of the slot.
        self._pending: dict[int, torch.Tensor] = {}
        self._num_pending = 0  # their coordinates
        self._most_pending = math.inf if once else BUCKET
        self._order = 0  # stands for the tensors contributed to so far, and their order

    @contextlib.contextmanager
    def contribution(self, name: str) -> Iterator[torch.Tensor]:
        """Yield an int64 tensor of the tensor's own shape; what the block adds to it is added to all ranks' parts.

        They get it when the tensor is sent, :meth:`flush` at the latest.
        """
        index = self._index_of[name]
        slot = self._layout.slots[index]
        # A running hash of the indices so far, which :meth:`check_order` compares over ranks.
        self._order = (self._order * len(self._index_of) + index + 1) % _ORDERS
        if index not in self._pending:
            length = self._size * self._part_size(slot)
            if self._num_pending + length > self._most_pending:
                self.flush()
            self._pending[index] = torch.zeros(length, dtype=torch.int64, device=self._total.device)
            self._num_pending += length
        yield self._pending[index][: slot.num_whole_coordinates].view(slot.whole_shape)
        if self._num_pending > self._most_pending:  # a tensor larger than the bucket is sent at once
            self.flush()

    def reset(self) -> None:
        """Begin a step: forget what an interrupted one left unsent."""
        self._pending, self._num_pending, self._order = {}, 0, 0

    def flush(self) -> None:
        """Send what is still here, a bucket at a time."""
        bucket: dict[int, torch.Tensor] = {}
        num_in_bucket = 0  # coordinates
        for index in list(self._pending):
            length = len(self._pending[index])
            if bucket and num_in_bucket + length > BUCKET:
                self._send(bucket)
                bucket, num_in_bucket = {}, 0
            bucket[index] = self._pending.pop(index)
            num_in_bucket += length
        if bucket:
            self._send(bucket)
        self._num_pending = 0

    def _send(self, tensors: Mapping[int, torch.Tensor]) -> None:
        """Reduce-scatter whole tensors (index of the slot → its coordinates, padded), and add this rank's parts.

        The parts of rank 0 of all tensors are sent first, then those of rank 1, and so on.
        """
        # [ranks, coordinates of a part] of each; a single tensor lies in this order already, and needs no copy.
        parts = [whole.view(self._size, -1) for whole in tensors.values()]
        sent = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        mine = torch.empty(sent.shape[1], dtype=torch.int64, device=sent.device)
        reduce_scatter_flat(mine, sent.view(-1), self._group)
        first = 0
        for index, whole in tensors.items():
            slot = self._layout.slots[index]
            self._layout.view(self._total, slot).add_(mine[first : first + slot.num_coordinates].view(slot.shape))
            first += len(whole) // self._size

    def check_order(self) -> None:
        """Compare over ranks the order of contributions since the last time. All ranks call it.

        Over n ranks, numbers with the sum n·x and the sum of squares n·x² all are x: their variance is 0.

        Raises:
            GuaranteeLost: if ranks contributed in different orders: sums of different tensors were added up.
        """
        assert not self._pending
        orders = torch.tensor([self._order, self._order**2], dtype=torch.int64, device=self._total.device)
        dist.all_reduce(orders, op=dist.ReduceOp.SUM, group=self._group)
        if orders.tolist() != [self._size * self._order, self._size * self._order**2]:
            raise GuaranteeLost("ranks contributed to tensors in different orders; this is a bug, report it")
        self._order = 0


def equal_part(num_coordinates: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Return the first coordinate and the number of coordinates of one rank's part of a tensor.

    Parts are equal; the last ones may be shorter, or empty.
    """
    size = part_size(num_coordinates, num_ranks)
    first = min(rank * size, num_coordinates)
    return first, min(size, num_coordinates - first)


def part_size(num_coordinates: int, num_ranks: int) -> int:
    """Return the coordinates of a part of a tensor that is cut into equal parts, but for the last ones."""
    return -(-num_coordinates // num_ranks)  # rounded up
