"""One process: every collective is the identity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch

from privtrain.backends.base import ReplicatedBackend


class LocalBackend(ReplicatedBackend):
    """A job of one rank."""

    rank = 0
    world_size = 1
    is_main = True
    kind = "local"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def describe(self) -> str:
        """See :class:`privtrain.backends.base.Backend`."""
        return f"local, 1 process on {self.device.type}"

    def reduce(self, vector: torch.Tensor) -> None:
        """See :class:`privtrain.backends.base.Backend`."""

    def reduce_total(self, total: torch.Tensor) -> torch.Tensor:
        """See :class:`privtrain.backends.base.Backend`."""
        self.reduce(total)
        return total

    def broadcast_bytes(self, value: bytes | None) -> bytes:
        """See :class:`privtrain.backends.base.Backend`."""
        assert value is not None
        return value

    def barrier(self) -> None:
        """See :class:`privtrain.backends.base.Backend`."""

    def main_alone(self) -> contextlib.AbstractContextManager[None]:
        """See :class:`privtrain.backends.base.Backend`."""
        return contextlib.nullcontext()

    def gather_digests(self, value: bytes) -> list[bytes]:
        """See :class:`privtrain.backends.base.Backend`."""
        return [value]

    def in_sync(self, tensors: Sequence[torch.Tensor]) -> bool:  # noqa: ARG002
        """See :class:`privtrain.backends.base.Backend`."""
        return True

    def parameters_agree(self, model: torch.nn.Module) -> bool:  # noqa: ARG002
        """See :class:`privtrain.backends.base.Backend`."""
        return True

    def close(self) -> None:
        """See :class:`privtrain.backends.base.Backend`."""
