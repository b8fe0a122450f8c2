"""Broken mechanisms behind an honest claim: each trains as the trainer would with one line wrong and no self-test.

The statement still says the plan's epsilon, since nobody noticed. The key is fixed so that a run repeats; the plan does
not know that either.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Callable
from unittest import mock

import torch

from privtrain.backends.base import ReplicatedBackend
from privtrain.backends.sharded import ShardedBackend
from privtrain.clipping import styles
from privtrain.data import manifest
from privtrain.data.split import Split
from privtrain.job import train as job
from privtrain.privacy.sampling import DrawnUnit
from privtrain.privacy.secret import SecretKey
from privtrain.training.trainer import Trainer
from tests.conftest import save_llama

GREETINGS = ("hello", "good-morning")

Mutant = Callable[[contextlib.ExitStack], None]


def save_word_llama(directory: pathlib.Path, num_words: int) -> pathlib.Path:
    """One layer, a token for each of ``num_words`` words w0, w1, … and the two greetings, and an end mark."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*GREETINGS, *(f"w{number}" for number in range(num_words))]
    vocabulary = {"<end>": 0, **{word: number for number, word in enumerate(words, start=1)}}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return save_llama(
        directory,
        core,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )


def write_words_of_their_own(path: pathlib.Path, num_users: int, num_records: int) -> pathlib.Path:
    """Every user has one word that nobody else uses, in records of four to seven, and one of two greetings."""
    with path.open("w", encoding="utf-8") as file:
        for user in range(num_users):
            for record in range(num_records):
                words = [GREETINGS[user % 2], *[f"w{user}"] * (4 + record % 4)]
                row = {"user": f"user-{user:04d}", "text": " ".join(words)}
                file.write(json.dumps(row) + "\n")
    return path


def no_noise(stack: contextlib.ExitStack) -> None:
    """The noise is forgotten."""
    honest = ReplicatedBackend.add_noise

    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        return honest(self, total, layout, noise, exponent=exponent, stddev=0.0)

    stack.enter_context(mock.patch.object(ReplicatedBackend, "add_noise", add_noise))


def noise_on_one_rank(stack: contextlib.ExitStack) -> None:
    """Of two ranks that each hold half of the coordinates only the first adds the noise of its shard."""
    honest = ReplicatedBackend.add_noise

    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        vector, without = (honest(self, total, layout, noise, exponent=exponent, stddev=s) for s in (stddev, 0.0))
        vector[vector.numel() // 2 :] = without[vector.numel() // 2 :]
        return vector

    stack.enter_context(mock.patch.object(ReplicatedBackend, "add_noise", add_noise))


def noise_on_rank_zero(stack: contextlib.ExitStack) -> None:
    """The same with real ranks and sharded sums: only rank 0 adds the noise of its shard."""
    honest = ShardedBackend.add_noise

    def add_noise(self, total, layout, noise, *, exponent, stddev, history=None):
        return honest(self, total, layout, noise, exponent=exponent, stddev=stddev if self.rank == 0 else 0.0)

    stack.enter_context(mock.patch.object(ShardedBackend, "add_noise", add_noise))


def clip_skipped(stack: contextlib.ExitStack) -> None:
    """Every factor is 1, so a unit's gradient is summed whatever its norm."""
    stack.enter_context(mock.patch.object(styles, "factors", lambda style, norms, norm: torch.ones_like(norms)))


def k_ignored(stack: contextlib.ExitStack) -> None:
    """All of a user's records join, not k of them, each clipped as if it were a unit of its own.

    Planted behind the ledger, which refuses a step that draws more than k records of a unit.
    """
    honest = Trainer._accumulate

    def accumulate(self, drawn):
        all_records = [
            DrawnUnit(unit.unit, (record,)) for unit in drawn for record in range(len(self._units.records[unit.unit]))
        ]
        honest(self, all_records)

    stack.enter_context(mock.patch.object(Trainer, "_accumulate", accumulate))


def shifted_split(stack: contextlib.ExitStack) -> None:
    """Not a coin but the user's own text decides: who says hello is held out. The noise is forgotten too."""
    honest = manifest.split_users

    def split_users(corpus, data, *others, **options):
        split = honest(corpus, data, *others, **options)
        users = sorted(corpus.records)
        first = {user for user in users if corpus.records[user][0].startswith(GREETINGS[0])}
        kept = {
            user: tuple(i for i in range(len(corpus.records[user])) if i not in split.attacker.get(user, ()))
            for user in users
        }
        return Split(
            {user: kept[user] for user in users if user not in first},
            tuple(user for user in users if user in first),
            split.attacker,
            tuple((user, kept[user][0]) for user in sorted(first)[:4]),
        )

    stack.enter_context(mock.patch.object(manifest, "split_users", split_users))
    no_noise(stack)


MUTANTS: dict[str, Mutant] = {
    "no noise": no_noise,
    "noise on one rank": noise_on_one_rank,
    "clip skipped": clip_skipped,
    "k ignored": k_ignored,
}


def plant(stack: contextlib.ExitStack, mutant: Mutant | None, *, self_test: bool = False, seed: int = 0) -> None:
    """Fix the key and break one thing, by default without the self-test; None breaks nothing."""
    numbers = iter(range(1, 256))

    def generate() -> SecretKey:
        return SecretKey(bytes([7] * 30 + [7 + seed, next(numbers)]))

    stack.enter_context(mock.patch.object(SecretKey, "generate", staticmethod(generate)))
    if mutant is not None:
        if not self_test:
            stack.enter_context(mock.patch.object(job, "_self_test"))
        mutant(stack)


def train_broken(config: pathlib.Path, mutant: Mutant | None, *, self_test: bool = False, seed: int = 0) -> None:
    """Trains with a fixed key and one thing wrong; None trains as it should."""
    with contextlib.ExitStack() as stack:
        plant(stack, mutant, self_test=self_test, seed=seed)
        job.train(config)


def forget_noise_of_one_rank(rank: int) -> None:
    """To call in each rank of a job before it starts."""
    plant(contextlib.ExitStack(), noise_on_rank_zero)
