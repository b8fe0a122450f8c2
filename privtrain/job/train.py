"""A training job from config to release, in life-cycle order.

Every rank runs this. Rank 0 alone (``backend.is_main``) reads and writes the run directory, the ledger and the budget
registry; it does so within ``backend.main_alone()``, which also stops the others if it fails there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.markup import escape

from privtrain.backends import Backend
from privtrain.config import Config
from privtrain.config.training import PerformanceSection
from privtrain.data.canaries import plant
from privtrain.data.corpus import without_users
from privtrain.data.look import check_rows, reasons_of
from privtrain.data.manifest import draw_split
from privtrain.data.units import UnitData
from privtrain.errors import ConfigError, Fault, GuaranteeLost, Preempted, PrivtrainError, SelfTestFailed
from privtrain.inputs import Inputs, check_inputs, load_checked, read_inputs
from privtrain.job import checkpoint, evaluation
from privtrain.job.advice import (
    attack_warnings,
    expected_units,
    expected_users,
    learning_rate_warnings,
    warnings,
)
from privtrain.job.claim import check_run_directory, claimed, is_complete
from privtrain.job.contributions import check_contributed, note_canaries
from privtrain.job.environment import environment_digest
from privtrain.job.noised_sums import NoisedSums, check_whole
from privtrain.job.publish import publish
from privtrain.job.released import after_release, finish
from privtrain.job.reservation import budgeted
from privtrain.job.resume import Continuation
from privtrain.job.session import (
    Session,
    begin_session,
    check_coins,
    decide_session,
    new_generation,
    opened_ledger,
    root_key_of,
)
from privtrain.job.stop import StopRequest, listening
from privtrain.job.supervise import process_group
from privtrain.ledger.log import Ledger, NullLedger
from privtrain.models.load import saved_as_loaded
from privtrain.privacy.plan import PrivacyPlan
from privtrain.privacy.sampling import check_step_size
from privtrain.privacy.secret import SecretKey
from privtrain.process.console import Progress, say
from privtrain.run.base_model import base_digests
from privtrain.run.release import model_card, write_adapter, write_model
from privtrain.run.statement import privacy_statement, unit_text
from privtrain.tracking import NullTracker, Tracker, open_machine_tracker, open_tracker, watched_mirrors
from privtrain.tracking.mirrors import Values
from privtrain.training import average
from privtrain.training.cost import flops_per_token, peak_memory_bytes
from privtrain.training.gradient_canaries import GradientCanaries, check_placement
from privtrain.training.network import Network, checksum_over_ranks, load_network
from privtrain.training.repeatable import demand_repeatable
from privtrain.training.selecting import select_units
from privtrain.training.selftest import run_self_test
from privtrain.training.trainer import ReplayDiverged, Trainer


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that is one trial of a tuning (:mod:`privtrain.job.tune`), which holds one budget reservation for all.

    Attributes:
        dropped_users: users on the do-not-train list.
        check_release: called before anything is released; raises if nothing may be.
    """

    dropped_users: tuple[str, ...]
    check_release: Callable[[], None]

    @contextlib.contextmanager
    def allowed(self, inputs: Inputs) -> Iterator[Inputs]:
        """Yield the inputs without users who opted out, as :func:`budgeted` does for a run with its own reservation."""
        corpus = without_users(inputs.corpus, self.dropped_users)
        yield dataclasses.replace(inputs, corpus=corpus, check_release=self.check_release)


def train(
    chosen: pathlib.Path | Config,
    overrides: Sequence[str] = (),
    *,
    on_step: Callable[[int, Values], None] | None = None,
    trial: Trial | None = None,
) -> None:
    """Train, or continue training, and release.

    Args:
        chosen: YAML file, or the configuration itself.
        overrides: dotted assignments over the file.
        on_step: called on rank 0 with step and released metrics, whenever some are released.
        trial: set where the run is a trial of a tuning, which then takes care of the budget.

    Raises:
        PrivtrainError: one of its kinds, for everything that a user can mend.
    """
    undone = None  # what failed after the release
    with listening() as stop:
        if isinstance(chosen, Config):
            config = chosen
            check_inputs(config)
        else:
            config = load_checked(chosen, overrides)
        if config.privacy.tuning is not None and trial is None:
            raise ConfigError([Fault("privacy.tuning", "one run is none of several: start it with privtrain tune")])
        inputs = read_inputs(config)
        check_run_directory(inputs)
        if config.performance.num_threads is not None:
            torch.set_num_threads(config.performance.num_threads)
        with process_group(config.performance, stop) as backend, claimed(inputs, backend):
            # Both leave out the users who opted out.
            budget = budgeted(inputs, backend, stop) if trial is None else trial.allowed(inputs)
            with budget as allowed:
                if not is_complete(allowed, backend):
                    undone = _run(allowed, backend, stop, on_step)
                else:
                    with backend.main_alone():
                        undone = finish(allowed) if backend.is_main else None
    if undone is not None:  # the release stands, and the registry has settled it
        raise undone


