"""What a run directory proves to the budget registry: how many steps are charged, and in whose ledger.

Evidence is read from the verified ledger, never from what the run publishes, which anybody could have edited.
"""

from __future__ import annotations

import json

from privtrain.data.manifest import read_sealed, split_commitment
from privtrain.errors import LedgerCorrupt
from privtrain.job.resume import verified_state
from privtrain.ledger.chain import LedgerState
from privtrain.ledger.log import blinded_plan, key_commitment, verify_chain
from privtrain.privacy.plan import PrivacyPlan
from privtrain.registry.evidence import NOTHING, LedgerEvidence
from privtrain.run.directory import RunDirectory


def evidence_so_far(run: RunDirectory) -> LedgerEvidence | None:
    """Return what the ledger shows while a job writes it; ``None`` before there is a ledger.

    Raises:
        LedgerCorrupt: if the ledger does not verify.
    """
    if not run.ledger.exists():
        return None
    return _evidence(verify_chain(run.ledger, allow_torn=True))


def evidence_of_unreleased(run: RunDirectory, fingerprint: str) -> LedgerEvidence:
    """Return the steps that an abandoned run has spent, with no steps for one that never began.

    Args:
        run: its directory, whose lock the caller holds.
        fingerprint: of the run's plan and data.

    Raises:
        LedgerCorrupt: if the ledger is gone, damaged, another run's or older than the files beside it, or if it shows
            a release.
    """
    state = verified_state(run)
    if state is None:
        return NOTHING
    _check_owner(run, state, fingerprint)
    if state.is_released:
        raise LedgerCorrupt(f"{run.ledger} shows that the run was released: its whole charge stands. Settle it instead")
    return _evidence(state)


def evidence_of_release(run: RunDirectory, fingerprint: str, plan: PrivacyPlan) -> LedgerEvidence:
    """Return the steps that a released run has spent.

    Args:
        run: its directory, whose lock the caller holds.
        fingerprint: of the run's plan and data.
        plan: the run's.

    Raises:
        LedgerCorrupt: if the ledger is gone, damaged, another run's or older than the files beside it, if it shows no
            release of this plan, or if the manifest of the split was replaced.
    """
    state = verified_state(run)
    if state is None or state.release is None:
        raise LedgerCorrupt(f"{run.privacy} is there, but {run.ledger} shows no release; nothing was settled")
    _check_owner(run, state, fingerprint)
    if state.release.manifest.plan != plan.fingerprint():
        raise LedgerCorrupt(f"{run.ledger} shows the release of another plan than this configuration's")
    _check_split(run, state)
    return _evidence(state)


def contradictions(run: RunDirectory, shown: LedgerEvidence) -> list[str]:
    """Return, in words, where the published statement contradicts the ledger: a warning, since the ledger decides."""
    try:
        statement = json.loads(run.privacy.read_text(encoding="utf-8"))
        stated_and_shown = {
            "steps_released": (statement["steps_released"], shown.num_steps),
            "plan_fingerprint": (statement["plan_fingerprint"], shown.plan),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"it cannot be read ({type(error).__name__})"]
    return [
        f"{name} is {stated}, the ledger shows {true}"
        for name, (stated, true) in stated_and_shown.items()
        if stated != true
    ]


def _evidence(state: LedgerState) -> LedgerEvidence:
    plan = state.release.manifest.plan if state.release is not None else ""
    return LedgerEvidence(state.num_charged, state.head, state.key_sha256, plan)


def _check_owner(run: RunDirectory, state: LedgerState, fingerprint: str) -> None:
    """Raise unless key, plan and data in the ledger's first record are the run's own."""
    if not state.num_records:  # a crash came before the first record
        return
    key = run.load_key("pseudonym")
    if state.key_sha256 != key_commitment(key) or state.plan != blinded_plan(key, fingerprint):
        raise LedgerCorrupt(f"{run.ledger} is not of this run, plan and data set: it was replaced. Restore it")


def _check_split(run: RunDirectory, state: LedgerState) -> None:
    """Raise unless the manifest of the split is the one that training began with.

    Who is charged rests on the manifest: it says which canary users are invented and have no budget.
    """
    if not state.split:  # training never began a session
        return
    if not run.manifest.exists():
        raise LedgerCorrupt(f"{run.manifest} is gone: which users are invented is not known. Restore it")
    if state.split != split_commitment(run.load_key("root"), read_sealed(run.manifest)["sha256"]):
        raise LedgerCorrupt(f"{run.manifest} is not the one that {run.ledger} was begun with: it was replaced")
