"""``privtrain export``: what a finished run released, as one directory that transformers and peft open elsewhere.

Merging and casting are post-processing of the released weights: the privacy statement travels with them unchanged.
``export.json`` says what was made of what: digests of the released weights, of the base model and of every file
written, and one digest over all of these, the relation. Whoever has the run can make the weights again, and
``privtrain verify`` does.

A released adapter is copied as it is, or merged into its base model; fully trained weights are cast to a dtype. "Whole"
below means a model that needs no adapter.
"""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

from privtrain.commands.outputs import output_faults
from privtrain.config.model import ModelSection
from privtrain.errors import ConfigError, Fault
from privtrain.files.atomic import replace_directory, write_atomically
from privtrain.run import bundle
from privtrain.run.base_model import changed_base_files, locate
from privtrain.run.bundle import ReleaseManifest
from privtrain.run.directory import RunDirectory
from privtrain.run.exported import DTYPES, NAME, SCHEMA, rendered, weights_of
from privtrain.run.places import own_config


def export_run(run: pathlib.Path, output: pathlib.Path, *, merge: bool, dtype: str) -> str:
    """Write a finished run's model into a new directory and open it again; return a line that says what was written.

    Args:
        run: a finished run directory.
        output: directory to make.
        merge: put the adapter into its base model; without it, an adapter is copied as it was released.
        dtype: one of :data:`DTYPES`, for merged or fully trained weights; an adapter keeps its own.

    Raises:
        ConfigError: if the run is not finished, the output exists or the dtype is unknown; nothing is written then.
        VerificationFailed: if the run does not hold what was released, or if the merged or re-opened model computes
            something else than base and adapter.
        RuntimeError: if what was saved is not what is in memory.
    """
    directory = RunDirectory(run)
    _check(directory, output, dtype, merge=merge)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        manifest = bundle.check_released(run)
        if merge and directory.adapter.exists():
            _check_base(directory, manifest)
        if directory.model.exists() or merge:
            _save_whole(directory, temporary, dtype)
            _describe(manifest, temporary, dtype)
            what = f"{'merged ' if merge else ''}model in {dtype}"
        else:
            shutil.copytree(directory.adapter, temporary)
            what = "adapter"
        replace_directory(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"wrote the {what} with its privacy statement to {output}; check it with: privtrain verify {output}"


def _check(run: RunDirectory, output: pathlib.Path, dtype: str, *, merge: bool) -> None:
    """Raise ConfigError with everything that stands against the export, before anything is written."""
    faults = output_faults(run, output)
    if dtype not in DTYPES:
        faults.append(Fault("--dtype", f"given {dtype}; must be one of {', '.join(DTYPES)}"))
    if merge and run.is_complete() and run.adapter.exists():
        faults += _unmergeable(run)
    if faults:
        raise ConfigError(faults)


def _check_base(run: RunDirectory, manifest: ReleaseManifest) -> None:
    """Raise unless the base model's files are where the run had them, with the digests that the release recorded."""
    section = own_config(run).model
    if wrong := changed_base_files(section, manifest.base_model):
        problem = (
            f"{locate(section).path} is not the base model that the adapter was trained on: other "
            f"{', '.join(wrong[:3])}; restore it, or export without --merge"
        )
        raise ConfigError([Fault("--merge", problem)])


def _unmergeable(run: RunDirectory) -> list[Fault]:
    """Return why an adapter cannot become part of its base's weights, seen before anything is loaded."""
    run.check_private()
    config = own_config(run)
    method, quantization = config.training.method, config.model.quantization
    faults = []
    if config.training.has_virtual_tokens:
        problem = f"{method} trains virtual tokens, which no weight of the base model can hold; export without --merge"
        faults.append(Fault("--merge", problem))
    quantized_as = quantization or _own_quantization(config.model)
    if quantized_as is not None:
        problem = (
            f"the adapter was trained on a base held in {quantized_as}; merged into other weights it computes "
            "something else. Export without --merge, and load the base with the same quantization"
        )
        faults.append(Fault("--merge", problem))
    return faults


def _own_quantization(model: ModelSection) -> str | None:
    """Return how the base's own ``config.json`` says that its weights are quantised, e.g. ``gptq``; None if not."""
    from transformers import PretrainedConfig

    if model.gguf_file is not None:
        return None  # transformers converts GGUF to ordinary weights on loading
    location = locate(model)
    try:
        tree, _ = PretrainedConfig.get_config_dict(location.path, **location.arguments)
    except OSError:
        return None  # loading says why
    settings = tree.get("quantization_config")
    return None if settings is None else str(settings.get("quant_method", "a quantised form"))


def _save_whole(run: RunDirectory, target: pathlib.Path, dtype: str) -> None:
    """Save the whole model in ``dtype``, open it again, and raise unless it has the same weights and outputs."""
    from transformers import AutoTokenizer

    from privtrain.models.merge import check_outputs, outputs, reopened, rounded, save_weights, whole_model

    # The values are rounded to dtype, but computed with in fp32, for exact expected outputs.
    model = rounded(whole_model(run, None), _type_of(dtype))
    expected = outputs(model)
    save_weights(model.to(_type_of(dtype)), target)
    AutoTokenizer.from_pretrained(str(run.released)).save_pretrained(str(target))
    shutil.copy(run.privacy, target / "privacy.json")
    write_atomically(target / "README.md", _card(run, dtype))
    _check_saved(model, target)
    check_outputs(expected, outputs(reopened(model, target)), target)


def _type_of(dtype: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]


def _describe(manifest: ReleaseManifest, target: pathlib.Path, dtype: str) -> None:
    """Write ``release.json`` and ``export.json`` beside the model's files: they bind those to the release."""
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "release": manifest.digest,
        "released": weights_of(manifest.files),
        "base_model": dict(manifest.base_model),
        # An adapter as it is gets no export.json, so where an adapter was released it has been merged.
        "merged": any(path.startswith("adapter/") for path in manifest.files),
        "dtype": dtype,
        "files": {path: bundle.sha256_of(target / path) for path in bundle.files_under(target)},
    }
    write_atomically(target / NAME, rendered({**content, "relation": bundle.digest_of(content)}))
    write_atomically(target / bundle.NAME, bundle.render(manifest, "export"))


