"""The random directions of gradient canaries (Andrew et al. 2023, arXiv 2302.03098): from the run's key, without torch.

A direction is a vector of independent fair signs over all trainable coordinates. Two of d coordinates are orthogonal up
to about 1 / sqrt(d), so each can be looked for in a sum as if the others were not there. Training adds it and the audit
looks for it; both draw it from the root key, block by block, so that neither ever stores one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from privtrain.privacy.secret import SecretKey

BLOCK = 1 << 16
"""Coordinates of a tensor that are drawn at once."""

RAW_NORM = 10.0
"""Norm of a canary's update before clipping, in clipping norms: where clipping is missing it stands out."""


def signs(key: SecretKey, user: str, name: str, block: int, num: int) -> npt.NDArray[np.int8]:
    """Return a block of a canary's direction: [num] of -1 and 1.

    Args:
        key: the run's root key.
        user: the canary's id.
        name: name of the trainable tensor.
        block: number of the block in this tensor, from 0.
        num: coordinates of the block, at most ``BLOCK``.
    """
    assert 0 < num <= BLOCK, num
    num_words = math.ceil(num / 64)  # a word has 64 signs
    words = key.stream("gradient canary", user, name, block).uint64(num_words)
    bits = np.unpackbits(words.view(np.uint8), count=num)
    return 2 * bits.astype(np.int8) - 1


class Block(NamedTuple):
    """A block of a tensor: its number, its first coordinate, its number of coordinates."""

    number: int
    first: int
    num_coordinates: int


def blocks(num_coordinates: int) -> list[Block]:
    """Return the blocks of a tensor of so many coordinates; the last one may be shorter."""
    firsts = range(0, num_coordinates, BLOCK)
    return [Block(number, first, min(BLOCK, num_coordinates - first)) for number, first in enumerate(firsts)]