def _run(
    inputs: Inputs, backend: Backend, stop: StopRequest, on_step: Callable[[int, Values], None] | None
) -> PrivtrainError | None:
    """Train and release; return the error of what rank 0 could not do after the release (signing, mirrors), if any.

    Everything that can fail comes before :func:`begin_session`, since from then on a run holds its directory and, with
    its first step, budget.
    """
    undone = None
    if backend.is_main:
        _announce(inputs, backend)

    # What is trained, and on whom.
    network = load_network(inputs.config, backend)
    for warning in check_rows(inputs.corpus, network.encoder, inputs.config.data):
        if backend.is_main:
            say(f"[yellow]warning[/]: {escape(warning)}")
    stop.leave_if_agreed(backend, "the model is loaded, training has not begun")
    with opened_ledger(inputs, backend) as ledger:
        root_key = root_key_of(inputs, backend, ledger)
        split = draw_split(inputs.config, inputs.corpus, network.tokenizer, root_key)
        with backend.main_alone():
            if backend.is_main:
                check_coins(inputs, split, ledger.state)
        has_begun = ledger.state.generation >= 0
        cache = inputs.run.base_losses
        units = select_units(inputs, backend, network, split, root_key, cache=cache, has_begun=has_begun)
        if backend.is_main and network.encoder.complaints:
            say(f"[yellow]warning[/]: records that predict nothing{escape(reasons_of(network.encoder))}")

        # Where training continues, and whether this model can be trained privately.
        session = decide_session(inputs, backend, ledger, _environment(inputs, backend, network, units))
        run_id = _tracker_id(inputs, backend)
        with backend.main_alone():
            tracker = _open_tracker(inputs, backend, run_id, session.continuation.start_step, on_step)
        gradient_canaries = GradientCanaries(root_key, split.canaries, units)
        trainer = _build_trainer(inputs, backend, ledger, network, units, session, tracker, stop, gradient_canaries)
        if backend.is_main:
            for warning in learning_rate_warnings(inputs.config, inputs.plan, _num_trained(trainer)):
                say(f"[yellow]warning[/]: {warning}")
        _self_test(trainer, network, backend, inputs.config.performance)
        stop.leave_if_agreed(backend, "the self-test is over, training has not begun")
        if session.continuation.start_step:
            trainer.clipping_norm = checkpoint.restore(session.state, trainer.layout, trainer.optimizer, backend)
        with backend.main_alone():
            if backend.is_main:
                evaluation.check_possible(inputs, network, session.continuation.start_step)
                begin_session(inputs, ledger, session, split, units)
                inputs.check_release()  # tells the registry, before the first step, which ledger is this run's

        # Train.
        held_out_before = None
        start_step = session.continuation.start_step
        if start_step == 0:
            held_out_before = evaluation.on_held_out(inputs, trainer, network, split, 0, stop)
        # Also on resuming: the tracker has dropped the rows from the resumed step on, to log them again.
        if evaluation.is_due(inputs.config, start_step):
            evaluation.on_public(inputs, trainer, network, start_step, stop)
        costs = _token_cost(inputs, trainer, network)
        # Asked again: a signal that came during the evaluation may not have been noted in time for its last batch.
        stop.leave_if_agreed(backend, "training has not begun")
        sums = _kept_sums(inputs, trainer, start_step)
        session = _loop(inputs, trainer, network, session, stop)

        # Measure and release.
        average.install(trainer.optimizer, backend)
        costs["perf/peak_memory_bytes"] = peak_memory_bytes(backend.device)
        trainer.tracker.log(session.continuation.end_step, costs)
        end_step = session.continuation.end_step
        held_out_after = evaluation.on_held_out(inputs, trainer, network, split, end_step, stop)
        evaluation.warn_if_worse(backend, held_out_before, held_out_after)
        evaluation.on_public(inputs, trainer, network, end_step, stop, is_last=True)
        state = _whole_state(trainer) if inputs.config.training.releases_model else {}
        with backend.main_alone():
            if backend.is_main:
                note_canaries(inputs.run, ledger.state, split.canaries, units)
                check_contributed(inputs.run, plant(inputs.corpus, split.canaries), inputs.plan)
                if sums is not None:
                    sums.seal()
                _release(inputs, ledger, network, state)
                undone = after_release(inputs.run, inputs.config.release, lambda: tracker.publish(inputs.run))
            tracker.close()
    return undone


