"""What a run directory proves to the registry: read from the verified ledger, never from what the run publishes."""

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
    """Return what the ledger shows while a job writes it; ``None`` before it is made.

    Raises:
        LedgerCorrupt: if it does not verify.
    """
    if not run.ledger.exists():
        return None
    return _evidence(verify_chain(run.ledger, allow_torn=True))


def evidence_of_unreleased(run: RunDirectory, fingerprint: str) -> LedgerEvidence:
    """Return what a run that was given up has spent. The caller holds the run's lock.

    Raises:
        LedgerCorrupt: if the ledger is gone, damaged, another run's or older than what lies beside it, or if it shows
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
    """Return what a released run has spent. The caller holds the run's lock.

    Raises:
        LedgerCorrupt: as :func:`evidence_of_unreleased`, and if the ledger shows no release of this plan.
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
    """Return what the published statement says otherwise than the ledger; it decides nothing."""
    try:
        statement = json.loads(run.privacy.read_text(encoding="utf-8"))
        claims = {
            "steps_released": (statement["steps_released"], shown.num_steps),
            "plan_fingerprint": (statement["plan_fingerprint"], shown.plan),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"it cannot be read ({type(error).__name__})"]
    return [f"{name} is {said}, the ledger shows {true}" for name, (said, true) in claims.items() if said != true]


def _evidence(state: LedgerState) -> LedgerEvidence:
    plan = state.release.manifest.plan if state.release is not None else ""
    return LedgerEvidence(state.num_charged, state.head, state.key_sha256, plan)


def _check_owner(run: RunDirectory, state: LedgerState, fingerprint: str) -> None:
    """Raise unless key, plan and data in the ledger's first record are the run's own."""
    if not state.num_records:
        return
    key = run.load_key("pseudonym")
    if state.key_sha256 != key_commitment(key) or state.plan != blinded_plan(key, fingerprint):
        raise LedgerCorrupt(f"{run.ledger} is not of this run, plan and data set: it was replaced. Restore it")


def _check_split(run: RunDirectory, state: LedgerState) -> None:
    """Raise unless the manifest, which says who is invented, is the one that training began with."""
    if not state.split:
        return
    if not run.manifest.exists():
        raise LedgerCorrupt(f"{run.manifest} is gone: which users are invented is not known. Restore it")
    if state.split != split_commitment(run.load_key("root"), read_sealed(run.manifest)["sha256"]):
        raise LedgerCorrupt(f"{run.manifest} is not the one that {run.ledger} was begun with: it was replaced")
