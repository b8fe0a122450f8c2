"""Which tokens of a rendered conversation the assistant wrote, exactly.

A template with ``{% generation %}`` says so itself. For any other, the conversation is rendered once up to each
assistant turn with the generation prompt, and once through it; if each is a prefix of the next, what the second adds is
what the model is to write, its end-of-turn mark included. A template without this property (one that rewrites earlier
turns, as some do with a model's reasoning) is refused by name, on a public conversation, before any record is read.
"""

from __future__ import annotations

import bisect
import collections
import datetime
import functools
import itertools
import re
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from privtrain.config.data import DataSection
from privtrain.data.formats import is_learned
from privtrain.data.records import Record
from privtrain.errors import ConfigError, DamagedFile, Fault
from privtrain.files import reading

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: What a template reads an undefined name or key of a turn as.
_UNDEFINED = re.compile(r"has no (?:attribute|element) '?([^']+)'?$|^'([^']+)' is undefined$")
#: The day that is written instead: a record must be the same tokens on every rank and after a resume.
TODAY = datetime.datetime(2024, 7, 26, tzinfo=datetime.UTC)
#: Letters of C's strftime, each also with a minus before it: without leading zeros.
_DIRECTIVES = "aAbBcCdDeFgGhHIjklmMnpPrRStTuUVwWxXyYzZ"
#: The public conversation that templates are tried on.
_PROBE: Messages = [
    {"role": "user", "content": "Which way?"},
    {"role": "assistant", "content": "North."},
    {"role": "user", "content": "How far?"},
    {"role": "assistant", "content": "A mile."},
]


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool = False) -> Any:
    """Return a conversation by the tokenizer's chat template, the same whatever day it is.

    Of several templates by name it is the one that transformers chooses, ``"default"``.

    Raises:
        ValueError: if the tokenizer has no template, or several of which none is the default.
    """
    return tokenizer.apply_chat_template(
        messages,
        chat_template=undated(tokenizer.get_chat_template()),
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )


@functools.lru_cache(maxsize=8)
def undated(template: str) -> str:
    """Return a chat template that writes one fixed day where it would write today's, in whatever form it asks for.

    Templates ask a function of transformers, ``strftime_now(format)``. A macro of this name takes its place.
    """
    if not _asks_for_today(template):
        return template
    # {directive, such as %d: what it stands for on the fixed day}. %s alone would depend on the machine's time zone.
    days = {f"%{flag}{letter}": TODAY.strftime(f"%{flag}{letter}") for flag in ("", "-") for letter in _DIRECTIVES}
    days["%s"] = str(int(TODAY.timestamp()))
    written = "".join(f" | replace({directive!r}, {value!r})" for directive, value in days.items())
    # %% is a sign and no directive. The line break behind the macro is trimmed, as behind every statement.
    macro = "{% macro strftime_now(format) %}{{ (format | replace('%%', '\\0')" + written
    return macro + ") | replace('\\0', '%') }}{% endmacro %}\n" + template


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer's chat template would write today's date."""
    return _asks_for_today(tokenizer.get_chat_template())


def _asks_for_today(template: str) -> bool:
    """Return whether a template calls the function that gives today's date."""
    return "strftime_now" in template


