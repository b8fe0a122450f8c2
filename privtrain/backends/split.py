"""Trainable tensors on every rank; sum, noise and optimizer split over the ranks.

What ZeRO stage 1 does, and all that LoRA needs beside a sharded base: each rank accumulates a clipped sum of its own
units, one reduce-scatter a logical step leaves it an equal part of the whole sum, it noises and steps that part, and
one all-gather brings the stepped parts together. Both together send what one all-reduce sends.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from privtrain.backends.base import Placement
from privtrain.backends.group import all_gather_flat, reduce_scatter_flat
from privtrain.backends.shards import part_size
from privtrain.privacy.layout import Layout


class SplitStep:
    """The flat vector of all trainable tensors, cut into equal parts.

    Args:
        model: with its trainable tensors on this rank, fp32.
        optimizer_device: where this rank's part of parameters and optimizer state is kept.
        equal_passes: whether every rank must run equally many forward passes, because weights are gathered in them.

    Attributes:
        placement: the whole tensors are clipped, this rank's part is stepped.
    """

    def __init__(self, model: torch.nn.Module, optimizer_device: torch.device, *, equal_passes: bool = False) -> None:
        self._layout = Layout.of(model)
        self._world_size = dist.get_world_size()
        rank = dist.get_rank()
        # Coordinates of a part; the last parts may be shorter, or empty.
        self._size = part_size(self._layout.num_coordinates, self._world_size)
        low, high = rank * self._size, (rank + 1) * self._size
        mine: dict[str, torch.nn.Parameter] = {}
        parts: dict[str, tuple[int, tuple[int, ...]]] = {}  # name → (first coordinate held, shape of the whole tensor)
        for slot in self._layout.slots:
            first, stop = slot.within(low, high)  # those of its coordinates that lie in this rank's part, maybe none
            values = self._layout.parameters[slot.name].detach().view(-1)[first:stop]
            mine[slot.name] = torch.nn.Parameter(values.to(optimizer_device))
            parts[slot.name] = (first, slot.shape)
        self._stepped = Layout(mine, parts)
        self.placement = Placement(self._layout, self._stepped, rank, self._world_size, equal_passes=equal_passes)

    def reduce_total(self, total: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of the SUM over ranks of ``total``, the flat vector of all trainable tensors."""
        padded = torch.nn.functional.pad(total, (0, self._size * self._world_size - len(total)))
        part = torch.empty(self._size, dtype=total.dtype, device=total.device)
        reduce_scatter_flat(part, padded)
        return part[: self._stepped.num_coordinates]

    def publish(self) -> None:
        """Gather every rank's stepped part into the model of every rank."""
        device = next(iter(self._layout.parameters.values())).device
        part = torch.zeros(self._size, dtype=torch.float32, device=device)
        for slot, parameter in zip(self._stepped.slots, self._stepped.parameters.values(), strict=True):
            self._stepped.view(part, slot).copy_(parameter.detach())
        gathered = torch.empty(self._size * self._world_size, dtype=torch.float32, device=device)
        all_gather_flat(gathered, part)
        with torch.no_grad():
            for slot, parameter in zip(self._layout.slots, self._layout.parameters.values(), strict=True):
                parameter.copy_(self._layout.view(gathered, slot))
