"""The trainable tensors of a model as one flat fp32 vector: what is clipped, reduced, noised and applied."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Slot:
    """One trainable tensor's place in the vector."""

    name: str
    shape: tuple[int, ...]
    start: int

    @property
    def num_coordinates(self) -> int:
        """Number of coordinates."""
        return math.prod(self.shape)


class Layout:
    """Order and place of every trainable tensor, sorted by name so that all ranks and backends agree.

    Args:
        parameters: name → trainable parameter.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = {name: parameters[name] for name in sorted(parameters)}
        self.slots: list[Slot] = []
        start = 0
        for name, parameter in self.parameters.items():
            self.slots.append(Slot(name, tuple(parameter.shape), start))
            start += parameter.numel()
        self.num_coordinates = start

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """The layout of the tensors of ``model`` that require a gradient; a tied tensor has one place."""
        return cls({name: p for name, p in model.named_parameters() if p.requires_grad})

    def zeros(self, device: torch.device) -> torch.Tensor:
        """A zero vector."""
        return torch.zeros(self.num_coordinates, dtype=torch.float32, device=device)

    def view(self, vector: torch.Tensor, slot: Slot) -> torch.Tensor:
        """The part of ``vector`` that belongs to ``slot``, in its shape, sharing memory."""
        return vector[slot.start : slot.start + slot.num_coordinates].view(slot.shape)
