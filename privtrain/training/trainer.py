"""One logical step of DP-SGD, in the order that the guarantee needs: see :meth:`Trainer.train_step`.

A step draws units (users or records, by ``privacy.unit``), adds up their clipped gradients over all ranks, adds noise
and updates the weights. A *generation* is a stretch of training under one secret, which samples and noise are drawn
from. A *commitment* is a digest of the exact sum that was released with noise. The ledger keeps it, so that a step that
is *replayed* after a crash can be compared with what it was. Sums lie on a public grid: integers times 2**exponent.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from privtrain.backends import Backend, Placement
from privtrain.backends.base import all_equal
from privtrain.clipping import PerUnitClipper, ShardedClipper, styles
from privtrain.clipping.clipper import RowLosses
from privtrain.clipping.lines import LineClipper
from privtrain.clipping.random_state import seed_from
from privtrain.config.training import TrainingSection
from privtrain.data.lines import Line, LinePacker
from privtrain.data.microbatch import Microbatch, Packer, Records
from privtrain.data.selection import check_contributions
from privtrain.data.units import UnitData
from privtrain.errors import GuaranteeLost
from privtrain.ledger.log import Ledger
from privtrain.models.losses import CausalLM, Objective
from privtrain.privacy.correlated import NoiseHistory
from privtrain.privacy.plan import PrivacyPlan, finite
from privtrain.privacy.sampling import DrawnUnit, UnitSampler, assign_to_ranks
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.sum_digest import BoundSum, bind, chained_noise
from privtrain.tracking import Tracker
from privtrain.training import auxiliary_sums, average
from privtrain.training.auxiliary_sums import next_norm
from privtrain.training.gradient_canaries import GradientCanaries


class Released(NamedTuple):
    """What leaves a step.

    Attributes:
        vector: the clipped sum over all ranks with its noise, fp32, laid out as :attr:`Trainer.layout`.
        auxiliary_sums: name → auxiliary sum with its noise, over the expected batch size.
        commitment: to the exact sums of both, without noise, for the ledger.
    """

    vector: torch.Tensor
    auxiliary_sums: dict[str, float]
    commitment: str


class _StepCounts(NamedTuple):
    """Sums over all ranks of what the clippers noted in a step. Private.

    Attributes:
        num_units: units that were added.
        num_clipped: those whose gradient was made smaller.
        num_nonfinite: those that counted as zero, since their loss or gradient is not finite.
        sum_norms: of the gradients of finite units, before clipping.
        sum_losses: of the finite losses of units.
        num_losses: units with a loss; a gradient canary has none.
    """

    num_units: float
    num_clipped: float
    num_nonfinite: float
    sum_norms: float
    sum_losses: float
    num_losses: float


class ReplayDiverged(Exception):  # noqa: N818 - no error: the job goes on in a new generation
    """Raised on every rank, before noise is drawn, if a replayed step's sum is not the one that was committed."""