def _kept_sums(inputs: Inputs, trainer: Trainer, start_step: int) -> NoisedSums | None:
    """Keep the noised sums from now on if the config asks; return what writes them on rank 0."""
    if not inputs.config.audit.keep_noised_sums or not trainer.backend.is_main:
        return None
    sums = NoisedSums(inputs.run, trainer.layout, inputs.plan.num_steps, start_step)
    trainer.keep = sums.keep
    return sums


def _token_cost(inputs: Inputs, trainer: Trainer, network: Network) -> dict[str, float]:
    """Return ``perf/flops_per_token`` → floating-point operations, if the config asks; otherwise nothing."""
    if not inputs.config.performance.count_flops:
        return {}
    vocabulary_size = network.num_ids
    return {"perf/flops_per_token": flops_per_token(trainer, network.packer, vocabulary_size=vocabulary_size)}


def rehearse(inputs: Inputs, backend: Backend, stop: StopRequest) -> int:
    """Load the model, build the trainer and run the self-test as a run would, but without a run directory.

    Under a throw-away key, and without a ledger. Every rank calls it.

    Returns:
        The number of trained weights.

    Raises:
        PrivtrainError: as the run would.
    """
    network = load_network(inputs.config, backend)
    key = SecretKey(backend.from_main(lambda: SecretKey.generate().reveal()))
    split = draw_split(inputs.config, inputs.corpus, network.tokenizer, key)
    units = select_units(inputs, backend, network, split, key, cache=None)
    nothing_done = Continuation(generation=0, start_step=0, end_step=0, num_replayed=0, num_abandoned=0, first_step=0)
    session = Session(key, nothing_done, environment="", state=None)
    gradient_canaries = GradientCanaries(key, split.canaries, units)
    trainer = _build_trainer(
        inputs, backend, NullLedger(), network, units, session, NullTracker(), stop, gradient_canaries
    )
    _self_test(trainer, network, backend, inputs.config.performance)
    return _num_trained(trainer)


def _num_trained(trainer: Trainer) -> int:
    return sum(math.prod(slot.whole_shape) for slot in trainer.layout.slots)


def _announce(inputs: Inputs, backend: Backend) -> None:
    """Say what runs, why it is not private, and warnings; check that a step's sum cannot overflow."""
    say(f"{backend.describe()}; loading {inputs.config.model.public_name}")
    for reason in inputs.plan.not_private_reasons:
        say(f"[bold red]NOT PRIVATE[/]: {reason}")
    num_units, num_users = expected_units(inputs.config, inputs.corpus), expected_users(inputs.config, inputs.corpus)
    # By the expected number, before the model is loaded; the sampler checks again with the exact one.
    check_step_size(inputs.plan.scheme, num_units)
    advice = warnings(inputs.config, inputs.plan, num_units, num_users)
    for warning in advice + attack_warnings(inputs.config, inputs.corpus):
        say(f"[yellow]warning[/]: {warning}")


def _environment(inputs: Inputs, backend: Backend, network: Network, units: UnitData) -> bytes:
    """Return the digest of all that a step is computed with: see :mod:`privtrain.job.environment`."""
    return environment_digest(
        inputs.config,
        backend,
        precision=network.precision,
        weights_checksum=checksum_over_ranks(network.model, backend),
        units_sha256=units.sha256(),
    )


def _tracker_id(inputs: Inputs, backend: Backend) -> str:
    """Return the run's id in W&B, from rank 0, which alone sees the run directory."""

    def read() -> bytes:
        identity = json.loads(inputs.run.identity.read_text(encoding="utf-8"))
        return identity.get("tracker_id", "").encode()

    return backend.from_main(read).decode()


def _open_tracker(
    inputs: Inputs,
    backend: Backend,
    run_id: str,
    start_step: int,
    on_step: Callable[[int, Values], None] | None,
) -> Tracker:
    """Return where metrics go: on rank 0 all trackers, on other ranks at most one of the machine's own metrics."""
    if not backend.is_main:
        return open_machine_tracker(inputs.config, run_id, backend.rank)
    # Rows logged after from_step are dropped. A run that begins logs step 0 too, the evaluation before its first step,
    # so of an earlier start that was interrupted nothing is kept: -1.
    from_step = start_step if start_step > 0 else -1
    return open_tracker(inputs.config, inputs.plan, inputs.run, run_id=run_id, from_step=from_step, on_step=on_step)


