"""For recipes of paper scale, offline: published configs of models, tiny random ones of their kind, invented rows."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import torch
import transformers as hf
from tokenizers import processors

from tests.launch import recipe_plans

#: Hub name -> published config, so that nothing has to be downloaded.
PUBLISHED: dict[str, hf.PreTrainedConfig] = {
    **recipe_plans.MODELS,
    "FacebookAI/roberta-base": hf.RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1
    ),  # the class's other defaults are the model's
    "openai-community/gpt2": hf.GPT2Config(),
    "meta-llama/Llama-2-7b-hf": hf.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32_000
    ),
    "EleutherAI/gpt-neo-125m": hf.GPTNeoConfig(
        hidden_size=768, num_layers=12, num_heads=12, attention_types=[[["global", "local"], 6]]
    ),
    "EleutherAI/gpt-neo-1.3B": hf.GPTNeoConfig(),
    "Qwen/Qwen2.5-7B": hf.Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    ),
}

#: Sizes under the names that architectures use for them.
_TINY = {
    "hidden_size": 16,
    "n_embd": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_layers": 2,
    "num_attention_heads": 2,
    "n_head": 2,
    "num_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1100,
    "n_positions": 1100,
    "vocab_size": 262,
}


def save_tiny(name: str, directory: pathlib.Path, tokenizer_of: pathlib.Path) -> pathlib.Path:
    """A random model of a hub model's architecture, with a byte-level tokenizer that has the marks of encoders.

    Args:
        name: of the model on the hub.
        directory: where to save.
        tokenizer_of: a byte-level model.
    """
    published = PUBLISHED[name]
    is_encoder = published.model_type in ("roberta", "bert")
    tokenizer = hf.AutoTokenizer.from_pretrained(tokenizer_of)
    if is_encoder:
        tokenizer.add_special_tokens({"pad_token": "<pad>", "sep_token": "<sep>", "cls_token": "<cls>"})
        ids = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<sep>", "<cls>")]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> <sep> $B <sep>", special_tokens=ids
        )
    tokenizer.save_pretrained(directory)
    present = published.to_dict()
    sizes: dict[str, Any] = {key: value for key, value in _TINY.items() if present.get(key) is not None}
    if "attention_types" in present:
        sizes["attention_types"] = [[["global", "local"], 1]]
    marks = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 0}
    config = type(published)(**sizes, **marks)
    if "type_vocab_size" in present:
        config.type_vocab_size = present["type_vocab_size"]
    torch.manual_seed(0)
    (hf.AutoModelForMaskedLM if is_encoder else hf.AutoModelForCausalLM).from_config(config).save_pretrained(directory)
    return directory


def dummy_rows(data: dict[str, Any], path: pathlib.Path) -> pathlib.Path:
    """Rows with the columns that the recipe names, two records a user."""
    rng = np.random.default_rng(0)
    words = ["alder", "birch", "cedar", "elm", "fir", "gorse", "hazel"]
    texts = [
        data[f"{key}_column"] for key in ("text", "text_pair", "prompt", "completion") if data.get(f"{key}_column")
    ]
    with open(path, "w", encoding="utf-8") as file:
        for number in range(48):
            row: dict[str, Any] = {data["user_column"]: number // 2}
            row |= {column: " ".join(rng.choice(words, size=rng.integers(2, 9))) for column in texts}
            if data["labels"]:
                row[data["label_column"]] = data["labels"][number % len(data["labels"])]
            file.write(json.dumps(row) + "\n")
    return path
