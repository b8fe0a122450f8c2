"""Flip all coins before training: who is held out, what the attacker holds, which secrets are planted. Sealed.

A coin is a random choice that follows from the run's root key, such as whether a user is trained on. Coins that are
flipped afterwards prove nothing: somebody has seen the model by then. This makes the run directory and its root key,
and writes what follows from them to ``secret/prepared.json``; training draws the same coins from the same key and
refuses to begin if the file says anything else.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from attacks.errors import AttackInputError
from attacks.scoring.columns import read_columns, spans_of
from attacks.scoring.documents import SPANS_PATH, SPANS_SCHEMA
from privtrain.config import Config
from privtrain.data.corpus import Corpus, load_corpus, without_users
from privtrain.data.manifest import check_prepared, draw_split, needs_tokenizer, read_sealed, split_commitment
from privtrain.data.split import Split
from privtrain.files.atomic import write_json
from privtrain.inputs import load_checked
from privtrain.privacy.secret import SecretKey
from privtrain.registry.database import registry_url
from privtrain.registry.store import Registry
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file, write_sealed
from privtrain.run.sources import source_digests, write_sources


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What may be said of the coins in public: nothing of this depends on how they fell.

    Attributes:
        run: the run directory.
        num_users: users in the data who did not opt out.
        num_opted_out: users in the data who did.
        num_attacked: users of whom the attacker holds records.
        num_attacker_records: records that the attacker holds.
        num_canaries: planted users.
        num_labelled: records with sealed spans.
        commitment: what the privacy statement and the report will quote; keyed, so it tells nothing of the coins.
    """

    run: pathlib.Path
    num_users: int
    num_opted_out: int
    num_attacked: int
    num_attacker_records: int
    num_canaries: int
    num_labelled: int
    commitment: str


def prepare(config_path: pathlib.Path, overrides: Sequence[str] = (), *, spans_column: str | None = None) -> Prepared:
    """Make a run directory with its sealed coins. The same command again changes nothing.

    People whom the registry has on its do-not-train list are left out, as training would. If somebody opted out since
    the last time, they are taken out and everybody else's coins stay as they are.

    Args:
        config_path: the configuration that training will get.
        overrides: assignments to its keys, such as ``"canaries.num_users=200"``.
        spans_column: column of labelled [start, end] spans of sensitive text; the spans are sealed with the coins, so
            that nobody can choose them after looking at the model.

    Raises:
        ConfigError: as training would.
        PlanMismatch: if the run was prepared with other data, another configuration or other coins.
        AttackInputError: if training has begun in the directory, or a cell of the column holds no spans.
    """
    config = load_checked(config_path, overrides)
    if spans_column and config.data.format != "text":
        raise AttackInputError(f"--spans needs data.format: text; {config_path} has {config.data.format}")
    everybody = load_corpus(config.data, config.performance.index_dir)
    corpus = _without_opted_out(config, everybody)
    digests = source_digests(config.data, corpus)
    extras = read_columns(config.data, corpus, [spans_column] if spans_column else [], digests)
    run = RunDirectory(config.run.directory)
    if _has_begun(run):
        raise AttackInputError(f"training has begun in {run.root}: coins come before it; set another run.name")
    if not run.exists():
        run.create()
    with run.locked():
        if not run.exists():
            run.check_new()
        key = run.keep_key("root", config.privacy.insecure_seed, was_used=run.prepared.exists())
        split = draw_split(config, corpus, _tokenizer(config), key)
        manifest = split.manifest(corpus)
        if run.prepared.exists():
            _check_sealed(run, config, everybody, corpus, key)
        if spans_column:
            labelled = {place: spans_of(row[spans_column], row["offset"]) for place, row in extras.items()}
            write_sealed(run, run.root / SPANS_PATH, _spans(manifest, labelled))
        else:
            sealed_with = _coins_of_spans(run)
            if sealed_with is not None and sealed_with != manifest["sha256"]:
                raise AttackInputError(
                    "the opt-out list changed since spans were sealed with the split; run prepare again with --spans "
                    "COLUMN"
                )
        write_sources(run, digests)
        # Last: it says that the run is prepared.
        write_json(run.prepared, manifest, mode=0o600)
    return _public(run, corpus, split, split_commitment(key, manifest["sha256"]), len(extras))


