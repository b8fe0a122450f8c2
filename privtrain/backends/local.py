"""One process: every collective is the identity."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from typing_extensions import override

from privtrain.backends.base import ReplicatedBackend


class LocalBackend(ReplicatedBackend):
    """A job of one rank."""

    rank = 0
    world_size = 1
    kind = "local"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @override
    def describe(self) -> str:
        return f"local, 1 process on {self.device.type}"

    @override
    def reduce(self, vector: torch.Tensor) -> None:
        pass

    @override
    def _broadcast(self, value: bytes | None) -> bytes:
        assert value is not None
        return value

    @override
    def barrier(self) -> None:
        pass

    @override
    def main_alone(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @override
    def gather_digests(self, value: bytes) -> list[bytes]:
        return [value]

    @override
    def in_sync(self, tensors: Sequence[torch.Tensor]) -> bool:
        return True

    @override
    def parameters_agree(self, model: torch.nn.Module) -> bool:
        return True

    @override
    def close(self) -> None:
        pass
