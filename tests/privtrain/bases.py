"""Base models of two layers in a directory, whole or wrong in one way: bytes are the tokens, <s> is 0, </s> is 1."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import byte_core

NUM_IDS = 258


def save_tokenizer(out: pathlib.Path, template: str | None = None, pad: str | None = "<s>", extra: Any = ()) -> Any:
    """A byte tokenizer; ``extra`` marks and a ``pad`` of another name have ids from 258 on."""
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    core = byte_core("<s>", "</s>")
    core.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in ("<s>", "</s>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", **({} if pad is None else {"pad_token": pad})
    )
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(out)
    return tokenizer


def save_base(out: pathlib.Path, kind: str = "llama", **shape: Any) -> pathlib.Path:
    """A base model with its tokenizer; ``kind`` is llama or gpt2."""
    import transformers

    torch.manual_seed(3)
    marks = {"vocab_size": NUM_IDS, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        given = {**marks, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **shape}
        model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**given))
    else:
        given = {
            **marks,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            **shape,
        }
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**given))
    model.save_pretrained(out)
    save_tokenizer(out)
    return out


def change_config(directory: pathlib.Path, **values: Any) -> None:
    """Say something else in config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_weights(
    directory: pathlib.Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Put other tensors into the weight file."""
    path = directory / "model.safetensors"
    save_file({k: v.contiguous() for k, v in change(load_file(path)).items()}, path, {"format": "pt"})
