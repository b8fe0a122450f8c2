"""A training job from config to release, in life-cycle order."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from privtrain.backends import Backend, create_backend
from privtrain.config import Config, load_config, to_yaml
from privtrain.console import Progress, say
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.split import Split, split_users
from privtrain.data.units import build_units, tokenize
from privtrain.errors import GuaranteeLost, PlanMismatch
from privtrain.inputs import check_inputs
from privtrain.ledger import Ledger, open_ledger
from privtrain.models import add_lora, base_dtype, load_base, load_tokenizer, resolve_precision, row_losses
from privtrain.plan import PrivacyPlan
from privtrain.release import model_card, privacy_statement, write_adapter, write_statement
from privtrain.rundir import RunDirectory, write_atomically, write_json
from privtrain.secret import SecretKey
from privtrain.tracking import NullTracker, Tracker, open_tracker
from privtrain.training import checkpoint
from privtrain.training.environment import environment_digest
from privtrain.training.evaluate import held_out_loss, perplexity
from privtrain.training.resume import Continuation, decide
from privtrain.training.selftest import run_self_test
from privtrain.training.trainer import Trainer

#: Public seed of the adapter's initial values, which do not depend on data.
_INIT_SEED = 0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every rank reads for itself before the process group exists."""

    config: Config
    corpus: Corpus
    plan: PrivacyPlan
    fingerprint: str
    run: RunDirectory


@dataclasses.dataclass(frozen=True)
class Session:
    """What rank 0 decided for this session and told the others."""

    root_key: SecretKey
    key: SecretKey
    continuation: Continuation
    state: bytes | None


def train(config_path: pathlib.Path, overrides: Sequence[str] = ()) -> None:
    """Train, or go on training, and release.

    Args:
        config_path: YAML file.
        overrides: dotted assignments.

    Raises:
        PrivtrainError: one of its kinds, for everything that a user can mend.
    """
    config = load_config(config_path, overrides)
    check_inputs(config)
    inputs = _read_inputs(config)
    _check_run_directory(inputs)
    if config.performance.num_threads is not None:
        torch.set_num_threads(config.performance.num_threads)
    backend = create_backend(config.performance.collective_timeout_seconds)
    try:
        with _held(inputs, backend):
            if _is_complete(inputs, backend):
                return
            _run(inputs, backend)
    finally:
        backend.close()


def _is_complete(inputs: Inputs, backend: Backend) -> bool:
    """Rank 0 looks, since the others may not see the run directory."""
    complete = backend.broadcast_bytes(bytes([inputs.run.is_complete()]) if backend.is_main else None) == b"\x01"
    if complete and backend.is_main:
        say(f"{inputs.run.root} is complete; nothing to do. For another run set run.name")
    return complete


def _read_inputs(config: Config) -> Inputs:
    corpus = load_corpus(config.data)
    plan = PrivacyPlan.build(config.privacy)
    run = RunDirectory(config.run.directory)
    return Inputs(config, corpus, plan, plan.fingerprint(corpus.manifest_sha256), run)


def _check_run_directory(inputs: Inputs) -> None:
    """Refuse a directory of another plan or data set before anything is written."""
    run = inputs.run
    if not run.exists():
        return
    run.check_permissions()
    known = json.loads(run.identity.read_text(encoding="utf-8"))["fingerprint"]
    if known != inputs.fingerprint:
        raise PlanMismatch(
            f"{run.root} belongs to another plan or data set (fingerprint {known[:12]}, this config gives "
            f"{inputs.fingerprint[:12]}); nothing was written. Restore its config, or set another run.name"
        )


@contextlib.contextmanager
def _held(inputs: Inputs, backend: Backend) -> Iterator[None]:
    """Rank 0 makes and locks the run directory; the others need no file of it."""
    if not backend.is_main:
        yield
        return
    run = inputs.run
    if not run.exists():
        run.create()
    with run.locked():
        if not run.exists():
            write_atomically(run.config, to_yaml(inputs.config))
            identity = {
                "fingerprint": inputs.fingerprint,
                "tracker_id": f"{inputs.config.run.name}-{secrets.token_hex(4)}",
            }
            write_json(run.identity, identity, mode=0o600)
        yield


