"""Decide where a run continues, from its ledger and its newest checkpoint.

A *generation* is a stretch of training under one secret; the first is 0. The ledger records an *intent* before a step
uses any data (from then on the step has *begun*, and is charged) and a *commit* after it, with a *commitment*, that is
a digest, to the step's exact clipped sum. Steps behind the newest checkpoint are kept; those past it are *replayed*
(taken again) or abandoned.

A step's sample is a function of (secret of the generation, step), its noise of (secret, step, exact sum), see
:mod:`privtrain.privacy.sum_digest`. From that follows how to continue:

* **A replayed step with the sum that was committed is the same release**, bit for bit, on whatever machine, device or
  number of ranks it is computed. It is free.
* **A replayed step with another sum would be a second release about the same sample.** Its noise would be its own, so
  nothing could be subtracted, but it is not what one more step costs: two releases about one sample do not compose like
  releases about two samples drawn independently. So each replayed sum is compared with the ledger's commitment before
  any noise is drawn. Where it differs, a new generation begins with that step: a fresh secret, hence a fresh sample.
  Steps replayed so far stand; those after them that were begun stay charged, and fewer are left.
* **A step that was begun and never committed released nothing**, since nothing leaves the job before the commit is on
  disk: metrics and checkpoints are written by rank 0 after it. It may be taken again with whatever sum, and is charged
  once.
* **Under another environment** (:mod:`.environment`: config, code, libraries, ranks, device) a new generation begins in
  any case, also where nothing would be replayed. Not for the noise, which differs where sums do, but for the sample: a
  copy of the directory may be going on under the old environment, and steps of the two must not share a sample.

* **Where noise is correlated** each commitment binds those before it, and the noise of steps gone by is drawn again
  from them. A new generation is a mechanism of its own, without history; rounds that the one before began stay charged
  whole.

What the ledger cannot know: two copies that go on under one environment draw the same samples. Their noise differs
where their sums do, but to release both is to release more about these samples than either statement says.

How many steps were begun is what the ledger shows, unless other files show more: a ledger that is gone, or an older one
put in its place, must not look like a run that never began, since its steps may have been computed and copied.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections import Counter

from privtrain.errors import LedgerCorrupt
from privtrain.job import checkpoint
from privtrain.ledger.bodies import directory_of
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.head import head_path
from privtrain.ledger.log import verify_chain
from privtrain.run.directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Where a session continues.

    Attributes:
        generation: the generation whose secret draws samples and noise.
        start_step: the next step to take; equals the steps behind the checkpoint that is loaded.
        end_step: steps that the model will have taken when all that the plan allows are charged.
        num_replayed: steps from ``start_step`` on that had begun before and are repeated bit for bit.
        num_abandoned: steps past the checkpoint that will not be replayed; they stay charged.
        first_step: the generation's first step, from which its sampling epochs are counted.
    """

    generation: int
    start_step: int
    end_step: int
    num_replayed: int
    num_abandoned: int
    first_step: int


def decide(
    state: LedgerState,
    *,
    num_steps: int,
    environment: str,
    checkpoint_step: int,
    checkpoint_generation: int,
    period: int = 1,
) -> Continuation:
    """Decide where to continue: replay the steps past the checkpoint, or begin a new generation.

    Args:
        state: of the verified ledger.
        num_steps: charged steps that the plan allows.
        environment: digest of the present environment, in the form in which the ledger stores it.
        checkpoint_step: steps behind the newest intact checkpoint; 0 without one.
        checkpoint_generation: generation that wrote it; 0 without one.
        period: steps of an epoch of the sampling scheme; a new generation begins a new epoch, and the one that it cuts
            short stays charged as a whole.

    Raises:
        LedgerCorrupt: if the checkpoint rests on steps that the ledger does not know: then the ledger lost records.
    """
    # state.path: the steps of the current model in order, also across generations; abandoned ones are not on it.
    kept = [entry for entry in state.path if entry.step < checkpoint_step]
    to_replay = [entry for entry in state.path if entry.step >= checkpoint_step]
    if len(kept) != checkpoint_step or (kept and kept[-1].generation != checkpoint_generation):
        raise LedgerCorrupt(
            f"the newest checkpoint has {checkpoint_step} steps of generation {checkpoint_generation} behind it, which "
            "the ledger does not show: one of them was replaced. Restore both from one backup or start a new run"
        )
    if state.generation < 0:  # no session has begun
        return Continuation(
            generation=0, start_step=0, end_step=num_steps, num_replayed=0, num_abandoned=0, first_step=0
        )

    # Also with nothing to replay: a copy of the directory may be going on from here under the old environment.
    is_other_environment = environment != state.environment
    # The present secret draws other samples for the steps of an earlier generation.
    crosses_generations = any(entry.generation != state.generation for entry in to_replay)
    if is_other_environment or crosses_generations:
        return next_generation(state, num_steps=num_steps, step=checkpoint_step, period=period)

    num_left = _num_left(state, num_steps, period, may_finish_epoch=True)
    own_steps = [step for generation, step in state.intents if generation == state.generation]
    return Continuation(
        generation=state.generation,
        start_step=checkpoint_step,
        end_step=checkpoint_step + len(to_replay) + num_left,  # replayed steps are charged already
        num_replayed=len(to_replay),
        num_abandoned=0,
        first_step=min(own_steps, default=checkpoint_step),
    )


