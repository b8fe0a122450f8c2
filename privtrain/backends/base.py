"""What the trainer needs of a process group, and the parts that all replicated backends share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch

from privtrain.layout import Layout
from privtrain.noise import add_gaussian_noise_
from privtrain.secret import SecretKey


class Backend(Protocol):
    """One rank's view of the job. Every method but ``describe`` is called by all ranks in the same order."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the only one that writes."""
        ...

    def describe(self) -> str:
        """A phrase for people: kind, ranks and device."""
        ...

    def reduce(self, vector: torch.Tensor) -> None:
        """Replace ``vector`` (fp32, any shape) on every rank by its SUM over ranks."""
        ...

    def add_noise(self, vector: torch.Tensor, layout: Layout, key: SecretKey, step: int, stddev: float) -> None:
        """Add the step's noise, once per coordinate over the whole job. Only after :meth:`reduce`."""
        ...

    def apply(self, vector: torch.Tensor, layout: Layout, optimizer: torch.optim.Optimizer, divide_by: float) -> None:
        """Step the optimizer on ``vector / divide_by``."""
        ...

    def broadcast_bytes(self, value: bytes | None) -> bytes:
        """Rank 0's bytes, on every rank; the others pass ``None``."""
        ...

    def barrier(self) -> None:
        """Wait for every rank."""
        ...

    def gather_digests(self, value: bytes) -> list[bytes]:
        """Every rank's 32 bytes, by rank, on every rank."""
        ...

    def in_sync(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these tensors are bit-identical on every rank."""
        ...

    def close(self) -> None:
        """Leave the process group."""
        ...


class ReplicatedBackend:
    """Noise and update where every rank holds all trainable tensors: LoRA under ``local`` and ``ddp``.

    All ranks draw the same bits, so their parameters stay identical without a broadcast.
    """

    def add_noise(self, vector: torch.Tensor, layout: Layout, key: SecretKey, step: int, stddev: float) -> None:
        """See :class:`Backend`."""
        add_gaussian_noise_(vector, layout, key=key, step=step, stddev=stddev)

    def apply(self, vector: torch.Tensor, layout: Layout, optimizer: torch.optim.Optimizer, divide_by: float) -> None:
        """See :class:`Backend`."""
        for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
            parameter.grad = (layout.view(vector, slot) / divide_by).to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def all_equal(values: Sequence[bytes]) -> bool:
    """Whether there is one value."""
    return len(set(values)) == 1


def digest(tensors: Sequence[torch.Tensor]) -> bytes:
    """SHA-256 over the exact bits of the tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return sha.digest()


__all__ = ["Backend", "ReplicatedBackend", "all_equal", "digest"]
