"""Resumable state: adapter, optimizer and step, written whole or not at all, verified before use.

Everything else a resumed run needs (sample, noise, data order) is a pure function of the secret and the step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
from typing import Any

import torch

from privtrain.console import say
from privtrain.layout import Layout
from privtrain.rundir import replace_directory, write_atomically

_STATE = "state.pt"
_SUMMARY = "summary.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that passed its check.

    Attributes:
        step: steps behind the model.
        generation: generation that wrote it.
        state: serialised adapter and optimizer.
    """

    step: int
    generation: int
    state: bytes


def save(
    directory: pathlib.Path,
    *,
    step: int,
    generation: int,
    layout: Layout,
    optimizer: torch.optim.Optimizer,
    num_kept: int,
) -> None:
    """Write ``directory/step-NNNNNNNN`` atomically and drop all but the newest ``num_kept``."""
    buffer = io.BytesIO()
    tensors = {name: p.detach().cpu() for name, p in layout.parameters.items()}
    torch.save({"adapter": tensors, "optimizer": optimizer.state_dict()}, buffer)
    state = buffer.getvalue()
    temporary = directory / ".tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    summary = {"step": step, "generation": generation, "sha256": hashlib.sha256(state).hexdigest()}
    write_atomically(temporary / _STATE, state, mode=0o600)
    write_atomically(temporary / _SUMMARY, json.dumps(summary), mode=0o600)
    replace_directory(temporary, directory / f"step-{step:08d}")
    for old in _newest_first(directory)[num_kept:]:
        shutil.rmtree(old)


def load_newest(directory: pathlib.Path) -> Checkpoint | None:
    """The newest intact checkpoint: a damaged one is passed over with a word, since its steps can be replayed."""
    for candidate in _newest_first(directory):
        checkpoint = _read(candidate)
        if checkpoint is not None:
            return checkpoint
        say(f"[yellow]warning[/]: {candidate} is damaged (its checksum does not hold); going back to an older one")
    return None


def drop_after(directory: pathlib.Path, step: int) -> None:
    """Remove checkpoints past ``step``: they are damaged, or rest on steps that were abandoned."""
    for candidate in _newest_first(directory):
        if int(candidate.name.removeprefix("step-")) > step:
            shutil.rmtree(candidate)


def restore(state: bytes, layout: Layout, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's adapter and optimizer state in place."""
    content: dict[str, Any] = torch.load(io.BytesIO(state), weights_only=True, map_location="cpu")
    with torch.no_grad():
        for name, parameter in layout.parameters.items():
            parameter.copy_(content["adapter"][name])
    optimizer.load_state_dict(content["optimizer"])


def _newest_first(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("step-*"), reverse=True)


def _read(directory: pathlib.Path) -> Checkpoint | None:
    try:
        summary = json.loads((directory / _SUMMARY).read_text(encoding="utf-8"))
        state = (directory / _STATE).read_bytes()
    except (FileNotFoundError, ValueError):
        return None
    if hashlib.sha256(state).hexdigest() != summary.get("sha256"):
        return None
    return Checkpoint(summary["step"], summary["generation"], state)
