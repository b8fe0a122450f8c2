"""The Gaussian noise of a step, as a pure function of (secret, step, tensor name, block).

Blocks make any slice of the noise cheap to draw alone: a rank that owns a shard draws that shard and nothing else. The
draw is made on the CPU in float64 and added in fp32, so that the bits are the same on every device and world size.

The guarantee is for the ideal Gaussian. Floating-point attacks on the last bits (Mironov 2012) are outside the model.
"""

from __future__ import annotations

import torch

from privtrain.layout import Layout
from privtrain.secret import SecretKey

#: Coordinates per independently keyed block.
BLOCK = 1 << 16


def gaussian(key: SecretKey, step: int, name: str, start: int, stop: int) -> torch.Tensor:
    """Standard normal noise for coordinates ``start:stop`` of one tensor.

    Args:
        key: secret of the run's current generation.
        step: the logical step.
        name: the tensor's name.
        start: first coordinate.
        stop: one past the last coordinate.

    Returns:
        float64 vector of ``stop - start`` draws, independent across (step, name, coordinate).
    """
    pieces = []
    for block in range(start // BLOCK, -(-stop // BLOCK)):
        first = block * BLOCK
        count = min(stop - first, BLOCK)
        values = key.stream("noise", step, name, block).standard_normal(count)
        pieces.append(torch.from_numpy(values[max(start - first, 0) :]))
    return torch.cat(pieces) if pieces else torch.zeros(0, dtype=torch.float64)


def add_gaussian_noise_(vector: torch.Tensor, layout: Layout, *, key: SecretKey, step: int, stddev: float) -> None:
    """Add N(0, stddev²) to every coordinate of a reduced sum, in place, in fp32.

    Call it once a step, after the reduction. Ranks that hold the whole vector all draw the same bits; a rank that holds
    parts of tensors draws the noise of its own coordinates, block by block, and no more.

    Args:
        vector: the flat fp32 sum.
        layout: its tensors, or the parts of them that this rank holds.
        key: secret of the run's current generation.
        step: the logical step.
        stddev: noise_multiplier times the sensitivity of the whole sum.
    """
    assert vector.dtype == torch.float32
    if stddev == 0:
        return
    for slot in layout.slots:
        stop = slot.first + slot.num_coordinates
        for start in range(slot.first // BLOCK * BLOCK, stop, BLOCK):
            first, last = max(start, slot.first), min(start + BLOCK, stop)
            noise = gaussian(key, step, slot.name, first, last).mul_(stddev).to(torch.float32)
            place = slot.start + first - slot.first
            vector[place : place + last - first].add_(noise.to(vector.device))