def _run(inputs: Inputs, backend: Backend) -> None:
    config, plan = inputs.config, inputs.plan
    if backend.is_main:
        say(f"{backend.describe()}; loading {config.model.public_name}")
        for reason in plan.not_private_reasons:
            say(f"[bold red]NOT PRIVATE[/]: {reason}")
    tokenizer = load_tokenizer(config.model)
    precision = resolve_precision(config.performance.precision, backend.device)
    base = load_base(config.model, base_dtype(precision, backend.device))
    model = add_lora(base, config.lora, _INIT_SEED, config.model.public_name).to(backend.device)
    model.train()
    autocast = torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    if backend.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # a replayed step must have the same bits

    with _opened_ledger(inputs, backend) as ledger:
        session = _begin_session(inputs, backend, ledger)
        split = split_users(inputs.corpus, config.data, session.root_key)
        units = build_units(inputs.corpus, split, tokenizer, unit=plan.unit, max_length=config.data.max_length)
        _seal_manifest(inputs, backend, split)
        tracker = _open_tracker(inputs, backend, session.continuation.start_step)
        pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else tokenizer.eos_token_id
        assert isinstance(pad_id, int)
        trainer = Trainer(
            plan=plan,
            training=config.training,
            performance=config.performance,
            model=model,
            units=units,
            backend=backend,
            key=session.key,
            generation=session.continuation.generation,
            ledger=ledger,
            tracker=tracker,
            autocast=autocast,
            pad_id=pad_id,
        )
        _self_test(trainer, model, autocast, precision, backend, len(tokenizer))
        if session.state is not None:
            checkpoint.restore(session.state, trainer.layout, trainer.optimizer)
        evaluation = [inputs.corpus.records[user][index] for user, index in split.evaluation]
        tokens, _ = tokenize(evaluation, tokenizer, config.data.max_length)

        def evaluate(step: int) -> None:
            loss = held_out_loss(
                model,
                tokens,
                backend,
                microbatch_size=config.performance.microbatch_size,
                pad_id=pad_id,
                autocast=autocast,
            )
            if loss is not None:
                tracker.log(step, {"eval/held_out_loss": loss, "eval/held_out_perplexity": perplexity(loss)})

        if session.continuation.start_step == 0:
            evaluate(0)
        _loop(inputs, trainer, session.continuation)
        evaluate(session.continuation.end_step)
        tracker.close()
        if ledger is not None:
            _release(inputs, ledger, model, tokenizer, num_users=len(units))
    backend.barrier()


@contextlib.contextmanager
def _opened_ledger(inputs: Inputs, backend: Backend) -> Iterator[Ledger | None]:
    if not backend.is_main:
        yield None
        return
    run, plan = inputs.run, inputs.plan
    with open_ledger(
        run.ledger,
        plan_fingerprint=inputs.fingerprint,
        records_per_unit=plan.records_per_unit,
        pseudonym_key=run.load_or_create_key("pseudonym", plan.insecure_seed),
    ) as ledger:
        yield ledger


def _begin_session(inputs: Inputs, backend: Backend, ledger: Ledger | None) -> Session:
    """Rank 0 decides how to go on, records it, and gives every rank the secrets and the checkpoint."""
    environment = environment_digest(inputs.config, backend)
    message = b""
    if ledger is not None:
        run, seed = inputs.run, inputs.plan.insecure_seed
        newest = checkpoint.load_newest(run.checkpoints)
        continuation = decide(
            ledger.state,
            num_steps=inputs.plan.num_steps,
            environment=environment,
            checkpoint_step=newest.step if newest else 0,
            checkpoint_generation=newest.generation if newest else 0,
        )
        _explain(continuation)
        root_key = run.load_or_create_key("root", seed)
        key = run.load_or_create_key(f"generation-{continuation.generation:04d}", seed)
        ledger.begin_session(
            generation=continuation.generation, from_step=continuation.start_step, environment=environment
        )
        head = json.dumps(dataclasses.asdict(continuation)).encode()
        message = b"".join([root_key.reveal(), key.reveal(), len(head).to_bytes(8, "little"), head])
        message += newest.state if newest else b""
    message = backend.broadcast_bytes(message if backend.is_main else None)
    size = int.from_bytes(message[64:72], "little")
    continuation = Continuation(**json.loads(message[72 : 72 + size]))
    state = message[72 + size :]
    return Session(SecretKey(message[:32]), SecretKey(message[32:64]), continuation, state or None)


