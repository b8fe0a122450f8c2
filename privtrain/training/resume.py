"""Where a restarted run goes on, decided from its ledger and its newest checkpoint. A pure function.

A session goes on under the same secret only if its environment is the one that drew from that secret so far: then steps
that were begun after the checkpoint are replayed for free. Otherwise a new generation with a fresh secret begins, and
abandoned steps stay charged, which leaves fewer steps for the model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from privtrain.errors import LedgerCorrupt
from privtrain.ledger import LedgerState


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a session goes on.

    Attributes:
        generation: whose secret draws samples and noise.
        start_step: steps that the loaded model has behind it.
        end_step: the model's number of steps when the budget is used up.
        num_replayed: steps from ``start_step`` that were begun before and are repeated bit by bit.
        num_abandoned: steps newly given up by this decision; they stay charged.
        first_step: the first step of the generation: its epochs of sampling are counted from there.
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
    """Decide how to go on.

    Args:
        state: the verified ledger.
        num_steps: charged steps that the plan allows.
        environment: digest of the present environment.
        checkpoint_step: steps behind the newest intact checkpoint; 0 without one.
        checkpoint_generation: generation that wrote it; 0 without one.
        period: steps of an epoch of the sampling scheme; a new generation begins a new epoch, and the one that it cuts
            short stays charged as a whole.

    Raises:
        LedgerCorrupt: if the checkpoint rests on steps that the ledger does not know: then the ledger lost records.
    """
    before = [entry for entry in state.path if entry.step < checkpoint_step]
    if len(before) != checkpoint_step or (before and before[-1].generation != checkpoint_generation):
        raise LedgerCorrupt(
            f"the newest checkpoint has {checkpoint_step} steps of generation {checkpoint_generation} behind it, which "
            "the ledger does not show: one of them was replaced. Restore both from one backup or start a new run"
        )
    if state.generation < 0:
        return Continuation(0, 0, num_steps, 0, 0, 0)
    past = [entry for entry in state.path if entry.step >= checkpoint_step]
    # Also at a step boundary: a copy of the directory may be going on from here under the old environment.
    same = environment == state.environment and all(
        entry.generation == state.generation and entry.environment == environment for entry in past
    )
    begun = Counter(generation for generation, _ in state.intents)
    num_left = num_steps - sum(-(-count // period) * period for g, count in begun.items() if g != state.generation)
    if same:
        num_left = max(0, num_left - begun[state.generation])
        first = min((step for g, step in state.intents if g == state.generation), default=checkpoint_step)
        return Continuation(
            state.generation, checkpoint_step, checkpoint_step + len(past) + num_left, len(past), 0, first
        )
    num_left = max(0, num_left - -(-begun[state.generation] // period) * period)
    return Continuation(
        state.generation + 1, checkpoint_step, checkpoint_step + num_left, 0, len(past), checkpoint_step
    )
