"""What the owner of a run reads of a corpus: how much of it stands in the records, and what it is worth.

Private: it looks at the records, ε does not cover it, and it lies in the run's ``secret/`` alone.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from privtrain.commands.corpus import copies, probe
from privtrain.commands.corpus.conditions import Text
from privtrain.config import Config
from privtrain.config.data import DataSection
from privtrain.data.canaries import canaries_of, plant
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.formats import written
from privtrain.data.manifest import read_sealed, split_commitment
from privtrain.errors import PlanMismatch
from privtrain.files import reading
from privtrain.files.atomic import write_json
from privtrain.files.private import make_private_directory
from privtrain.run.directory import RunDirectory

REPORT_SCHEMA = "privtrain/corpus-report/1"


def report_of(
    run: RunDirectory,
    config: Config,
    texts: Sequence[Text],
    described: Mapping[str, Any],
    tokenizer: Any,
    copy_tokens: int,
) -> list[str]:
    """Compare the corpus with the private records, write that into ``secret/``, and return what the owner should read.

    Raises:
        PlanMismatch: if the rows are not those that were trained on.
    """
    split = _split(run, config)
    texts_alone = [text.written for text in texts]
    index = copies.CorpusIndex(_tokens(tokenizer, texts_alone), texts_alone, copy_tokens)
    training = index.compare(_as_text(split.training(), config.data, tokenizer))
    held_out = index.compare(_as_text(split.held_out(), config.data, tokenizer))
    values = _values(texts, split, config.data)
    body = {
        "schema": REPORT_SCHEMA,
        "corpus": described["relation"],
        "training_records": dataclasses.asdict(training),
        "held_out_records": dataclasses.asdict(held_out),
        **{name: found if isinstance(found, str) else dataclasses.asdict(found) for name, found in values.items()},
    }
    make_private_directory(run.secret / "corpora")
    path = run.secret / "corpora" / f"{described['relation'][:16]}.json"
    write_json(path, body, mode=0o600)
    return [
        f"private, in {path}:",
        *_rate_lines("training records", training),
        *_rate_lines("held-out users' records, as a control", held_out),
        *(f"  {_value_line(name, found)}" for name, found in values.items()),
        "  a decision about the corpus that looks at these numbers looked at private records: ε does not cover it",
    ]


def _rate_lines(name: str, counted: copies.Copies) -> Iterator[str]:
    for what, rate in (
        (f"copies of {counted.num_tokens} tokens", counted.copies),
        (f"near copies ({copies.NEAR_SHARE:.0%} of the runs of {copies.NUM_WORDS} words)", counted.near_copies),
    ):
        if rate.upper is None:
            yield f"  {name}: no text is long enough for {what}"
        else:
            yield f"  {name} ({counted.num_records:,}): {rate.num} of {rate.num_texts} texts hold {what}; " + (
                f"rate at most {rate.upper:.2%} (95 %)"
            )


def _value_line(name: str, value: probe.Utility | probe.Likeness | str) -> str:
    if isinstance(value, str):
        return f"{name}: not measured: {value}"
    if isinstance(value, probe.Likeness):
        return (
            f"{name}: MAUVE of {value.num_texts} texts against held-out users' records {value.of_corpus:.3f}; of as "
            f"many real training records {value.of_records:.3f}"
        )
    return (
        f"{name}: a classifier trained on the corpus names {value.on_corpus:.1%} of {value.num_tests} labels of "
        f"held-out users, one trained on real records {value.on_records:.1%}, the most frequent label is "
        f"{value.most_frequent:.1%}"
    )


@dataclasses.dataclass(frozen=True)
class _Split:
    """Records of both sides, as training saw them; ``attacker`` are a user's records that only the attacker holds."""

    corpus: Corpus
    held_in_users: Sequence[str]
    held_out_users: Sequence[str]
    attacker: Mapping[str, Sequence[int]]

    def training(self) -> Iterator[str]:
        return self._records(self.held_in_users)

    def held_out(self) -> Iterator[str]:
        return self._records(self.held_out_users)

    def _records(self, users: Sequence[str]) -> Iterator[str]:
        for user in users:
            taken = set(self.attacker.get(user, ()))
            yield from (text for number, text in enumerate(self.corpus.records[user]) if number not in taken)


def _split(run: RunDirectory, config: Config) -> _Split:
    """Return the records of both sides; raise unless split and data are those of the run."""
    manifest = read_sealed(run.manifest)
    statement = reading.read_json(run.privacy)
    if split_commitment(run.load_key("root"), manifest["sha256"]) != statement["split_commitment"]:
        raise PlanMismatch(f"{run.manifest} is not what {run.privacy} commits to; restore it")
    corpus = load_corpus(config.data, config.performance.index_dir)
    if corpus.manifest_sha256 != manifest["data_sha256"]:
        raise PlanMismatch("data.source holds other rows than the run was trained on; restore them to compare")
    planted = plant(corpus, canaries_of(manifest))
    known = planted.records
    held_in, held_out = ([user for user in manifest[side] if user in known] for side in ("held_in", "held_out"))
    return _Split(planted, held_in, held_out, manifest["attacker"])


def _as_text(records: Iterator[str], data: DataSection, tokenizer: Any) -> Iterator[tuple[Sequence[int], str]]:
    for record in records:
        text = "\n".join(_parts(record, data))
        yield _tokens(tokenizer, [text])[0], text


def _parts(record: str, data: DataSection) -> list[str]:
    """Return what stands in a record: prompt and completion, or every turn."""
    match data.format:
        case "chat":
            return [message["content"] for message in json.loads(record)]
        case "prompt_completion":
            found = json.loads(record)
            return [found["prompt"], found["completion"]]
        case _:
            return [record]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _values(texts: Sequence[Text], split: _Split, data: DataSection) -> dict[str, probe.Utility | probe.Likeness | str]:
    """Return what the corpus is worth, by measure."""
    likeness = probe.measure_likeness(
        [text.written for text in texts],
        (written(record, data) for record in split.training()),
        (written(record, data) for record in split.held_out()),
    )
    labels = {text.condition.prompt: text.condition.label for text in texts if text.condition.label is not None}
    if data.format != "prompt_completion" or not labels:
        reason = "labels are known where data.format: prompt_completion was sampled with --label or labelled prompts"
        return {"utility": reason, "likeness": likeness}

    def labelled(records: Iterator[str]) -> list[tuple[str, str]]:
        """Keep real records after one of the labels' prompts, which have that label."""
        found = map(json.loads, records)
        return [
            (item["completion"], label) for item in found if (label := labels.get(item["prompt"].strip())) is not None
        ]

    corpus = [(text.written, text.condition.label) for text in texts if text.condition.label is not None]
    sides = corpus, labelled(split.training()), labelled(split.held_out())
    return {
        "utility": probe.measure(*sides),
        "utility of sentences": probe.measure_sentences(*sides),
        "likeness": likeness,
    }
