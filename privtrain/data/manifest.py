"""The manifest file: written when the split is drawn, compared by training; and the record of what training used.

The split says which users are trained on (held in), which are not (held out), and which canaries are planted. It is a
function of the run's root key, the data and the configuration, so training does not have to believe the file that
``attacks prepare`` wrote: it draws the split again and refuses a file that says anything else. A manifest is sealed: it
holds a SHA-256 of its own content.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from privtrain.config import Config
from privtrain.data.canaries import SAMPLES, TEMPLATE, Canary, draw_canaries, plant
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.split import Split, seal, split_users
from privtrain.data.units import UnitData
from privtrain.errors import ConfigError, DamagedFile, Fault, PlanMismatch
from privtrain.files import reading
from privtrain.privacy.secret import SecretKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USED_SCHEMA = "privtrain/used/1"


def draw_split(config: Config, corpus: Corpus, tokenizer: PreTrainedTokenizerBase | None, root_key: SecretKey) -> Split:
    """Return a run's split, canaries included.

    Args:
        config: its configuration.
        corpus: the kept records, without canaries.
        tokenizer: the model's; may be None where :func:`needs_tokenizer` says no.
        root_key: the run's.

    Raises:
        ConfigError: if a canary does not fit into ``data.max_length``: its secret would be cut off.
    """
    if not config.canaries.are_planted:
        return split_users(corpus, config.data, root_key, by_record=config.privacy.protects_records)
    canaries = draw_canaries(corpus, config.canaries, tokenizer, root_key, config.privacy.unit)
    if config.data.deduplicate == "within_user":
        # An invented user's records are all equal; of equal records one is kept, as of any user's.
        canaries = tuple(_with_one_record(canary) if canary.is_invented else canary for canary in canaries)
    if tokenizer is not None:
        invented = [canary.records[0] for canary in canaries if canary.is_invented]
        num_cut = Encoder(config.data, tokenizer).encode(invented).num_truncated
        if num_cut:
            problem = f"given {config.data.max_length}, which cuts {num_cut} canaries; raise it or shorten the canaries"
            raise ConfigError([Fault("data.max_length", problem)])
    return split_users(corpus, config.data, root_key, canaries, by_record=config.privacy.protects_records)


def _with_one_record(canary: Canary) -> Canary:
    return dataclasses.replace(canary, records=canary.records[:1], repetitions=1)


def needs_tokenizer(config: Config) -> bool:
    """Return whether drawing the split needs the model's tokenizer."""
    section = config.canaries
    return section.kind not in (TEMPLATE, SAMPLES) and bool(section.num_users or section.user_fraction)


def read_sealed(path: pathlib.Path) -> dict[str, Any]:
    """Read a manifest and compare it with the digest that it holds of itself.

    That does not show that it is the run's manifest: compare :func:`split_commitment` for that.

    Raises:
        PlanMismatch: if it was altered or damaged.
    """
    try:
        manifest = reading.read_json(path, max_bytes=_MAX_MANIFEST_BYTES)
    except DamagedFile as error:
        problem = f"does not match its seal: it was altered or damaged (it {error.problem})"
        raise PlanMismatch(f"{path} {problem}; restore it") from None
    if seal({name: value for name, value in manifest.items() if name != "sha256"}) != manifest.get("sha256"):
        raise PlanMismatch(f"{path} does not match its seal: it was altered or damaged; restore it")
    return manifest


_MAX_MANIFEST_BYTES = 1 << 34
"""A manifest names every user."""


def split_commitment(root_key: SecretKey, manifest_sha256: str) -> str:
    """Return a hiding commitment to the split, which may be published: HMAC-SHA-256 in hex under the root key.

    A plain hash could be brute-forced for small splits.
    """
    return root_key.derive("split commitment", manifest_sha256).hex()


