"""The record formats: which columns a row needs, and the one text form in which a record is kept and fingerprinted.

``text`` keeps the text itself; the others keep a line of JSON:

* ``prompt_completion``: ``{"completion":"Yes.","prompt":"Open?"}``
* ``chat``: ``[{"content":"Open?","role":"user"},{"content":"Yes.","role":"assistant"}]``
* ``classification``: ``{"label":1,"texts":["Open?"]}``, with the label's place in ``data.labels``

A row that has nothing to learn from (no text, no completion, no assistant turn with words or a tool call, a label that
``data.labels`` does not name) becomes an empty string: whether a row is kept depends on that row alone, so neighbouring
data sets keep the same other rows.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from privtrain.config.data import DataSection
from privtrain.files import strict_json

#: Levels of lists and objects in a conversation: tool calls have a few, JSON and templates fail at hundreds.
_DEEPEST = 64

_ASSISTANT = "assistant"
_ROLES = {_ASSISTANT, "developer", "system", "tool", "user"}


@dataclasses.dataclass(frozen=True)
class Unusable:
    """A row that nothing can be learned from, with the rule that it breaks in words that hold none of its values."""

    reason: str


def canonical(data: DataSection, values: Sequence[object]) -> str:
    """Return a record as text, the same for the same content whatever file it came from; empty if it cannot be used.

    Args:
        data: names the format.
        values: the row's values in the order of ``data.column_keys``.
    """
    record = _as_text(data, values)
    return "" if has_half_pair(record) else record


def has_half_pair(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, as of an emoji that was cut: no tokenizer reads it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _as_text(data: DataSection, values: Sequence[object]) -> str:
    """Return the one text form of a row's values; empty if nothing can be learned from them."""
    match data.format:
        case "text":
            return _content(values[0]).strip()
        case "prompt_completion":
            prompt, completion = map(_content, values)
            is_usable = completion.strip() and (values[0] is None or isinstance(values[0], str))
            return _dump({"prompt": prompt, "completion": completion}) if is_usable else ""
        case "chat":
            messages = _messages(values[0])
            return _dump(messages) if any(_is_answer(m) for m in messages) else ""
        case "classification":
            label, *texts = values
            number = _label_number(data, label)
            texts = [_content(text).strip() for text in texts]
            return _dump({"label": number, "texts": texts}) if number is not None and all(texts) else ""


def written(record: str, data: DataSection) -> str:
    """Return the part of a record (in its one text form) that a model learns to write, as text.

    That is the text itself, the completion or the assistant's turns. A classifier writes nothing: return its record as
    it is.
    """
    match data.format:
        case "chat":
            return "\n".join(turn["content"] for turn in json.loads(record) if turn["role"] == _ASSISTANT)
        case "prompt_completion":
            return json.loads(record)["completion"]
        case _:
            return record


def why_unusable(data: DataSection, values: Sequence[object]) -> Unusable:
    """Return the reason why :func:`canonical` rejects a row; only for rows that it does reject."""
    if has_half_pair(_as_text(data, values)):
        return Unusable("half of a surrogate pair in its text, as of an emoji that was cut; take it out")
    # Each value with the key that names its column.
    (first, first_key), *others = zip(values, (f"data.{key}" for key in data.column_keys), strict=True)
    match data.format:
        case "text":
            return Unusable(_text_problem(first, first_key))
        case "prompt_completion":
            ((completion, completion_key),) = others
            if first is None or isinstance(first, str):  # a prompt may be empty or missing: it is the completion
                return Unusable(_text_problem(completion, completion_key))
            return Unusable(_text_problem(first, first_key))
        case "chat":
            return Unusable(f"{_conversation_problem(first)} ({first_key})")
        case "classification":
            if _label_number(data, first) is None:
                return Unusable(_label_problem(data, first, first_key))
            empty = [_text_problem(text, key) for text, key in others if not _content(text).strip()]
            return Unusable(empty[0])


def _label_problem(data: DataSection, label: object, key: str) -> str:
    """Return why a value is none of the declared labels, without quoting it; ``key`` names its column."""
    if isinstance(label, float | bool):
        return f"{_kind(label)} that is neither whole nor text for a label ({key}); convert it"
    if label is None or label == "":
        return f"no label ({key})"
    if not isinstance(label, int | str):
        return f"{_kind(label)} where one label is needed ({key})"
    text = str(label).strip()
    names = [str(name) for name in data.labels or ()]
    if text.casefold() in map(str.casefold, names):
        return f"a label that data.labels writes in other case ({key})"
    if text.endswith(".0") and text[:-2] in names:
        return f"a label with .0 behind, which data.labels names without; convert the column to whole numbers ({key})"
    return f"a label that data.labels does not name ({key})"


