"""Each coordinate's noise once in the job, also where several ranks hold the same reduced sum.

Ranks that hold the same coordinates each draw the noise of an equal run of them, and one all-gather of fp32 brings the
noised runs together. Noise is a function of key, tensor and coordinate, so every rank ends with the vector that one
rank alone would have drawn, bit for bit. Each then steps whole tensors, as one rank alone does: a step cut into runs
may differ in a last bit on a CPU, whose vector instructions would end elsewhere, and another sum has another noise.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from typing_extensions import override

from privtrain.backends.group import ProcessGroup, all_gather_flat
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
        run = _own_run(layout, group)
        mine = draw(total[run.first : run.stop], layout.run(run.first, run.stop))
        padded = torch.nn.functional.pad(mine, (0, run.size - len(mine)))  # all ranks send equally much
        gathered = torch.empty(run.size * dist.get_world_size(group), dtype=mine.dtype, device=mine.device)
        all_gather_flat(gathered, padded, group)
        return gathered[: layout.num_coordinates]

    @override
    def noised_layout(self, layout: Layout) -> Layout:
        """Return this rank's run of the vector, whose noise no other rank draws."""
        group = self.holders()
        if group is None:
            return layout
        run = _own_run(layout, group)
        return layout.run(run.first, run.stop)


class _Run(NamedTuple):
    """Coordinates of the vector whose noise one rank draws.

    Attributes:
        first: the first one.
        stop: one past the last one.
        size: coordinates of every rank's run, except the last ones, which may be shorter or empty.
    """

    first: int
    stop: int
    size: int


def _own_run(layout: Layout, group: dist.ProcessGroup) -> _Run:
    """Return this rank's run: the vector is cut into equal ones, one for each rank of ``group`` in their order."""
    num_coordinates, rank = layout.num_coordinates, dist.get_rank(group)
    size = -(-num_coordinates // dist.get_world_size(group))  # rounded up
    return _Run(min(rank * size, num_coordinates), min((rank + 1) * size, num_coordinates), size)
