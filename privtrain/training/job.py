"""A training job from config to release, in life-cycle order."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from privtrain.advice import warnings
from privtrain.backends import Backend, create_backend
from privtrain.config import Config, load_config, public_tree, to_yaml
from privtrain.console import Progress, say
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.microbatch import Packer
from privtrain.data.split import Split, split_users
from privtrain.data.units import UnitData, build_units, tokenize
from privtrain.errors import ConfigError, Fault, GuaranteeLost, LedgerCorrupt, PlanMismatch
from privtrain.inputs import check_inputs
from privtrain.ledger import Ledger, open_ledger
from privtrain.models import (
    add_lora,
    base_dtype,
    load_base,
    load_tokenizer,
    resolve_precision,
    row_losses,
    weights_checksum,
)
from privtrain.plan import PrivacyPlan
from privtrain.release import model_card, privacy_statement, write_adapter, write_model, write_statement
from privtrain.rundir import RunDirectory, write_atomically, write_json
from privtrain.secret import SecretKey
from privtrain.tracking import NullTracker, Tracker, open_tracker
from privtrain.training import checkpoint
from privtrain.training.environment import check_ranks_agree, environment_digest
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
class Network:
    """The model and what goes with it on this rank."""

    tokenizer: Any
    model: Any
    precision: str
    autocast: torch.autocast
    packer: Packer


@dataclasses.dataclass(frozen=True)
class Session:
    """What rank 0 decided for this session and told the others."""

    key: SecretKey
    continuation: Continuation
    environment: str
    state: bytes


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
            if not _is_complete(inputs, backend):
                _run(inputs, backend)
    finally:
        backend.close()


def _read_inputs(config: Config) -> Inputs:
    corpus = load_corpus(config.data)
    plan = PrivacyPlan.build(config.privacy)
    run = RunDirectory(config.run.directory)
    return Inputs(config, corpus, plan, plan.fingerprint(corpus.manifest_sha256), run)


def _check_run_directory(inputs: Inputs) -> None:
    """Refuse a directory of another plan, data set or model before anything is written."""
    run = inputs.run
    if not run.exists():
        return
    run.check_permissions()
    identity = json.loads(run.identity.read_text(encoding="utf-8"))
    if identity["fingerprint"] != inputs.fingerprint:
        raise PlanMismatch(
            f"{run.root} belongs to another plan or data set (fingerprint {identity['fingerprint'][:12]}, this config "
            f"gives {inputs.fingerprint[:12]}); nothing was written. Restore its config, or set another run.name"
        )
    fixed = _fixed_keys(inputs.config)
    changed = [key for key, value in identity["fixed"].items() if fixed.get(key) != value]
    if changed:
        raise PlanMismatch(
            f"{run.root} was begun with another {', '.join(changed)}; nothing was written. "
            "Restore the value, or set another run.name"
        )


def _fixed_keys(config: Config) -> dict[str, Any]:
    """What a run cannot change on the way, beside its plan: what is trained, on what, and what is published."""
    tree = config.model_dump(mode="json", include={"model", "lora", "data", "tracking"})
    del tree["data"]["source"]  # its content is in the fingerprint; files may move
    keys = {f"{section}.{key}": value for section in ("model", "lora", "data") for key, value in tree[section].items()}
    published = ("private_metrics", "release_held_out_metrics")
    return keys | {f"tracking.{key}": tree["tracking"][key] for key in published}


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
        _check_run_directory(inputs)  # again: another job may have begun here since the first look
        if not run.exists():
            identity = {
                "fingerprint": inputs.fingerprint,
                "tracker_id": f"{inputs.config.run.name}-{secrets.token_hex(4)}",
                "fixed": _fixed_keys(inputs.config),
            }
            write_json(run.identity, identity, mode=0o600)
        yield


def _is_complete(inputs: Inputs, backend: Backend) -> bool:
    """Rank 0 looks, since the others may not see the run directory."""
    complete = backend.broadcast_bytes(bytes([inputs.run.is_complete()]) if backend.is_main else None) == b"\x01"
    if complete and backend.is_main:
        say(f"{inputs.run.root} is complete; nothing to do. For another run set run.name")
    return complete


def _run(inputs: Inputs, backend: Backend) -> None:
    if backend.is_main:
        _announce(inputs, backend)
    network = _load_network(inputs.config, backend)
    with _opened_ledger(inputs, backend) as ledger:
        split = split_users(inputs.corpus, inputs.config.data, _root_key(inputs, backend, ledger))
        units = _units_of(inputs, network, split)
        session = _decide(inputs, backend, ledger, network, units)
        tracker = _open_tracker(inputs, backend, session.continuation.start_step)
        trainer = _build_trainer(inputs, backend, ledger, network, units, session, tracker)
        _self_test(trainer, network, backend)
        if session.state:
            checkpoint.restore(session.state, trainer.layout, trainer.optimizer)
        if ledger is not None:
            # Everything that can fail came first: a start that fails costs no budget.
            _begin_session(inputs, ledger, session, split)
        if session.continuation.start_step == 0:
            _evaluate(inputs, trainer, network, split, 0)
        _loop(inputs, trainer, session.continuation)
        _evaluate(inputs, trainer, network, split, session.continuation.end_step)
        tracker.close()
        if ledger is not None:
            _release(inputs, ledger, network, num_units=len(units))
    backend.barrier()


def _announce(inputs: Inputs, backend: Backend) -> None:
    say(f"{backend.describe()}; loading {inputs.config.model.public_name}")
    for reason in inputs.plan.not_private_reasons:
        say(f"[bold red]NOT PRIVATE[/]: {reason}")
    for warning in warnings(inputs.config, inputs.plan, inputs.corpus):
        say(f"[yellow]warning[/]: {warning}")


def _load_network(config: Config, backend: Backend) -> Network:
    tokenizer = load_tokenizer(config.model)
    precision = resolve_precision(config.performance.precision, backend.device)
    model = _trainable_model(config, precision, backend.device).to(backend.device)
    model.train()
    if backend.device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)  # so that a replayed step has the same bits
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else tokenizer.eos_token_id
    assert isinstance(pad_id, int)
    packer = Packer(config.performance.microbatch_size, config.data.max_length, pad_id)
    autocast = torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    return Network(tokenizer, model, precision, autocast, packer)


def _trainable_model(config: Config, precision: str, device: torch.device) -> torch.nn.Module:
    if config.training.method == "full":
        model = load_base(config.model, torch.float32).requires_grad_(True)
        base: Any = model
    else:
        base = load_base(config.model, base_dtype(precision, device))
        model = add_lora(base, config.lora, _INIT_SEED, config.model.public_name)
    if config.performance.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


@contextlib.contextmanager
def _opened_ledger(inputs: Inputs, backend: Backend) -> Iterator[Ledger | None]:
    """The ledger on rank 0, ``None`` elsewhere. A run that lost its ledger is not begun again under it."""
    if not backend.is_main:
        yield None
        return
    run, plan = inputs.run, inputs.plan
    is_new = not run.ledger.exists()
    if is_new and (run.manifest.exists() or checkpoint.load_newest(run.checkpoints) is not None):
        raise LedgerCorrupt(f"{run.ledger} is gone but the run had begun; restore it, or set another run.name")
    key = run.create_key("pseudonym", plan.insecure_seed) if is_new else run.load_key("pseudonym")
    with open_ledger(
        run.ledger,
        plan_fingerprint=inputs.fingerprint,
        records_per_unit=plan.records_per_unit,
        pseudonym_key=key,
    ) as ledger:
        yield ledger


def _root_key(inputs: Inputs, backend: Backend, ledger: Ledger | None) -> SecretKey:
    """The key behind the split: made before the first session, kept ever after, sent to every rank."""
    secret = None
    if ledger is not None:
        is_begun = ledger.state.generation >= 0
        run, seed = inputs.run, inputs.plan.insecure_seed
        secret = (run.load_key("root") if is_begun else run.create_key("root", seed)).reveal()
    return SecretKey(backend.broadcast_bytes(secret))


def _units_of(inputs: Inputs, network: Network, split: Split) -> UnitData:
    if not split.training:
        raise ConfigError([Fault("data.held_out_fraction", "no user is left to train on; lower it")])
    return build_units(
        inputs.corpus, split, network.tokenizer, unit=inputs.plan.unit, max_length=inputs.config.data.max_length
    )


def _decide(inputs: Inputs, backend: Backend, ledger: Ledger | None, network: Network, units: UnitData) -> Session:
    """See that the ranks agree; then rank 0 decides how to go on and gives every rank the secret and the checkpoint."""
    environment = environment_digest(
        inputs.config,
        backend,
        precision=network.precision,
        weights_checksum=weights_checksum(network.model),
        units_sha256=units.sha256(),
    )
    data = hashlib.sha256(inputs.fingerprint.encode()).digest()
    check_ranks_agree(backend, {"plan or data set": data, "environment": environment})
    message = None
    if ledger is not None:
        newest = checkpoint.load_newest(inputs.run.checkpoints)
        continuation = decide(
            ledger.state,
            num_steps=inputs.plan.num_steps,
            environment=environment.hex(),
            checkpoint_step=newest.step if newest else 0,
            checkpoint_generation=newest.generation if newest else 0,
        )
        _explain(continuation)
        name = f"generation-{continuation.generation:04d}"
        is_used = continuation.generation == ledger.state.generation
        run, seed = inputs.run, inputs.plan.insecure_seed
        key = run.load_key(name) if is_used else run.create_key(name, seed)
        head = json.dumps(dataclasses.asdict(continuation)).encode()
        message = key.reveal() + len(head).to_bytes(8, "little") + head + (newest.state if newest else b"")
    message = backend.broadcast_bytes(message)
    size = int.from_bytes(message[32:40], "little")
    continuation = Continuation(**json.loads(message[40 : 40 + size]))
    return Session(SecretKey(message[:32]), continuation, environment.hex(), message[40 + size :])


def _explain(continuation: Continuation) -> None:
    if continuation.num_abandoned:
        say(
            f"the environment changed since {continuation.num_abandoned} steps past the last checkpoint were begun. "
            f"They stay charged; generation {continuation.generation} goes on with a fresh secret and ends at step "
            f"{continuation.end_step}"
        )
    elif continuation.start_step or continuation.num_replayed:
        say(f"resuming at step {continuation.start_step}; {continuation.num_replayed} steps are replayed bit by bit")


def _open_tracker(inputs: Inputs, backend: Backend, start_step: int) -> Tracker:
    if not backend.is_main:
        return NullTracker()
    run_id = json.loads(inputs.run.identity.read_text(encoding="utf-8"))["tracker_id"]
    # A run that begins evaluates before its first step, so nothing of an earlier beginning is kept.
    from_step = start_step if start_step > 0 else -1
    return open_tracker(inputs.config, inputs.plan, inputs.run, run_id=run_id, from_step=from_step)


def _build_trainer(
    inputs: Inputs,
    backend: Backend,
    ledger: Ledger | None,
    network: Network,
    units: UnitData,
    session: Session,
    tracker: Tracker,
) -> Trainer:
    return Trainer(
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
        clipping_route=inputs.config.performance.clipping_route,
    )


def _self_test(trainer: Trainer, network: Network, backend: Backend) -> None:
    def losses(input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        with network.autocast:
            return row_losses(network.model, input_ids, target_mask)

    run_self_test(
        model=network.model,
        layout=trainer.layout,
        row_losses=losses,
        clipping_norm=trainer.plan.clipping_norm,
        noise_multiplier=trainer.plan.noise_multiplier,
        backend=backend,
        vocabulary_size=len(network.tokenizer),
        precision=network.precision,
        clipping_style=trainer.plan.clipping_style,
        clipping_route=trainer.clipper.route,
    )
    if backend.is_main:
        say("self-test passed: coverage, clipping, reduction and noise are as the plan says")


def _begin_session(inputs: Inputs, ledger: Ledger, session: Session, split: Split) -> None:
    """Put on record that training goes on, and with what."""
    run, continuation = inputs.run, session.continuation
    ledger.begin_session(
        generation=continuation.generation, from_step=continuation.start_step, environment=session.environment
    )
    checkpoint.drop_after(run.checkpoints, continuation.start_step)
    write_atomically(run.resolved_config, to_yaml(inputs.config.model_dump(mode="json")), mode=0o600)
    write_atomically(run.config, to_yaml(public_tree(inputs.config)))
    manifest = split.manifest(inputs.corpus)
    if not run.manifest.exists():
        write_json(run.manifest, manifest, mode=0o600)
    elif json.loads(run.manifest.read_text(encoding="utf-8"))["sha256"] != manifest["sha256"]:
        raise GuaranteeLost(f"{run.manifest} is not the split that this run's key gives; it was replaced")


def _evaluate(inputs: Inputs, trainer: Trainer, network: Network, split: Split, step: int) -> None:
    texts = [inputs.corpus.records[user][index] for user, index in split.evaluation]
    records, _ = tokenize(texts, network.tokenizer, inputs.config.data.max_length)
    loss = held_out_loss(network.model, records, trainer.backend, packer=network.packer, autocast=network.autocast)
    if loss is not None and math.isfinite(perplexity(loss)):
        trainer.tracker.log(step, {"eval/held_out_loss": loss, "eval/held_out_perplexity": perplexity(loss)})


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


def _release(inputs: Inputs, ledger: Ledger, network: Network, *, num_units: int) -> None:
    config, plan, run, state = inputs.config, inputs.plan, inputs.run, ledger.state
    if state.num_charged > plan.num_steps:
        raise GuaranteeLost(
            f"{state.num_charged} steps were charged, the plan allows {plan.num_steps}; nothing is released"
        )
    epsilon = plan.epsilon_after(state.num_charged)
    head = ledger.release(epsilon if math.isfinite(epsilon) else None, plan.delta)
    statement = privacy_statement(
        config,
        plan,
        num_units=num_units,
        num_model_steps=len(state.path),
        num_charged=state.num_charged,
        num_commits=len(state.commits),
        ledger_head=head,
    )
    write = write_model if config.training.method == "full" else write_adapter
    write(run, network.model, network.tokenizer, model_card(config, plan, statement))
    write_statement(run, statement)
    shown = "not private" if plan.not_private_reasons else f"({epsilon:.4g}, {plan.delta:g})-DP for one {plan.unit}"
    say(f"released {run.released} with its privacy statement: {shown}")