def _explain(continuation: Continuation) -> None:
    if continuation.num_abandoned:
        say(
            f"The environment changed since {continuation.num_abandoned} steps past the last checkpoint were begun. "
            f"They stay charged; generation {continuation.generation} goes on with a fresh secret and ends at step "
            f"{continuation.end_step}"
        )
    elif continuation.start_step or continuation.num_replayed:
        say(f"resuming at step {continuation.start_step}; {continuation.num_replayed} steps are replayed bit by bit")


def _seal_manifest(inputs: Inputs, backend: Backend, split: Split) -> None:
    if not backend.is_main:
        return
    manifest = split.manifest(inputs.corpus)
    run = inputs.run
    if run.manifest.exists():
        sealed = json.loads(run.manifest.read_text(encoding="utf-8"))["sha256"]
        if sealed != manifest["sha256"]:
            raise GuaranteeLost(f"{run.manifest} is not the split that this run's key gives; it was replaced")
        return
    write_json(run.manifest, manifest, mode=0o600)


def _open_tracker(inputs: Inputs, backend: Backend, from_step: int) -> Tracker:
    if not backend.is_main:
        return NullTracker()
    run_id = json.loads(inputs.run.identity.read_text(encoding="utf-8"))["tracker_id"]
    return open_tracker(inputs.config, inputs.plan, inputs.run, run_id=run_id, from_step=from_step)


def _self_test(
    trainer: Trainer,
    model: torch.nn.Module,
    autocast: torch.autocast,
    precision: str,
    backend: Backend,
    vocabulary_size: int,
) -> None:
    def losses(input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        with autocast:
            return row_losses(model, input_ids, target_mask)

    run_self_test(
        model=model,
        layout=trainer.layout,
        row_losses=losses,
        clipping_norm=trainer.plan.clipping_norm,
        noise_multiplier=trainer.plan.noise_multiplier,
        backend=backend,
        vocabulary_size=vocabulary_size,
        precision=precision,
    )
    if backend.is_main:
        say("self-test passed: coverage, clipping, reduction and noise are as the plan says")


def _loop(inputs: Inputs, trainer: Trainer, continuation: Continuation) -> None:
    performance, backend = inputs.config.performance, trainer.backend
    parameters = list(trainer.layout.parameters.values())
    with Progress(continuation.start_step, continuation.end_step, backend.is_main) as progress:
        for step in range(continuation.start_step, continuation.end_step):
            trainer.train_step(step)
            done = step + 1
            if done % performance.checkpoint_interval_steps == 0 or done == continuation.end_step:
                if not backend.in_sync(parameters):
                    raise GuaranteeLost(f"ranks hold different parameters after step {done}; nothing is released")
                if backend.is_main:
                    checkpoint.save(
                        inputs.run.checkpoints,
                        step=done,
                        generation=trainer.generation,
                        layout=trainer.layout,
                        optimizer=trainer.optimizer,
                        num_kept=performance.num_checkpoints_kept,
                    )
            progress.advance(done, _epsilon_text(inputs.plan, trainer.ledger))


def _epsilon_text(plan: PrivacyPlan, ledger: Ledger | None) -> str:
    if ledger is None:
        return ""
    if plan.not_private_reasons:
        return "NOT PRIVATE"
    return f"ε {plan.epsilon_after(ledger.state.num_charged):.3f}/{plan.epsilon:.3f}"


def _release(inputs: Inputs, ledger: Ledger, model: Any, tokenizer: Any, *, num_users: int) -> None:
    config, plan, run = inputs.config, inputs.plan, inputs.run
    num_charged = ledger.state.num_charged
    if num_charged > plan.num_steps or len(ledger.state.commits) > num_charged:
        raise GuaranteeLost(f"{num_charged} steps were charged, the plan allows {plan.num_steps}; nothing is released")
    epsilon = plan.epsilon_after(num_charged)
    head = ledger.release(epsilon if epsilon != float("inf") else None, plan.delta)
    statement = privacy_statement(
        config, plan, fingerprint=inputs.fingerprint, num_users=num_users, num_charged=num_charged, ledger_head=head
    )
    write_adapter(run, model, tokenizer, model_card(config, plan, statement))
    write_statement(run, statement)
    shown = "not private" if plan.not_private_reasons else f"({epsilon:.4g}, {plan.delta:g})-DP for one {plan.unit}"
    say(f"released {run.adapter} with its privacy statement: {shown}")
