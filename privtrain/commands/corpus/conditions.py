"""Conditions, which texts are sampled after: nothing, a prompt, a conversation so far, or the prompt of a label.

Conditions are public: ε of the run covers what the model answers, not what it is asked. A condition as token ids is
called its context. ``data`` is always the ``data`` section of the run's configuration: it says in which format and
columns the model was trained.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from privtrain.config.data import DataSection
from privtrain.data.chat import end_marks, rendered
from privtrain.data.encode import context_ids
from privtrain.data.formats import has_half_pair
from privtrain.errors import ConfigError, Fault
from privtrain.files import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KEYS = ("prompt", "messages", "label")


@dataclasses.dataclass(frozen=True)
class Condition:
    """What texts are sampled after. All fields empty: texts from nothing.

    Attributes:
        prompt: what a text begins with (``data.format: text``), or what it answers (``prompt_completion``).
        messages: turns of a conversation so far, each {role, content} (``data.format: chat``; without ``prompt``).
        label: label that the corpus gives to texts sampled after this condition; None without labels.
    """

    prompt: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    label: str | None = None

    def context(self, data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """Return the tokens that come before the text, as training encoded them."""
        if data.format != "chat":
            return context_ids(self.prompt, tokenizer)
        messages = [dict(message) for message in self.messages]
        text: Any = rendered(tokenizer, messages, add_generation_prompt=True)
        encoded: Any = tokenizer(text, add_special_tokens=False, verbose=False)
        return encoded["input_ids"]

    def row(self, text: str, data: DataSection) -> dict[str, Any]:
        """Return a row of the corpus, in the columns of the run's own data.

        Args:
            text: what the model wrote after the condition.
            data: the section of the run.
        """
        match data.format:
            case "chat":
                answer = {"role": "assistant", "content": text}
                row: dict[str, Any] = {data.messages_column: [*map(dict, self.messages), answer]}
            case "prompt_completion":
                row = {data.prompt_column: self.prompt, data.completion_column: text}
            case _:
                row = {data.text_column: self.prompt + text}
        return row if self.label is None else {**row, data.label_column: self.label}


@dataclasses.dataclass(frozen=True)
class Text:
    """A sampled text: what it was sampled after, and what the model wrote."""

    condition: Condition
    written: str


def read_conditions(
    data: DataSection, prompts: pathlib.Path | None, labels: Sequence[str], template: str
) -> list[Condition]:
    """Return the conditions to sample after, for the format that a run was trained in.

    Args:
        data: the section of the run.
        prompts: file of JSON lines such as ``{"prompt": "Dear Ada,"}`` or ``{"messages": [...]}``, with a ``"label"``
            where the text has one; None: by ``labels``, or without both one empty condition.
        labels: names of labels; each is put into ``template`` in place of ``{label}``, which makes its prompt.
        template: text with ``{label}`` in it.

    Raises:
        ConfigError: with every fault.
        DamagedFile: if a line is no JSON object.
    """
    faults = []
    if data.format == "classification":
        problem = (
            "was trained as a classifier, which writes no text; to generate texts with labels, train data.format: "
            "prompt_completion with the label in data.prompt_column and the text in data.completion_column"
        )
        raise ConfigError([Fault("RUN", problem)])
    if prompts is not None and labels:
        faults.append(Fault("--label", "is another way to say what --prompts says; give one of the two"))
    if "{label}" not in template:
        faults.append(Fault("--template", f"given {template!r}; it must hold {{label}}"))
    if len(set(labels)) < len(labels):
        faults.append(Fault("--label", f"given {', '.join(labels)}; one of them twice"))
    if prompts is not None and not prompts.is_file():
        faults.append(Fault("--prompts", f"no such file: {prompts}"))
    if prompts is None and not labels and data.format != "text":
        problem = (
            f"data.format: {data.format} trains answers; give --prompts FILE, whose lines are such as "
            '{"prompt": "Dear Ada,"}, or --label for each label'
        )
        faults.append(Fault("--prompts", problem))
    if faults:
        raise ConfigError(faults)
    if prompts is not None:
        return _read_file(prompts, data)
    conditions = [Condition(template.replace("{label}", label), label=label) for label in labels] or [Condition()]
    return [_for_format(condition, data) for condition in conditions]


def _read_file(path: pathlib.Path, data: DataSection) -> list[Condition]:
    """Return the condition of each line of a JSON lines file; raise ConfigError with the first ten faulty lines."""
    conditions, faults = [], []
    remedy = 'each line is an object such as {"prompt": "Dear Ada,"}'
    for number, line in reading.read_json_lines(path, remedy=remedy, may_have_mark=True):
        try:
            conditions.append(_parsed(line, data))
        except ValueError as error:
            faults.append(Fault("--prompts", f"{path}, line {number}: {error}"))
    if not conditions and not faults:
        faults.append(Fault("--prompts", f"{path} holds no line"))
    if faults:
        raise ConfigError(faults[:10])
    return conditions


def _parsed(line: Mapping[str, Any], data: DataSection) -> Condition:
    """Return the condition that a line of the prompts file states; raise ValueError with what is wrong with it."""
    if unknown := sorted(set(line) - set(_KEYS)):
        raise ValueError(f"unknown key {unknown[0]!r}; allowed are {', '.join(_KEYS)}")
    if has_half_pair(json.dumps(line, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair, which no tokenizer reads")
    if ("prompt" in line) == ("messages" in line):
        raise ValueError("give prompt or messages")
    label, prompt, messages = line.get("label"), line.get("prompt", ""), line.get("messages", [])
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise ValueError("label must be text or a whole number")
    if not isinstance(prompt, str):
        raise ValueError("prompt must be text")
    if "messages" in line and data.format != "chat":
        raise ValueError(f"the run was trained in data.format: {data.format}; give prompt")
    if not isinstance(messages, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    ):
        raise ValueError("messages must be a list of {role, content}")
    if "messages" in line and (not messages or messages[-1]["role"] == "assistant"):
        raise ValueError("messages must end with a turn that the assistant is to answer")
    return _for_format(Condition(prompt, tuple(messages), None if label is None else str(label)), data)


def _for_format(condition: Condition, data: DataSection) -> Condition:
    """Return the condition as the run's format needs it: where that is chat, a prompt becomes the user's turn."""
    if data.format != "chat" or condition.messages:
        return condition
    return Condition(messages=({"role": "user", "content": condition.prompt},), label=condition.label)


def contexts_of(
    conditions: Iterable[Condition], data: DataSection, tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[list[int]]:
    """Return the token ids of each condition.

    Args:
        conditions: what texts are sampled after.
        data: the section of the run.
        tokenizer: the released one.
        longest: tokens that the model reads, condition and text together.

    Raises:
        ConfigError: if a condition leaves no room for a text, or the chat template refuses it.
    """
    contexts, faults = [], []
    for number, condition in enumerate(conditions, start=1):
        try:
            contexts.append(condition.context(data, tokenizer))
        except Exception as error:  # noqa: BLE001 - a chat template raises whatever its author chose
            faults.append(Fault("--prompts", f"number {number}: the chat template refuses it: {error}"))
            continue
        if len(contexts[-1]) >= longest:
            problem = f"number {number} has {len(contexts[-1])} tokens; the model reads {longest}, the text included"
            faults.append(Fault("--prompts", problem))
    if faults:
        raise ConfigError(faults[:10])
    return contexts


def ends_of(data: DataSection, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the end mark, and in a conversation what ends a turn."""
    end = tokenizer.eos_token_id
    assert isinstance(end, int)
    return sorted({end, *(end_marks(tokenizer) if data.format == "chat" else ())})


def digest_input(conditions: Iterable[Condition]) -> str:
    """Return the conditions as one text, a line of JSON for each, to take a digest of."""
    return "\n".join(json.dumps(dataclasses.asdict(condition), sort_keys=True) for condition in conditions)
