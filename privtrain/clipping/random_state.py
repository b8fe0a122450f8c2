"""Go back to where torch's random numbers were before a pass, so that a repeated pass draws the same dropout."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch


@dataclasses.dataclass(frozen=True)
class RandomState:
    """The state of torch's generators that a pass on ``device`` draws from: the CPU's, and a CUDA device's own."""

    device: torch.device
    cpu: torch.Tensor  # uint8, as torch.get_rng_state gives it
    cuda: torch.Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> RandomState:
        """Return the present state. Waits for no device."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    @contextlib.contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw numbers from this state on within the block; afterwards go on as if the block had not been."""
        with torch.random.fork_rng(devices=[self.device] if self.cuda is not None else []):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
