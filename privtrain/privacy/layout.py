"""The trainable tensors of a model as one flat vector: what is clipped, reduced, noised and applied.

The vector is the tensors one after another, sorted by name. A rank of a sharded job holds a part of each tensor: its
vector is these parts. A *coordinate* is one number of a tensor (flattened) or of a vector.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Slot:
    """The position of a trainable tensor, or of this rank's part of it, in the flat vector.

    Attributes:
        name: the tensor's name.
        shape: shape of what is held: the tensor's own, or one dimension for a part.
        start: first coordinate in the vector.
        first: first coordinate of the tensor that is held; 0 where the whole tensor is.
        whole_shape: the tensor's own shape.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    first: int
    whole_shape: tuple[int, ...]

    @property
    def num_coordinates(self) -> int:
        """Number of coordinates held."""
        return math.prod(self.shape)

    def within(self, low: int, high: int) -> tuple[int, int]:
        """Return which of the slot's own coordinates, [first, last), lie in the run [low, high) of the vector.

        Counted from the first one that is held. ``first == last`` where none does.
        """
        first = min(max(low - self.start, 0), self.num_coordinates)
        last = min(max(high - self.start, 0), self.num_coordinates)
        return first, last

    @property
    def num_whole_coordinates(self) -> int:
        """Number of coordinates of the tensor itself."""
        return math.prod(self.whole_shape)


class Layout:
    """Order and place of every trainable tensor, sorted by name so that all ranks and backends agree.

    Args:
        parameters: name → trainable parameter, or the part of it that this rank steps.
        parts: for a rank that holds parts: name → (first coordinate of the tensor in its part, shape of the whole
            tensor).

    Attributes:
        parameters: sorted by name.
        slots: place of each of ``parameters`` in the vector, in the same order.
        num_coordinates: length of the vector.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        parts: Mapping[str, tuple[int, tuple[int, ...]]] | None = None,
    ) -> None:
        self.parameters = {name: parameters[name] for name in sorted(parameters)}
        self.slots: list[Slot] = []
        start = 0
        for name, parameter in self.parameters.items():
            shape = tuple(parameter.shape)
            first, whole_shape = parts[name] if parts is not None else (0, shape)
            self.slots.append(Slot(name, shape, start, first, whole_shape))
            start += parameter.numel()
        self.num_coordinates = start

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Return the layout of the tensors of ``model`` that require a gradient; a tied tensor has one place."""
        return cls({name: p for name, p in model.named_parameters() if p.requires_grad})

    def run(self, low: int, high: int) -> Layout:
        """Return the layout of the run [low, high) of the vector: which parts of which tensors lie there.

        Its parameters have shapes and no values (device "meta").
        """
        parameters: dict[str, nn.Parameter] = {}
        parts: dict[str, tuple[int, tuple[int, ...]]] = {}
        for slot in self.slots:
            first, last = slot.within(low, high)
            parameters[slot.name] = nn.Parameter(torch.empty(last - first, device="meta"))
            parts[slot.name] = (slot.first + first, slot.whole_shape)
        return Layout(parameters, parts)

    def zeros(self, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a zero vector."""
        return torch.zeros(self.num_coordinates, dtype=dtype, device=device)

    def view(self, vector: torch.Tensor, slot: Slot) -> torch.Tensor:
        """Return the part of ``vector`` that belongs to ``slot``, in its shape, sharing memory."""
        return vector[slot.start : slot.start + slot.num_coordinates].view(slot.shape)
