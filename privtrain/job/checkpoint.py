"""Checkpoints: trained tensors, optimizer, clipping norm and step; written whole or not at all, verified before use.

A checkpoint is a directory ``step-NNNNNNNN`` of two files: ``state.pt``, the tensors, and ``summary.json``, which holds
the number of steps taken, the generation (which secret drew their samples and noise), the ledger's commitment to the
sum of the last of them and the SHA-256 of ``state.pt``.

Tensors are stored whole and by name, so that a job with another backend or number of ranks can resume from them.
Sharded backends collect them in rank 0's host memory one after another (12 bytes a trained parameter), and send them
back the same way; no rank's accelerator ever holds more than one whole tensor.
Everything else a resumed run needs (sample, noise, data order) is a pure function of the secret and the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any, BinaryIO

import numpy as np
import torch

from privtrain.backends import Backend
from privtrain.errors import GuaranteeLost
from privtrain.files.atomic import replace_directory, write_atomically
from privtrain.privacy.layout import Layout, Slot
from privtrain.process.console import say

_STATE = "state.pt"
_SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed its check."""

    step: int  # steps taken
    generation: int
    commitment: str  # the ledger's, to the sum of the last step taken; empty in those of earlier versions
    state: pathlib.Path  # file of tensors


def save(
    directory: pathlib.Path,
    *,
    step: int,
    generation: int,
    commitment: str,
    layout: Layout,
    optimizer: torch.optim.Optimizer,
    clipping_norm: float,
    num_kept: int,
    backend: Backend,
) -> None:
    """Write ``directory/step-NNNNNNNN`` atomically and drop all but the newest ``num_kept``.

    Every rank calls it; rank 0 writes.

    Args:
        directory: of all checkpoints.
        step: steps taken.
        generation: whose secret drew the last of them.
        commitment: the ledger's, to the sum of the last of them.
        layout: the trained tensors, or the parts of them that this rank holds.
        optimizer: over the same tensors.
        clipping_norm: of the next step.
        num_kept: checkpoints to keep.
        backend: collects whole tensors on rank 0.
    """
    tensors, moments = _collected(layout, optimizer, backend)
    with backend.main_alone():
        if backend.is_main:
            content = {
                "tensors": tensors,
                "moments": moments,
                "num_updates": _num_updates(optimizer),
                "clipping_norm": clipping_norm,
            }
            _write(directory, {"step": step, "generation": generation, "commitment": commitment}, content)
            for old in _newest_first(directory)[num_kept:]:
                shutil.rmtree(old)