def _has_begun(run: RunDirectory) -> bool:
    """Return whether training began its first session here.

    A start that failed before that leaves a ledger of one record, which does not count.
    """
    if run.manifest.exists():
        return True
    if run.ledger.exists():
        return len(run.ledger.read_bytes().splitlines()) > 1
    return any(run.secret.glob("generation-*.key"))


def _without_opted_out(config: Config, corpus: Corpus) -> Corpus:
    """Return the corpus without the users who have opted out by now; without a registry all of it."""
    url = registry_url(config.registry)
    if url is None:
        return corpus
    registry = Registry(url, retry_seconds=config.registry.retry_seconds, read_only=True)
    listed = registry.do_not_train()
    dropped = [user for user in corpus.records if registry.pseudonym(user) in listed] if listed else []
    return without_users(corpus, dropped) if dropped else corpus


def _check_sealed(run: RunDirectory, config: Config, everybody: Corpus, allowed: Corpus, key: SecretKey) -> None:
    """Check that the sealed coins are those of this command, except for people who opted out since.

    Args:
        run: with ``secret/prepared.json``.
        config: of this command.
        everybody: all users of the data.
        allowed: the users who have not opted out by now.
        key: the run's root key, which all coins follow from.

    Raises:
        PlanMismatch: if the coins differ.
    """
    sealed = read_sealed(run.prepared)
    known = {*sealed["held_in"], *sealed["held_out"]}
    # Neither sealed nor allowed now: these users had opted out when the coins were sealed already.
    gone = [user for user in everybody.records if user not in known and user not in allowed.records]
    corpus_then = without_users(everybody, gone)
    split_then = draw_split(config, corpus_then, _tokenizer(config), key)
    check_prepared(run.prepared, split_then.manifest(corpus_then))


def _tokenizer(config: Config) -> Any:
    """Return the model's tokenizer if drawing the canaries needs it, else None."""
    if not needs_tokenizer(config):
        return None
    from privtrain.models.load import load_tokenizer

    return load_tokenizer(config.model)


def _coins_of_spans(run: RunDirectory) -> str | None:
    """Return the digest of the split manifest that the sealed spans were written for; None without sealed spans."""
    path = run.root / SPANS_PATH
    return read_sealed_file(run, path, schema=SPANS_SCHEMA)["manifest_sha256"] if path.is_file() else None


def _spans(manifest: dict[str, Any], spans_of_record: dict[tuple[str, int], list[tuple[int, int]]]) -> dict[str, Any]:
    """Return the content of the file of spans: user to record index (as text) to spans, with the manifest's digest.

    Args:
        manifest: the split that the spans are sealed with.
        spans_of_record: (user, record index) to [start, end) spans in characters.
    """
    by_user: dict[str, dict[str, list[list[int]]]] = {}
    for (user, index), spans in sorted(spans_of_record.items()):
        by_user.setdefault(user, {})[str(index)] = [list(span) for span in spans]
    return {"schema": SPANS_SCHEMA, "manifest_sha256": manifest["sha256"], "spans": by_user}


def _public(run: RunDirectory, corpus: Corpus, split: Split, commitment: str, num_labelled: int) -> Prepared:
    """Return the counts that do not depend on how the coins fell."""
    return Prepared(
        run=run.root,
        num_users=len(corpus.records),
        num_opted_out=corpus.counts.num_users_opted_out,
        num_attacked=len(split.attacker),
        num_attacker_records=sum(map(len, split.attacker.values())),
        num_canaries=len(split.canaries),
        num_labelled=num_labelled,
        commitment=commitment,
    )