def check_prepared(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless the split equals the one that was sealed before training.

    Args:
        path: the manifest that ``attacks prepare`` wrote.
        manifest: the manifest of the split that this configuration, data set and key give now.

    Raises:
        PlanMismatch: if they differ, naming what differs.
    """
    prepared = read_sealed(path)
    differing = [name for name in manifest if name != "sha256" and prepared.get(name) != manifest[name]]
    if differing or prepared["sha256"] != manifest["sha256"]:
        raise PlanMismatch(
            f"{path} was sealed with other {', '.join(differing) or 'keys'} than this configuration, data set, "
            "tokenizer and the run's key give; nothing was trained. Restore what was changed since `attacks prepare`, "
            "or prepare and train under another run.name. If somebody opted out since then (`privtrain ledger "
            "forget`), the same `attacks prepare` again leaves them out and keeps everybody else's coins"
        )


def used_facts(
    corpus: Corpus, split: Split, units: UnitData, *, manifest_sha256: str, records_per_unit: int
) -> dict[str, Any]:
    """Return a record of what training can draw, compared with the split. Names users: for ``secret/`` only.

    Args:
        corpus: the kept records, without canaries.
        split: which records training may use.
        units: the units of the training, after every rule that drops or shortens records.
        manifest_sha256: digest of the split's manifest.
        records_per_unit: k, the most records of a unit in one step.

    Returns:
        Counts of units and records; ``left_out``: user → numbers of records that no unit holds; ``canaries``: canary
        user → how many records units hold, and how many of these carry the secret.
    """
    kept, left_out = _kept_and_left_out(split, units)
    records = plant(corpus, split.canaries).records
    canaries: dict[str, dict[str, int]] = {}
    for canary in split.canaries:
        kept_records = [records[canary.user][index] for index in kept.get(canary.user, ())]
        canaries[canary.user] = {
            "num_records": len(kept_records),
            "num_with_secret": sum(canary.secret in record for record in kept_records),
        }
    return {
        "schema": USED_SCHEMA,
        "manifest_sha256": manifest_sha256,
        "units_sha256": units.sha256(),
        "num_units": len(units),
        "num_records": int(units.num_records.sum()),
        "records_per_unit_per_step": records_per_unit,
        "left_out": left_out,
        "canaries": canaries,
    }


def _kept_and_left_out(split: Split, units: UnitData) -> tuple[dict[str, set[int]], dict[str, list[int]]]:
    """Return which records the units hold (of canary users), and which of the split's they do not (of all users).

    Both are user → numbers of records.
    """
    canaries = {canary.user for canary in split.canaries}
    kept: dict[str, set[int]] = {}
    left_out: dict[str, list[int]] = {}
    # The units come in the split's order of users, all units of a user together; users without a unit are missing. So
    # both are walked side by side, without an index of all users in memory.
    owned = _indices_by_owner(units)
    next_owner, next_indices = next(owned, (None, set[int]()))  # None: no unit is left
    for user, allowed in split.training.items():
        indices_of_user: set[int] = set()
        if user == next_owner:
            indices_of_user = next_indices
            next_owner, next_indices = next(owned, (None, set[int]()))
            if user in canaries:
                kept[user] = indices_of_user
        missing = sorted(set(allowed) - indices_of_user)
        if missing:
            left_out[user] = missing
    assert next_owner is None, "units of users who are not in the split, or in another order"
    return kept, left_out


def _indices_by_owner(units: UnitData) -> Iterator[tuple[str, set[int]]]:
    """Yield each owner with the indices of all records that the owner's units hold."""
    pairs = zip(units.owners, units.indices, strict=True)
    for owner, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield owner, {index for _, indices in group for index in indices}


def with_contributions(used: Mapping[str, Any], num_drawn: Mapping[str, int]) -> dict[str, Any]:
    """Return the result of :func:`used_facts` with, for each canary, how many of its records the steps drew.

    Args:
        used: the result of :func:`used_facts`.
        num_drawn: canary user → records that entered steps, summed over all steps.
    """
    canaries = {user: {**facts, "num_drawn": num_drawn.get(user, 0)} for user, facts in used["canaries"].items()}
    return {**used, "canaries": canaries}
