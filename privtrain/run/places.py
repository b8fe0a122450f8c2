"""Find a run's base model and data from any directory, where its configuration names them relative to another one."""

from __future__ import annotations

import glob
import json
import pathlib
from typing import Any

from privtrain.config import Config
from privtrain.config.data import FilesSource
from privtrain.run.directory import RunDirectory


def located(config: Config, run: RunDirectory) -> Config:
    """Return a run's own configuration with the relative paths that are not here as the run's first start had them.

    Files that are here come first: a run may have been moved together with its data.

    Args:
        config: read from the run's ``secret/config.yaml``.
        run: the run, whose identity says in which directory it was started.
    """
    if not run.identity.is_file():
        return config
    started_in = json.loads(run.identity.read_text("utf-8")).get("started_in")
    if started_in is None:
        return config

    def found(path: pathlib.Path) -> pathlib.Path:
        there = pathlib.Path(started_in, path)
        return there if not glob.glob(_literal(path)) and glob.glob(_literal(there)) else path

    data: dict[str, Any] = {}
    for key in ("source", "evaluation"):
        source = getattr(config.data, key)
        if isinstance(source, FilesSource):
            data[key] = source.model_copy(update={"paths": [found(path) for path in source.paths]})
    if config.data.chat_template_file is not None:
        data["chat_template_file"] = found(config.data.chat_template_file)
    model = {}
    if config.model.name_or_path is not None:
        model["name_or_path"] = str(found(pathlib.Path(config.model.name_or_path)))
    sections = {"data": config.data.model_copy(update=data), "model": config.model.model_copy(update=model)}
    return config.model_copy(update=sections)


def _literal(path: pathlib.Path) -> str:
    """Return a path as a pattern: a name with brackets that is there stands for itself."""
    return glob.escape(str(path)) if path.exists() else str(path)
