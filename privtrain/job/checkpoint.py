"""Resumable state: trained tensors, optimizer, clipping norm and step, whole or not at all, verified before use.

The state is by name of tensor, and whole: whichever backend and number of ranks wrote it, any other can go on from it.
Sharded backends put it together on rank 0's host memory one tensor after another (12 bytes a trained parameter), and
hand it out the same way; no rank's accelerator ever holds more than one whole tensor of it.
Everything else a resumed run needs (sample, noise, data order) is a pure function of the secret and the step.
"""

from __future__ import annotations

import dataclasses
import functools
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
from privtrain.privacy.layout import Layout
from privtrain.process.console import say

_STATE = "state.pt"
_SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed its check."""

    step: int  # steps taken
    generation: int
    state: pathlib.Path  # file of tensors


def save(
    directory: pathlib.Path,
    *,
    step: int,
    generation: int,
    layout: Layout,
    optimizer: torch.optim.Optimizer,
    clipping_norm: float,
    num_kept: int,
    backend: Backend,
) -> None:
    """Write ``directory/step-NNNNNNNN`` atomically and drop all but the newest ``num_kept``.

    Every rank calls it; rank 0 writes.
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
            _write(directory, {"step": step, "generation": generation}, content)
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
    """Hashes what goes to a file, so that no serialised copy is ever in memory. torch only appends."""

    def __init__(self, file: BinaryIO) -> None:
        self.sha = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
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
    """Return path, generation and step of every checkpoint, unverified; of a damaged one, the step in its name."""
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
    """Load a checkpoint on every rank (rank 0 reads ``state`` and sends it); return the next step's clipping norm.

    Raises:
        GuaranteeLost: if another version of privtrain wrote it.
    """
    content: dict[str, Any] = {}
    with backend.main_alone():
        if backend.is_main:
            assert state is not None
            content = _loaded(state)
    head = backend.json_from_main(lambda: content["head"])
    for slot, parameter in zip(layout.slots, layout.parameters.values(), strict=True):
        optimizer.state[parameter] = {"step": torch.tensor(head["num_updates"], dtype=torch.float32)}
        for key in [None, *head["moments"]]:
            whole = backend.from_main(functools.partial(_tensor_bytes, content, key, slot.name))
            count = slot.num_coordinates
            part = np.frombuffer(whole, dtype=np.float32)[slot.first : slot.first + count].copy()
            value = torch.from_numpy(part).view(slot.shape).to(parameter.device)
            if key:
                optimizer.state[parameter][key] = value
            else:
                parameter.detach().copy_(value)
    backend.publish()
    return head["clipping_norm"]


def _tensor_bytes(content: dict[str, Any], moment: str | None, name: str) -> bytes:
    tensors = content["tensors"] if moment is None else content["moments"][moment]
    return tensors[name].numpy().tobytes()


def _loaded(state: pathlib.Path) -> dict[str, Any]:
    """Return the state; raise if another version wrote it. ``head`` is what every rank must know of it."""
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
    """Return whole tensors, and per kind of moment the optimizer's, by name; on rank 0."""
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
        with open(state, "rb") as file:
            is_intact = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if not is_intact or type(step) is not int or type(generation) is not int:
        return None
    return Checkpoint(step, generation, state)
