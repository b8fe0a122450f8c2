"""Seed torch's random numbers, and go back to where they were before a pass, so that a repeated one draws the same.

Dropout is part of the guarantee where a model has it. A unit more moves the masks of those that are drawn after it, by
far more than the clipping norm; so the bound on one unit needs masks that nobody can know, and that look as random to
others wherever they begin. ``torch.manual_seed`` is not enough for that on a CPU: it reads 32 bits of its seed, and
whoever knows all records but one could try each of these masks.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch

from privtrain.errors import GuaranteeLost
from privtrain.privacy.secret import KeyStream

#: A state of torch's generator on a CPU, the Mersenne twister mt19937, in bytes; and where its words are, as uint64:
#: before them stand seed, numbers left until the next twist and the place of the next number.
_STATE_BYTES, _NUM_WORDS = 5056, 624
_WORDS = slice(3, 3 + _NUM_WORDS)
_SEED_TRIED, _ITS_WORDS = 5, (5, 472231674, 2253902500)


def seed_from(stream: KeyStream) -> None:
    """Seed torch's generators on all devices from a secret stream: the CPU's by all 624 words of its state.

    A CUDA generator takes 63 bits, as ``torch.manual_seed`` does.

    Raises:
        GuaranteeLost: if the state of the CPU's generator is laid out otherwise than this knows.
    """
    seed, *words = stream.uint64(1 + _NUM_WORDS)
    torch.manual_seed(_SEED_TRIED)
    state = torch.get_rng_state().numpy().copy()
    numbers = state.view(np.uint64) if len(state) == _STATE_BYTES else state
    if tuple(numbers[_WORDS][: len(_ITS_WORDS)].tolist()) != _ITS_WORDS:
        version = torch.__version__
        raise GuaranteeLost(f"torch {version} keeps random numbers in a form that cannot be seeded; take torch 2.13")
    torch.manual_seed(int(seed >> np.uint64(1)))  # of the other devices
    numbers[_WORDS] = np.array(words) >> np.uint64(32)  # a word has 32 bits
    torch.set_rng_state(torch.from_numpy(state))


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
