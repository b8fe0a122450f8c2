"""Start or resume a session: rank 0 chooses secret, checkpoint and steps, and broadcasts the choice.

A *session* is one start of the training command; a *generation* is a stretch of training under one secret, over one or
more sessions. For every step the ledger holds a *commitment* (a digest) to the exact clipped sum that was released with
noise; a resumed session replays steps past its checkpoint and compares their sums with it. :mod:`.resume` decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator

from privtrain.backends import Backend
from privtrain.config import public_tree, to_yaml
from privtrain.data.manifest import check_prepared, split_commitment, used_facts
from privtrain.data.split import Split
from privtrain.data.units import UnitData
from privtrain.errors import GuaranteeLost, LedgerCorrupt
from privtrain.files.atomic import write_atomically, write_json
from privtrain.inputs import Inputs
from privtrain.job import checkpoint
from privtrain.job.environment import check_ranks_agree
from privtrain.job.resume import Continuation, decide, files_written_after_start, next_generation
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.head import head_path
from privtrain.ledger.log import Ledger, NullLedger, open_ledger
from privtrain.privacy.secret import SecretKey
from privtrain.process.console import say
from privtrain.run.sealing import write_sealed
from privtrain.run.sources import source_digests, write_sources


@dataclasses.dataclass(frozen=True)
class Session:
    """What rank 0 decided for this session and broadcast.

    Attributes:
        key: secret of the generation.
        continuation: where training continues, see :class:`~privtrain.job.resume.Continuation`.
        environment: digest of the environment, in hexadecimal.
        state: the checkpoint's file of tensors; ``None`` on ranks other than 0, or without a checkpoint.
        committed: step → commitment to its sum, for the steps that are replayed.
        past: commitments to the sums of the generation's steps before ``start_step``, in order.
    """

    key: SecretKey
    continuation: Continuation
    environment: str
    state: pathlib.Path | None
    committed: dict[int, str] = dataclasses.field(default_factory=dict)
    past: tuple[str, ...] = ()


@contextlib.contextmanager
def opened_ledger(inputs: Inputs, backend: Backend) -> Iterator[Ledger]:
    """Yield the open ledger on rank 0, and a :class:`NullLedger`, which records nothing, on the others.

    Raises:
        LedgerCorrupt: if the ledger does not verify, or is missing although the run has begun.
    """
    with contextlib.ExitStack() as stack:
        with backend.main_alone():
            ledger = stack.enter_context(_opened_on_main(inputs)) if backend.is_main else NullLedger()
        yield ledger


@contextlib.contextmanager
def _opened_on_main(inputs: Inputs) -> Iterator[Ledger]:
    """Yield the open ledger, made if the run is new; the key of its pseudonyms is made with it, and never replaced."""
    run, plan = inputs.run, inputs.plan
    head = head_path(run.ledger)  # file of the ledger's last hash, written before the ledger itself
    is_missing = not run.ledger.exists()
    # A crash while the ledger was made leaves the head alone. Any other file shows that there was a ledger.
    if is_missing and any(path != head for path in files_written_after_start(run)):
        raise LedgerCorrupt(f"{run.ledger} is missing but the run started; restore it, or set another run.name")
    # Beside a head the key must be there: it was made before, and pseudonyms may have been computed with it.
    is_new = is_missing and not head.exists()
    key = run.create_key("pseudonym", plan.insecure_seed) if is_new else run.load_key("pseudonym")
    with open_ledger(
        run.ledger,
        plan_fingerprint=inputs.fingerprint,
        records_per_unit=plan.records_per_unit,
        pseudonym_key=key,
        num_groups=1 if plan.strategy is None else plan.strategy.num_bands,
    ) as ledger:
        if ledger.repair:
            say(ledger.repair)
        yield ledger


def root_key_of(inputs: Inputs, backend: Backend, ledger: Ledger) -> SecretKey:
    """Return the root key, which the split is drawn from, on every rank: made at the first start, then kept."""

    def kept() -> bytes:
        run, seed = inputs.run, inputs.plan.insecure_seed
        # It drew the split of an earlier session, or that of `attacks prepare`.
        was_used = ledger.state.generation >= 0 or run.prepared.exists()
        return run.keep_key("root", seed, was_used=was_used).reveal()

    return SecretKey(backend.from_main(kept))


def check_coins(inputs: Inputs, split: Split, state: LedgerState) -> None:
    """Raise unless the split (each user's coin: held in or out) is that of earlier sessions and ``attacks prepare``.

    Rank 0 only.

    Args:
        inputs: with the records and the run directory.
        split: as drawn now.
        state: of the ledger, which commits to the split of earlier sessions.

    Raises:
        GuaranteeLost: if training started with another split.
        PlanMismatch: if ``attacks prepare`` made another split.
    """
    manifest = split.manifest(inputs.corpus)
    if state.split and state.split != split_commitment(inputs.run.load_key("root"), manifest["sha256"]):
        raise GuaranteeLost(
            f"{inputs.run.ledger} records another train/held-out split than secret/root.key and the data give now: "
            "one of them was replaced. Restore it, or set another run.name"
        )
    known = inputs.run.manifest
    if known.exists() and json.loads(known.read_text(encoding="utf-8"))["sha256"] != manifest["sha256"]:
        raise GuaranteeLost(f"{known} is not the split that this run's key gives; it was replaced")
    if inputs.run.prepared.exists():
        check_prepared(inputs.run.prepared, manifest)


def decide_session(inputs: Inputs, backend: Backend, ledger: Ledger, environment: bytes) -> Session:
    """Let rank 0 decide where to continue, and return its decision, with the secret, on every rank.

    Args:
        inputs: with the plan and the run directory.
        backend: this rank's view of the job.
        ledger: open on rank 0.
        environment: this rank's :func:`~privtrain.job.environment.environment_digest`.

    Raises:
        GuaranteeLost: if a rank has another plan, data set or environment.
        LedgerCorrupt: if the newest checkpoint rests on steps that the ledger does not show.
    """
    plan_and_data = hashlib.sha256(inputs.fingerprint.encode()).digest()
    check_ranks_agree(backend, {"plan or data set": plan_and_data, "environment": environment})
    message, newest = b"", None
    with backend.main_alone():
        if backend.is_main:
            newest = checkpoint.load_newest(inputs.run.checkpoints)
            key, continuation = _decided_on_main(inputs, ledger, environment, newest)
            message = _message(key, continuation, ledger.state)
    state = newest.state if newest else None
    return _session_of(backend.from_main(lambda: message), environment.hex(), state)


def new_generation(inputs: Inputs, backend: Backend, ledger: Ledger, session: Session, step: int) -> Session:
    """Begin a new generation at ``step``, whose replayed sum is not the committed one. Every rank calls it.

    Returns:
        The session that goes on from ``step`` under a fresh secret; the model in memory is kept, no checkpoint is read.
    """
    message = b""
    with backend.main_alone():
        if backend.is_main:
            plan = inputs.plan
            continuation = next_generation(ledger.state, num_steps=plan.num_steps, step=step, period=plan.scheme.period)
            say(
                f"step {step} was repeated and gave another sum than before (other weights, or a device or library "
                "that computes otherwise); nothing of it was released"
            )
            _explain(continuation)
            key = inputs.run.create_key(f"generation-{continuation.generation:04d}", plan.insecure_seed)
            ledger.begin_session(
                generation=continuation.generation,
                from_step=step,
                environment=session.environment,
                split=ledger.state.split,
            )
            message = _message(key, continuation, ledger.state)
    return _session_of(backend.from_main(lambda: message), session.environment, None)


def _message(key: SecretKey, continuation: Continuation, state: LedgerState) -> bytes:
    """Return what rank 0 broadcasts: 32 bytes of secret, then JSON, which :func:`_session_of` reads.

    Of the JSON, ``committed`` and ``past`` are those of :class:`Session`.
    """
    start = continuation.start_step

    def commitments(steps: range) -> dict[int, str]:
        """Return step → commitment, for those of the generation's steps that were committed."""
        by_step = {step: state.commits.get((continuation.generation, step)) for step in steps}
        return {step: commitment for step, commitment in by_step.items() if commitment is not None}

    body = {
        "continuation": dataclasses.asdict(continuation),
        "committed": commitments(range(start, start + continuation.num_replayed)),
        "past": list(commitments(range(continuation.first_step, start)).values()),
    }
    return key.reveal() + json.dumps(body).encode()


def _session_of(message: bytes, environment: str, state: pathlib.Path | None) -> Session:
    """Return the session that :func:`_message` describes."""
    body = json.loads(message[32:])
    return Session(
        key=SecretKey(message[:32]),
        continuation=Continuation(**body["continuation"]),
        environment=environment,
        state=state,
        committed={int(step): commitment for step, commitment in body["committed"].items()},  # JSON's keys are texts
        past=tuple(body["past"]),
    )


def _decided_on_main(
    inputs: Inputs, ledger: Ledger, environment: bytes, newest: checkpoint.Checkpoint | None
) -> tuple[SecretKey, Continuation]:
    """Return the key of the generation that training continues in, made if the generation is new, and where.

    ``newest``: the newest intact checkpoint, if there is one.
    """
    continuation = decide(
        ledger.state,
        num_steps=inputs.plan.num_steps,
        environment=ledger.blinded("environment", environment.hex()),
        checkpoint_step=newest.step if newest else 0,
        checkpoint_generation=newest.generation if newest else 0,
        period=inputs.plan.scheme.period,
    )
    if newest is not None:
        _check_own(newest, ledger.state)
    _explain(continuation)
    name = f"generation-{continuation.generation:04d}"
    has_begun = continuation.generation == ledger.state.generation
    key = inputs.run.load_key(name) if has_begun else inputs.run.create_key(name, inputs.plan.insecure_seed)
    return key, continuation


def _check_own(newest: checkpoint.Checkpoint, state: LedgerState) -> None:
    """Raise unless the checkpoint's last step is the very one that the ledger commits to.

    A run of the same plan has the same steps by number, taken with another secret: its weights hold releases that this
    run's ledger does not charge.

    Raises:
        LedgerCorrupt: if it is not.
    """
    if state.commits.get((newest.generation, newest.step - 1)) != newest.commitment:
        raise LedgerCorrupt(
            f"{newest.state.parent} is not of this run's step {newest.step}, by the ledger: it was copied from another "
            "run, or an earlier version of privtrain wrote it. Restore it, or remove it: the steps behind it are then "
            "replayed"
        )


def _explain(continuation: Continuation) -> None:
    """Say on the console what was abandoned, or where training resumes."""
    if continuation.num_abandoned:
        say(
            f"{continuation.num_abandoned} started steps cannot be replayed (the environment or their sums changed) "
            f"and stay charged; training continues as generation {continuation.generation} with a new secret, up to "
            f"step {continuation.end_step}"
        )
    elif continuation.start_step or continuation.num_replayed:
        say(f"resuming at step {continuation.start_step}; {continuation.num_replayed} steps are replayed bit for bit")


def begin_session(inputs: Inputs, ledger: Ledger, session: Session, split: Split, units: UnitData) -> None:
    """Record in the ledger and the run directory that a session starts, with its split, config and data counts.

    Rank 0 only, right before the first step. Checkpoints past the session's start, of abandoned steps, are removed.
    """
    run, continuation = inputs.run, session.continuation
    manifest = split.manifest(inputs.corpus)
    ledger.begin_session(
        generation=continuation.generation,
        from_step=continuation.start_step,
        environment=session.environment,
        split=split_commitment(run.load_key("root"), manifest["sha256"]),
    )
    checkpoint.drop_after(run.checkpoints, continuation.start_step)
    write_atomically(run.resolved_config, to_yaml(inputs.config.model_dump(mode="json")), mode=0o600)
    write_atomically(run.config, to_yaml(public_tree(inputs.config)))
    counts = {
        **dataclasses.asdict(inputs.corpus.counts),
        "num_truncated_training_records": units.num_truncated,
        "num_training_records_without_target": units.num_without_target,
    }
    write_json(run.data_counts, counts, mode=0o600)
    if not run.manifest.exists():
        write_json(run.manifest, manifest, mode=0o600)
    used = used_facts(
        inputs.corpus,
        split,
        units,
        manifest_sha256=manifest["sha256"],
        records_per_unit=inputs.plan.records_per_unit,
    )
    write_sealed(run, run.used, used)
    if not run.sources.exists():  # else `attacks prepare` wrote them when it drew the split
        write_sources(run, source_digests(inputs.config.data, inputs.corpus))
