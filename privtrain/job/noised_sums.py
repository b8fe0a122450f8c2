"""The noised sum of every step, kept for the owner's audit in ``secret/noised_sums``, never published.

A noised sum is the output of the mechanism, before the optimizer sees it, divided by the step's clipping norm. Its file
is written once the step is committed. A session begins by deleting the files of the steps that it will take, so that no
file of an abandoned step remains; a replayed step writes the same file again. At the release the list of files, with
their digests, is sealed under the run's root key.
"""

from __future__ import annotations

import io

import numpy as np
import torch

from privtrain.errors import ConfigError, Fault
from privtrain.files.atomic import write_atomically
from privtrain.files.private import make_private_directory
from privtrain.files.reading import file_sha256
from privtrain.privacy.layout import Layout
from privtrain.run.directory import NOISED_SUMS_SCHEMA, RunDirectory
from privtrain.run.sealing import write_sealed


class NoisedSums:
    """Writes the sums of a run; rank 0 alone holds one.

    Args:
        run: its directory.
        layout: of the sums.
        num_steps: steps of the plan.
        start_step: the session's first; files from there on are deleted.
    """

    def __init__(self, run: RunDirectory, layout: Layout, num_steps: int, start_step: int) -> None:
        self._run, self._layout, self._num_steps = run, layout, num_steps
        make_private_directory(run.noised_sums)
        for step in range(start_step, num_steps):
            run.noised_sum(step).unlink(missing_ok=True)

    def keep(self, step: int, vector: torch.Tensor, clipping_norm: float) -> None:
        """Write the noised sum of a step, whole or not at all.

        Args:
            step: counts from 0.
            vector: [coordinates] fp32, the sum with its noise.
            clipping_norm: C of the step.
        """
        buffer = io.BytesIO()
        np.save(buffer, (vector.detach().double() / clipping_norm).float().cpu().numpy())
        write_atomically(self._run.noised_sum(step), buffer.getvalue(), mode=0o600)

    def seal(self) -> None:
        """Write the sealed list of the sums that are there."""
        steps = [step for step in range(self._num_steps) if self._run.noised_sum(step).exists()]
        facts = {
            "schema": NOISED_SUMS_SCHEMA,
            "tensors": [[slot.name, slot.num_coordinates] for slot in self._layout.slots],
            "steps": [[step, file_sha256(self._run.noised_sum(step))] for step in steps],
        }
        write_sealed(self._run, self._run.noised_sums_index, facts)


def check_whole(layout: Layout) -> None:
    """Raise unless this rank holds whole tensors of the noised sum, since rank 0 writes it alone.

    Raises:
        ConfigError: if the backend shards the sum.
    """
    if any(slot.first or slot.num_coordinates != slot.num_whole_coordinates for slot in layout.slots):
        problem = "true needs whole sums on a rank, and this backend shards them; use one process or DDP"
        raise ConfigError([Fault("audit.keep_noised_sums", problem)])
