"""Invariant 5: the same noise never covers two sums; invariant 7: whatever happens, no step is uncharged."""

from __future__ import annotations

from collections import Counter

import hypothesis
import pytest
from hypothesis import strategies as st

from privtrain.errors import LedgerCorrupt
from privtrain.job.resume import Continuation, decide, next_generation
from privtrain.ledger.chain import LedgerState, StepEntry


def state_of(path: list[tuple[int, int]], generation: int = 0, num_abandoned: int = 0) -> LedgerState:
    state = LedgerState(generation=generation, path=[StepEntry(*entry) for entry in path], environment="e")
    state.intents = dict.fromkeys(path, "") | {(-1, s): "" for s in range(num_abandoned)}
    return state


def go_on(state, *, step, generation=0, environment="e", num_steps=10):
    return decide(
        state, num_steps=num_steps, environment=environment, checkpoint_step=step, checkpoint_generation=generation
    )


def test_a_fresh_run_begins_at_zero():
    assert go_on(LedgerState(), step=0) == Continuation(0, 0, 10, 0, 0, 0)


def test_the_same_environment_replays_for_free():
    state = state_of([(0, s) for s in range(7)])
    assert go_on(state, step=5) == Continuation(0, 5, 10, 2, 0, 0)


def test_new_environment_past_checkpoint_costs_steps():
    state = state_of([(0, s) for s in range(7)])
    assert go_on(state, step=5, environment="other") == Continuation(1, 5, 8, 0, 2, 5)


def test_new_environment_at_checkpoint_loses_nothing():
    """A copy of the directory may be drawing the next steps from the old secret under the old environment."""
    state = state_of([(0, s) for s in range(5)])
    assert go_on(state, step=5, environment="other") == Continuation(1, 5, 10, 0, 0, 5)
    assert go_on(state, step=5) == Continuation(0, 5, 10, 0, 0, 0)


def test_steps_of_two_generations_are_not_replayed_in_one():
    state = state_of([(0, s) for s in range(5)] + [(1, s) for s in range(5, 7)], generation=1)
    assert go_on(state, step=5) == Continuation(1, 5, 10, 2, 0, 5)
    assert go_on(state, step=4) == Continuation(2, 4, 7, 0, 3, 4)


def test_a_replay_that_diverged_keeps_the_steps_before_it():
    state = state_of([(0, s) for s in range(7)])
    assert next_generation(state, num_steps=10, step=6) == Continuation(1, 6, 9, 0, 1, 6)
    assert next_generation(state, num_steps=12, step=4, period=6) == Continuation(1, 4, 4, 0, 3, 4)


def test_a_spent_budget_leaves_the_checkpoint_as_it_is():
    state = state_of([(0, s) for s in range(10)])
    assert go_on(state, step=6, environment="other") == Continuation(1, 6, 6, 0, 4, 6)


@pytest.mark.parametrize(("step", "generation"), [(8, 0), (3, 1)])
def test_a_checkpoint_that_the_ledger_does_not_know_is_refused(step, generation):
    state = state_of([(0, s) for s in range(7)])
    with pytest.raises(LedgerCorrupt, match="ledger does not show"):
        go_on(state, step=step, generation=generation)


@hypothesis.given(data=st.data(), num_steps=st.integers(1, 30), num_abandoned=st.integers(0, 5), same=st.booleans())
def test_charged_steps_never_exceed_the_plan(data, num_steps, num_abandoned, same):
    num_abandoned = min(num_abandoned, num_steps)
    length = data.draw(st.integers(0, num_steps - num_abandoned))
    step = data.draw(st.integers(0, length))
    state = state_of([(0, s) for s in range(length)], num_abandoned=num_abandoned)
    result = go_on(state, step=step, environment="e" if same else "other", num_steps=num_steps)
    newly_charged = result.end_step - result.start_step - result.num_replayed
    assert newly_charged >= 0
    assert state.num_charged + newly_charged == num_steps


@hypothesis.given(data=st.data(), period=st.integers(1, 6), num_epochs=st.integers(1, 6))
def test_whatever_is_cut_short_whole_epochs_stay_within_the_plan(data, period, num_epochs):
    """Any sequence of crashes with a new environment: each generation is charged in whole epochs of its own."""
    num_steps, checkpoint = period * num_epochs, 0
    state = LedgerState()
    for session in range(4):
        result = decide(
            state,
            num_steps=num_steps,
            environment=str(session // 2),
            checkpoint_step=checkpoint,
            checkpoint_generation=state.path[checkpoint - 1].generation if checkpoint else 0,
            period=period,
        )
        if result.generation != state.generation:
            assert result.first_step == result.start_step
            first_steps = {result.generation: result.first_step}
        assert result.first_step == first_steps[result.generation]
        state.generation, state.environment = result.generation, str(session // 2)
        state.path = [entry for entry in state.path if entry.step < result.start_step]
        stop = data.draw(st.integers(result.start_step + result.num_replayed, result.end_step))
        for step in range(result.start_step, stop):
            state.intents[result.generation, step] = ""
            state.path.append(StepEntry(result.generation, step))
        checkpoint = data.draw(st.integers(result.start_step, stop))
        counts = Counter(generation for generation, _ in state.intents)
        assert sum(-(-count // period) * period for count in counts.values()) <= num_steps
