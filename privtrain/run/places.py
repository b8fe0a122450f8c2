"""Find a run's base model and data from any directory, where its configuration names them relative to another one."""

from __future__ import annotations

import glob
import pathlib
from typing import Any

from privtrain.config import Config, load_config
from privtrain.config.data import FilesSource
from privtrain.data.corpus import files_named
from privtrain.files import reading
from privtrain.run.directory import RunDirectory


def own_config(run: RunDirectory) -> Config:
    """Return the configuration in a run's ``secret/``, its paths as of :func:`located`."""
    return located(load_config(run.resolved_config), run)


def located(config: Config, run: RunDirectory) -> Config:
    """Return a run's own configuration with the relative paths that are not here as the run's first start had them.

    Files that are here come first: a run may have been moved together with its data.

    Args:
        config: read from the run's ``secret/config.yaml``.
        run: the run, whose identity says in which directory it was started.

    Raises:
        DamagedFile: if the identity cannot be read.
    """
    if not run.identity.is_file():
        return config
    started_in = reading.read_json(run.identity, remedy="restore it").get("started_in")
    if started_in is None:
        return config

    def moved(path: pathlib.Path) -> pathlib.Path:
        there = pathlib.Path(started_in, path)
        return there if not path.exists() and there.exists() else path

    def moved_pattern(path: pathlib.Path) -> pathlib.Path:
        # The directory is no pattern, whatever its name, but stands in one where the path is one.
        tried = (path, pathlib.Path(started_in, path), pathlib.Path(glob.escape(started_in), path))
        return next(filter(files_named, tried), path)

    data: dict[str, Any] = {}
    for key in ("source", "evaluation"):
        source = getattr(config.data, key)
        if isinstance(source, FilesSource):
            data[key] = source.model_copy(update={"paths": list(map(moved_pattern, source.paths))})
    if config.data.chat_template_file is not None:
        data["chat_template_file"] = moved(config.data.chat_template_file)
    model = {}
    name = config.model.name_or_path
    if name is not None and moved(pathlib.Path(name)) != pathlib.Path(name):  # else as it is: ./base is not base
        model["name_or_path"] = str(moved(pathlib.Path(name)))
    sections = {"data": config.data.model_copy(update=data), "model": config.model.model_copy(update=model)}
    return config.model_copy(update=sections)
