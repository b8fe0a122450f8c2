"""``privtrain init``: a complete, commented configuration from a model and a file of rows, with every guess shown."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.markup import escape

from privtrain.commands.starting_point import plan_for, rounded
from privtrain.config.commented import commented_yaml
from privtrain.config.data import DataSection, FilesSource
from privtrain.config.load import validate
from privtrain.config.schema import Config
from privtrain.data.corpus import columns_of, load_corpus, missing, source_files, visible_name
from privtrain.data.encode import Encoder
from privtrain.data.look import sample_of
from privtrain.data.rows import file_columns, file_rows
from privtrain.errors import ConfigError, Fault
from privtrain.files.atomic import write_atomically
from privtrain.files.writable import why_unwritable
from privtrain.inputs import check_inputs
from privtrain.models.limits import num_positions_of
from privtrain.models.load import load_tokenizer
from privtrain.process.console import say

#: Rows of the first file that columns are guessed from.
_NUM_ROWS = 1000
_MOST_LABELS = 50
#: Columns without a use that are named.
_MOST_SHOWN = 8
#: A whole number as labels are written: without leading zeros, and small enough for int64.
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,17}")
#: The guessed data.max_length is a multiple of the first, and at most the second.
_LENGTHS = (64, 1024)

# Names of columns by purpose, in lower case; where a file has several of them, the first of the list is taken.
_USER_NAMES = [
    "user",
    "user_id",
    "userid",
    "uid",
    "author",
    "author_id",
    "customer",
    "customer_id",
    "client",
    "client_id",
    "patient",
    "patient_id",
    "account",
    "account_id",
    "owner",
    "member",
    "member_id",
    "speaker",
    "username",
    "person",
    "participant",
    "subject",
]
_TEXT_NAMES = [
    "text",
    "content",
    "body",
    "message",
    "review",
    "document",
    "comment",
    "note",
    "sentence",
    "post",
    "transcript",
]
_LABEL_NAMES = ("label", "labels", "class", "category", "target", "intent", "sentiment", "topic")
_CHAT_NAMES = ("messages", "conversation", "conversations", "dialogue", "chat", "turns", "chosen")
_PROMPTS = ("prompt", "instruction", "question", "input", "query")
_COMPLETIONS = ("completion", "response", "output", "answer", "chosen")
#: Columns that other stacks put into a prompt, or compare answers by; here nothing reads them.
_UNREAD = ("system", "history", "tools", "functions", "documents", "context", "images", "image", "videos", "rejected")


@dataclasses.dataclass(frozen=True)
class Guess:
    """Guessed keys of a configuration, or of its ``data`` section alone.

    Attributes:
        tree: key → value, e.g. ``{"text_column": "review"}``; for a whole configuration section → keys → values.
        notes: key → why that value was chosen, for people; dotted (``data.text_column``) for a whole configuration.
    """

    tree: dict[str, Any]
    notes: dict[str, str]


def write_config(
    model: str,
    paths: Sequence[pathlib.Path],
    output: pathlib.Path,
    *,
    user_column: str | None = None,
    num_users: int | None = None,
    held_out_fraction: float | None = None,
) -> Config:
    """Guess, check and write a configuration, and print each guess with its reason.

    Args:
        model: directory or hub name.
        paths: files of rows, or patterns of such; all JSONL, all CSV or all Parquet.
        output: the file to write; must not exist.
        user_column: column of the user id, if it is not to be guessed.
        num_users: a public number of users; without it the number in the file, rounded down to one digit.
        held_out_fraction: share of the users that is held out; without it the default.

    Raises:
        ConfigError: if the files cannot be read, or no user column is found.
    """
    if output.exists():
        raise ConfigError([Fault(str(output), "exists already; choose another --output, or remove it")])
    if problem := why_unwritable(output.absolute().parent):
        raise ConfigError([Fault("--output", problem)])
    guessed = guess_configuration(
        model, paths, user_column=user_column, num_users=num_users, held_out_fraction=held_out_fraction
    )
    config = validate(guessed.tree, str(output))  # before anything is written
    first_files = ", ".join(path.name for path in paths[:3])
    more = " ..." if len(paths) > 3 else ""
    head = (
        f"Written by privtrain init from {model} and {first_files}{more}.\n"
        "Every key is here; those behind a # stand at their defaults.\n"
        f"Next: privtrain preview {output}; privtrain plan {output}; privtrain train {output}"
    )
    write_atomically(output, commented_yaml(guessed.tree, head, guessed.notes))
    for dotted, note in guessed.notes.items():
        section, key = dotted.split(".")
        say(escape(f"{dotted}: {guessed.tree[section].get(key)}   # {note}"))
    return config


def guess_configuration(
    model: str,
    paths: Sequence[pathlib.Path],
    *,
    user_column: str | None = None,
    num_users: int | None = None,
    held_out_fraction: float | None = None,
) -> Guess:
    """Return a whole configuration for a model and files of rows, checked, with a note on each guessed key.

    Args:
        model: directory or hub name.
        paths: files of rows, or patterns of such; all JSONL, all CSV or all Parquet.
        user_column: column of the user id, if it is not to be guessed.
        num_users: a public number of users; without it the number in the files, rounded down to one digit.
        held_out_fraction: share of the users that is held out, by which the batch is smaller; without it the default.

    Raises:
        ConfigError: if the files cannot be read, or no user column is found.
    """
    files = source_files(FilesSource(kind="files", paths=list(paths)))
    if not files:
        raise ConfigError([Fault("data.source.paths", missing(path)) for path in paths])
    faults = [fault for file in files for fault in columns_of(file)[1]]
    if faults:
        raise ConfigError(faults)

    # Columns, by the first file alone.
    guess = guess_columns(files[0], user_column)
    name = _run_name(files[0])
    tree: dict[str, Any] = {
        "run": {"name": name},
        "model": {"name_or_path": model},
        "data": {"source": {"kind": "files", "paths": [str(path) for path in paths]}, **guess.tree},
        # Stands in until users are counted: the rows are read by a configuration that is valid as a whole.
        "privacy": plan_for(1000, 0.1),
        "tracking": {"wandb": False},
    }
    if held_out_fraction is not None:
        tree["data"]["held_out_fraction"] = held_out_fraction
    config = validate(tree, "guessed configuration")
    check_inputs(config)
    notes = {f"data.{key}": f"Guessed: {reason}" for key, reason in guess.notes.items()}

    # Length and plan, by the records of all files.
    corpus = load_corpus(config.data)
    tree["data"]["max_length"] = _max_length(config, sample_of(corpus, 512))
    notes["data.max_length"] = "Holds at least 95 of 100 records, unless they are longer than 1,024 tokens."
    published_users = num_users or rounded(len(corpus.records))
    source = "given" if num_users else "the number in the file to one digit; say --num-users to give a public one"
    users = f"{published_users:,} users ({source})"
    tree["privacy"] |= plan_for(published_users, config.data.held_out_fraction)
    notes |= {
        "privacy.sampling_prob": f"For {users}. These numbers are published, and so tell it.",
        "privacy.target_epsilon": "Smaller is stronger. What it costs: privtrain plan.",
        "tracking.wandb": "No account is needed where it is false.",
    }
    return Guess(tree, notes)


def guess_columns(file: pathlib.Path, user_column: str | None = None) -> Guess:
    """Guess from names and first rows which column of a file holds user ids, texts, labels or conversations.

    Args:
        file: JSONL, CSV or Parquet.
        user_column: column of the user id, if it is known.

    Returns:
        Keys of the ``data`` section, e.g. ``{"user_column": "author", "format": "text", "text_column": "review"}``.

    Raises:
        ConfigError: if there is no column that could be a user's, or none to learn from.
    """
    columns = file_columns(file)
    twice = sorted(name for name, count in collections.Counter(columns).items() if count > 1)
    if twice:
        problem = f"the columns of {file.name} must have different names; given twice: {_shown(file, twice)}"
        raise ConfigError([Fault("data.source.paths", problem)])
    rows = list(itertools.islice(file_rows(file, columns), _NUM_ROWS))
    if not rows:
        raise ConfigError([Fault("data.source.paths", f"{file} holds no row")])
    values = {name: [row[index] for row in rows] for index, name in enumerate(columns)}  # column → its values

    # Whose rows these are.
    user = user_column or _user_column(values)
    if user is None or user not in values:
        what = f"no column {user!r}" if user else "no column that looks like a user's id"
        problem = (
            f"{what} among {_shown(file, columns)}; name it with --user-column, or add one: ε is for its users. If "
            "every row is another person's, a column of row numbers will do"
        )
        raise ConfigError([Fault("data.user_column", problem)])

    # What is learned from the other columns, and which of them would be expected to be read, but are not.
    learned = _guess_format({name: column for name, column in values.items() if name != user})
    if learned is None:
        problem = f"no text, conversation or prompt among the columns {', '.join(columns)}"
        raise ConfigError([Fault("data.format", problem)])
    keys, notes = learned.tree, learned.notes
    unread = [name for name in columns if name != user and name not in keys.values()]
    expected = [name for name in unread if name.lower() in _UNREAD and any(values[name])]
    told = (*expected, *(name for name in unread if name.lower() in (*_PROMPTS, *_COMPLETIONS)))
    others = [visible_name(name) for name in unread if name not in told]
    reason = [notes.get("format", "texts")]
    if expected:
        reason.append(
            f"{', '.join(expected)}: not read, though the column says so. Put into the records what the model is to be "
            "told"
        )
    if others:
        more = f" and {len(others) - _MOST_SHOWN} more" if len(others) > _MOST_SHOWN else ""
        reason.append(f"no use for {', '.join(others[:_MOST_SHOWN])}{more}")
    if expected or others:
        notes["format"] = "; ".join(reason)
    num_ids = len({str(value) for value in values[user]})
    notes["user_column"] = "as you said" if user_column else f"{num_ids} ids in the first {len(rows)} rows"
    return Guess({"user_column": user, **keys}, notes)


def _shown(file: pathlib.Path, columns: Sequence[str]) -> str:
    """Return the names of columns for an error message, unless a CSV file seems to lack its header.

    Then its first line, which was read as names, is somebody's row, and must not be shown.
    """
    known = {*_USER_NAMES, *_TEXT_NAMES, *_LABEL_NAMES, *_CHAT_NAMES, *_PROMPTS, *_COMPLETIONS}
    if file.suffix == ".csv" and not known & {name.strip().lower() for name in columns}:
        return f"the {len(columns)} fields of its first line, which must name the columns"
    return ", ".join(columns)


def _guess_format(values: dict[str, list[Any]]) -> Guess | None:
    """Guess ``data.format`` and its columns from names and values; None if nothing fits.

    Tried in this order: a column of conversations, a pair of prompt and completion, a text with a label, a text.

    Args:
        values: column → its values in the first rows; the user column is left out.

    Raises:
        ConfigError: if a column is named like what is looked for, but its values are in a form that is not read.
    """
    pair = {*_PROMPTS, *_COMPLETIONS} - {*_CHAT_NAMES}
    others = {name: column for name, column in values.items() if name.lower() not in pair}
    chat = _first(others, _CHAT_NAMES, _is_conversation)
    if chat is not None:
        return Guess({"format": "chat", "messages_column": chat}, {"format": f"{chat} holds lists of turns"})
    _refuse_other_kinds(
        values, _CHAT_NAMES, "data.messages_column", "turns without role and content; rename their keys"
    )
    _refuse_unread_turns(values)
    prompt = _first(values, _PROMPTS, _is_text, others=False)
    completion = _first(values, _COMPLETIONS, _is_text, others=False)
    if prompt and completion:
        keys = {"format": "prompt_completion", "prompt_column": prompt, "completion_column": completion}
        unread = [name for name in values if name.lower() in _PROMPTS and name != prompt and _is_text(values[name])]
        note = f"there are columns {prompt} and {completion}"
        if unread:
            note += f"; not read: {', '.join(unread)}. Put it into {prompt} if it belongs there"
        return Guess(keys, {"format": note})
    text = _first(values, _TEXT_NAMES, _is_text)
    if text is None or text.lower() not in _TEXT_NAMES:  # nothing, or a column of another name that holds long texts
        _refuse_other_kinds(values, _TEXT_NAMES, "data.text_column", "something else than text; convert it")
    if text is None:
        return None
    without_text = {name: column for name, column in values.items() if name != text}
    label = _first(without_text, _LABEL_NAMES, _is_label, others=False)
    if label is None:
        return Guess({"format": "text", "text_column": text}, {"text_column": f"texts{_unread_label(without_text)}"})
    labels = _labels_of(values[label])
    keys = {"format": "classification", "text_column": text, "label_column": label, "labels": labels}
    labels_note = "those of the first rows. The list is published: check that it is complete and no secret"
    return Guess(
        keys, {"format": f"{label} holds {len(labels)} values; attacks score no classifier", "labels": labels_note}
    )


def _labels_of(column: list[Any]) -> list[int | str]:
    """Return the different labels of a column: numbers by value, then names by letters; empty ones are no labels."""
    texts = _different(column)
    # 01 is a name: as a number it would be 1, and no row has that label.
    numbers = {text for text in texts if _NUMBER.fullmatch(text)}
    return [*sorted(map(int, numbers)), *sorted(texts - numbers)]


def _different(column: list[Any]) -> set[str]:
    """Return the different values of a column as texts, empty ones left out."""
    return {str(value).strip() for value in column if value is not None} - {""}


def _refuse_unread_turns(values: dict[str, list[Any]]) -> None:
    """Raise if conversations are there in a form that is not read: in two columns, or as text that is no JSON.

    Args:
        values: column → its values in the first rows.
    """
    prompts_or_completions = [name for name in values if name.lower() in (*_PROMPTS, *_COMPLETIONS)]
    if any(_is_conversation(values[name]) for name in prompts_or_completions):
        columns = ", ".join(prompts_or_completions)
        problem = f"columns {columns} hold turns; join those of a row into one column, messages"
        raise ConfigError([Fault("data.messages_column", problem)])
    for name, column in values.items():
        texts = [value.lstrip() for value in column if isinstance(value, str)]
        if name.lower() in _CHAT_NAMES and any(text.startswith(("[{", "{")) for text in texts):
            problem = f"column {name} holds text that is no JSON list of {{role, content}}; write it with json.dumps"
            raise ConfigError([Fault("data.messages_column", problem)])


def _refuse_other_kinds(values: dict[str, list[Any]], names: Sequence[str], key: str, what: str) -> None:
    """Raise if a column has one of these names but holds lists or objects, which cannot be read as this key's values.

    A column of another name is then not taken in its place: the user meant this one.

    Args:
        values: column → its values in the first rows.
        names: names that a column for the key has, in lower case.
        key: key of the configuration, for the error.
        what: what such a column holds and what to do, for the error.
    """
    for name, column in values.items():
        if name.lower() in names and any(isinstance(value, list | dict | bytes) and value for value in column):
            raise ConfigError([Fault(key, f"column {name} holds {what}")])


def _unread_label(values: dict[str, list[Any]]) -> str:
    """Return an addition to the note on texts: which column may hold labels that are not read; often empty."""
    by_name = {name.lower(): name for name in values}
    for label_name in _LABEL_NAMES:
        name = by_name.get(label_name)
        if name is None:
            continue
        if any(isinstance(value, bool | float | list) for value in values[name]):
            return f"; to train a classifier, convert column {name} to text or whole numbers"
        num_different = len(_different(values[name]))
        if num_different:
            return f"; column {name} is not read: a label has several values, each for many rows; given {num_different}"
    label_like = [name for name, column in values.items() if _is_label(column)]
    if label_like:
        columns = ", ".join(map(visible_name, label_like))
        return (
            f"; few values stand in {columns}: for a classifier of them set data.format: classification, "
            "data.label_column and data.labels"
        )
    return ""


def _first(
    values: dict[str, list[Any]], names: Sequence[str], fits: Callable[[list[Any]], bool], *, others: bool = True
) -> str | None:
    """Return the first column that fits a purpose: those of the given names first, in their order.

    Args:
        values: column → its values in the first rows.
        names: names in lower case, the most likely first.
        fits: whether a column's values suit the purpose.
        others: try columns of other names too, those with the longest values first.
    """
    by_name = {name.lower(): name for name in values}
    candidates = [by_name[name] for name in names if name in by_name]
    if others:
        rest = [name for name in values if name not in candidates]
        candidates += sorted(rest, key=lambda name: _total_length(values[name]), reverse=True)
    return next((name for name in candidates if fits(values[name])), None)


def _total_length(column: list[Any]) -> int:
    """Return the length of all texts and lists of a column together."""
    return sum(len(value) for value in column if isinstance(value, str | list))


def _user_column(values: dict[str, list[Any]]) -> str | None:
    """Return a column that is named like a user's id, e.g. ``Author-ID`` or ``forum_user``; no value is looked at."""
    separators = str.maketrans("- .", "___")  # "Author-ID" and "author id" become author_id
    by_normal_name = {name.lower().translate(separators): name for name in values}
    for name in _USER_NAMES:
        if name in by_normal_name:
            return by_normal_name[name]
    endings = tuple(f"_{word}" for word in ("user", "user_id", "author", "customer", "customer_id"))
    return next((name for normal, name in by_normal_name.items() if normal.endswith(endings)), None)


