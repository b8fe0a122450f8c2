"""A run's budget reservation: reserve before training, renew the lease, settle what was spent.

The registry is a database of ε budgets over many runs. A *reservation* sets aside the ε of a whole run before it
starts. It stays open while the job renews its *lease*; without news it expires and stays charged in full. When the run
is released it is *settled*: charged for the steps that the run's verified ledger shows. A *claim* is a random token
that says which copy of the run directory holds the reservation (see :func:`_read_claims`).

Without a registry in the configuration nothing happens here. With one, training never starts without a reservation: a
refusal, or a registry that does not answer, ends the job before the model is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import secrets
import threading
from collections.abc import Iterator

import dp_accounting
from rich.markup import escape

from privtrain.backends import Backend
from privtrain.data.canaries import canaries_of, plant
from privtrain.data.corpus import without_users
from privtrain.data.manifest import read_sealed
from privtrain.errors import (
    ClockRefused,
    ConfigError,
    Fault,
    GuaranteeLost,
    LedgerCorrupt,
    PlanMismatch,
    PrivtrainError,
    RegistryUnreachable,
)
from privtrain.files.atomic import write_json
from privtrain.inputs import Inputs
from privtrain.job.contributions import added, contributions_of
from privtrain.job.evidence import contradictions, evidence_of_release, evidence_of_unreleased, evidence_so_far
from privtrain.job.resume import is_bound
from privtrain.job.stop import StopRequest
from privtrain.privacy.plan import PrivacyPlan
from privtrain.process.console import say
from privtrain.registry.database import registry_url
from privtrain.registry.evidence import LedgerEvidence
from privtrain.registry.requests import Reservation, RunRequest
from privtrain.registry.spending import Settings
from privtrain.registry.store import Registry, Settled
from privtrain.registry.views import populations_shared_with
from privtrain.run.directory import RunDirectory

_SLOWEST_HEARTBEAT_SECONDS = 900.0
_EXIT_REQUEUE = 75
_UNSETTLED = (
    "Until the same command settles this run, a reservation that it holds stays charged in full; without one, it is "
    "charged nowhere"
)
_WARNINGS = {
    Settled.BESIDE: "another copy of this run holds its reservation or settled it; this release is charged in full "
    "beside it",
    Settled.LATE: "this run held no reservation in the registry (it was trained without it or with another one, or the "
    "registry was restored from a backup); it is charged in full now, to the data set that holds its records, "
    "whatever was left of the budget",
    Settled.UNKNOWN: "this run holds no reservation in the registry, which does not know its data set by this unit or "
    "does not account for its sampling; it is charged to none of its budgets",
}


@contextlib.contextmanager
def budgeted(inputs: Inputs, backend: Backend, stop: StopRequest) -> Iterator[Inputs]:
    """Hold the run's reservation while it trains; settle it if the run ends released.

    Yields:
        The inputs without the users on the do-not-train list, the same on every rank.

    Raises:
        BudgetExceeded: if a budget does not allow the run.
        RegistryUnreachable: if the registry does not answer.
        GuaranteeLost: if the reservation was closed, or claimed by a copy of the run directory, while the run trained.
    """
    with backend.main_alone():
        reservation = BudgetReservation.take(inputs) if backend.is_main else None
    # Always sent, so that ranks whose environment lacks the registry's URL agree with rank 0.
    dropped = backend.json_from_main(lambda: [] if reservation is None else reservation.dropped_users())
    allowed = inputs
    if dropped:
        allowed = dataclasses.replace(allowed, corpus=without_users(inputs.corpus, dropped))
    if reservation is not None:
        allowed = dataclasses.replace(allowed, check_release=reservation.check)
    heartbeat = contextlib.nullcontext() if reservation is None else reservation.heartbeat(stop)
    try:
        with heartbeat:
            yield allowed
    except Exception as error:
        if reservation is not None and reservation.lost is not None:
            raise reservation.lost from error  # the heartbeat's thread found it, and stopped the run
        # A run that is to be requeued keeps its reservation, also if it has not begun a step.
        if reservation is not None and getattr(error, "exit_code", None) != _EXIT_REQUEUE:
            reservation.refund_if_unstarted()
        raise
    with backend.main_alone():
        if reservation is not None:
            reservation.settle()


class BudgetReservation:
    """A reservation held by this process, on rank 0. Use :func:`budgeted`.

    Args:
        registry: that holds it.
        reservation: its row; ``None`` for a run that is released, which may still have to be settled.
        inputs: of the run.
        uid: the registry's name of the run, kept in the run directory.
        claims: tokens that show that this directory holds the reservation.

    Attributes:
        lost: the error by which this process found that the reservation is no longer its own.
    """

    def __init__(
        self, registry: Registry, reservation: Reservation | None, inputs: Inputs, uid: str, claims: tuple[str, ...]
    ) -> None:
        self._registry = registry
        self._reservation = reservation
        self._inputs = inputs
        self._uid = uid
        self._claims = claims
        self.lost: GuaranteeLost | LedgerCorrupt | None = None
        self._knows_ledger = False  # whether the registry has been told which ledger the run has
        self._is_tuning = False  # whether the reservation is for all trials of a tuning, and so has no ledger
        self._lease_seconds = inputs.config.registry.lease_hours * 3600

    @classmethod
    def take(cls, inputs: Inputs, *, chosen: RunDirectory | None = None) -> BudgetReservation | None:
        """Reserve the run's ε, or find the reservation that it holds already; ``None`` without a registry.

        A complete run reserves nothing; it may still have to settle.

        Args:
            inputs: of the run; for a tuning, ``inputs.run`` is the directory of all trials.
            chosen: for :mod:`privtrain.job.tune` alone: the run directory that the best trial is moved to. All trials
                together are charged whole from the first :meth:`check` on, which therefore precedes the first trial.
        """
        try:
            reservation = cls._take(inputs, (chosen or inputs.run).is_complete())
            if reservation is not None:
                reservation._is_tuning = chosen is not None
            return reservation
        except PrivtrainError as error:
            # Without its identity the directory is free again, for the plan that takes the refused one's place. Not
            # after a lost connection: the registry may hold a reservation under that identity.
            if not isinstance(error, RegistryUnreachable) and not is_bound(inputs.run) and chosen is None:
                inputs.run.identity.unlink(missing_ok=True)
            raise

    @classmethod
    def _take(cls, inputs: Inputs, is_complete: bool) -> BudgetReservation | None:
        """Do the work of :meth:`take`; ``is_complete``: the run is released already."""
        registry = _opened_registry(inputs, is_complete)
        if registry is None:
            return None
        # The registry's name of this run: made with the directory, the same when it is resumed.
        uid = json.loads(inputs.run.identity.read_text(encoding="utf-8"))["tracker_id"]
        if is_complete:
            return cls(registry, None, inputs, uid, _read_claims(inputs.run))
        # Proves from now on that this copy of the run directory holds the reservation (see _read_claims).
        claim = secrets.token_hex(16)
        request = _request(inputs, uid, claim)
        # Old and new claims go to disk before the registry is told: wherever a crash comes, the one that it holds is
        # among them.
        write_json(_claims_path(inputs.run), {"claims": [*request.earlier_claims, claim]}, mode=0o600)
        reservation = registry.reserve(request)
        write_json(_claims_path(inputs.run), {"claims": [claim]}, mode=0o600)
        held = {"registry": registry.database.shown, "reservation": reservation.id}
        write_json(inputs.run.reservation, held, mode=0o600)
        state = "reserved" if reservation.is_new else "found again"
        say(f"budget {state}: {inputs.config.registry.dataset}, reservation {reservation.id[:12]}")
        return cls(registry, reservation, inputs, uid, (claim,))

    def dropped_users(self) -> list[str]:
        """Return the users of this run's data that are on the do-not-train list."""
        listed = self._registry.opted_out(self._reservation) if self._reservation else frozenset()
        if not listed:
            return []
        return [user for user in self._inputs.corpus.records if self._registry.pseudonym(user) in listed]

    @contextlib.contextmanager
    def heartbeat(self, stop: StopRequest) -> Iterator[None]:
        """Renew the lease from a thread while the block runs; the thread stops the run if the reservation is lost."""
        if self._reservation is None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._heartbeat_loop, args=(ended, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(timeout=5)

    def settle_tuning(self, chosen: Inputs) -> None:
        """Charge a tuning whose chosen run is released: in full, as it was reserved.

        The registry is told what users contributed to the chosen run; their part in the other trials is not added.

        Args:
            chosen: inputs of the chosen run, in its final directory.
        """
        try:
            shown = evidence_of_release(chosen.run, chosen.fingerprint, chosen.plan)
            if self._registry.is_settled(self._uid, shown.head):
                return
            # Made to read the contributions out of the chosen run's ledger; it reserves nothing.
            of_chosen = BudgetReservation(self._registry, None, chosen, self._uid, self._claims)
            self._charge(shown, of_chosen._contributions())
        except (ClockRefused, RegistryUnreachable) as error:
            say(f"[yellow]warning[/]: {error}. {_UNSETTLED}")

    def settle(self) -> None:
        """Charge a released run for the steps that its ledger shows, and tell the registry who contributed.

        A run that is not released keeps its reservation. If the registry does not answer, only a warning is given: the
        release stands, and the same command settles it later.
        """
        run, inputs = self._inputs.run, self._inputs
        if not run.is_complete():
            return
        try:
            # Asked first: once `ledger shred` has destroyed the keys, what follows could not be read any more.
            so_far = evidence_so_far(run)
            if so_far is not None and self._registry.is_settled(self._uid, so_far.head):
                return
            shown = evidence_of_release(run, inputs.fingerprint, inputs.plan)
            self._charge(shown, self._contributions())
        except (ClockRefused, RegistryUnreachable) as error:
            say(f"[yellow]warning[/]: {error}. {_UNSETTLED}")
            return
        self._tell_of_shared_users()
        for problem in contradictions(run, shown):
            say(
                f"[yellow]warning[/]: {run.privacy}: {problem}; the charge is what the ledger shows. See: privtrain "
                f"ledger verify {run.root}"
            )

    def _charge(self, shown: LedgerEvidence, contributions: dict[str, tuple[int, int]]) -> None:
        """Settle in the registry, and warn if the charge is another than the reservation's.

        Args:
            shown: steps that the released run's ledger shows.
            contributions: the registry's pseudonym of a user → (steps, records).
        """
        outcome = self._registry.settle(
            self._uid,
            shown,
            contributions=contributions,
            claims=self._claims,
            request=_request_if_any(self._inputs, self._uid),
        )
        if outcome in _WARNINGS:
            say(f"[yellow]warning[/]: {_WARNINGS[outcome]}")

    def _tell_of_shared_users(self) -> None:
        """Warn if users of this run are also in other populations, whose budgets this run is not charged to.

        A population is the group of people that a per-user budget is kept for, over one or more data sets.
        """
        shared: list[str] = []
        with contextlib.suppress(RegistryUnreachable):  # only the warning is lost: the run is settled
            shared = populations_shared_with(self._registry.database, self._uid)
        if shared:
            say(
                "[yellow]warning[/]: users of this run are also in the population "
                f"{escape(' and '.join(map(repr, shared)))}: what they lose there and here adds up, and no budget "
                "counts both; give the data sets one --population"
            )

    def refund_if_unstarted(self) -> None:
        """Refund a failed run that provably never began a step; any other keeps its reservation."""
        if self._reservation is None:
            return
        # The job's own failure is what is reported; a reservation that cannot be refunded stays, and expires.
        with contextlib.suppress(PrivtrainError):
            shown = evidence_of_unreleased(self._inputs.run, self._inputs.fingerprint)
            if shown.num_steps == 0:
                self._registry.refund(self._uid, shown, claims=self._claims)
                self._inputs.run.reservation.unlink(missing_ok=True)

    def check(self) -> None:
        """Renew the lease, check that the reservation still is this run's, and report which ledger the run has.

        Raises:
            GuaranteeLost: if it was closed, another copy of the run directory claimed it, or the ledger was replaced.
            LedgerCorrupt: if the ledger does not verify.
            RegistryUnreachable: if the registry does not answer and was never told which ledger the run has: it would
                then accept any ledger as this run's, e.g. one with fewer steps.
        """
        if self._reservation is None:
            return
        try:
            # A tuning has no ledger of its own. Its trials are one mechanism, so one step charges it whole.
            shown = LedgerEvidence(1, "") if self._is_tuning else evidence_so_far(self._inputs.run)
            self._registry.renew(self._reservation.id, self._lease_seconds, self._claims[-1], shown)
            self._knows_ledger = shown is not None
        except (GuaranteeLost, LedgerCorrupt) as error:
            self.lost = error
            raise
        except RegistryUnreachable:
            if not self._knows_ledger:
                raise  # else training may go on: a reservation that expires stays charged in full

    def _heartbeat_loop(self, ended: threading.Event, stop: StopRequest) -> None:
        """Renew the lease until ``ended``; stop the run if the reservation or its ledger is gone."""
        interval = min(self._lease_seconds / 4, _SLOWEST_HEARTBEAT_SECONDS)
        while not ended.wait(interval):
            try:
                with contextlib.suppress(RegistryUnreachable):
                    self.check()
            except (GuaranteeLost, LedgerCorrupt):
                stop.ask("the run's reservation or its ledger is gone")
                return

    def _contributions(self) -> dict[str, tuple[int, int]]:
        """Return the registry's pseudonym of a user → (steps, records) that the ledger charges to that user.

        Canary users that were invented are left out.
        """
        run = self._inputs.run
        canaries = canaries_of(read_sealed(run.manifest)) if run.manifest.exists() else ()
        corpus = plant(self._inputs.corpus, canaries)
        totals = contributions_of(run, corpus, self._inputs.plan)
        for canary in canaries:
            if canary.is_invented:  # there is no person whose budget it would be
                totals.pop(canary.user, None)
        # Added up, since ids that differ only in their Unicode form have one pseudonym.
        return added((self._registry.pseudonym(user), counts) for user, counts in totals.items())


def _opened_registry(inputs: Inputs, is_complete: bool) -> Registry | None:
    """Return the registry that the configuration names; ``None`` if it names none.

    ``None`` also where a run that is released already (``is_complete``) cannot reach it: nothing can be settled now.

    Raises:
        PlanMismatch: if a run that holds a reservation is started without its registry.
        ConfigError: if no data set is named.
        RegistryUnreachable: if the registry does not answer.
    """
    section = inputs.config.registry
    url = registry_url(section)
    if url is None:
        file = inputs.run.reservation
        if file.exists() and not is_complete:
            shown_url = json.loads(file.read_text(encoding="utf-8"))["registry"]
            raise PlanMismatch(
                f"{inputs.run.root} holds a reservation in {shown_url} but no registry is configured; "
                "set PRIVTRAIN_REGISTRY or registry.url"
            )
        return None
    if section.dataset is None:
        raise ConfigError([Fault("registry.dataset", "a registry is configured: name the data set to be charged")])
    try:
        return Registry(url, retry_seconds=section.retry_seconds)
    except RegistryUnreachable as error:
        if not is_complete:
            raise
        say(f"[yellow]warning[/]: {error}. {_UNSETTLED}")
        return None


def refund_run(run_path: pathlib.Path, url: str) -> str:
    """Refund an abandoned run, except the steps that its verified ledger shows as begun; return a summary.

    Raises:
        PrivtrainError: if it is no run, it is still training, it was released, or it holds no reservation.
        LedgerCorrupt: if its ledger is missing, damaged, or older than the other files of the run.
    """
    run = RunDirectory(run_path)
    if not run.exists() or not run.reservation.exists():
        raise PrivtrainError(f"{run.root} is not a run that holds a reservation")
    with run.locked():
        if run.is_complete():
            raise PrivtrainError(f"{run.root} is released; start its training command again to settle it")
        identity = json.loads(run.identity.read_text(encoding="utf-8"))
        shown = evidence_of_unreleased(run, identity["fingerprint"])
        num_back = Registry(url).refund(identity["tracker_id"], shown, claims=_read_claims(run))
    what = f"{shown.num_steps} steps stay charged, {num_back} were given back"
    return f"{run.root}: {what}. Resuming it reserves its plan again"


def _read_claims(run: RunDirectory) -> tuple[str, ...]:
    """Return the random tokens (claims) that this copy of the run directory took its reservation with; empty if none.

    The registry keeps one token for a reservation, a new one at every start. So of two copies of a directory the one
    that starts second takes the reservation. The first is refused from then on, as is a directory restored from an
    older backup. The file holds two tokens if a start crashed while the registry was told the new one.
    """
    file = _claims_path(run)
    return tuple(json.loads(file.read_text(encoding="utf-8"))["claims"]) if file.exists() else ()


def _claims_path(run: RunDirectory) -> pathlib.Path:
    return run.secret / "reservation_claims.json"


def _request(inputs: Inputs, uid: str, claim: str | None) -> RunRequest:
    """Return what the run asks of the registry.

    Args:
        inputs: of the run.
        uid: the registry's name of the run.
        claim: the token that this start takes the reservation with; ``None`` to settle a released run.

    Raises:
        PrivtrainError: if the plan is not private, or its sampling is not one that the registry accounts for.
    """
    plan, section = inputs.plan, inputs.config.registry
    assert section.dataset is not None
    if plan.not_private_reasons:
        reasons = "; ".join(plan.not_private_reasons)
        raise PrivtrainError(f"a run that is not private cannot be charged to any budget: {reasons}")
    if plan.sampling not in ("poisson", "cyclic_poisson"):
        raise PrivtrainError(
            f"privacy.sampling: given {plan.sampling}; the registry accounts for poisson and cyclic_poisson sampling"
        )
    # Independent steps are charged and refunded one by one. A tuning, and steps with correlated noise, are one
    # mechanism each, which is charged whole once a step was begun.
    is_whole = plan.tuning is not None or plan.sampling == "cyclic_poisson"
    if is_whole:
        settings, event = None, plan.event_of_steps(plan.num_steps)
    else:
        settings = _settings(plan)
        event = settings.event()
    if is_whole and plan.tuning is None:
        # Wrapped, so that the registry counts it as one (see ``part_of``): a bare self-composed event counts as many
        # steps as it has repetitions.
        event = dp_accounting.ComposedDpEvent([event])
    return RunRequest(
        uid=uid,
        name=inputs.config.run.name,
        fingerprint=plan.fingerprint(),
        dataset=section.dataset,
        manifest_sha256=inputs.corpus.manifest_sha256,
        unit=plan.guaranteed_unit,
        relation=plan.neighboring_relation,
        event=event,
        num_steps=plan.num_steps,
        epsilon=plan.epsilon,
        delta=plan.delta,
        settings=settings,
        lease_seconds=section.lease_hours * 3600,
        claim=claim,
        earlier_claims=_read_claims(inputs.run),
        has_split=inputs.run.manifest.exists(),
    )


def _request_if_any(inputs: Inputs, uid: str) -> RunRequest | None:
    """Return what a released run would have asked for, so that one without a reservation can be charged afterwards.

    ``None`` if no budget can be asked for such a run.
    """
    try:
        return _request(inputs, uid, None)
    except PrivtrainError:
        return None


def _settings(plan: PrivacyPlan) -> Settings:
    """Return the settings of the mechanism that the ledger records."""
    return Settings(
        noise_multiplier=plan.noise_multiplier,
        sampling_prob=plan.sampling_prob,
        num_steps=plan.num_steps,
        num_records=plan.user_accounting.num_sampled,
    )