class Trainer:
    """User-level DP-SGD with Adam, on whatever part of the trainable tensors the backend gives this rank.

    Args:
        plan: everything that the guarantee depends on.
        training: optimizer settings.
        model: the model with its adapter, on the backend's device.
        units: the training data by privacy unit.
        backend: this rank's view of the job.
        key: secret of the current generation.
        generation: its number.
        ledger: the open ledger on rank 0, a ``NullLedger`` elsewhere.
        tracker: where metrics go.
        autocast: precision of forward passes.
        packer: makes microbatches.
        clipping_route: ``performance.clipping_route``: how the gradients of units are computed.
        reduce_once: ``performance.reduce_once``: see :class:`~privtrain.clipping.ShardedClipper`.
        objective: the loss of a row.
        line_packer: makes *lines*, long rows that several units share, in place of microbatches of padded rows; used
            where ``packs_lines`` is set.
        first_step: the generation's first step.
        committed: step → commitment to its sum, of the steps that are replayed.
        past: commitments to the sums of the generation's steps from ``first_step`` on that are not replayed, in order;
            correlated noise is drawn again from them before the first step.
        should_stop: whether this rank was asked to stop.
        gradient_canaries: units whose update is a random direction; None if there are none.

    Attributes:
        packs_lines: whether units are packed into lines; set by the self-test, which proves that lines are exact.
        why_rows: why units are not packed into lines, in words; empty if they are, or if there is no ``line_packer``.
        why_by_record: why attention in lines goes record by record, in words; empty if one kernel does all records.
            Set by the self-test too.
        must_stop: after a step, whether any rank was asked to stop; the same on all ranks.
        keep: called with step, noised sum on the CPU and its clipping norm, once the step is committed; set by the job.
        clipper: accumulates the clipped sum of this rank's units.
        layout: the trained tensors, or the parts of them, that this rank's optimizer steps.
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
        ledger: Ledger,
        tracker: Tracker,
        autocast: torch.autocast,
        packer: Packer,
        clipping_route: str = "auto",
        reduce_once: bool = False,
        objective: Objective | None = None,
        first_step: int = 0,
        committed: Mapping[int, str] | None = None,
        past: Sequence[str] = (),
        should_stop: Callable[[], bool] = lambda: False,
        gradient_canaries: GradientCanaries | None = None,
        line_packer: LinePacker | None = None,
    ) -> None:
        self.plan = plan
        self.must_stop = False
        self._should_stop = should_stop
        self._gradient_canaries = gradient_canaries
        self.keep: Callable[[int, torch.Tensor, float], None] | None = None
        self.backend = backend
        self.ledger = ledger
        self.tracker = tracker
        self.generation = generation
        self._training = training
        self.model = model
        self._units = units
        self._key = key
        self._committed = committed or {}
        self._first_step = first_step
        self._past = past
        self._history: NoiseHistory | None = None  # of correlated noise
        self._previous = ""  # commitment of the step before
        self.autocast = autocast
        self.packer = packer
        self.line_packer = line_packer
        self.packs_lines = False
        self.why_rows = ""
        self.why_by_record = "the self-test has not tried another way"
        self._share: Sequence[DrawnUnit] = ()  # units of the step that this rank clips
        self.objective = objective or CausalLM()
        if plan.records_per_user is not None:
            assert len(units.owners) == len(units), "a bound on users needs to know them"
            check_contributions(units.owners, plan.records_per_user)
        self.sampler = UnitSampler(plan.scheme, plan.records_per_unit, key, units.num_records, first_step)
        self.placement: Placement = backend.place(model)
        self.layout = self.placement.stepped
        self._reduce_once = reduce_once
        self.clipper = self.new_clipper(self.row_losses, clipping_route)
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(),
            lr=training.learning_rate,
            betas=training.betas,
            weight_decay=training.weight_decay,
        )

    def train_step(self, step: int) -> None:
        """Take one logical step; ``step`` counts from 0.

        The ledger is told who takes part before their data are used, and that the step is done after the update, so a
        crash charges too much rather than too little. The divisor is a constant of the plan, not the realised batch.

        Raises:
            ReplayDiverged: if it was committed before with another sum; go on with :meth:`begin_generation`.
        """
        started = time.monotonic()
        self._recall(step)
        self._seed_dropout(step)
        drawn = self.sampler.draw(step)
        self._intend(step, drawn)

        # The exact sum of clipped gradients, and its noise.
        self.clipper.reset()
        self._accumulate(drawn)
        vector, released, commitment = self.release(
            self.clipper,
            self._key,
            step,
            functools.partial(self._check_replay, step),
            history=self._history,
            previous=self._previous,
        )
        # Copied here, since the optimizer may overwrite it, and written only once the step is committed.
        kept = None if self.keep is None else vector.detach().to("cpu", copy=True)
        self._previous = commitment

        # The update.
        self._set_learning_rate(step)
        self.backend.apply(vector, self.layout, self.optimizer, divide_by=self.plan.expected_batch_size)
        num_averaged = self._training.num_averaged_steps
        average.include(self.optimizer, step, num_steps=self.plan.num_steps, num_averaged=num_averaged)

        # The step is done: only now anything of it leaves the job.
        counts = self._reduced_counts()
        self._commit(step, commitment, self._zeroed(drawn, num_nonfinite=counts.num_nonfinite))
        if self.keep is not None and kept is not None:
            self.keep(step, kept, self.clipping_norm)
        self._log(step, time.monotonic() - started, counts, released)
        self._adapt(released)

    def _accumulate(self, drawn: Sequence[DrawnUnit]) -> None:
        """Add the clipped gradients of this rank's share of a step to the clipper's sum."""
        canary_users: list[str] = []
        if self._gradient_canaries is not None:  # they have no records to run
            drawn, canary_users = self._gradient_canaries.apart(drawn)
        for batch in self.microbatches(drawn):
            self.clipper.accumulate(batch)
        if canary_users and self._gradient_canaries is not None:
            assert isinstance(self.clipper, PerUnitClipper), "checked at the start"
            users_of_rank = canary_users[self.placement.share :: self.placement.num_shares]  # taken in turn
            self._gradient_canaries.add(self.clipper, users_of_rank)

    def begin_generation(self, key: SecretKey, generation: int, first_step: int) -> None:
        """Draw samples and noise from another secret from ``first_step`` on; nothing of the old one is replayed."""
        self._key = key
        self.generation = generation
        self._first_step = first_step
        self._committed = {}  # nothing is replayed: a sum of the new secret's sample is another one
        # Correlated noise begins anew: a step of the new secret takes back nothing of the old one's noise.
        self._past = ()  # no step of this generation is behind it
        self._history = None  # the next step makes an empty one, see _recall
        self._previous = ""  # and its noise is bound to no step before it
        self.sampler = UnitSampler(
            self.plan.scheme, self.plan.records_per_unit, key, self._units.num_records, first_step
        )

    def new_history(self, clipper: PerUnitClipper) -> NoiseHistory | None:
        """Return an empty history of correlated noise, on the clipper's grid; ``None`` where noise is independent.

        A step's correlated noise takes back part of the noise of the steps before, which the history keeps.
        """
        strategy = self.plan.correlated
        if strategy is None:
            return None
        exponent, stddev = clipper.grid_exponent, self._stddev(clipper)
        noised = self.backend.noised_layout(self.layout)
        return NoiseHistory(strategy, noised, self.backend.device, exponent=exponent, stddev=stddev)

    def _recall(self, step: int) -> None:
        """Before this process's first step, draw the correlated noise of the generation's earlier steps again.

        Noise is a function of the secret and the commitments, so it need not be stored. Independent noise needs none.
        """
        if self._history is not None:
            return
        self._history = self.new_history(self.clipper)
        if self._history is None:
            return
        if len(self._past) != step - self._first_step:
            raise GuaranteeLost(
                f"{step - self._first_step} steps of generation {self.generation} are behind step {step}, the ledger "
                f"commits to {len(self._past)} sums of them: its noise cannot be drawn again"
            )
        for earlier_step, commitment in enumerate(self._past, start=self._first_step):
            self._history.advance(chained_noise(self._key, earlier_step, commitment))
            self._previous = commitment

    def release(
        self,
        clipper: PerUnitClipper,
        key: SecretKey,
        step: int,
        check: Callable[[str], None] | None = None,
        *,
        history: NoiseHistory | None = None,
        previous: str = "",
    ) -> Released:
        """Reduce the sum over all ranks, add noise, and return all that leaves a step. Every rank calls it.

        The self-test calls it too, so that what the test measures is what training does.

        Args:
            clipper: with this rank's part of the step's sum.
            key: secret that the noise is drawn from.
            step: the logical step.
            check: called with the commitment to the sum before any noise is drawn; if it raises, nothing is released.
            history: correlated noise of the steps before, from :meth:`new_history`; the step's own is added to it.
            previous: with ``history``, the commitment to the sum of the step before.

        Raises:
            GuaranteeLost: if ranks hold different sums after the reduction.
        """
        total = self.backend.reduce_total(clipper.finish())
        totals = auxiliary_sums.reduced(self.plan, clipper.diagnostics, self.backend)
        # Noise is bound to (keyed by) the sums themselves: two different sums never get the same noise.
        bound = self.bound_sum(clipper, total, totals, key, step, previous)
        if not all_equal(self.backend.gather_digests(bytes.fromhex(bound.commitment))):
            raise GuaranteeLost(f"ranks hold different sums of step {step} after the reduction; nothing is released")
        if check is not None:
            check(bound.commitment)
        vector = self.backend.add_noise(
            total,
            self.layout,
            bound.noise,
            exponent=clipper.grid_exponent,
            stddev=self._stddev(clipper),
            history=history,
        )
        if self.plan.clipping_style == "batch":  # a baseline that bounds no unit, for runs without noise only
            self._clip_batch(vector)
        return Released(vector, auxiliary_sums.release(self.plan, totals, bound.noise), bound.commitment)

    def bound_sum(
        self,
        clipper: PerUnitClipper,
        total: torch.Tensor,
        totals: Mapping[str, int],
        key: SecretKey,
        step: int,
        previous: str = "",
    ) -> BoundSum:
        """Return the noise key of a step's sums, and their commitment; equal on every rank.

        Noise is keyed by the sums themselves: two different sums never get the same noise.

        Args:
            clipper: whose grid and sensitivity hold.
            total: the reduced clipped sum, in grid steps.
            totals: name → reduced auxiliary sum, in grid steps.
            key: secret that the noise is drawn from.
            step: the logical step.
            previous: the commitment of the step before, which correlated noise is bound to as well.
        """
        public = [clipper.grid_exponent, self._stddev(clipper), auxiliary_sums.EXPONENT]
        for auxiliary_sum in self.plan.auxiliary_sums:
            public += [auxiliary_sum.name, auxiliary_sum.noise]
        return bind(
            key,
            step,
            total,
            self.layout,
            public=public,
            metrics=list(totals.values()),
            sum_parts=self.backend.sum_parts,
            previous=previous if self.plan.correlated is not None else None,
        )

    def _stddev(self, clipper: PerUnitClipper) -> float:
        """Return the standard deviation of a step's own noise."""
        return self.plan.fresh_noise_multiplier * clipper.sensitivity

    def _clip_batch(self, total: torch.Tensor) -> None:
        """Scale the step's sum so that the mean gradient's norm is at most the clipping norm.

        Only for ``clipping_style: batch``, which bounds no unit and so gives no privacy: a baseline to compare with.
        """
        assert self.plan.noise_multiplier == 0
        squares = torch.linalg.vector_norm(total, dtype=torch.float64).square()[None]
        self.backend.sum_parts(squares)
        norm = float(squares.sqrt()) / self.plan.expected_batch_size
        total *= styles.batch_factor(norm, self.plan.clipping_norm)

    def new_clipper(self, losses: RowLosses, route: str) -> PerUnitClipper:
        """Return a clipper of one of three kinds.

        * Where gradients are in parts over the ranks: a :class:`~privtrain.clipping.ShardedClipper`.
        * Where there is a ``line_packer``: a :class:`~privtrain.clipping.lines.LineClipper`, whatever ``packs_lines``
          says: the self-test tries it on lines before it sets that. It takes microbatches of rows as well.
        * Else a :class:`~privtrain.clipping.PerUnitClipper`, for rows alone.

        Where a forward pass gathers weights from all ranks, every rank must run as many passes as any other
        (``equal_passes``), and asks through ``any_rank`` whether another one needs a further pass.

        Args:
            losses: gives the [rows] losses of a microbatch; the self-test passes others than :meth:`row_losses`.
            route: of ``performance.clipping_route``.
        """
        if self.placement.shards is not None:
            return ShardedClipper(
                self.model,
                self.placement.shards,
                self.plan.clipping_norm,
                losses,
                self.backend.device,
                self.plan.clipping_style,
                route,
                any_rank=self.backend.any_rank,
                reduce_once=self._reduce_once,
            )
        lines = functools.partial(LineClipper, self.token_losses, in_one_kernel=not self.why_by_record)
        kind = PerUnitClipper if self.line_packer is None else lines
        return kind(
            self.model,
            self.placement.clipped,
            self.plan.clipping_norm,
            losses,
            self.backend.device,
            self.plan.clipping_style,
            route,
            equal_passes=self.placement.equal_passes,
            any_rank=self.backend.any_rank,
        )

    def choose_attention(self, why_by_record: str) -> None:
        """Let attention in lines go record by record from now on, or in one kernel where no reason is given.

        Args:
            why_by_record: the attribute.
        """
        self.why_by_record = why_by_record
        if isinstance(self.clipper, LineClipper):
            self.clipper.in_one_kernel = not why_by_record

    def microbatches(self, drawn: Sequence[DrawnUnit]) -> Iterator[Microbatch | Line]:
        """Yield this rank's share of a step in microbatches or lines, on its device.

        Each unit is one rank's as a whole. Every rank yields as many batches as the busiest one. Where gradients are
        sharded, units that are too large for one rank are *joint*: the ranks of a shard group work on them together,
        and their batches follow.

        Args:
            drawn: all units of the step, the same on every rank.
        """
        placement = self.placement
        fetched = self._units.fetch([(d.unit, d.record_indices) for d in drawn])
        records_of = {d.unit: records for d, records in zip(drawn, fetched, strict=True)}
        packer = self.line_packer if self.packs_lines and self.line_packer is not None else self.packer
        cost_of = {unit: packer.cost(records) for unit, records in records_of.items()}

        # A unit is worked on by one rank, or by the ranks of one shard group (*replica*). Every rank computes all
        # shares, so that all know how many batches the busiest rank has.
        joint = [d for d in drawn if is_joint(placement, self.clipper, self.packer, records_of[d.unit])]
        joint_units = {d.unit for d in joint}
        single = [d for d in drawn if d.unit not in joint_units]
        single_by_share = assign_to_ranks(single, [cost_of[d.unit] for d in single], placement.num_shares)
        joint_by_replica = assign_to_ranks(joint, [cost_of[d.unit] for d in joint], placement.num_replicas)
        joint_here = joint_by_replica[placement.replica]
        self._share = [*single_by_share[placement.share], *joint_here]  # in the order of the batches' owners

        shares = [[records_of[d.unit] for d in share] for share in single_by_share]
        joint_records = [records_of[d.unit] for d in joint_here]
        for batch in packer.pack_share(shares, placement.share, joint_records):
            yield batch.to(self.backend.device)

    def row_losses(self, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Return [rows] losses in the job's precision: what is clipped, and what the self-test differentiates again."""
        with self.autocast:
            return self.objective.losses(self.model, input_ids, target_mask)

    def token_losses(self, line: Line) -> torch.Tensor:
        """Return [1, tokens] losses in the job's precision, as :meth:`row_losses`."""
        with self.autocast:
            return self.objective.token_losses(self.model, line)

    @property
    def clipping_norm(self) -> float:
        """The next step's clipping norm: the plan's, unless clipping is adaptive; part of a checkpoint."""
        return self.clipper.clipping_norm

    @clipping_norm.setter
    def clipping_norm(self, value: float) -> None:
        self.clipper.clipping_norm = value

    @property
    def last_commitment(self) -> str:
        """The commitment to the sum of the last step taken, as the ledger has it; part of a checkpoint."""
        return self._previous

    def _adapt(self, released: Mapping[str, float]) -> None:
        """Set the next step's clipping norm from the released share of unclipped units, if clipping is adaptive."""
        settings, initial_norm = self.plan.adaptive_clipping, self.plan.clipping_norm
        if settings is not None:
            share = auxiliary_sums.share_within(released)
            self.clipping_norm = next_norm(settings, self.clipping_norm, share, initial_norm=initial_norm)

    def _intend(self, step: int, drawn: Sequence[DrawnUnit]) -> None:
        """Record in the ledger that a step begins, with the units that take part and their numbers of records."""
        if self.backend.is_main:  # only rank 0 records; the others need not read names, which may lie on disk
            units = [(self._units.names[d.unit], len(d.record_indices)) for d in drawn]
            self.ledger.intend(self.generation, step, units)

    def _check_replay(self, step: int, commitment: str) -> None:
        """Raise ReplayDiverged if a replayed step has another commitment than before; a new step has none before."""
        before = self._committed.get(step)
        if before is not None and before != commitment:
            raise ReplayDiverged

    def _reduced_counts(self) -> _StepCounts:
        """Return sums over all ranks, and set ``must_stop``.

        Whether any rank was asked to stop is summed with them, to save a collective.
        """
        noted = self.clipper.diagnostics
        own = _StepCounts(
            num_units=noted.num_units,
            num_clipped=noted.num_clipped,
            num_nonfinite=noted.num_nonfinite,
            sum_norms=noted.sum_norms,
            sum_losses=noted.sum_losses,
            num_losses=len(noted.unit_losses),
        )
        sums = torch.tensor([*own, float(self._should_stop())], dtype=torch.float32, device=self.backend.device)
        self.backend.reduce(sums)
        *reduced, num_stopping = sums.tolist()
        self.must_stop = num_stopping > 0
        return _StepCounts(*reduced)

    def _zeroed(self, drawn: Sequence[DrawnUnit], num_nonfinite: float) -> list[str]:
        """Return names of the units whose gradient was not finite, so that they counted as zero; on every rank.

        Each is known only to the rank that clipped it. ``num_nonfinite``: over all ranks, almost always 0.
        """
        if not num_nonfinite:
            return []
        zeroed_here = {self._share[position].unit for position in self.clipper.diagnostics.nonfinite_owners}
        flags = torch.tensor([float(d.unit in zeroed_here) for d in drawn], device=self.backend.device)
        self.backend.reduce(flags)
        return [self._units.names[d.unit] for d, flag in zip(drawn, flags.tolist(), strict=True) if flag]

    def _commit(self, step: int, commitment: str, zeroed: Sequence[str]) -> None:
        """Record in the ledger that a step is done, with the names of units that counted as zero."""
        self.ledger.commit(self.generation, step, commitment, zeroed)

    def _seed_dropout(self, step: int) -> None:
        """Seed torch by the key, the same when a step is replayed; secret (:mod:`privtrain.clipping.random_state`)."""
        seed_from(self._key.stream("dropout", step, self.backend.rank))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's parameter groups, one a learning rate: of LoRA's B matrices, and of everything else.

        ``rate_ratio`` of a group is its learning rate over that of the schedule.
        """
        by_ratio: dict[float, list[torch.nn.Parameter]] = {}
        for name, parameter in self.layout.parameters.items():
            is_b = ".lora_B." in name or ".lora_embedding_B." in name
            ratio = self._training.lora_b_rate_ratio if is_b else 1.0
            by_ratio.setdefault(ratio, []).append(parameter)
        return [{"params": parameters, "rate_ratio": ratio} for ratio, parameters in by_ratio.items()]

    def _set_learning_rate(self, step: int) -> None:
        """Set the schedule's rate of a step in every parameter group."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._training.learning_rate_at(step, self.plan.num_steps) * group["rate_ratio"]

    def _log(self, step: int, step_seconds: float, counts: _StepCounts, released: Mapping[str, float]) -> None:
        """Log a step: released values, and private ones that the tracker keeps in ``secret/``; on rank 0.

        Args:
            step: counts from 0.
            step_seconds: duration.
            counts: of :meth:`_reduced_counts`.
            released: name → auxiliary sum, as released.
        """
        if not self.backend.is_main:
            return
        num_finite = counts.num_units - counts.num_nonfinite
        num_charged = self.ledger.state.num_charged
        epsilon = self.plan.epsilon_after(self.plan.accounted_steps(self.ledger.state.intents))
        adaptive = {}
        if self.plan.adaptive_clipping is not None:
            share = auxiliary_sums.share_within(released)
            adaptive = {"privacy/clipping_norm": self.clipping_norm, "privacy/share_within_norm": share}
        self.tracker.log(
            step + 1,
            {
                **adaptive,
                **auxiliary_sums.metrics(self.plan, released),
                "train/lr": self._training.learning_rate_at(step, self.plan.num_steps),
                "privacy/epsilon": finite(epsilon),
                "privacy/num_charged_steps": num_charged,
                "privacy/budget_fraction": num_charged / self.plan.num_steps,
                "perf/step_seconds": round(step_seconds, 4),
                "perf/expected_units_per_second": finite(self.plan.expected_batch_size / max(step_seconds, 1e-9)),
                "train/loss": finite(counts.sum_losses / max(counts.num_losses, 1)),
                "train/num_units": int(counts.num_units),
                "train/clip_fraction": counts.num_clipped / max(counts.num_units, 1),
                "train/mean_norm": finite(counts.sum_norms / max(num_finite, 1)),
                "train/num_nonfinite_units": int(counts.num_nonfinite),
            },
        )


def is_joint(placement: Placement, clipper: PerUnitClipper, packer: Packer, records: Records) -> bool:
    """Return whether the ranks of a shard group work on this unit together: decided by its size and the route alone."""
    return placement.shards is not None and (clipper.route == "one_unit" or not packer.fits(records))
