"""The private report on a corpus: how much of it stands in the run's records, and what it is worth.

The report looks at the records, so ε does not cover it: it is for the run's owner, and lies in the run's ``secret/``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from privtrain.commands.corpus import copies, probe
from privtrain.commands.corpus.balanced import BalancedAccuracy
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

_NO_YARDSTICK = "no ratio: real records themselves are not shown to teach more than chance here, so nothing follows"

REPORT_SCHEMA = "privtrain/corpus-report/2"


def report_of(
    run: RunDirectory,
    config: Config,
    texts: Sequence[Text],
    described: Mapping[str, Any],
    tokenizer: Any,
    copy_tokens: int,
) -> list[str]:
    """Compare the corpus with the private records, write the report into ``secret/``, and return it as lines of text.

    Args:
        run: the run that the corpus was sampled from.
        config: its configuration, whose ``data.source`` names the records.
        texts: the corpus.
        described: the content of the corpus's description file; its ``relation`` is the digest that names the corpus.
        tokenizer: the released one.
        copy_tokens: consecutive tokens of a record in a text that make it a copy.

    Raises:
        PlanMismatch: if the rows are not those that were trained on.
    """
    split = _split(run, config)
    written_texts = [text.written for text in texts]
    index = copies.CorpusIndex(_tokens(tokenizer, written_texts), written_texts, copy_tokens)
    training = index.compare(_tokens_and_texts(split.training(), config.data, tokenizer))
    held_out = index.compare(_tokens_and_texts(split.held_out(), config.data, tokenizer))
    values = _values(texts, split, config.data)
    body = {
        "schema": REPORT_SCHEMA,
        "corpus": described["relation"],
        "training_records": dataclasses.asdict(training),
        "held_out_records": dataclasses.asdict(held_out),
        **{name: _as_json(value) for name, value in values.items()},
    }
    make_private_directory(run.secret / "corpora")
    path = run.secret / "corpora" / f"{described['relation'][:16]}.json"
    write_json(path, body, mode=0o600)
    return [
        f"private, in {path}:",
        *_rate_lines("training records", training),
        *_rate_lines("held-out users' records, as a control", held_out),
        *(f"  {_value_line(name, value)}" for name, value in values.items()),
        "  a decision about the corpus that looks at these numbers looked at private records: ε does not cover it",
    ]


def _rate_lines(name: str, counted: copies.Copies) -> Iterator[str]:
    """Yield a line on copies and one on near copies of the records called ``name``."""
    for what, rate in (
        (f"copies of {counted.num_tokens} tokens", counted.copies),
        (f"near copies ({copies.NEAR_SHARE:.0%} of the runs of {copies.NUM_WORDS} words)", counted.near_copies),
    ):
        if rate.upper is None:
            yield f"  {name}: no text is long enough for {what}"
        else:
            count = f"{rate.num} of {rate.num_texts} texts hold {what}; rate at most {rate.upper:.2%} (95 %)"
            yield f"  {name} ({counted.num_records:,}): {count}"


def _as_json(value: probe.Utility | probe.Likeness | str) -> dict[str, Any] | str:
    """Return a measure as the report holds it, with the ratio of a utility."""
    if isinstance(value, str):
        return value
    ratio = {"ratio": value.ratio} if isinstance(value, probe.Utility) else {}
    return {**dataclasses.asdict(value), **ratio}


def _value_line(name: str, value: probe.Utility | probe.Likeness | str) -> str:
    """Return a measure of the corpus's worth as a line; a text in its place says why it was not measured."""
    if isinstance(value, str):
        return f"{name}: not measured: {value}"
    if isinstance(value, probe.Likeness):
        return (
            f"{name}: MAUVE of {value.num_texts} texts against held-out users' records {value.of_corpus:.3f}; of as "
            f"many real training records {value.of_records:.3f}"
        )
    ratio = _NO_YARDSTICK if value.ratio is None else f"ratio {value.ratio:.2f}"
    return (
        f"{name}: balanced accuracy on {value.num_tests} records of {value.num_users} held-out users: a classifier "
        f"trained on the corpus {_interval(value.on_corpus)}, one trained on real records "
        f"{_interval(value.on_records)}, chance {value.on_records.chance:.1%}; {ratio}"
    )


def _interval(accuracy: BalancedAccuracy) -> str:
    """Return a balanced accuracy with its interval."""
    return f"{accuracy.value:.1%} (95 % interval {accuracy.lower:.1%} to {accuracy.upper:.1%})"