def _build_trainer(
    inputs: Inputs,
    backend: Backend,
    ledger: Ledger,
    network: Network,
    units: UnitData,
    session: Session,
    tracker: Tracker,
    stop: StopRequest,
    gradient_canaries: GradientCanaries,
) -> Trainer:
    """Return the trainer of this session.

    Raises:
        ConfigError: if the configuration asks for an audit of whole sums or gradients, and the backend shards them.
    """
    trainer = Trainer(
        plan=inputs.plan,
        training=inputs.config.training,
        model=network.model,
        units=units,
        backend=backend,
        key=session.key,
        generation=session.continuation.generation,
        ledger=ledger,
        tracker=tracker,
        autocast=network.autocast,
        packer=network.packer,
        line_packer=network.line_packer,
        clipping_route=inputs.config.performance.clipping_route,
        reduce_once=inputs.config.performance.reduce_once,
        should_stop=stop.requested.is_set,
        objective=network.objective,
        first_step=session.continuation.first_step,
        committed=session.committed,  # to the sums of steps that are replayed
        gradient_canaries=gradient_canaries,
        past=session.past,  # commitments to the sums of the steps before these
    )
    if inputs.config.audit.keep_noised_sums:
        check_whole(trainer.layout)
    check_placement(inputs.config.canaries.num_gradient_users, trainer.placement)
    return trainer


def _self_test(trainer: Trainer, network: Network, backend: Backend, performance: PerformanceSection) -> None:
    """Run the self-test, keep to the clipping route that it found, and say how units are packed and clipped.

    Units are packed into *lines*, long rows that several units share, where the self-test proves that no unit changes
    another there; otherwise each record has a padded row of its own.
    """

    def tested() -> str:
        return run_self_test(trainer, vocabulary_size=network.num_ids, precision=network.precision)

    route = demand_repeatable(backend.device, tested, say if backend.is_main else lambda _: None)
    trainer.clipper.settle(route)
    if trainer.why_rows and performance.packing == "lines":
        raise SelfTestFailed(f"records need rows ({trainer.why_rows}); set performance.packing: auto or rows")
    if backend.is_main:
        if trainer.packs_lines and trainer.line_packer is not None:
            packer = trainer.line_packer
            say(
                f"units are packed into lines: shared ones of {packer.shared_tokens:,} tokens, others of their own "
                f"length up to {packer.num_tokens:,}"
            )
            if backend.device.type == "cuda":
                way = f"record by record: {trainer.why_by_record}" if trainer.why_by_record else "in one kernel a layer"
                say(f"attention within their records goes {way}")
        elif trainer.why_rows:
            say(f"records are padded to rows: {trainer.why_rows}")
        if route == "one_unit" and trainer.clipper.fallback_reason:
            say(f"clipping goes one unit at a time: {trainer.clipper.fallback_reason}")
        say("self-test passed: coverage, clipping, reduction and noise are as the plan says")


def _loop(inputs: Inputs, trainer: Trainer, network: Network, session: Session, stop: StopRequest) -> Session:
    """Take the steps that are left; return the session that took the last of them.

    A step that an earlier start had begun is *replayed*: its sum must be the committed one. If it is not, nothing of it
    is released, and a new *generation* (a stretch of training under one secret) begins with the same step; its secret
    and where it continues are another *session*.
    """
    performance, backend = inputs.config.performance, trainer.backend
    continuation = session.continuation
    step = continuation.start_step
    with Progress(
        step,
        continuation.end_step,
        backend.is_main,
        units_per_step=inputs.plan.expected_batch_size,
        unit=inputs.plan.unit,
    ) as progress:
        while step < continuation.end_step:
            try:
                trainer.train_step(step)
            except ReplayDiverged:  # raised before noise is drawn: this step is taken again, under a fresh secret
                session = _begin_generation(inputs, trainer, session, step)
                continuation = session.continuation
                continue
            step += 1
            is_last = step == continuation.end_step  # evaluated by the caller, once the mean of weights is installed
            if evaluation.is_due(inputs.config, step) and not is_last and not trainer.must_stop:
                try:
                    evaluation.on_public(inputs, trainer, network, step, stop)
                except Preempted:
                    if not stop.is_agreed:
                        raise
                    trainer.must_stop = True  # as on all ranks: the step is saved below
            if step % performance.checkpoint_interval_steps == 0 or is_last or trainer.must_stop:
                _save_checkpoint(inputs, trainer, step)
            progress.advance(step, _epsilon_text(inputs.plan, trainer.ledger))
            if trainer.must_stop:
                with backend.main_alone():
                    trainer.tracker.alert("Pre-empted", f"saved after step {step} of {continuation.end_step}")
                    trainer.tracker.close()
                raise stop.preempted(f"saved after step {step} of {continuation.end_step}")
    return session


