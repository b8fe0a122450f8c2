"""Read a YAML file and dotted overrides into a :class:`Config`; report every fault at once."""

from __future__ import annotations

import difflib
import pathlib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pydantic
import yaml

from privtrain.config.schema import Config
from privtrain.errors import ConfigError, Fault
from privtrain.files import reading

_MAX_BYTES = 16 << 20


def load_config(path: pathlib.Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate.

    Args:
        path: a YAML file with the tree of :class:`Config`.
        overrides: dotted assignments such as ``privacy.target_epsilon=4``; values are parsed as YAML.

    Returns:
        The validated, frozen configuration.

    Raises:
        ConfigError: with every fault, each naming its YAML path.
    """
    return validate(apply_overrides(_read_yaml(path), overrides), source=str(path))


def validate(tree: dict[str, Any], source: str = "") -> Config:
    """Validate a tree; see :func:`load_config`."""
    try:
        return Config.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ConfigError([_fault(item) for item in error.errors(include_url=False)], source) from None


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``tree`` with ``a.b=value`` assignments applied, values read as YAML."""
    result = yaml.safe_load(yaml.safe_dump(tree))
    faults = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            faults.append(Fault(override, "an override looks like section.key=value"))
            continue
        *parents, leaf = key.split(".")
        node = result
        for part in parents:
            if not isinstance(node.setdefault(part, {}), dict):
                faults.append(Fault(key, f"{part!r} is not a section"))
                break
            node = node[part]
        else:
            try:
                node[leaf] = _parse_scalar(text)
            except yaml.YAMLError:
                faults.append(Fault(key, f"given {text!r}, which is no YAML value"))
    if faults:
        raise ConfigError(faults, "overrides")
    return result


def to_yaml(tree: dict[str, Any]) -> str:
    """A configuration tree as YAML, in the order of the sections."""
    return yaml.safe_dump(tree, sort_keys=False)


def public_tree(config: Config) -> dict[str, Any]:
    """The resolved configuration without this machine's paths."""
    tree = config.model_dump(
        mode="json", exclude={"run": {"output_dir"}, "registry": {"url"}, "performance": {"index_dir"}, "release": True}
    )
    if config.model.name_or_path is not None:
        tree["model"]["name_or_path"] = config.model.public_name
    if config.data.chat_template_file is not None:
        tree["data"]["chat_template_file"] = config.data.chat_template_file.name
    if "paths" in tree["data"]["source"]:
        tree["data"]["source"]["paths"] = [pathlib.Path(path).name for path in tree["data"]["source"]["paths"]]
    return tree


def _parse_scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    # YAML 1.1 reads 1e-5 as a string; people type it all the time.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _read_yaml(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError([Fault("", f"no such file: {path}")])
    content = reading.read_bytes(path, max_bytes=_MAX_BYTES, follow_links=True)
    try:
        tree = yaml.safe_load(content.decode("utf-8"))
    except reading.YAML_FAULTS as error:
        raise ConfigError([Fault("", f"not a YAML file: {' '.join(str(error).split())}")], str(path)) from None
    if not isinstance(tree, dict):
        raise ConfigError([Fault("", "the file must hold sections such as run, model, data, privacy")], str(path))
    return numbers_as_meant(tree)


def numbers_as_meant(node: Any) -> Any:
    """A tree in which ``1e-5`` (a string in YAML 1.1) is the number that people mean."""
    if isinstance(node, dict):
        return {key: numbers_as_meant(value) for key, value in node.items()}
    if isinstance(node, list):
        return [numbers_as_meant(value) for value in node]
    if isinstance(node, str) and node[:1].isdigit() and "e" in node.lower():
        return _parse_scalar(node)
    return node


def _fault(item: Any) -> Fault:
    location = [str(part) for part in item["loc"] if part not in ("files", "hub", "plays")]
    path = ".".join(location)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], sorted(_keys_beside(location[:-1])), n=1)
        hint = f"; did you mean {'.'.join([*location[:-1], near[0]])}?" if near else ""
        return Fault(path, f"unknown key{hint}")
    if item["type"] == "missing":
        return Fault(path, "this key is required")
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return Fault(path, message)
    return Fault(path, f"given {item['input']!r}; {message[0].lower()}{message[1:]}")


def _keys_beside(location: Sequence[str]) -> set[str]:
    models: list[type[pydantic.BaseModel]] = [Config]
    for part in location:
        models = [
            m for model in models if part in model.model_fields for m in _models(model.model_fields[part].annotation)
        ]
    return {key for model in models for key in model.model_fields}


def _models(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models(argument)
