"""Read a base model's weights tensor by tensor, or only a part of one, for ranks that hold only parts.

Where the files are safetensors and name their tensors as the model does, a part is read from the file and the whole
is nowhere in memory. Other files (GGUF, or weights that transformers renames or fuses while it loads) are loaded whole
into host memory first, once a rank, and freed after the parts were copied.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from privtrain.config.model import LoraSection, ModelSection
from privtrain.errors import ConfigError, Fault
from privtrain.models.load import NO_FOREIGN_CODE, load_base, load_classifier, switch_cache_off
from privtrain.run.base_model import locate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: (tensor name, first coordinate, number of coordinates) → flat values.
PartReader = Callable[[str, int, int], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class ClassifierHead:
    """What makes a base model a sequence classifier.

    Attributes:
        labels: names of the classes, in order.
        init_seed: public seed of a head that the base's files lack.
    """

    labels: tuple[int | str, ...]
    init_seed: int


class BaseSource:
    """Where a base model comes from. It can be loaded whole, built without weights, or read in parts.

    Args:
        model: which model.
        dtype: type of its weights.
        head: for a sequence classifier; ``None`` for a language model.
        method: ``training.method``.
        lora: settings of the adapter, where ``method`` is lora.
    """

    def __init__(
        self,
        model: ModelSection,
        dtype: torch.dtype,
        head: ClassifierHead | None = None,
        method: str = "lora",
        lora: LoraSection | None = None,
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.head = head
        self.method = method
        # By default what asks for no whole weights: see _refuse_parts.
        self.lora = lora if lora is not None and method == "lora" else LoraSection()

    def whole(self) -> PreTrainedModel:
        """Return the model with its weights, frozen.

        Raises:
            ConfigError: if it cannot be loaded.
        """
        if self.head is None:
            return load_base(self.model, self.dtype)
        head = self.head
        return load_classifier(self.model, self.dtype, labels=head.labels, init_seed=head.init_seed)

    def empty(self) -> PreTrainedModel:
        """Return the model without weights, frozen; the caller chooses by context where its tensors are made.

        Raises:
            ConfigError: if this model or method needs the whole base on every rank.
        """
        from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

        self._refuse_parts()
        location = locate(self.model)
        config = AutoConfig.from_pretrained(location.path, **NO_FOREIGN_CODE, **location.arguments)
        if getattr(config, "quantization_config", None) is not None and self.model.gguf_file:
            delattr(config, "quantization_config")
        model = AutoModelForCausalLM.from_config(config, dtype=self.dtype)
        switch_cache_off(model)
        with contextlib.suppress(OSError):  # a model whose files have no generation config keeps its class's
            model.generation_config = GenerationConfig.from_pretrained(location.path, **_hub_only(location.arguments))
        return model.eval().requires_grad_(False)

    def _refuse_parts(self) -> None:
        """Raise if this model or method must see whole weights of the base, of which each rank holds only parts."""
        elsewhere = "a base that is sharded over ranks (ZeRO-3, FSDP2); launch with ddp, zero1 or zero2"
        faults = []
        if self.head is not None:
            faults.append(Fault("data.format", f"classification does not run on {elsewhere}"))
        if self.method not in ("lora", "full"):
            faults.append(Fault("training.method", f"{self.method} does not run on {elsewhere}"))
        # These two compute with, or copy, the base's weights when the adapter is made.
        if self.lora.use_dora:
            faults.append(Fault("lora.use_dora", f"does not run on {elsewhere}, or set false"))
        if self.lora.modules_to_save:
            faults.append(Fault("lora.modules_to_save", f"does not run on {elsewhere}, or leave it empty"))
        if self.model.quantization is not None:
            faults.append(Fault("model.quantization", f"{self.model.quantization} does not run on {elsewhere}"))
        if faults:
            raise ConfigError(faults)

    def reader(self, shapes: Mapping[str, tuple[int, ...]]) -> PartReader:
        """Return a function that reads parts of the tensors with these names and shapes, in the type of the weights.

        If the safetensors files do not have just these tensors, the whole model is loaded now, and read from memory.
        """
        files = _SafetensorsParts.find(self.model, shapes)
        if files is not None:
            return lambda name, first, count: files.read(name, first, count).to(self.dtype)
        values = {name: p.detach().flatten() for name, p in self.whole().named_parameters()}
        return lambda name, first, count: values[name][first : first + count]


class _SafetensorsParts:
    """The tensors in a model's safetensors files, of which any run of consecutive coordinates can be read.

    Args:
        file_of: name of a tensor → the file that holds it.
    """

    def __init__(self, file_of: Mapping[str, pathlib.Path]) -> None:
        self._file_of = file_of
        self._open: dict[pathlib.Path, Any] = {}

    @classmethod
    def find(cls, model: ModelSection, shapes: Mapping[str, tuple[int, ...]]) -> _SafetensorsParts | None:
        """Return the files of a model, if they hold just these tensors under just these names and shapes."""
        if model.gguf_file:
            return None
        files = cls({name: path for path in _weight_files(model) for name in _names(path)})
        if all(files.has(name, shape) for name, shape in shapes.items()):
            return files
        return None

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        return name in self._file_of and tuple(self._slice(name).get_shape()) == shape

    def read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Return ``count`` coordinates of the flattened tensor from ``first`` on; read only the rows that hold them."""
        stored = self._slice(name)
        shape = stored.get_shape()
        if not shape:  # a scalar has no rows
            return stored[...].flatten()[first : first + count]
        width = math.prod(shape[1:])  # coordinates of a row
        first_row, end_row = first // width, -(-(first + count) // width)  # the second rounded up
        rows = stored[first_row:end_row].flatten()
        start = first - first_row * width
        return rows[start : start + count]

    def _slice(self, name: str) -> Any:
        """Return a stored tensor, of which nothing is read until it is indexed. Files are opened once."""
        from safetensors import safe_open

        path = self._file_of[name]
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt")
        return self._open[path].get_slice(name)


def _names(path: pathlib.Path) -> list[str]:
    """Return the names of the tensors in a safetensors file, without reading the tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _weight_files(model: ModelSection) -> list[pathlib.Path]:
    """Return every safetensors file of the model on this machine; none if it has only others.

    Files of a hub model are downloaded. There is one file, or an index that names several.
    """
    from transformers.utils import cached_file

    location = locate(model)
    optional = {
        **location.arguments,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    single = cached_file(location.path, "model.safetensors", **optional)
    if single is not None:
        return [pathlib.Path(single)]
    index = cached_file(location.path, "model.safetensors.index.json", **optional)
    if index is None:
        return []
    parts = sorted(set(json.loads(pathlib.Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [pathlib.Path(str(cached_file(location.path, part, **location.arguments))) for part in parts]


__all__ = ["BaseSource", "ClassifierHead", "PartReader"]


def _hub_only(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that say where files are, without the one that GenerationConfig does not know."""
    return {name: value for name, value in arguments.items() if name != "gguf_file"}


def weights_checksum(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Return a cheap digest that changes when the weights change: of every named tensor's sum and norm."""
    numbers = []
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach()
        value = value if value.is_floating_point() else value.double()  # quantised weights are whole numbers
        norm = torch.linalg.vector_norm(value, dtype=torch.float64)
        numbers.append((name, float(value.sum(dtype=torch.float64)), float(norm)))
    return hashlib.sha256(repr(numbers).encode()).hexdigest()