def reproduction_faults(
    directory: pathlib.Path, made: Mapping[str, Any], released: pathlib.Path, base_model: pathlib.Path | None
) -> list[str]:
    """Make an export again from the run, and compare its tensors: they may differ by the dtype's round-off alone.

    Args:
        directory: the export.
        made: the content of its ``export.json``.
        released: the run directory.
        base_model: directory of the base model; by default where the run had it.

    Returns:
        A line for each tensor that differs; empty if the export follows from the release.

    Raises:
        PrivtrainError: if the run's configuration or the base model is not at hand.
    """
    import torch
    from safetensors.torch import load_file

    from privtrain.models.merge import save_weights, whole_model

    run = RunDirectory(released)
    if run.adapter.exists() and not run.resolved_config.exists():
        raise ConfigError([Fault("--released", f"{released} has no secret/config.yaml; give the whole run")])
    model = whole_model(run, base_model).to(_type_of(made["dtype"]))
    with tempfile.TemporaryDirectory() as place:
        save_weights(model, pathlib.Path(place))
        expected_tensors = _tensors(pathlib.Path(place), load_file)
    exported_tensors = _tensors(directory, load_file)
    in_one_alone = sorted(exported_tensors.keys() ^ expected_tensors.keys())
    problems = [f"tensor {name} is in one of them alone" for name in in_one_alone]
    for name in sorted(exported_tensors.keys() & expected_tensors.keys()):
        exported, expected = exported_tensors[name], expected_tensors[name]
        if exported.dtype != expected.dtype or exported.shape != expected.shape:
            problems.append(f"tensor {name} has another type or shape")
        elif not torch.equal(exported, expected) and not _is_round_off(exported, expected):
            problems.append(f"tensor {name} is not what the released weights give")
    return [f"{_weights_file(directory)}: {problem}" for problem in problems]


def _is_round_off(exported: Any, expected: Any) -> bool:
    """Return whether two tensors differ by units in the last place: another machine may round a product differently."""
    import torch

    unit = torch.finfo(expected.dtype).eps if expected.dtype.is_floating_point else 0.0
    exported, expected = exported.double(), expected.double()
    return torch.allclose(exported, expected, rtol=2 * unit, atol=2 * unit * float(expected.abs().max()))


def _tensors(directory: pathlib.Path, load_file: Any) -> dict[str, Any]:
    return {name: value for file in sorted(directory.glob("*.safetensors")) for name, value in load_file(file).items()}


def _weights_file(directory: pathlib.Path) -> str:
    return ", ".join(sorted(path.name for path in directory.glob("*.safetensors")))


def _check_saved(model: Any, target: pathlib.Path) -> None:
    """Open the saved weights, and raise RuntimeError if one is empty, missing, not finite or not as in memory."""
    import torch

    saved = dict(type(model).from_pretrained(str(target), dtype=model.dtype).named_parameters())
    for name, value in model.named_parameters():
        if name not in saved or not value.numel() or not torch.equal(saved[name], value):
            raise RuntimeError(f"{target}: tensor {name} was not saved as it is in memory")
        if not torch.isfinite(value).all():
            raise RuntimeError(f"{target}: tensor {name} is not finite in {model.dtype}; export it with --dtype fp32")


def _card(run: RunDirectory, dtype: str) -> str:
    """Return the run's card, rewritten for a merged model if an adapter was released."""
    card = (run.released / "README.md").read_text(encoding="utf-8")
    if run.model.exists():
        return card
    merged = f"The adapter is merged into its base model and stored in {dtype}: post-processing, no privacy cost.\n\n"
    for of_adapter, of_merged in (
        ("library_name: peft", "library_name: transformers"),
        ("base_model_relation: adapter", "base_model_relation: finetune"),
        ("## Privacy statement", merged + "## Privacy statement"),
    ):
        card = card.replace(of_adapter, of_merged, 1)
    return card
