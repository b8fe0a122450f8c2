"""Select the training units of a run: which records of each held-in user are trained on.

Some selections keep the records with the largest or smallest loss under the base model. These losses are computed
before the first step and kept in the run directory, so that a resumed run selects the same records.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from privtrain.backends import Backend
from privtrain.data.canaries import plant
from privtrain.data.corpus import Corpus
from privtrain.data.selection import Losses, Selection, check_contributions
from privtrain.data.split import Split
from privtrain.data.units import UnitData, build_units
from privtrain.data.units_on_disk import units_on_disk
from privtrain.errors import ConfigError, Fault, GuaranteeLost
from privtrain.files.atomic import write_json
from privtrain.inputs import Inputs
from privtrain.privacy.secret import SecretKey
from privtrain.process.console import say

if TYPE_CHECKING:
    from privtrain.training.network import Network

#: Rank given to records whose loss is not finite.
_NONFINITE_LOSS = 1e30


def select_units(
    inputs: Inputs,
    backend: Backend,
    network: Network,
    split: Split,
    root_key: SecretKey,
    *,
    cache: pathlib.Path | None,
    has_begun: bool = False,
) -> UnitData:
    """Return the privacy units to train on. Every rank calls it, before the model is trained.

    Args:
        inputs: plan and records.
        backend: this rank's view of the job.
        network: the model as it is before its first step.
        split: who is held in, i.e. trained on.
        root_key: the run's, from which random choices are drawn.
        cache: file in which rank 0 keeps the losses that decided; ``None`` for a rehearsal.
        has_begun: whether an earlier session trained; if losses decide, the cache must then exist.

    Raises:
        ConfigError: if nobody is left to train on.
        GuaranteeLost: if a run that has begun lost its losses, or a user would have more records than the plan allows.
    """
    if not split.training:
        raise ConfigError([Fault("data.held_out_fraction", "no user is left to train on; lower it")])
    plan = inputs.plan
    selection = Selection(plan.selection, _max_records(inputs), root_key)
    corpus = plant(inputs.corpus, split.canaries)
    wanted = selection.to_score(split)
    losses = _losses(wanted, inputs, corpus, backend, network, cache=cache, has_begun=has_begun)
    chosen = selection.applied(corpus, split, losses)
    if not corpus.is_on_disk:
        units = build_units(corpus, chosen, network.encoder, unit=plan.unit, cut=selection)
    elif selection.strategy == "random_chunk":
        raise ConfigError([Fault("privacy.selection", "random_chunk needs the records in memory: no index_dir")])
    else:
        units = units_on_disk(corpus, chosen, network.encoder, unit=plan.unit)
    check_contributions(units.owners, plan.records_per_user)
    return units


def _max_records(inputs: Inputs) -> int | None:
    """Return how many records of a user the selection keeps for the whole run; ``None`` for all."""
    plan = inputs.plan
    if plan.unit == "example":
        return plan.records_per_user
    if plan.selection in ("random", "random_chunk"):
        return None  # each step draws records_per_unit of the user's records afresh
    return plan.records_per_unit


def _losses(
    wanted: Sequence[tuple[str, int]],
    inputs: Inputs,
    corpus: Corpus,
    backend: Backend,
    network: Network,
    *,
    cache: pathlib.Path | None,
    has_begun: bool,
) -> Losses:
    """Return (user, record index) → loss of each wanted record, on every rank: from the cache, or else scored now.

    Arguments are those of :func:`select_units`, and ``wanted``: the records that the selection compares, maybe none.
    """
    if not wanted:
        return {}
    cached: dict[tuple[str, int], float] = {}
    with backend.main_alone():  # rank 0 alone has access to the run directory
        if backend.is_main and cache is not None and cache.exists():
            content = json.loads(cache.read_text(encoding="utf-8"))
            cached = {(user, index): loss for user, index, loss in content["losses"]}
        elif backend.is_main and has_begun:
            raise GuaranteeLost(
                f"{cache} is gone: the records that training began with are not known; restore it, or set another "
                "run.name"
            )
    # Rank 0 decides: its cache may be of other records, e.g. of a configuration that was changed before training.
    if backend.json_from_main(lambda: all(record in cached for record in wanted)):
        values = backend.json_from_main(lambda: [cached[record] for record in wanted])
        return dict(zip(wanted, values, strict=True))
    if backend.is_main:
        say(f"scoring records under the model before training, for {inputs.plan.selection}")
    losses = dict(zip(wanted, _scored(wanted, corpus, backend, network), strict=True))
    with backend.main_alone():
        if backend.is_main and cache is not None:
            rows = [[user, index, loss] for (user, index), loss in losses.items()]
            write_json(cache, {"losses": rows}, mode=0o600)
    return losses


def _scored(wanted: Sequence[tuple[str, int]], corpus: Corpus, backend: Backend, network: Network) -> list[float]:
    """Return each record's mean loss per predicted token, in nats.

    One record a forward pass, so that its loss depends on it alone. The ranks take turns over the records and run
    equally many passes, as a sharded model needs: past the last record a rank repeats it, without counting it.
    """
    records = network.encoder.encode([corpus.records[user][index] for user, index in wanted]).records
    losses = torch.zeros(len(records), dtype=torch.float32, device=backend.device)
    network.model.eval()
    with torch.no_grad():
        for start in range(0, len(records), backend.world_size):
            turn = start + backend.rank
            index = min(turn, len(records) - 1)
            (batch,) = network.lone_packer.pack([[records[index]]], num_batches=1)
            moved = batch.to(backend.device)
            with network.autocast:
                loss = network.objective.losses(network.model, moved.input_ids, moved.target_mask).sum()
            if turn == index:  # else a repetition of the last record
                losses[index] = loss / max(1, records[index].num_targets)
    network.model.train()
    backend.reduce(losses)
    return losses.nan_to_num(nan=_NONFINITE_LOSS, posinf=_NONFINITE_LOSS).tolist()