def _is_text(column: list[Any]) -> bool:
    """Return whether any value of a column is a text with more than white space."""
    return any(isinstance(value, str) and value.strip() for value in column)


def _is_label(column: list[Any]) -> bool:
    """Return whether a column has few plain values: at least two, and at most half as many as rows."""
    values = [value for value in column if value is not None]
    is_plain = all(isinstance(value, int | str) and not isinstance(value, bool) for value in values)
    return is_plain and 2 <= len(_different(values)) <= min(_MOST_LABELS, len(column) // 2)


def _is_conversation(column: list[Any]) -> bool:
    """Return whether the first value that is not empty is a list of turns with roles, or its JSON."""
    for value in column:
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = json.loads(value)
            except ValueError:
                return False
        if isinstance(value, list) and value:
            return isinstance(value[0], dict) and "role" in value[0]
        if value not in (None, []):
            return False
    return False


def _max_length(config: Config, records: Sequence[str]) -> int:
    """Return ``data.max_length``: a multiple of 64 tokens that 95 % of records fit into, within the model's limit."""
    multiple, longest = _LENGTHS
    tokenizer = load_tokenizer(config.model)
    data: DataSection = config.data.model_copy(update={"max_length": longest})
    lengths = [len(record) for record in Encoder(data, tokenizer).encode(records).records]
    wanted = math.ceil(int(np.percentile(lengths, 95)) / multiple) * multiple
    most = min(longest, num_positions_of(config.model) or longest)  # None: the model's config names no limit
    return max(4, min(max(wanted, multiple), most))  # 4: the least that the configuration allows


def _run_name(file: pathlib.Path) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem).strip("._-")
    return name or "run"