def _write(directory: pathlib.Path, summary: dict[str, Any], content: dict[str, Any]) -> None:
    """Write a checkpoint beside the others and rename it into place, with its digest in the summary."""
    temporary = directory / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    descriptor = os.open(temporary / _STATE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        writer = _Hashing(file)
        try:
            torch.save(content, writer)  # pyright: ignore[reportArgumentType] - it asks for no more than write
        except RuntimeError:  # torch says only that its positions do not fit, not that the disk is full
            if writer.error is not None:
                raise writer.error from None
            raise
    summary = {**summary, "sha256": writer.sha.hexdigest()}
    write_atomically(temporary / _SUMMARY, json.dumps(summary), mode=0o600)
    replace_directory(temporary, directory / f"step-{summary['step']:08d}")


class _Hashing:
    """A file that hashes what is written to it, so that no serialised copy is ever in memory. torch only appends.

    Attributes:
        sha: over everything written.
        error: of a write that failed; torch swallows it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.sha = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
        """Write and hash `data`; keep the error of a failed write, which torch replaces by one of its own."""
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.sha.update(data)
        return written

    def flush(self) -> None:
        self._file.flush()


def load_newest(directory: pathlib.Path) -> Checkpoint | None:
    """Return the newest intact checkpoint; skip damaged ones with a warning, since their steps can be replayed."""
    for candidate in _newest_first(directory):
        checkpoint = _read(candidate)
        if checkpoint is not None:
            return checkpoint
        say(f"[yellow]warning[/]: {candidate} is damaged (its checksum does not hold); going back to an older one")
    return None


def listed(directory: pathlib.Path) -> list[tuple[pathlib.Path, int | None, int]]:
    """Return (path, generation, steps taken) of every checkpoint, newest first, by its summary; tensors are not read.

    Where the summary is damaged: generation ``None``, and the steps by the directory's name.
    """
    checkpoints = []
    for path in _newest_first(directory):
        try:
            summary = json.loads((path / _SUMMARY).read_text(encoding="utf-8"))
            checkpoints.append((path, int(summary["generation"]), int(summary["step"])))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            checkpoints.append((path, None, int(path.name.removeprefix("step-"))))
    return checkpoints


def drop_after(directory: pathlib.Path, step: int) -> None:
    """Remove checkpoints past ``step``: they are damaged, or contain steps that were abandoned."""
    for candidate in _newest_first(directory):
        if int(candidate.name.removeprefix("step-")) > step:
            shutil.rmtree(candidate)


def restore(state: pathlib.Path | None, layout: Layout, optimizer: torch.optim.Optimizer, backend: Backend) -> float:
    """Load a checkpoint into parameters and optimizer on every rank; return the next step's clipping norm.

    Args:
        state: the checkpoint's file of tensors, which rank 0 alone reads and sends; ``None`` on the other ranks.
        layout: the parameters, or the parts of them, that this rank holds.
        optimizer: over the same parameters.
        backend: sends each tensor from rank 0.

    Raises:
        GuaranteeLost: if another version of privtrain wrote it.
    """
    content: dict[str, Any] = {}  # stays empty on the other ranks, which never call what reads it
    with backend.main_alone():
        if backend.is_main:
            assert state is not None
            content = _loaded(state)
    head = backend.json_from_main(lambda: content["head"])
    for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
        parameter.detach().copy_(_received(content, "tensors", slot, backend))
        state_of_parameter = {"step": torch.tensor(head["num_updates"], dtype=torch.float32)}
        for moment in head["moments"]:
            state_of_parameter[moment] = _received(content, moment, slot, backend).to(parameter.device)
        optimizer.state[parameter] = state_of_parameter
    backend.publish()
    return head["clipping_norm"]


def _received(content: dict[str, Any], kind: str, slot: Slot, backend: Backend) -> torch.Tensor:
    """Return this rank's part, on the CPU, of a tensor that rank 0 sends whole.

    Args:
        content: of the checkpoint, on rank 0.
        kind: ``tensors`` for the parameter itself, or the name of a moment of the optimizer, e.g. ``exp_avg``.
        slot: the parameter's name, and which part of it this rank holds.
        backend: sends the tensor.
    """

    def values() -> bytes:
        """Return the whole tensor's fp32 values; called on rank 0 alone."""
        tensors = content["tensors"] if kind == "tensors" else content["moments"][kind]
        return tensors[slot.name].numpy().tobytes()

    whole = np.frombuffer(backend.from_main(values), dtype=np.float32)
    part = whole[slot.first : slot.first + slot.num_coordinates].copy()
    return torch.from_numpy(part).view(slot.shape)


def _loaded(state: pathlib.Path) -> dict[str, Any]:
    """Return the content of ``state.pt``, and under ``head`` the small part that every rank must know.

    ``tensors``: name → parameter. ``moments``: name of the moment → name of the parameter → tensor. ``head``: the
    number of optimizer updates, the clipping norm, and the names of the moments.

    Raises:
        GuaranteeLost: if another version of privtrain wrote it.
    """
    content = torch.load(state, weights_only=True, map_location="cpu")
    missing = sorted({"tensors", "moments", "num_updates", "clipping_norm"} - set(content))
    if missing:
        raise GuaranteeLost(
            f"{state.parent} was written by another version of privtrain (it lacks {', '.join(missing)}); go on with "
            "that version, or remove this checkpoint: the steps behind it are then replayed or, elsewhere, stay charged"
        )
    head = {key: content[key] for key in ("num_updates", "clipping_norm")} | {"moments": sorted(content["moments"])}
    return {**content, "head": head}


def _collected(
    layout: Layout, optimizer: torch.optim.Optimizer, backend: Backend
) -> tuple[dict[str, torch.Tensor | None], dict[str, dict[str, torch.Tensor | None]]]:
    """Return name → whole parameter, and moment of the optimizer → name → whole tensor.

    Every rank calls it. On rank 0 the tensors are on the CPU; on the others they are ``None``.
    """
    tensors: dict[str, torch.Tensor | None] = {}
    moments: dict[str, dict[str, torch.Tensor | None]] = {}
    for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
        tensors[slot.name] = backend.whole(slot, parameter)
        for key, value in sorted(optimizer.state[parameter].items()):
            if key != "step":
                moments.setdefault(key, {})[slot.name] = backend.whole(slot, value)
    return tensors, moments


def _num_updates(optimizer: torch.optim.Optimizer) -> float:
    return float(next(iter(optimizer.state.values()))["step"])


def _newest_first(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("step-*"), reverse=True)


def _read(directory: pathlib.Path) -> Checkpoint | None:
    """Return the checkpoint in a directory; None if it is damaged."""
    state = directory / _STATE
    try:
        summary = json.loads((directory / _SUMMARY).read_text(encoding="utf-8"))
        step, generation, sha256 = summary["step"], summary["generation"], summary["sha256"]
        commitment = str(summary.get("commitment", ""))
        with open(state, "rb") as file:
            is_intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_intact or type(step) is not int or type(generation) is not int:
        return None
    return Checkpoint(step, generation, commitment, state)
