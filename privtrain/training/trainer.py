"""The loop: one logical step after another, in the order that the guarantee needs."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from privtrain.backends import Backend
from privtrain.clipping import PerUnitClipper
from privtrain.config.schema import TrainingSection
from privtrain.data.microbatch import Microbatch, Packer
from privtrain.data.units import UnitData
from privtrain.layout import Layout
from privtrain.ledger import Ledger
from privtrain.models import row_losses
from privtrain.plan import PrivacyPlan, finite
from privtrain.sampling import DrawnUnit, PoissonSampler, deal
from privtrain.secret import SecretKey
from privtrain.tracking import Tracker
from privtrain.training.stop import StopRequest


class Trainer:
    """User-level DP-SGD with Adam on a replicated adapter.

    Args:
        plan: everything that the guarantee depends on.
        training: optimizer settings.
        model: the model with its adapter, on the backend's device.
        units: the training data by privacy unit.
        backend: this rank's view of the job.
        key: secret of the current generation.
        generation: its number.
        ledger: the open ledger on rank 0, ``None`` elsewhere.
        tracker: where metrics go.
        autocast: precision of forward passes.
        packer: makes microbatches.
        clipping_route: see :class:`~privtrain.clipping.PerUnitClipper`.
        stop: who asked this rank to stop.

    Attributes:
        must_stop: after a step, whether any rank was asked to stop; the same on all ranks.
    """

    def __init__(
        self,
        *,
        plan: PrivacyPlan,
        training: TrainingSection,
        model: torch.nn.Module,
        units: UnitData,
        backend: Backend,
        key: SecretKey,
        generation: int,
        ledger: Ledger | None,
        tracker: Tracker,
        autocast: torch.autocast,
        packer: Packer,
        clipping_route: str = "auto",
        stop: StopRequest | None = None,
    ) -> None:
        self.plan = plan
        self.must_stop = False
        self._stop = stop or StopRequest()
        self.backend = backend
        self.ledger = ledger
        self.tracker = tracker
        self.generation = generation
        self._training = training
        self._model = model
        self._units = units
        self._key = key
        self._autocast = autocast
        self._packer = packer
        self.sampler = PoissonSampler(plan, key, [len(records) for records in units.records])
        self.layout = Layout.of(model)
        self.clipper = PerUnitClipper(
            model, self.layout, plan.clipping_norm, self.row_losses, backend.device, plan.clipping_style, clipping_route
        )
        self.optimizer = torch.optim.AdamW(
            list(self.layout.parameters.values()),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )

    def train_step(self, step: int) -> None:
        """One logical step; ``step`` counts from 0."""
        started = time.monotonic()
        self._seed_dropout(step)
        drawn = self.sampler.draw(step)
        self._intend(step, drawn)
        self.clipper.reset()
        for batch in self.microbatches(drawn):
            self.clipper.accumulate(batch)
        total = self.clipper.finish()
        self.backend.reduce(total)
        stddev = self.plan.noise_multiplier * self.clipper.sensitivity
        self.backend.add_noise(total, self.layout, self._key, step, stddev)
        update = self._check_replay(step, total)
        self._set_learning_rate(step)
        self.backend.apply(total, self.layout, self.optimizer, divide_by=self.plan.expected_batch_size)
        self._commit(step, update)
        self._log(step, time.monotonic() - started)

    def microbatches(self, drawn: Sequence[DrawnUnit]) -> Iterator[Microbatch]:
        """This rank's share of a step: whole units, and as many microbatches as the busiest rank has."""
        costs = [self._packer.width(self._records_of(d)) for d in drawn]
        hands = [[self._records_of(d) for d in hand] for hand in deal(drawn, costs, self.backend.world_size)]
        num_batches = max(self._packer.num_batches(hand) for hand in hands)
        for batch in self._packer.pack(hands[self.backend.rank], num_batches):
            yield batch.to(self.backend.device)

    def _records_of(self, drawn: DrawnUnit) -> list[np.ndarray]:
        return [self._units.records[drawn.unit][record] for record in drawn.records]

    def row_losses(self, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """[rows] losses in the job's precision: what is clipped, and what the self-test differentiates again."""
        with self._autocast:
            return row_losses(self._model, input_ids, target_mask)

    def _intend(self, step: int, drawn: Sequence[DrawnUnit]) -> None:
        if self.ledger is not None:
            units = [(self._units.names[d.unit], len(d.records)) for d in drawn]
            self.ledger.intend(self.generation, step, units)

    def _check_replay(self, step: int, noised: torch.Tensor) -> str:
        if self.ledger is None:
            return ""
        update = hashlib.sha256(noised.cpu().numpy().tobytes()).hexdigest()
        self.ledger.check_replay(self.generation, step, update)
        return update

    def _commit(self, step: int, update: str) -> None:
        if self.ledger is not None:
            self.ledger.commit(self.generation, step, update)

    def _seed_dropout(self, step: int) -> None:
        # Dropout must be the same when a step is replayed. It is no part of the guarantee.
        torch.manual_seed(int(self._key.stream("dropout", step, self.backend.rank).uint64(1)[0] >> 1))

    def _set_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self._training, step, self.plan.num_steps)

    def _log(self, step: int, step_seconds: float) -> None:
        counts = self.clipper.diagnostics
        raw = [counts.num_units, counts.num_clipped, counts.num_nonfinite, counts.sum_norms, counts.sum_losses]
        raw.append(float(self._stop.requested.is_set()))  # rides along: no collective of its own
        sums = torch.tensor(raw, dtype=torch.float32, device=self.backend.device)
        self.backend.reduce(sums)
        num_units, num_clipped, num_nonfinite, sum_norms, sum_losses, num_stopping = sums.tolist()
        self.must_stop = num_stopping > 0
        if self.ledger is None:
            return
        num_charged = self.ledger.state.num_charged
        epsilon = self.plan.epsilon_after(num_charged)
        self.tracker.log(
            step + 1,
            {
                "train/lr": learning_rate(self._training, step, self.plan.num_steps),
                "privacy/epsilon": finite(epsilon),
                "privacy/num_charged_steps": num_charged,
                "privacy/budget_fraction": num_charged / self.plan.num_steps,
                "perf/step_seconds": round(step_seconds, 4),
                "train/loss": finite(sum_losses / max(num_units, 1)),
                "train/num_units": int(num_units),
                "train/clip_fraction": num_clipped / max(num_units, 1),
                "train/mean_norm": finite(sum_norms / max(num_units - num_nonfinite, 1)),
                "train/num_nonfinite_units": int(num_nonfinite),
            },
        )


def learning_rate(training: TrainingSection, step: int, num_steps: int) -> float:
    """The learning rate of a step: linear warm-up, then constant, linear to zero or cosine to zero."""
    if step < training.num_warmup_steps:
        return training.learning_rate * (step + 1) / training.num_warmup_steps
    progress = (step - training.num_warmup_steps) / max(1, num_steps - training.num_warmup_steps)
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return training.learning_rate * factor[training.schedule]
