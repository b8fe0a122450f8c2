"""``privtrain export``: what a finished run released, as one directory that transformers and peft open elsewhere.

Merging and casting are post-processing of the released weights: the privacy statement travels with them unchanged.
"""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

from privtrain.config import load_config
from privtrain.errors import ConfigError, Fault
from privtrain.rundir import RunDirectory, replace_directory, write_atomically

DTYPES = ("fp32", "bf16", "fp16")


def export_run(run: pathlib.Path, output: pathlib.Path, *, merge: bool, dtype: str) -> str:
    """Write a finished run's model into a new directory and open it again.

    Args:
        run: a finished run directory.
        output: directory to make.
        merge: put the adapter into its base model; without it, an adapter is copied as it was released.
        dtype: one of :data:`DTYPES`, for merged or fully trained weights; an adapter keeps its own.

    Returns:
        A line that says what was written.

    Raises:
        ConfigError: if the run is not finished, the output exists or the dtype is unknown; nothing is written then.
        RuntimeError: if what was saved is not what is in memory.
    """
    directory = RunDirectory(run)
    _check(directory, output, dtype)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if directory.model.exists() or merge:
            _save_whole(directory, temporary, dtype)
            what = f"{'merged ' if merge else ''}model in {dtype}"
        else:
            shutil.copytree(directory.adapter, temporary)
            what = "adapter"
        replace_directory(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"wrote the {what} with its privacy statement to {output}"


def _check(run: RunDirectory, output: pathlib.Path, dtype: str) -> None:
    faults = []
    if not run.is_complete():
        faults.append(
            Fault("RUN", f"{run.root} holds no finished run (no privacy.json); finish it with privtrain train")
        )
    if output.exists():
        faults.append(Fault("OUTPUT", f"{output} exists; choose another directory or remove it"))
    if dtype not in DTYPES:
        faults.append(Fault("--dtype", f"given {dtype}; must be one of {', '.join(DTYPES)}"))
    if faults:
        raise ConfigError(faults)


def _save_whole(run: RunDirectory, target: pathlib.Path, dtype: str) -> None:
    import torch
    from transformers import AutoTokenizer

    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    model = _whole_model(run).to(types[dtype])
    model.save_pretrained(str(target))
    AutoTokenizer.from_pretrained(str(run.released)).save_pretrained(str(target))
    shutil.copy(run.privacy, target / "privacy.json")
    write_atomically(target / "README.md", _card(run, dtype))
    _check_saved(model, target)


def _whole_model(run: RunDirectory) -> Any:
    """The released model in fp32, so that merging rounds once."""
    import torch

    from privtrain.models import load_adapter, load_base

    if run.model.exists():
        import transformers

        (architecture,) = transformers.AutoConfig.from_pretrained(str(run.model)).architectures or []
        return getattr(transformers, architecture).from_pretrained(str(run.model), dtype=torch.float32)
    base = load_base(load_config(run.resolved_config).model, torch.float32)
    adapted: Any = load_adapter(base, run.adapter)
    return adapted.merge_and_unload(safe_merge=True)


def _check_saved(model: Any, target: pathlib.Path) -> None:
    """Open what was saved: weights that are empty, missing, not finite or different are never handed out."""
    import torch

    saved = dict(type(model).from_pretrained(str(target), dtype=model.dtype).named_parameters())
    for name, value in model.named_parameters():
        if name not in saved or not value.numel() or not torch.equal(saved[name], value):
            raise RuntimeError(f"{target}: tensor {name} was not saved as it is in memory")
        if not torch.isfinite(value).all():
            raise RuntimeError(f"{target}: tensor {name} is not finite in {model.dtype}; export it with --dtype fp32")


def _card(run: RunDirectory, dtype: str) -> str:
    card = (run.released / "README.md").read_text(encoding="utf-8")
    if run.model.exists():
        return card
    merged = f"The adapter is merged into its base model and stored in {dtype}: post-processing, no privacy cost.\n\n"
    return card.replace("library_name: peft", "library_name: transformers").replace(
        "## Privacy statement", merged + "## Privacy statement", 1
    )
