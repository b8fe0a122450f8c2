"""The record formats: which columns a row needs, and the one text form in which a record is kept and fingerprinted.

``text`` keeps the text itself; the others keep a line of JSON. A row that has nothing to learn from (no text, no
completion, no assistant turn, a label that ``data.labels`` does not name) becomes an empty string: whether a row is
kept depends on that row alone, so neighbouring data sets keep the same other rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from privtrain.config.schema import DataSection

_ASSISTANT = "assistant"


def column_keys(data: DataSection) -> list[str]:
    """The configuration keys whose columns make up a record, in the order that :func:`canonical` takes values."""
    keys = {
        "text": ["text_column"],
        "prompt_completion": ["prompt_column", "completion_column"],
        "chat": ["messages_column"],
        "classification": ["label_column", "text_column", "text_pair_column"],
    }[data.format]
    return [key for key in keys if getattr(data, key) is not None]


def canonical(data: DataSection, values: Sequence[object]) -> str:
    """A record as text, the same for the same content whatever file it came from; empty if it cannot be used.

    Args:
        data: names the format.
        values: the row's values in the order of :func:`column_keys`.
    """
    match data.format:
        case "text":
            return _content(values[0]).strip()
        case "prompt_completion":
            prompt, completion = map(_content, values)
            return _dump({"prompt": prompt, "completion": completion}) if completion.strip() else ""
        case "chat":
            messages = _messages(values[0])
            return _dump(messages) if any(_is_answer(m) for m in messages) else ""
        case "classification":
            label, *texts = values
            number = _label_number(data, label)
            texts = [_content(text).strip() for text in texts]
            return _dump({"label": number, "texts": texts}) if number is not None and all(texts) else ""


def _content(value: object) -> str:
    return value if isinstance(value, str) else ""


def _messages(value: object) -> list[dict[str, Any]]:
    """The turns of a conversation, also from a JSON string (CSV); none if any of them is not one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return []
    if not isinstance(value, list):
        return []
    # Parquet fills the keys that only some turns have with nulls.
    turns = [{k: v for k, v in turn.items() if v is not None} for turn in value if isinstance(turn, dict)]
    is_whole = len(turns) == len(value) and all(
        isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str) for turn in turns
    )
    return turns if is_whole else []


def _is_answer(message: dict[str, Any]) -> bool:
    return message["role"] == _ASSISTANT and bool(message["content"].strip())


def _label_number(data: DataSection, label: object) -> int | None:
    """The label's place in ``data.labels``; 1 and "1" are the same label, since CSV has no numbers."""
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None
    names = [str(name) for name in data.labels or ()]
    return names.index(str(label).strip()) if str(label).strip() in names else None


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