def _text_problem(value: object, key: str) -> str:
    """Return what is wrong with a value that should be text; ``key`` is the key that names its column."""
    if value is None or isinstance(value, str):
        return f"no text in the column that {key} names"
    hint = "; a list of turns is data.format: chat" if isinstance(value, list) else "; convert the column to text"
    return f"{_kind(value)} where {key} needs text{hint}"


def _kind(value: object) -> str:
    """Return what kind of value this is, in words, without the value."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _conversation_problem(value: object) -> str:
    """Return why a cell is no conversation that an assistant's turn can be learned from, without quoting it."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=strict_json.unique_keys)
        except strict_json.RepeatedKeyError:
            return "a turn names a key twice"
        except (ValueError, RecursionError):
            return "text that is no JSON where a list of turns is needed"
    if not _is_flat(value, _DEEPEST):
        return "a conversation is nested too deeply"
    if not isinstance(value, list):
        return "no conversation" if value is None else f"{_kind(value)} where a list of turns is needed"
    for turn in value:
        if not isinstance(turn, dict):
            return f"a turn is {_kind(turn)}, not an object with role and content"
        if not isinstance(turn.get("role"), str):
            return "a turn has no role; turns are {role, content}, not {from, value}"
        content = turn.get("content")
        if content is None and turn.get("function_call"):
            return "a turn has function_call, the older form of tool_calls; convert it"
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            what = "no content" if content is None else f"{_kind(content)} for content"
            return f"a turn has {what}; it must be text (parts: join their texts), or absent beside tool_calls"
    if any(turn["role"] == _ASSISTANT and not is_learned(turn) for turn in value):
        return "no assistant turn to learn from: those of weight 0 are context"
    problem = "no assistant turn with content or tool_calls"
    if not {turn["role"] for turn in value} <= _ROLES:
        return f"{problem}, but turns of roles beside {', '.join(sorted(_ROLES))}; rename the model's to assistant"
    return problem


def _content(value: object) -> str:
    """Return a text as it is; nothing for what is no text."""
    return value if isinstance(value, str) else ""


def _messages(value: object) -> list[dict[str, Any]]:
    """Return the turns of a conversation, a list or its JSON (as in CSV); empty if any turn is not {role, content}."""
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=strict_json.unique_keys)
        except (ValueError, RecursionError):
            return []
    if not isinstance(value, list) or not _is_flat(value, _DEEPEST):
        return []
    # In Parquet all turns have the same keys; those that a turn had not are null.
    turns = [_without_nulls(turn) for turn in value if isinstance(turn, dict)]
    for turn in turns:
        if turn.get("tool_calls"):  # a turn with a call may lack content, but chat templates expect it
            turn.setdefault("content", "")
        else:  # an empty list goes: templates ask only whether the key is there
            turn.pop("tool_calls", None)
    are_turns = len(turns) == len(value) and all(
        isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns
    )
    return turns if are_turns else []


def _is_flat(value: object, num_levels: int) -> bool:
    """Return whether lists and objects are nested in at most ``num_levels`` levels."""
    if not isinstance(value, list | dict):
        return True
    parts = value.values() if isinstance(value, dict) else value
    return num_levels > 0 and all(_is_flat(part, num_levels - 1) for part in parts)


def _without_nulls(value: Any) -> Any:
    """Return the value without keys whose value is null, at any depth; other values are returned as they are."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nulls(part) for part in value]
    return value


def is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a turn is the assistant's and no context: OpenAI marks those of context with ``"weight": 0``."""
    return message["role"] == _ASSISTANT and message.get("weight") not in (0, "0")


def _is_answer(message: dict[str, Any]) -> bool:
    """Return whether a turn is learned, with words or a tool call."""
    return is_learned(message) and bool(message["content"].strip() or message.get("tool_calls"))


def _label_number(data: DataSection, label: object) -> int | None:
    """Return the label's place in ``data.labels``; 1 and "1" are the same label, since CSV has no numbers."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None
    text = str(label).strip()
    names = [str(name) for name in data.labels or ()]
    return names.index(text) if text in names else None


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
