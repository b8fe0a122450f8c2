"""What training costs: floating-point operations of a token as this job computes it, and memory.

Counted on planted tokens of the job's own shape, so it says nothing of any record.
"""

from __future__ import annotations

import contextlib
import resource
import sys

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from privtrain.data.microbatch import Packer
from privtrain.training.trainer import Trainer


def flops_per_token(trainer: Trainer, packer: Packer, *, vocabulary_size: int) -> float:
    """Return operations of forward, backward and clipping, for one token of a full microbatch.

    Matrix products, convolutions and attention are counted, by torch's own counter; a multiplication and an addition
    are two. Every rank calls it, between steps; what the clipper holds is thrown away.

    Args:
        trainer: whose model and clipper are measured.
        packer: makes microbatches of the job's shape.
        vocabulary_size: planted tokens are below this.
    """
    rng = np.random.default_rng(0)
    # Units of one record, each as long as a row: they fill a microbatch.
    units = [
        [trainer.objective.plant(rng.integers(0, vocabulary_size, size=packer.max_length))]
        for _ in range(packer.microbatch_size)
    ]
    batches = [batch.to(trainer.backend.device) for batch in packer.pack(units, packer.num_batches(units))]
    counter = FlopCounterMode(display=False)
    # The first turn is not counted: in it a clipper does more, to look for layers that no rule covers.
    for context in (contextlib.nullcontext(), counter):
        trainer.clipper.reset()
        with context:
            for batch in batches:
                trainer.clipper.accumulate(batch)
    trainer.clipper.reset()
    return counter.get_total_flops() / (packer.microbatch_size * packer.max_length)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that this rank held: of the device, or, on CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
