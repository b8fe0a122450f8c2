"""Loss and accuracy on records that are not trained on: of held-out users, or public ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from privtrain.backends import Backend
from privtrain.data.microbatch import NOBODY, Packer
from privtrain.data.records import Record
from privtrain.models.losses import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """How the model does on some records.

    Attributes:
        losses: [records] sum of the negative log-likelihoods of each record's predicted tokens, or its label, in nats.
        num_targets: [records] predicted tokens of each; not all are 0.
        num_correct: number of labels that are the model's first choice; 0 for language models.
    """

    losses: np.ndarray
    num_targets: np.ndarray
    num_correct: float

    @property
    def loss(self) -> float:
        """Mean over all predicted tokens or labels."""
        return float(self.losses.sum() / self.num_targets.sum())

    @property
    def accuracy(self) -> float:
        """Share of labels that are the model's first choice."""
        return float(self.num_correct / self.num_targets.sum())


def evaluate(
    model: torch.nn.Module,
    records: Sequence[Record],
    backend: Backend,
    *,
    objective: Objective,
    packer: Packer,
    autocast: torch.autocast,
    between_batches: Callable[[], None] = lambda: None,
) -> Scores | None:
    """Score the records over all ranks, and return the same scores on each; ``None`` if nothing is to be predicted.

    Every rank runs as many batches as the busiest one, since sharded models need equal passes.

    Args:
        model: as it is now.
        records: tokenised.
        backend: reduces the losses.
        objective: the loss of a row.
        packer: makes microbatches.
        autocast: precision of forward passes.
        between_batches: called before each batch, on all ranks at the same time, so that it may use collectives.
    """
    # Rank r takes the records r, r + world_size, ...; the packer takes units, so each record is a unit of one.
    units = [[record] for record in records]
    shares = [units[rank :: backend.world_size] for rank in range(backend.world_size)]
    num_batches = max(packer.num_batches(share) for share in shares)
    # A record is scored on one rank; in the sum over ranks the others add zeros. The last entry counts correct labels.
    losses = torch.zeros(len(records) + 1, dtype=torch.float32, device=backend.device)
    model.eval()
    with torch.no_grad():
        for batch in packer.pack(shares[backend.rank], num_batches):
            between_batches()
            moved = batch.to(backend.device)
            with autocast:
                row_losses = objective.losses(model, moved.input_ids, moved.target_mask)
                losses[-1] += objective.num_correct(model, moved.input_ids, moved.target_mask)
            # batch.owner: of each row, which of batch.owners it belongs to; these are positions in this rank's share.
            is_record = batch.owner != NOBODY  # the others are padding rows
            owners = torch.tensor(batch.owners, dtype=torch.int64)  # empty in a batch that only other ranks need
            record_numbers = owners[batch.owner[is_record]] * backend.world_size + backend.rank
            losses[record_numbers.to(backend.device)] = row_losses[is_record.to(backend.device)].float()
    model.train()
    backend.reduce(losses)
    *per_record, num_correct = losses.double().tolist()
    num_targets = np.asarray([record.num_targets for record in records], dtype=np.float64)
    return Scores(np.asarray(per_record), num_targets, num_correct) if num_targets.sum() else None


class Rise(NamedTuple):
    """How much the mean loss per token rose, with a 95 % interval from ``low`` to ``high``."""

    estimate: float
    low: float
    high: float


def difference(before: Scores, after: Scores) -> Rise:
    """Return how much the mean loss per token rose, with a 95 % interval.

    The same records were scored before and after, and each is compared with itself. The mean is the ratio of summed
    losses to summed tokens, so the interval is that of a ratio estimator: linearised variance, Student's t. Records are
    taken to be independent draws; from fewer than two the interval is infinite.
    """
    from scipy import stats

    total, num = float(after.num_targets.sum()), len(after.num_targets)
    rises = after.losses - before.losses
    rise = float(rises.sum() / total)
    if num < 2 or not math.isfinite(rise):
        return Rise(rise, -math.inf, math.inf)
    spread = num / (num - 1) * float(np.square(rises - rise * after.num_targets).sum())
    half_width = float(stats.t.ppf(0.975, num - 1)) * math.sqrt(spread) / total
    return Rise(rise, rise - half_width, rise + half_width)


def perplexity(loss: float) -> float:
    """Return exp of the mean loss, infinite where float64 ends."""
    return math.exp(loss) if loss < 700 else math.inf
