"""Measure what a corpus sampled from a private model is worth, beside direct private training on the same data.

``python -m tests.bench.corpus_value DIRECTORY [DATA...]`` prints it; what DIRECTORY holds is not made again. Data are
``customers`` (invented, labelled by what a message wants) and ``plays`` (the roles of 19 plays, labelled by genre).
Both are trained at user-level ε = 8 twice: as a generator of labelled texts, of which 2,000 are sampled, and as a
classifier, with one plan. All accuracies are balanced ones on users who are in neither. Bases have half a million
weights and are pre-trained on public text: all plays for customers, and for the plays the 19 others.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import yaml

from attacks.analysis.audit.sampled_corpus import audit_corpus
from privtrain.commands.corpus import probe
from privtrain.commands.corpus.balanced import BalancedAccuracy
from privtrain.commands.generate import GenerateOptions, generate
from privtrain.data.invented_customers import customer_records
from privtrain.data.plays import read_plays
from privtrain.job.train import train

BASE_SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "recipes" / "studies" / "user-level-dp" / "base_model.py"
NUM_TEXTS, EPSILON, DELTA = 2000, 8.0, 1e-5
#: Chosen on customers of another seed: what a small model has not learned lies in its tail.
SAMPLING = {"temperature": 0.5, "top_p": 0.9}

#: Of a customer's message: the first words that it holds decide what it wants.
TOPICS = {
    "order": "Order of one",
    "account": "account",
    "stock": "back in stock",
    "thanks": "Thank you for",
    "feedback": "it came in two days",
}
GENRES = {
    "comedy": (
        "all-s-well-that-ends-well a-midsummer-night-s-dream as-you-like-it love-s-labours-lost measure-for-measure "
        "much-ado-about-nothing pericles the-comedy-of-errors the-merchant-of-venice the-merry-wives-of-windsor "
        "the-taming-of-the-shrew the-tempest twelfth-night two-gentlemen-of-verona a-winter-s-tale"
    ),
    "history": (
        "edward-iii henry-iv-part-1 henry-iv-part-2 henry-v henry-vi-part-1 henry-vi-part-2 henry-vi-part-3 henry-viii "
        "king-john richard-ii richard-iii"
    ),
    "tragedy": (
        "antony-and-cleopatra coriolanus cymbeline hamlet julius-caesar king-lear macbeth othello romeo-and-juliet "
        "timon-of-athens titus-andronicus troilus-and-cressida"
    ),
}

Row = tuple[str, str, str]
"""(user, label, text)."""


def customers() -> Iterator[Row]:
    """Yield messages of 16,000 invented customers."""
    for record in customer_records(16_000, seed=0, mean_records=2):
        topic = next((name for name, words in TOPICS.items() if words in record.text), "problem")
        yield record.user, topic, record.text


def plays() -> Iterator[Row]:
    """Yield speeches of at least six words from every second play of a genre."""
    genres = {play: genre for genre, names in GENRES.items() for play in names.split()[::2]}
    for user, text in read_plays():
        genre = genres.get(user.split("/")[0])
        if genre is not None and len(text.split()) >= 6:
            yield user, genre, text


@dataclasses.dataclass(frozen=True)
class Setting:
    """What differs between the data.

    Attributes:
        rows: the data.
        num_users: about how many are trained on.
        length: most tokens of a record.
        records_per_user, sampling_prob, num_steps: the plan, with batches as large as the time allows.
    """

    rows: Callable[[], Iterator[Row]]
    num_users: int
    length: int
    records_per_user: int
    sampling_prob: float
    num_steps: int


DATA = {
    "customers": Setting(customers, 11_520, 96, 1, 0.05, 100),
    "plays": Setting(plays, 500, 80, 2, 0.5, 60),
}


def main(directory: pathlib.Path, names: Sequence[str]) -> None:
    """Measure and print."""
    for name in names or DATA:
        place = directory / name
        place.mkdir(parents=True, exist_ok=True)
        _prepare(name, place)
        facts = _measure(name, place)
        (place / "facts.json").write_text(json.dumps(facts, indent=1))
        print(json.dumps({name: facts}, indent=1), flush=True)


def _prepare(name: str, place: pathlib.Path) -> None:
    """Rows of users who are trained on and of a fifth who are not, and the base."""
    rows = list(DATA[name].rows())
    users = sorted({user for user, _, _ in rows})
    tests = set(np.random.default_rng(0).permutation(users)[: len(users) // 5].tolist())
    for side, is_test in (("training", False), ("test", True)):
        lines = [
            json.dumps({"user": user, "label": label, "prompt": label, "text": text, "completion": text})
            for user, label, text in rows
            if (user in tests) == is_test
        ]
        (place / f"{side}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if not (place / "base").exists():
        words = [] if name == "customers" else [play for names in GENRES.values() for play in names.split()[1::2]]
        subprocess.run([sys.executable, BASE_SCRIPT, place / "base", *words], check=True)


def _config(name: str, place: pathlib.Path, task: str) -> dict[str, Any]:
    """Return what a task is trained with: all is the same for both but what a record is."""
    setting = DATA[name]
    tree: dict[str, Any] = {
        "run": {"name": task, "output_dir": str(place / "runs")},
        "model": {"name_or_path": str(place / "base")},
        "lora": {"rank": 16, "alpha": 32, "target_modules": "all-linear"},
        "data": {
            "source": {"kind": "files", "paths": [str(place / "training.jsonl")]},
            "max_length": setting.length,
            "attack_fraction": 0.0,
            "num_evaluation_records": 512,
        },
        "privacy": {
            "records_per_user": setting.records_per_user,
            "sampling_prob": setting.sampling_prob,
            "expected_batch_size": int(setting.sampling_prob * setting.num_users),
            "clipping_norm": 1.0,
            "target_epsilon": EPSILON,
            "target_delta": DELTA,
            "num_steps": setting.num_steps,
        },
        "training": {"learning_rate": 1e-2, "schedule": "linear"},
        "performance": {
            "microbatch_size": 64,
            "precision": "fp32",
            "num_threads": 1,
            "checkpoint_interval_steps": 50,
        },
        "tracking": {"wandb": False, "release_held_out_metrics": True},
    }
    if task == "classifier":
        tree["data"] |= {"format": "classification", "labels": _labels(name)}
    else:
        tree["data"] |= {"format": "prompt_completion"}
    return tree


def _labels(name: str) -> list[str]:
    return sorted([*TOPICS, "problem"] if name == "customers" else GENRES)


def _trained(name: str, place: pathlib.Path, task: str) -> pathlib.Path:
    run = place / "runs" / task
    if not (run / "release.json").exists():
        (place / f"{task}.yaml").write_text(yaml.safe_dump(_config(name, place, task)))
        train(place / f"{task}.yaml")
    return run


def _measure(name: str, place: pathlib.Path) -> dict[str, Any]:
    run = _trained(name, place, "generator")
    corpus = place / "corpus"
    if not corpus.exists():
        print(
            generate(run, corpus, GenerateOptions(NUM_TEXTS, labels=tuple(_labels(name)), batch_size=250, **SAMPLING)),
            flush=True,
        )
    texts, training = (_pairs(_rows(place / path)) for path in ("corpus/corpus.jsonl", "training.jsonl"))
    test = [probe.HeldOutRecord(row["completion"], row["label"], row["user"]) for row in _rows(place / "test.jsonl")]
    reports = [path for path in (run / "secret" / "corpora").iterdir() if not path.name.endswith(".audit.json")]
    found = json.loads(reports[0].read_text())
    audited, _ = audit_corpus(run, corpus)
    utility = probe.measure(texts, training, test)
    assert isinstance(utility, probe.Utility), utility
    direct = _accuracy(_trained(name, place, "classifier"), place, DATA[name].length, test)
    return {
        "epsilon": json.loads((run / "privacy.json").read_text())["epsilon"],
        "num_texts": len(texts),
        "copies": found["training_records"]["copies"],
        "near_copies": found["training_records"]["near_copies"],
        "near_copies_held_out": found["held_out_records"]["near_copies"],
        "probe_on_corpus": dataclasses.asdict(utility.on_corpus),
        "probe_on_records": dataclasses.asdict(utility.on_records),
        "direct_private_training": dataclasses.asdict(direct),
        # A ratio to a classifier at chance says nothing.
        "ratio": utility.on_corpus.value / direct.value if direct.is_above_chance else None,
        "num_tests": utility.num_tests,
        "num_test_users": utility.num_users,
        "sentences": found["utility of sentences"],
        "likeness": found["likeness"],
        "audit": [f"{finding.verdict}: {finding.verdict_reason}" for finding in audited],
    }


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _pairs(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["completion"], row["label"]) for row in rows]


def _accuracy(
    run: pathlib.Path, place: pathlib.Path, length: int, test: Sequence[probe.HeldOutRecord]
) -> BalancedAccuracy:
    """Of the released classifier, opened as anybody would."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from privtrain.commands.export import export_run

    merged = place / "merged"
    if not merged.exists():
        export_run(run, merged, merge=True, dtype="fp32")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    model = AutoModelForSequenceClassification.from_pretrained(merged).eval()
    is_right: list[bool] = []
    for start in range(0, len(test), 64):
        batch = test[start : start + 64]
        encoded = tokenizer(
            [record.text for record in batch], padding=True, truncation=True, max_length=length - 1, return_tensors="pt"
        )
        with torch.no_grad():
            chosen = model(**encoded).logits.argmax(-1).tolist()
        is_right += [model.config.id2label[at] == record.label for at, record in zip(chosen, batch, strict=True)]
    return BalancedAccuracy.of(is_right, [record.label for record in test], [record.user for record in test])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