def end_marks(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the special token that the chat template puts after an answer, as a list of its id.

    The list is empty if the template puts only plain text there.
    """
    answered: Any = rendered(tokenizer, _PROBE[:2])
    _, _, after_answer = answered.rpartition(_PROBE[1]["content"])
    encoded: Any = tokenizer(after_answer, add_special_tokens=False, verbose=False)
    special_ids = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return [token for token in encoded["input_ids"] if token in special_ids][:1]


def _unfit(problem: str) -> ConfigError:
    """Return the error for a chat template that cannot be trained on."""
    return ConfigError([Fault("data.chat_template_file", problem)])


class ChatRenderer:
    """Renders and tokenises conversations.

    Args:
        data: may name a template file that replaces the tokenizer's.
        tokenizer: the model's, a fast one.
        complaints: a counter to add to: reason why a conversation predicts nothing → number of such conversations.

    Raises:
        ConfigError: if there is no template, or its assistant turns cannot be told apart exactly.
    """

    def __init__(
        self, data: DataSection, tokenizer: PreTrainedTokenizerBase, complaints: collections.Counter[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._complaints = complaints
        if data.chat_template_file is not None:
            content = reading.read_bytes(data.chat_template_file, follow_links=True)
            try:
                tokenizer.chat_template = content.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise DamagedFile(data.chat_template_file, f"is not UTF-8 at byte {error.start}") from None
        if isinstance(tokenizer.chat_template, dict):  # several by name, as some models have for tools
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise _unfit(
                "the tokenizer has no chat template of its own, as those of base models have none; give the Jinja file "
                "of the model that you will serve, or train the instruct model"
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                [Fault("data.format", "chat needs a fast tokenizer, which knows the characters of a token")]
            )
        self._marks_itself = _GENERATION.search(template) is not None
        self._check_template()

    def _check_template(self) -> None:
        """Raise unless the template keeps the answers of the public conversation apart, each with a mark at its end.

        Raises:
            ConfigError: otherwise.
        """
        answers = [message["content"] for message in _PROBE if message["role"] == "assistant"]
        try:
            whole, spans = self._spans(_PROBE)
        except Exception as error:  # noqa: BLE001 - a template may raise anything
            raise _unfit(f"the chat template cannot be rendered: {error}") from None
        if len(spans) != len(answers) or not all(start < end for start, end in spans):
            raise _unfit(
                "the model's chat template changes earlier turns when later ones are added, so the assistant's tokens "
                "cannot be told apart exactly; give a template that marks them with "
                "{% generation %} … {% endgeneration %}"
            )
        for (start, end), answer in zip(spans, answers, strict=True):
            _, _, end_mark = whole[start:end].rpartition(answer)
            self._check_end(end_mark, after_span=whole[end:])

    def _check_end(self, end_mark: str, after_span: str) -> None:
        """Raise unless a model that learns to write an answer also learns to end it.

        Args:
            end_mark: what follows the answer among the characters that are predicted.
            after_span: what follows those.

        Raises:
            ConfigError: if nothing ends the answer, or the template closes its generation block before the end mark.
        """
        if end_mark.strip():  # a special token, or words
            return
        if not self._marks_itself:
            raise _unfit(
                "the chat template puts no mark after an answer, so the model would never learn to stop; give a "
                "template that writes {{ eos_token }} there"
            )
        # White space in the block may be a template's own end mark, unless a special token comes right after the block.
        special_tokens = tuple(token for token in self._tokenizer.all_special_tokens if token)
        if not end_mark or after_span.lstrip().startswith(special_tokens):
            raise _unfit(
                "the chat template closes {% endgeneration %} before the mark that ends an answer, so the model would "
                "never learn to stop; put the end mark inside the generation block"
            )

    def encode(self, messages: Messages) -> Record:
        """Return tokens of a conversation; predicted are those that begin within an assistant turn.

        A conversation that the template refuses, or whose turns it does not keep apart, predicts nothing.
        """
        try:
            text, spans = self._spans(messages)
        except Exception as error:  # noqa: BLE001 - a template may raise anything, and no record may end a job
            self._complaints[f"the chat template refuses it: {self._own_words(error)}"] += 1
            text, spans = "\n".join(message["content"] for message in messages), []
        else:
            if not spans:
                self._complaints["the chat template keeps no assistant turn apart in it"] += 1
        encoded: Any = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens = np.asarray(encoded["input_ids"], dtype=np.int64)
        starts = [start for start, _ in spans]
        is_target = np.zeros(len(tokens), dtype=bool)
        for position, (begin, end) in enumerate(encoded["offset_mapping"]):  # characters of each token
            last_span = bisect.bisect_right(starts, begin) - 1  # index of the last that starts at or before the token
            if last_span >= 0 and begin < end:  # some tokens stand for no character
                _, end_of_span = spans[last_span]
                is_target[position] = begin < end_of_span
        is_target[:1] = False  # nothing comes before the first token to predict it from
        return Record(tokens, is_target)

    def _own_words(self, error: Exception) -> str:
        """Return the error's message if it is the template's own text; else, since it may quote a record, its type."""
        words = " ".join(str(error).split())
        template = str(self._tokenizer.chat_template)
        if words and words in template:
            return words
        undefined = _UNDEFINED.search(words) if isinstance(error, jinja2.UndefinedError) else None
        if undefined:
            name = undefined[1] or undefined[2] or ""  # one of two ways to say it
            if name and name in template:
                return f"it reads {name!r}, which a turn lacks"
        return type(error).__name__

    def _spans(self, messages: Messages) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text, and (start, end) of the characters of each assistant turn in it.

        The second is empty if the assistant's turns cannot be told apart.
        """
        whole: str = rendered(self._tokenizer, messages)
        if self._marks_itself:
            return whole, self._marked_spans(messages)
        spans = []
        for index, message in enumerate(messages):
            if not is_learned(message) or index == 0:  # a turn that answers nothing is context
                continue
            before: str = rendered(self._tokenizer, messages[:index], add_generation_prompt=True)
            through: str = rendered(self._tokenizer, messages[: index + 1])
            if not (through.startswith(before) and whole.startswith(through)):
                return whole, []
            spans.append((len(before), len(through)))
        return whole, spans

    def _marked_spans(self, messages: Messages) -> list[tuple[int, int]]:
        """Return (start, end) of the characters that the template itself marks as the assistant's.

        Empty if some turns are not to be learned, and the template does not mark one block for each turn.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self._tokenizer.chat_template
        assert isinstance(template, str)
        special_tokens: Any = self._tokenizer.special_tokens_map
        marked: Any = render_jinja_template(
            conversations=[messages],  # pyright: ignore[reportArgumentType]
            chat_template=undated(template),
            return_assistant_tokens_mask=True,
            **special_tokens,
        )
        _, spans_of_conversations = marked
        spans = list(spans_of_conversations[0])
        is_learned_turn = [is_learned(message) for message in messages if message["role"] == "assistant"]
        if all(is_learned_turn):
            return spans
        if len(spans) != len(is_learned_turn):
            return []
        return list(itertools.compress(spans, is_learned_turn))