@dataclasses.dataclass(frozen=True)
class _Split:
    """The real records of a run, on both sides of its split.

    Attributes:
        corpus: all users' records, with the canaries that training planted.
        held_in_users: users who were trained on.
        held_out_users: users who were not.
        attacker: user → numbers of that user's records that were set aside for the attacks; training did not see them.
    """

    corpus: Corpus
    held_in_users: Sequence[str]
    held_out_users: Sequence[str]
    attacker: Mapping[str, Sequence[int]]

    def training(self) -> Iterator[str]:
        return (record for _, record in self._records(self.held_in_users))

    def held_out(self) -> Iterator[str]:
        return (record for _, record in self.held_out_by_user())

    def held_out_by_user(self) -> Iterator[tuple[str, str]]:
        """Yield (user, record) pairs."""
        return self._records(self.held_out_users)

    def _records(self, users: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Yield (user, text) of the records of `users` that were not set aside for the attacker."""
        for user in users:
            set_aside = set(self.attacker.get(user, ()))
            yield from (
                (user, text) for number, text in enumerate(self.corpus.records[user]) if number not in set_aside
            )


def _split(run: RunDirectory, config: Config) -> _Split:
    """Return the records on both sides of the split; raise PlanMismatch unless split and data are those of the run."""
    manifest = read_sealed(run.manifest)
    statement = reading.read_json(run.privacy)
    # The published statement holds a keyed digest of the manifest.
    if split_commitment(run.load_key("root"), manifest["sha256"]) != statement["split_commitment"]:
        raise PlanMismatch(f"{run.manifest} is not what {run.privacy} commits to; restore it")
    corpus = load_corpus(config.data, config.performance.index_dir)
    if corpus.manifest_sha256 != manifest["data_sha256"]:
        raise PlanMismatch("data.source holds other rows than the run was trained on; restore them to compare")
    planted = plant(corpus, canaries_of(manifest))
    held_in = [user for user in manifest["held_in"] if user in planted.records]
    held_out = [user for user in manifest["held_out"] if user in planted.records]
    return _Split(planted, held_in, held_out, manifest["attacker"])


def _tokens_and_texts(records: Iterator[str], data: DataSection, tokenizer: Any) -> Iterator[tuple[Sequence[int], str]]:
    """Yield (token ids, text) of each stored record."""
    for record in records:
        text = "\n".join(_parts(record, data))
        yield _tokens(tokenizer, [text])[0], text


def _parts(record: str, data: DataSection) -> list[str]:
    """Return the texts of a stored record: prompt and completion, or every turn (stored as JSON), or the one text."""
    match data.format:
        case "chat":
            return [message["content"] for message in json.loads(record)]
        case "prompt_completion":
            pair = json.loads(record)
            return [pair["prompt"], pair["completion"]]
        case _:
            return [record]


def _tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _values(texts: Sequence[Text], split: _Split, data: DataSection) -> dict[str, probe.Utility | probe.Likeness | str]:
    """Return measure → its result, or in words why it could not be taken."""
    likeness = probe.measure_likeness(
        [text.written for text in texts],
        (written(record, data) for record in split.training()),
        (written(record, data) for record in split.held_out()),
    )
    # prompt → the label that it stands for
    labels = {text.condition.prompt: text.condition.label for text in texts if text.condition.label is not None}
    if data.format != "prompt_completion" or not labels:
        reason = "labels are known where data.format: prompt_completion was sampled with --label or labelled prompts"
        return {"utility": reason, "likeness": likeness}

    corpus = [(text.written, text.condition.label) for text in texts if text.condition.label is not None]
    training = [found for record in split.training() if (found := _labelled(record, labels))]
    tests = [
        probe.HeldOutRecord(*found, user)
        for user, record in split.held_out_by_user()
        if (found := _labelled(record, labels))
    ]
    return {
        "utility": probe.measure(corpus, training, tests),
        "utility of sentences": probe.measure_sentences(corpus, training, tests),
        "likeness": likeness,
    }


def _labelled(record: str, labels: Mapping[str, str]) -> tuple[str, str] | None:
    """Return (completion, label) of a stored record; None if its prompt stands for no label."""
    pair = json.loads(record)
    label = labels.get(pair["prompt"].strip())
    return None if label is None else (pair["completion"], label)
