"""The model, its tokenizer, packer and objective, as this rank trains it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from privtrain.backends import Backend
from privtrain.clipping import refusals
from privtrain.config import Config
from privtrain.data.encode import Encoder
from privtrain.data.lines import LinePacker
from privtrain.data.microbatch import Packer
from privtrain.models.head_loss import FrozenHead
from privtrain.models.limits import check_limits, num_embedded, pad_classifier, padding_id
from privtrain.models.load import base_dtype, load_tokenizer, resolve_precision
from privtrain.models.losses import CausalLM, Classification, Objective
from privtrain.models.trainable import INIT_SEED, make_trainable
from privtrain.models.weights import BaseSource, ClassifierHead, weights_checksum
from privtrain.training.repeatable import prefer_repeatable


@dataclasses.dataclass(frozen=True)
class Network:
    """The model and what goes with it on this rank.

    Attributes:
        tokenizer: of transformers.
        model: with what is trained of it; the rest is frozen.
        precision: of forward and backward passes, ``"bf16"`` or ``"fp32"``.
        autocast: context of that precision.
        packer: makes microbatches of padded rows, a record in each.
        line_packer: makes *lines*, long rows that several units share; ``None`` where the configuration asks for rows.
        encoder: turns records into tokens.
        objective: the loss of a row.
    """

    tokenizer: Any
    model: Any
    precision: str
    autocast: torch.autocast
    packer: Packer
    line_packer: LinePacker | None
    encoder: Encoder
    objective: Objective

    @property
    def num_ids(self) -> int:
        """Token ids below this are known to both the tokenizer and the model."""
        return min(len(self.tokenizer), num_embedded(self.model))

    @property
    def lone_packer(self) -> Packer:
        """A packer of one record at a time, so that its loss is a function of itself alone."""
        return dataclasses.replace(self.packer, microbatch_size=1)


def load_network(config: Config, backend: Backend) -> Network:
    """Load the model in the precision of the configuration, with what a step needs beside it."""
    tokenizer = load_tokenizer(config.model)
    precision = resolve_precision(config.performance.precision, backend.device)
    model = _trainable_model(config, precision, backend, tokenizer)
    pad_id = padding_id(model, tokenizer)
    encoder = Encoder(config.data, tokenizer, num_embedded(model))
    model.train()
    prefer_repeatable(backend.device)
    packer = Packer(config.performance.microbatch_size, config.data.max_length, pad_id)
    autocast = torch.autocast(backend.device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
    objective = _objective(config, model, tokenizer, pad_id)
    line_packer = _line_packer(config, pad_id, backend.device.type, model)
    return Network(tokenizer, model, precision, autocast, packer, line_packer, encoder, objective)


def _line_packer(config: Config, pad_id: int, device_type: str, model: torch.nn.Module) -> LinePacker | None:
    """Return what packs units into lines for this model; ``None`` where the configuration asks for rows."""
    performance, max_length = config.performance, config.data.max_length
    if performance.packing == "rows":
        return None
    return LinePacker.of(
        max_length,
        performance.microbatch_size,
        pad_id,
        performance.microbatch_tokens,
        device_type=device_type,
        # The probes tell a tensor's dimension of tokens by its size, so no line may be as long as another dimension.
        avoided=_sizes(model),
    )


def _sizes(model: Any) -> set[int]:
    """Return the sizes of the model's own dimensions: of its weights, and every number in its configs."""
    sizes = {size for parameter in model.parameters() for size in parameter.shape}
    for config in refusals.configs(refusals.unwrapped(model)):
        sizes.update(value for value in vars(config).values() if isinstance(value, int) and not isinstance(value, bool))
    return sizes


def _objective(config: Config, model: Any, tokenizer: Any, pad_id: int) -> Objective:
    """Return the loss of a row: of next tokens or, where the data have labels, of the label."""
    labels, is_pair = config.data.labels, config.data.text_pair_column is not None
    if labels is None:
        return CausalLM(None if config.performance.packing == "rows" else FrozenHead.of(model))
    return Classification.of(model, tokenizer, num_labels=len(labels), pad_id=pad_id, is_pair=is_pair)


def _trainable_model(config: Config, precision: str, backend: Backend, tokenizer: Any) -> torch.nn.Module:
    """Load the base in its dtype, check its limits and add what is trained."""
    # A base whose own weights are trained keeps them in fp32; a frozen one may be stored in less.
    dtype = torch.float32 if config.training.releases_model else base_dtype(precision, backend.device)
    head = None if config.data.labels is None else ClassifierHead(tuple(config.data.labels), INIT_SEED)
    base: Any = backend.load_base(BaseSource(config.model, dtype, head, config.training.method, config.lora))
    check_limits(config, base, tokenizer)
    if head is not None:
        pad_classifier(base, tokenizer)
    model = make_trainable(base, config, INIT_SEED)
    if config.training.method != "full":
        model = model.to(backend.device)  # the base is there already; what was added to it is not
    if config.performance.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def checksum_over_ranks(model: torch.nn.Module, backend: Backend) -> str:
    """Return one digest of all weights, whichever rank holds them; the same on every rank, which all call it."""
    mine = weights_checksum(backend.local_tensors(model))
    return backend.combined_digest(bytes.fromhex(mine)).hex()
