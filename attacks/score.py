"""Score the attacker's documents: log p of every token under the fine-tuned model and under its exact base.

Launched like training (``accelerate launch ... -m attacks score RUN``). Batches are composed over all documents before
they are dealt to ranks, so the signals do not depend on the number of ranks. Writes signals, no verdicts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from rich.progress import track

from attacks.errors import AttackInputError
from attacks.rundir import read_statement
from attacks.signals import HELD_IN, HELD_OUT, SIGNALS_PATH, DocumentSignals, read_signals, write_signals
from privtrain.config import load_config
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.encode import Encoder
from privtrain.data.split import seal
from privtrain.models import base_dtype, load_adapter, load_base, load_tokenizer, resolve_precision, token_log_probs
from privtrain.processes import join_processes
from privtrain.rundir import RunDirectory
from privtrain.secret import pseudonym


@dataclasses.dataclass(frozen=True)
class Document:
    """One of the attacker's documents."""

    user: str
    index: int
    side: str
    tokens: np.ndarray


def score_run(run_path: pathlib.Path, batch_tokens: int) -> None:
    """Write ``secret/attack/signals.parquet`` for a finished run; nothing to do if it is there.

    Args:
        run_path: directory of a finished run.
        batch_tokens: tokens in one forward pass, padding included.

    Raises:
        AttackInputError: if the run is not finished, its manifest is broken, or its data changed since training.
    """
    read_statement(run_path)
    run = RunDirectory(run_path)
    config = load_config(run.resolved_config)
    if config.training.releases_model:
        raise AttackInputError(
            f"attacks compare an adapter with its base; a run with training.method: {config.training.method} has none"
        )
    if config.data.is_classification:
        raise AttackInputError("attacks score tokens of texts; a run with data.format: classification predicts none")
    state, device = join_processes(config.performance.collective_timeout_seconds)
    try:
        target = run_path / SIGNALS_PATH
        if target.is_file():
            read_signals(target)
            if state.is_main_process:
                print(f"{target} is already there; delete it to score again")
            return
        if config.performance.num_threads is not None:
            torch.set_num_threads(config.performance.num_threads)
        tokenizer = load_tokenizer(config.model)
        documents = attacker_documents(run, load_corpus(config.data), Encoder(config.data, tokenizer))
        precision = resolve_precision(config.performance.precision, device)
        base = load_base(config.model, base_dtype(precision, device))
        model = load_adapter(base, run.adapter).to(device).eval()
        autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
        key = run.load_key("pseudonym")
        batches = list(compose_batches(documents, batch_tokens))
        mine = batches[state.process_index :: state.num_processes]
        rows = []
        for batch in track(mine, "scoring", disable=not state.is_main_process):
            for document, (tuned, reference) in zip(batch, score_batch(model, batch, device, autocast), strict=True):
                name = pseudonym(key, document.user)
                rows.append(DocumentSignals(name, str(document.index), document.side, tuned, reference))
        part = target.with_name(f"part-{state.process_index:04d}.parquet")
        write_signals(part, rows)
        state.wait_for_everyone()
        if state.is_main_process:
            _join_parts(target, state.num_processes)
            print(f"scored {len(documents)} documents; next: attacks analyse {run_path}")
        state.wait_for_everyone()
    finally:
        state.destroy_process_group()


def attacker_documents(run: RunDirectory, corpus: Corpus, encoder: Encoder) -> list[Document]:
    """The documents that the sealed manifest gives to the attacker, tokenised as training tokenises.

    Raises:
        AttackInputError: if the manifest was altered or the data are not the ones that the split was drawn on.
    """
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    if seal(body) != manifest["sha256"]:
        raise AttackInputError(f"{run.manifest} does not match its seal; it was altered after training began")
    if corpus.manifest_sha256 != manifest["data_sha256"]:
        raise AttackInputError("the data changed since the split was sealed; restore the files named in config.yaml")
    held_in = set(manifest["held_in"])
    found = [(user, index) for user, indices in manifest["attacker"].items() for index in indices]
    if not found:
        raise AttackInputError(
            "the manifest gives the attacker no document; see data.attack_fraction and attack_min_records"
        )
    encoded = encoder.encode([corpus.records[user][index] for user, index in found])
    return [
        Document(user, index, HELD_IN if user in held_in else HELD_OUT, record.tokens)
        for (user, index), record in zip(found, encoded.records, strict=True)
    ]


def compose_batches(documents: Sequence[Document], batch_tokens: int) -> Iterator[list[Document]]:
    """Group documents of similar length; no batch holds more than ``batch_tokens`` with padding, unless it is alone."""
    batch: list[Document] = []
    for document in sorted(documents, key=lambda d: (-len(d.tokens), d.user, d.index)):
        longest = len(batch[0].tokens) if batch else len(document.tokens)
        if batch and longest * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def score_batch(
    model: torch.nn.Module, batch: Sequence[Document], device: torch.device, autocast: torch.autocast
) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each document its per-token log-probabilities under the adapter and with the adapter disabled."""
    width = max(len(document.tokens) for document in batch)
    input_ids = np.zeros((len(batch), width), dtype=np.int64)
    for row, document in enumerate(batch):
        input_ids[row, : len(document.tokens)] = document.tokens
    ids = torch.from_numpy(input_ids).to(device)
    with torch.no_grad(), autocast:
        tuned = token_log_probs(model, ids).cpu().numpy()
        with model.disable_adapter():  # pyright: ignore[reportCallIssue] - PEFT's method
            reference = token_log_probs(model, ids).cpu().numpy()
    lengths = [len(document.tokens) - 1 for document in batch]
    return [(tuned[row, :n].copy(), reference[row, :n].copy()) for row, n in enumerate(lengths)]


def _join_parts(target: pathlib.Path, num_parts: int) -> None:
    parts = [target.with_name(f"part-{index:04d}.parquet") for index in range(num_parts)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise AttackInputError(
            f"{', '.join(missing)} not found beside {target}: all ranks must see the run directory; "
            "score on one machine or on a shared file system"
        )
    write_signals(target, [row for part in parts for row in read_signals(part)])
    for part in parts:
        part.unlink()
