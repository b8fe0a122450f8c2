"""Flip all coins before training: who is held out, what the attacker holds, which secrets are planted. Sealed.

Coins that are flipped afterwards prove nothing: somebody has seen the model by then. This makes the run directory and
its root key, and writes what follows from them to ``secret/prepared.json``; training draws the same coins from the same
key and refuses to begin if the file says anything else.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from attacks.columns import read_columns, spans_of
from attacks.documents import SPANS_PATH
from attacks.errors import AttackInputError
from privtrain.config import Config, load_config
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.manifest import check_prepared, draw_split, needs_tokenizer
from privtrain.data.split import Split, seal
from privtrain.inputs import check_inputs
from privtrain.rundir import RunDirectory, write_json

SPANS_SCHEMA = "privtrain/spans/1"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What may be said of the coins in public: nothing of this depends on how they fell.

    Attributes:
        run: the run directory.
        num_users: users in the data.
        num_attacked: users of whom the attacker holds records.
        num_attacker_records: records that the attacker holds.
        num_canaries: planted users.
        num_labelled: records with sealed spans.
        sha256: the seal.
    """

    run: pathlib.Path
    num_users: int
    num_attacked: int
    num_attacker_records: int
    num_canaries: int
    num_labelled: int
    sha256: str


def prepare(config_path: pathlib.Path, overrides: Sequence[str] = (), *, spans_column: str | None = None) -> Prepared:
    """Make a run directory with its sealed coins. The same command again changes nothing.

    Args:
        config_path: the configuration that training will get.
        overrides: dotted assignments.
        spans_column: column of labelled [start, end] spans of sensitive text; sealed with the coins, so that they
            cannot be chosen after looking at the model.

    Raises:
        ConfigError: as training would.
        PlanMismatch: if the run was prepared with other data, another configuration or other coins.
        AttackInputError: if training has begun in the directory, or the spans are none.
    """
    config = load_config(config_path, overrides)
    check_inputs(config)
    corpus = load_corpus(config.data, config.performance.index_dir)
    extras = read_columns(config.data, corpus, [spans_column] if spans_column else [])
    run = RunDirectory(config.run.directory)
    if run.ledger.exists() or run.manifest.exists():
        raise AttackInputError(f"training has begun in {run.root}: coins come before it; set another run.name")
    if not run.exists():
        run.create()
    with run.locked():
        is_new = not run.prepared.exists()
        key = run.create_key("root", config.privacy.insecure_seed) if is_new else run.load_key("root")
        split = draw_split(config, corpus, _tokenizer(config), key)
        manifest = split.manifest(corpus)
        if not is_new:
            check_prepared(run.prepared, manifest)
        if spans_column:
            labelled = {place: spans_of(row[spans_column], row["offset"]) for place, row in extras.items()}
            write_json(run.root / SPANS_PATH, _spans(manifest, labelled), mode=0o600)
        # Last: it says that the run is prepared.
        write_json(run.prepared, manifest, mode=0o600)
    return _public(run, corpus, split, manifest, len(extras))


def _tokenizer(config: Config) -> Any:
    if not needs_tokenizer(config):
        return None
    from privtrain.models import load_tokenizer

    return load_tokenizer(config.model)


def _spans(manifest: dict[str, Any], found: dict[tuple[str, int], list[tuple[int, int]]]) -> dict[str, Any]:
    """Spans by user and record, tied to the coins and sealed."""
    by_user: dict[str, dict[str, list[list[int]]]] = {}
    for (user, index), spans in sorted(found.items()):
        by_user.setdefault(user, {})[str(index)] = [list(span) for span in spans]
    body = {"schema": SPANS_SCHEMA, "manifest_sha256": manifest["sha256"], "spans": by_user}
    return {**body, "sha256": seal(json.loads(json.dumps(body)))}


def _public(run: RunDirectory, corpus: Corpus, split: Split, manifest: dict[str, Any], num_labelled: int) -> Prepared:
    return Prepared(
        run=run.root,
        num_users=len(corpus.records),
        num_attacked=len(split.attacker),
        num_attacker_records=sum(map(len, split.attacker.values())),
        num_canaries=len(split.canaries),
        num_labelled=num_labelled,
        sha256=manifest["sha256"],
    )
