"""``privtrain preview``: what a run would learn from, row by row, before anything is spent. Needs no weights.

It shows private records to whoever starts it, and writes nothing. A row is a line of the data; a record is a row that
is kept, as the model reads it. Predicted tokens are those whose loss is trained, e.g. answers and not prompts.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from privtrain.config import Config
from privtrain.data.corpus import Corpus, load_corpus
from privtrain.data.encode import Encoder
from privtrain.data.look import Look, look_at, sample_of
from privtrain.data.records import Record
from privtrain.errors import EXIT_WRONG_INPUT
from privtrain.inputs import load_checked
from privtrain.models.limits import num_ids_of
from privtrain.models.load import load_tokenizer

#: Brackets round predicted text, for terminals without colours.
_BEGIN, _END = "⟦", "⟧"
_PREDICTED, _CONTEXT = "bold green", "dim"


def preview(config_path: pathlib.Path, overrides: Sequence[str], *, num_shown: int, as_json: bool) -> int:
    """Print counts, lengths, some whole records and what is wrong with the data.

    Args:
        config_path: YAML file of the run.
        overrides: dotted assignments such as ``data.max_length=512``.
        num_shown: records that are shown whole.
        as_json: print counts and faults for machines, and no record.

    Returns:
        The exit code: 0, or 2 if a start would be refused because of the data.

    Raises:
        ConfigError: for a config that cannot be run, or rows of which none can be used.
    """
    config = load_checked(config_path, overrides)
    corpus, encoder, look = seen(config)
    if as_json:
        print(json.dumps(_for_machines(config, corpus, look), indent=2, ensure_ascii=False))
    else:
        _print(config, corpus, encoder, look, num_shown)
    return EXIT_WRONG_INPUT if look.faults else 0


def seen(config: Config) -> tuple[Corpus, Encoder, Look]:
    """Load a run's records and encode a sample of them.

    Returns:
        The records by user, what turns a record into tokens, and what was seen in the sample: lengths and faults.
    """
    encoder = Encoder(config.data, load_tokenizer(config.model), num_ids_of(config.model))
    corpus = load_corpus(config.data, config.performance.index_dir)
    return corpus, encoder, look_at(corpus, encoder, config.data)


def _for_machines(config: Config, corpus: Corpus, look: Look) -> dict[str, Any]:
    """Return the counts, faults and warnings of the preview, without any text of a row."""
    names = [str(name) for name in config.data.labels or ()]
    return {
        **dataclasses.asdict(corpus.counts),
        "reasons": dict(corpus.counts.reasons),
        "num_users": len(corpus.records),
        "num_records": corpus.num_records,
        "num_looked_at": len(look.lengths),
        "num_tokens": {str(percent): int(np.percentile(look.lengths, percent)) for percent in (50, 95, 100)},
        "num_predicted_tokens": int(look.num_predicted.sum()),
        "num_truncated": look.num_truncated,
        "num_predicting_nothing": int((look.num_predicted == 0).sum()),
        "complaints": look.complaints,
        "labels": {names[index]: count for index, count in sorted(look.labels.items())},
        "faults": [dataclasses.asdict(fault) for fault in look.faults],
        "warnings": list(look.warnings),
    }


def _print(config: Config, corpus: Corpus, encoder: Encoder, look: Look, num_shown: int) -> None:
    """Print the preview for people: tables of rows and tokens, some records, warnings and faults."""
    console = Console(highlight=False)
    console.print(_rows_table(corpus))
    _print_reasons(console, corpus.counts.reasons)
    console.print(_tokens_table(config, encoder, look))
    _print_reasons(console, look.complaints)
    shown = sample_of(corpus, num_shown) if num_shown else []
    if shown:
        console.print(
            f"{len(shown)} records as the model reads them; predicted are the [{_PREDICTED}]{_BEGIN}bright{_END}[/] "
            f"parts. These are private"
        )
    for number, record in enumerate(shown, start=1):
        (encoded,) = encoder.encode([record]).records
        console.print(_heading(number, encoded, config), style="bold")
        console.print(as_text(encoded, encoder, config.data.labels), soft_wrap=True)
    for warning in look.warnings:
        console.print(f"[yellow]warning[/]: {warning}", soft_wrap=True)
    for fault in look.faults:
        console.print(Text.assemble(("refused", "bold red"), f": {fault}"), soft_wrap=True)
    if not look.faults:
        console.print("a start would not be refused because of its rows")


def _rows_table(corpus: Corpus) -> Table:
    """Return a table of how many rows were kept, and how many dropped for which reason."""
    counts = corpus.counts
    table = Table("rows", f"{counts.num_rows:,}")
    table.add_row("kept", f"{corpus.num_records:,} of {len(corpus.records):,} users")
    if counts.num_without_user:
        table.add_row("dropped: no user id", f"{counts.num_without_user:,}")
    if counts.num_empty:
        table.add_row("dropped: nothing to learn from", f"{counts.num_empty:,}")
    if counts.num_duplicates:
        table.add_row("dropped: a user's own text again", f"{counts.num_duplicates:,}")
    return table


def _print_reasons(console: Console, reasons: Mapping[str, int]) -> None:
    """Print reason → number of rows, the most frequent first."""
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        console.print(Text(f"  {count:,} × {reason}"), soft_wrap=True)


def _tokens_table(config: Config, encoder: Encoder, look: Look) -> Table:
    """Return a table of the lengths of the records that were looked at, and of how much of them is predicted."""
    lengths = look.lengths
    table = Table("tokens of a record", f"{len(lengths):,} looked at")
    middle, long, longest = (int(np.percentile(lengths, percent)) for percent in (50, 95, 100))
    table.add_row(
        "median, 95 %, longest", f"{middle}, {long}, {longest} (at most data.max_length={config.data.max_length})"
    )
    table.add_row("cut at data.max_length", f"{look.num_truncated:,}")
    table.add_row("predicted", f"{look.num_predicted.sum() / max(1, lengths.sum()):.0%} of tokens")
    table.add_row("records that predict nothing", f"{int((look.num_predicted == 0).sum()):,}")
    names = config.data.labels or []
    for index, count in sorted(look.labels.items()):  # empty unless records are classified
        table.add_row(Text(f"label {names[index]!r}"), f"{count:,}")
    begin, end = (encoder.tokenizer.decode([mark]) for mark in encoder.marks)
    table.add_row("begin and end mark", Text(f"{begin} {end}"))
    return table


def _heading(number: int, record: Record, config: Config) -> str:
    cut = ", cut" if len(record) >= config.data.max_length else ""
    return f"record {number}: {len(record)} tokens{cut}, {record.num_targets} predicted"


def as_text(record: Record, encoder: Encoder, labels: Sequence[int | str] | None = None) -> Text:
    """Return a record's tokens as text; predicted text stands in another colour, and between ⟦ and ⟧.

    Args:
        record: token ids, and for each whether it is predicted.
        encoder: what encoded the record.
        labels: names of the labels in a classification, where a record's last "token" is the number of its label.
    """
    text = Text()
    if labels is not None:
        text.append(_printable(encoder.tokenizer.decode(record.tokens[:-1])), style=_CONTEXT)
        name = labels[int(record.tokens[-1])] if record.num_targets else "nothing"
        return text.append(f" {_BEGIN}{name}{_END}", style=_PREDICTED)
    for is_target, run in _runs(record):
        piece = _printable(encoder.tokenizer.decode(run))
        text.append(f"{_BEGIN}{piece}{_END}" if is_target else piece, style=_PREDICTED if is_target else _CONTEXT)
    return text


def _runs(record: Record) -> Iterator[tuple[bool, list[int]]]:
    """Yield consecutive tokens of a record that are all predicted, or all not: (whether predicted, token ids)."""
    pairs = zip(record.is_target.tolist(), record.tokens.tolist(), strict=True)
    for is_target, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield is_target, [token for _, token in group]


def _printable(text: str | list[str]) -> str:
    """Escape characters that could move the cursor or change the terminal; a record may hold any."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))
