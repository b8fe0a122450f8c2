"""Texts drawn from the base model at a high temperature, for canaries that a LoRA can learn (arXiv 2606.10481).

Drawn once, before training, into a file: text that depends on the public base model, a public seed and nobody's data.
Which of them are planted is decided later, by coins that stay the run's secret. A file, not a draw at each start, since
another processor would round another text.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import torch

from attacks.errors import AttackInputError
from privtrain.config import load_config
from privtrain.data.encode import marks
from privtrain.files.atomic import write_atomically
from privtrain.models.load import load_base, load_tokenizer

_BATCH = 64
_MOST_ROUNDS = 50


def write_samples(
    config_path: pathlib.Path, out: pathlib.Path, *, count: int, num_tokens: int, temperature: float, seed: int
) -> int:
    """Write ``count`` different texts, drawn token by token from the base model, and return their number.

    Only texts are kept that give the drawn tokens again when they are encoded, since training reads text.

    Args:
        config_path: the run's configuration, for its base model and ``data.max_length``.
        out: the file, one JSON string a line; must not be there.
        count: different texts.
        num_tokens: tokens of each.
        temperature: of the sampling.
        seed: of the sampling.

    Raises:
        AttackInputError: if the file is there, the texts would be cut, or too few survive.
        ConfigError: naming every fault of the configuration.
    """
    config = load_config(config_path)
    if out.exists():
        raise AttackInputError(f"{out} is there already; a run may have been prepared with it. Choose another file")
    if num_tokens + 2 > config.data.max_length:
        raise AttackInputError(
            f"--tokens {num_tokens} and two marks do not fit into data.max_length = {config.data.max_length}"
        )
    tokenizer, model = load_tokenizer(config.model), load_base(config.model).eval()
    generator = torch.Generator().manual_seed(seed)
    embeddings: Any = model.get_input_embeddings()
    num_ids = int(embeddings.num_embeddings)
    # Marks, and ids that the model embeds but the tokenizer does not know.
    banned = [*tokenizer.all_special_ids, *range(len(tokenizer), num_ids)]
    texts: dict[str, None] = {}  # a set in order
    for _ in range(_MOST_ROUNDS):
        for ids in _draw_tokens(model, marks(tokenizer)[0], banned, num_tokens, temperature, generator).tolist():
            text = str(tokenizer.decode(ids))
            encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
            if encoded["input_ids"] == ids and text.strip():
                texts[text] = None
        if len(texts) >= count:
            break
    else:
        raise AttackInputError(
            f"only {len(texts)} of {count} texts were different and survived as text; lower --count or --temperature, "
            "or take fewer --tokens"
        )
    lines = [json.dumps(text, ensure_ascii=False) for text in list(texts)[:count]]
    write_atomically(out, "\n".join(lines) + "\n")
    return len(lines)


@torch.no_grad()
def _draw_tokens(
    model: Any, begin: int, banned: list[int], num_tokens: int, temperature: float, generator: torch.Generator
) -> torch.Tensor:
    """Return [batch, num_tokens] token ids, drawn one after the other.

    Args:
        model: the base model.
        begin: id of the begin mark, which each text is drawn after.
        banned: ids that are never drawn.
        num_tokens: of each text.
        temperature: divides the logits.
        generator: source of the draws.
    """
    ids = torch.full((_BATCH, 1), begin)
    past = None
    for _ in range(num_tokens):
        output = model(ids[:, -1:], past_key_values=past, use_cache=True)
        past = output.past_key_values
        logits = output.logits[:, -1].float()
        logits[:, banned] = -torch.inf
        chosen = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)
        ids = torch.cat([ids, chosen], dim=1)
    return ids[:, 1:]