def next_generation(state: LedgerState, *, num_steps: int, step: int, period: int = 1) -> Continuation:
    """Continue from ``step`` with a fresh secret; steps that have begun stay charged, in whole epochs a generation.

    Arguments: see :func:`decide`.
    """
    num_left = _num_left(state, num_steps, period, may_finish_epoch=False)
    return Continuation(
        generation=state.generation + 1,
        start_step=step,
        end_step=step + num_left,
        num_replayed=0,
        num_abandoned=sum(entry.step >= step for entry in state.path),
        first_step=step,
    )


def _num_left(state: LedgerState, num_steps: int, period: int, *, may_finish_epoch: bool) -> int:
    """Return how many further steps may begin until all ``num_steps`` are charged.

    A generation is charged in whole epochs of ``period`` steps; the present one by its steps if it goes on, since it
    can still finish its last epoch (``may_finish_epoch``).
    """
    steps_begun = Counter(generation for generation, _ in state.intents)
    num_charged = 0
    for generation, count in steps_begun.items():
        if may_finish_epoch and generation == state.generation:
            num_charged += count
        else:
            num_charged += math.ceil(count / period) * period
    return max(0, num_steps - num_charged)


def num_begun(run: RunDirectory) -> int:
    """Return how many steps of a run have begun, by its verified ledger; a record half written by a crash is none.

    Raises:
        LedgerCorrupt: if the ledger does not verify, or other files show steps that it does not.
    """
    state = verified_state(run)
    return 0 if state is None else state.num_charged


def verified_state(run: RunDirectory) -> LedgerState | None:
    """Return the state of a run's verified ledger, or ``None`` if it never had one.

    To be called only while no job writes: the other files of a running job may be a moment ahead of its ledger.

    Raises:
        LedgerCorrupt: if the ledger does not verify, or other files show steps that it does not.
    """
    if not run.ledger.exists():
        later_files = files_written_after_start(run)
        if later_files:
            raise LedgerCorrupt(
                f"{run.ledger} is missing but {later_files[0]} exists, so the number of started steps is unknown; "
                "restore it"
            )
        return None
    state = verify_chain(run.ledger, allow_torn=True)
    later = _past(run, state)
    if later is not None:
        raise LedgerCorrupt(f"{later} is newer than {run.ledger}, which is an older copy or was replaced; restore it")
    return state


def is_bound(run: RunDirectory) -> bool:
    """Return whether another run can no longer take this directory over: it had a ledger, or holds a reservation."""
    return run.ledger.exists() or run.reservation.exists() or bool(files_written_after_start(run))


def files_written_after_start(run: RunDirectory) -> list[pathlib.Path]:
    """Return those files of a run that are made after its ledger: beside a missing ledger they show that it was lost.

    Generation keys, checkpoints, the ledger's own further files, and everything that is released.
    """
    single = [head_path(run.ledger), run.manifest, run.privacy, run.release, run.staged, run.adapter, run.model]
    return [
        *(path for path in single if path.exists()),
        *sorted(run.secret.glob("generation-*.key")),
        *sorted(run.checkpoints.glob("*")),
        *sorted(directory_of(run.ledger).glob("*")),
    ]


def _past(run: RunDirectory, state: LedgerState) -> pathlib.Path | None:
    """Return a file that can only have been written after a record which the ledger lacks, or ``None``."""
    if run.manifest.exists() and state.generation < 0:  # the manifest is written after the first session's record
        return run.manifest
    committed_steps = {step for _, step in state.commits}  # of all generations
    for path, generation, num_steps in checkpoint.listed(run.checkpoints):
        last_step = num_steps - 1  # a checkpoint is written after the commit of its last step
        is_committed = (generation, last_step) in state.commits
        if generation is None:  # its summary is damaged: a commit of any generation has to do
            is_committed = last_step in committed_steps
        if not is_committed:
            return path
    return None
