"""Each coordinate's noise once in the job, also where several ranks hold the same reduced sum.

Ranks that hold the same coordinates each draw the noise of an equal run of them, and one all-gather of fp32 brings the
noised runs together. Noise is a function of key, tensor and coordinate, so every rank ends with the vector that one
rank alone would have drawn, bit for bit. Each then steps whole tensors, as one rank alone does: a step cut into runs
may differ in a last bit on a CPU, whose vector instructions would end elsewhere, and another sum has another noise.
"""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.group import ProcessGroup, all_gather_flat
from privtrain.backends.shards import equal_part, part_size
from privtrain.privacy.correlated import NoiseHistory
from privtrain.privacy.layout import Layout
from privtrain.privacy.noise import StepNoise


class SharedNoise(ProcessGroup):
    """A backend where groups of ranks hold the same sum. Subclasses say which ranks hold this rank's."""

    def holders(self) -> dist.ProcessGroup | None:
        """Return the ranks that hold the same coordinates of the reduced sum; ``None`` if this rank alone does."""
        raise NotImplementedError

    @override
    def add_noise(
        self,
        total: torch.Tensor,
        layout: Layout,
        noise: StepNoise,
        *,
        exponent: int,
        stddev: float,
        history: NoiseHistory | None = None,
    ) -> torch.Tensor:
        """Draw this rank's run of the noise, and gather the runs of all ranks that hold the same sum."""
        draw = functools.partial(super().add_noise, noise=noise, exponent=exponent, stddev=stddev, history=history)
        group = self.holders()
        if group is None:
            return draw(total, layout)
        first, stop = _own_run(layout, group)
        mine = draw(total[first:stop], layout.run(first, stop))
        num_ranks = dist.get_world_size(group)
        size = part_size(layout.num_coordinates, num_ranks)
        padded = torch.nn.functional.pad(mine, (0, size - len(mine)))  # all ranks send equally much
        gathered = torch.empty(size * num_ranks, dtype=mine.dtype, device=mine.device)
        all_gather_flat(gathered, padded, group)
        return gathered[: layout.num_coordinates]

    @override
    def noised_layout(self, layout: Layout) -> Layout:
        """Return this rank's run of the vector, whose noise no other rank draws."""
        group = self.holders()
        if group is None:
            return layout
        return layout.run(*_own_run(layout, group))


def _own_run(layout: Layout, group: dist.ProcessGroup) -> tuple[int, int]:
    """Return the first coordinate whose noise this rank draws, and one past the last: of equal runs in ranks' order."""
    first, count = equal_part(layout.num_coordinates, dist.get_rank(group), dist.get_world_size(group))
    return first, first + count
