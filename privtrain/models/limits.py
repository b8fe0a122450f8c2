"""What a model can read: how many ids it embeds, and how long a record may be. Known before any record is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from privtrain.config import Config
from privtrain.config.model import ModelSection
from privtrain.errors import ConfigError, Fault
from privtrain.models.load import load_architecture

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How names of learned position embeddings end in transformers' models, beside GPT-2's wpe.
_POSITIONS = ("position_embeddings", "embed_positions", "position_embedding")


def num_embedded(model: Any) -> int:
    """Return the number of ids that a model embeds; its weights were compared with its config when they were loaded."""
    return int(model.config.vocab_size)


def num_ids_of(model: ModelSection) -> int:
    """Return the number of ids that a base model embeds, by its configuration alone: no weight is loaded.

    Raises:
        ConfigError: if the configuration cannot be read.
    """
    return int(load_architecture(model).vocab_size)


def num_positions_of(model: ModelSection) -> int | None:
    """Return the most tokens that a base model can read, as its configuration says; ``None`` if it does not say.

    Raises:
        ConfigError: if the configuration cannot be read.
    """
    config = load_architecture(model)
    known = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
    # RoBERTa numbers positions from 2 on: padding id 1, plus one. So two of the stated number are never used.
    offset = 2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0
    return min((int(number) - offset for number in known if isinstance(number, int)), default=None)


def learned_positions(model: torch.nn.Module) -> int | None:
    """Return the most tokens that a model with learned positions can read; ``None`` where positions are computed."""
    sizes = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if isinstance(module, torch.nn.Embedding) and (last == "wpe" or last.endswith(_POSITIONS)):
            # Rows before the first position: OPT has an ``offset`` of 2; RoBERTa counts from its padding id on.
            offset = getattr(module, "offset", 0)
            if not offset and module.padding_idx is not None:
                offset = module.padding_idx + 1
            sizes.append(module.num_embeddings - int(offset))
    return min(sizes, default=None)


def check_limits(config: Config, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless the model can read records of ``data.max_length``, and has embeddings of begin and end mark.

    Raises:
        ConfigError: with every fault.
    """
    faults, size, longest = [], num_embedded(model), learned_positions(model)
    if config.training.has_virtual_tokens and longest is not None:
        longest -= config.prompt.num_virtual_tokens
    # The last place of a classification record is the label's, which the model reads as padding.
    if longest is not None and config.data.max_length > longest:
        less_prompt = ", less prompt.num_virtual_tokens" if config.training.has_virtual_tokens else ""
        label = ", the label's place among them" if config.data.is_classification else ""
        problem = (
            f"given {config.data.max_length}; the model has learned positions for at most {longest} tokens"
            f"{less_prompt}{label}"
        )
        faults.append(Fault("data.max_length", problem))
    for name in ("bos_token", "eos_token"):
        number = getattr(tokenizer, f"{name}_id")
        if isinstance(number, int) and number >= size:
            faults.append(
                Fault("model", f"the tokenizer's {name} has id {number}; the model embeds {size} ids, from 0 on")
            )
    if faults:
        raise ConfigError(faults)


def pad_classifier(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the padding id of a sequence classifier: a decoder classifies at the last token that is not padding."""
    model.config.pad_token_id = padding_id(model, tokenizer)


def padding_id(model: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that rows are padded with: the tokenizer's, or the end mark's if the model does not embed that."""
    number = tokenizer.pad_token_id
    if not isinstance(number, int) or number >= num_embedded(model):
        number = tokenizer.eos_token_id
    assert isinstance(number, int)
    return number