def _begin_generation(inputs: Inputs, trainer: Trainer, session: Session, step: int) -> Session:
    """Begin a new generation at ``step``, whose replayed sum was another one than before; return the new session."""
    if step > session.continuation.start_step:
        # The steps before it stand. After a crash they could not be replayed any more, with the new secret.
        _save_checkpoint(inputs, trainer, step)
    session = new_generation(inputs, trainer.backend, trainer.ledger, session, step)
    trainer.begin_generation(session.key, session.continuation.generation, session.continuation.first_step)
    return session


def _save_checkpoint(inputs: Inputs, trainer: Trainer, step: int) -> None:
    """Save a checkpoint, unless the ranks' parameters differ."""
    backend = trainer.backend
    norm = torch.tensor([trainer.clipping_norm], dtype=torch.float64)
    if not (backend.parameters_agree(trainer.model) and backend.in_sync([norm])):
        raise GuaranteeLost(f"ranks hold different parameters after step {step}; nothing is released")
    checkpoint.save(
        inputs.run.checkpoints,
        step=step,
        generation=trainer.generation,
        commitment=trainer.last_commitment,
        layout=trainer.layout,
        optimizer=trainer.optimizer,
        clipping_norm=trainer.clipping_norm,
        num_kept=inputs.config.performance.num_checkpoints_kept,
        backend=backend,
    )


def _epsilon_text(plan: PrivacyPlan, ledger: Ledger) -> str:
    """Return ε spent so far and ε of the plan, e.g. ``ε 1.234/8.000``."""
    if plan.not_private_reasons:
        return "NOT PRIVATE"
    return f"ε {plan.epsilon_after(plan.accounted_steps(ledger.state.intents)):.3f}/{plan.epsilon:.3f}"


def _whole_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return every trained tensor of the model, whole, on rank 0's CPU; empty elsewhere. Every rank calls it."""
    state: dict[str, torch.Tensor] = {}
    for slot, parameter in zip(trainer.layout.slots, trainer.layout.parameters.values(), strict=True):
        value = trainer.backend.whole(slot, parameter)
        if value is not None:
            state[slot.name] = value
    return state


def _release(inputs: Inputs, ledger: Ledger, network: Network, state: dict[str, torch.Tensor]) -> None:
    """Write statement, card and weights, and publish them with the ledger's release record; rank 0 alone calls it.

    Raises:
        GuaranteeLost: if ε would be for more steps than the plan allows, or the budget's reservation is lost.
    """
    config, plan, run, history = inputs.config, inputs.plan, inputs.run, ledger.state
    # Every step that ever began (the ledger's intents) is charged, also if it was abandoned. Accounted for are as many
    # or more: where the sampling scheme has epochs, one that began counts whole.
    num_accounted = plan.accounted_steps(history.intents)
    if num_accounted > plan.num_steps:
        raise GuaranteeLost(
            f"{num_accounted} steps have to be accounted for ({history.num_charged} began), the plan allows "
            f"{plan.num_steps}; nothing is released"
        )
    inputs.check_release()
    epsilon = plan.epsilon_after(num_accounted)
    statement = privacy_statement(
        config,
        plan,
        watched=watched_mirrors(config, run),
        num_model_steps=len(history.path),  # those that led to this model: none that was abandoned
        num_charged=history.num_charged,
        num_accounted=num_accounted,
        num_commits=len(history.commits),  # those that finished, also if they were abandoned later
        ledger_head=ledger.prepare_release(),
        split_commitment=history.split,
    )
    card = model_card(config, plan, statement, evaluation.last_on_public(run))

    def write_weights(directory: pathlib.Path) -> None:
        if config.training.releases_model:
            # The model is saved with the `use_cache` of its own config, which training had switched off.
            write_model(directory, network.model, network.tokenizer, card, state, saved_as_loaded)
        else:
            write_adapter(directory, network.model, network.tokenizer, card)

    name = run.model.name if config.training.releases_model else run.adapter.name
    base = base_digests(config.model)
    manifest = publish(run, ledger, plan, statement, write_weights, name=name, base_model=base)
    guarantee = f"({epsilon:.4g}, {plan.delta:g})-DP for one {unit_text(plan)}"
    shown = "not private" if plan.not_private_reasons else guarantee
    say(f"released {run.released} with its privacy statement: {shown}; release digest {manifest.digest}")
