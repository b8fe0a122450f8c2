"""From a kept record to token ids and the positions that are predicted, one function for each format.

A mark is a special token: the begin mark (BOS) before a text, the end mark (EOS) behind it.

* ``text``: begin mark, text, end mark, those that the text carries itself not doubled; everything but the begin mark
  is predicted.
* ``prompt_completion``: begin mark, prompt, completion, end mark; the completion and the end mark are predicted. Prompt
  and completion are tokenised apart, as they will be when the model answers a prompt.
* ``chat``: the model's chat template over the messages; the assistant's turns are predicted (:mod:`.chat`).
* ``classification``: text (or a pair) as the model's tokenizer marks it, then the label's number (:mod:`.records`).

Every record is encoded by itself. One that is cut before its first predicted token predicts nothing: it contributes
zero, and is counted.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from privtrain.config.data import DataSection
from privtrain.data.chat import ChatRenderer
from privtrain.data.records import Record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Encoded records, in the order given.

    Attributes:
        records: one per text.
        num_truncated: how many were cut at ``data.max_length``. Private, since it describes the data.
        num_without_target: how many predict nothing, and so contribute zero. Private too.
    """

    records: list[Record]
    num_truncated: int
    num_without_target: int


class Encoder:
    """Encodes records of the configured format.

    Args:
        data: section with the format and ``max_length``.
        tokenizer: the model's.
        num_ids: number of token ids that the model has embeddings of; a record with a higher id predicts nothing.
            ``None``: no limit.

    Raises:
        ConfigError: if the tokenizer cannot serve the format (no chat template, or one whose assistant turns cannot be
            told apart).
    """

    def __init__(self, data: DataSection, tokenizer: PreTrainedTokenizerBase, num_ids: int | None = None) -> None:
        self._data = data
        self._max_length = data.max_length
        self.tokenizer = tokenizer
        # The copy that cuts texts: a tokenizer remembers how it last cut one, and save_pretrained writes that. The
        # released tokenizer must not tell of a record. Other formats cut token ids, without the tokenizer's help.
        self._cutting_tokenizer = copy.deepcopy(tokenizer) if data.is_classification else tokenizer
        # Stored records → for each, its encoded form and whether it was cut.
        self._encode: Callable[[Sequence[str]], Iterable[tuple[Record, bool]]] = {
            "text": self._texts,
            "prompt_completion": self._completions,
            "chat": self._chats,
            "classification": self._classified,
        }[data.format]
        #: Why records predict nothing → number of such records; in words that quote no record. Private.
        self.complaints: collections.Counter[str] = collections.Counter()
        self._chat = ChatRenderer(data, tokenizer, self.complaints) if data.format == "chat" else None
        self.num_ids = num_ids

    @property
    def marks(self) -> tuple[int, int]:
        """The ids of begin and end mark."""
        return marks(self.tokenizer)

    def encode(self, records: Sequence[str]) -> Encoded:
        """Return tokens and targets of each record, given in its stored text form (:mod:`.formats`)."""
        encoded, num_truncated = [], 0
        for start in range(0, len(records), _TOKENIZER_BATCH):
            for cut_record, is_cut in self._encode(records[start : start + _TOKENIZER_BATCH]):
                record = self._within_ids(cut_record)
                has_known_ids = record is cut_record  # else another complaint was counted for it
                if has_known_ids and is_cut and not record.num_targets:
                    self.complaints["cut before its first predicted token; raise data.max_length"] += 1
                encoded.append(record)
                num_truncated += is_cut
        return Encoded(encoded, num_truncated, sum(record.num_targets == 0 for record in encoded))

    def sha256(self) -> str:
        """Return a digest of all that decides which tokens a text becomes, except library versions."""
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        body = {
            "data": self._data.model_dump(mode="json", exclude={"source", "evaluation"}),
            "tokenizer": _without_state(backend.to_str()) if backend is not None else self.tokenizer.get_vocab(),
            "marks": self.tokenizer.special_tokens_map,
            "chat_template": self.tokenizer.chat_template,
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True, default=str).encode()).hexdigest()

    def chunks(self, texts: Sequence[str]) -> list[tuple[Record, tuple[int, ...]]]:
        """Join the texts, each with an end mark, and cut the whole into records of ``max_length`` tokens.

        Records do not end where texts do, so one may hold the end of a text and the beginning of the next.

        Returns:
            Each record, which begins with a begin mark, and the numbers of the texts that it holds parts of.
        """
        begin, end = marks(self.tokenizer)
        encoded = [[*_unmarked(ids, begin, end), end] for ids in self._ids(texts)]
        tokens = np.asarray(list(itertools.chain.from_iterable(encoded)), dtype=np.int64)
        text_of_token = np.repeat(np.arange(len(encoded)), [len(ids) for ids in encoded])
        size = self._max_length - 1  # besides the begin mark
        chunks = []
        for start in range(0, len(tokens), size):
            stop = start + size
            record = Record.of(np.concatenate([[begin], tokens[start:stop]]))
            texts_inside = np.unique(text_of_token[start:stop])
            chunks.append((self._within_ids(record), tuple(texts_inside.tolist())))
        return chunks

    def _within_ids(self, record: Record) -> Record:
        """Return the record; if it holds a token that the model has no embedding of, one that predicts nothing.

        That is a begin mark alone.
        """
        if self.num_ids is None or int(record.tokens.max()) < self.num_ids:
            return record
        self.complaints["holds a token that the model has no embedding of"] += 1
        begin, _ = marks(self.tokenizer)
        return Record.of(np.asarray([begin], dtype=np.int64))

    def _cut(self, record: Record) -> tuple[Record, bool]:
        """Return the record cut at ``max_length``, and whether that took anything off."""
        return record.cut(self._max_length), len(record) > self._max_length

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's token ids, uncut and without the marks that a tokenizer adds by itself."""
        if not texts:
            return []
        encoded: Any = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)
        return encoded["input_ids"]

    def _texts(self, records: Sequence[str]) -> Iterator[tuple[Record, bool]]:
        """Yield each text between its begin and end marks, and whether it was cut."""
        begin, end = marks(self.tokenizer)
        for ids in self._ids(records):
            tokens = np.asarray([begin, *_unmarked(ids, begin, end), end], dtype=np.int64)
            yield self._cut(Record.of(tokens))  # all but the begin mark is predicted

    def _completions(self, records: Sequence[str]) -> Iterator[tuple[Record, bool]]:
        """Yield prompt and completion as one record, of which the completion and the end mark are predicted."""
        begin, end = marks(self.tokenizer)
        parsed = [json.loads(record) for record in records]
        prompts = self._ids([item["prompt"] for item in parsed])
        completions = self._ids([item["completion"] for item in parsed])
        for prompt_ids, completion_ids in zip(prompts, completions, strict=True):
            prompt, completion = _unmarked(prompt_ids, begin, None), _unmarked(completion_ids, None, end)
            tokens = np.asarray([begin, *prompt, *completion, end], dtype=np.int64)
            is_target = np.arange(len(tokens)) > len(prompt)  # position 0 is the begin mark
            yield self._cut(Record(tokens, is_target))

    def _chats(self, records: Sequence[str]) -> Iterator[tuple[Record, bool]]:
        assert self._chat is not None
        for record in records:
            yield self._cut(self._chat.encode(json.loads(record)))

    def _classified(self, records: Sequence[str]) -> Iterator[tuple[Record, bool]]:
        """Yield a text, or a pair of texts, and the label's number as one record, and whether a text was cut."""
        for record in records:
            item = json.loads(record)
            limit = self._max_length - 1  # the label takes one place
            texts = [_without_marks(text, self.tokenizer) for text in item["texts"]]
            first, second = texts if len(texts) == 2 else (texts[0], None)
            # Not self.tokenizer, which is released and would remember the cut: see __init__.
            encoded: Any = self._cutting_tokenizer(first, second, verbose=False)
            is_cut = len(encoded["input_ids"]) > limit
            if is_cut:
                encoded = self._cutting_tokenizer(
                    first, second, truncation="longest_first", max_length=limit, verbose=False
                )
            # Nothing is left of a text of marks alone, if the tokenizer adds none.
            ids = encoded["input_ids"] or [marks(self.tokenizer)[0]]
            tokens = np.asarray([*ids, item["label"]], dtype=np.int64)
            is_target = np.arange(len(tokens)) == len(tokens) - 1  # the label alone
            yield Record(tokens, is_target), is_cut


def marks(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return the ids of begin and end mark; where the tokenizer has no begin mark, the end mark serves as one."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    end = tokenizer.eos_token_id
    assert isinstance(begin, int)
    assert isinstance(end, int)
    return begin, end


def context_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the begin mark and a prompt: what a completion was trained to follow."""
    begin, _ = marks(tokenizer)
    encoded: Any = tokenizer(prompt, add_special_tokens=False, verbose=False)
    return [begin, *_unmarked(encoded["input_ids"], begin, None)]


def _unmarked(ids: Sequence[int], begin: int | None, end: int | None) -> Sequence[int]:
    """Strip leading begin and trailing end marks that a text itself carries, since the encoder adds its own.

    None: strip none of this kind.
    """
    first, last = 0, len(ids)
    while first < last and ids[first] == begin:
        first += 1
    while last > first and ids[last - 1] == end:
        last -= 1
    return ids[first:last]


def _without_marks(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Strip leading begin marks and trailing end marks from a text, for a tokenizer that adds its own."""
    begins = [str(mark) for mark in (tokenizer.bos_token, tokenizer.cls_token) if mark]
    ends = [str(mark) for mark in (tokenizer.eos_token, tokenizer.sep_token) if mark]
    # As long as a mark stands there: a text may carry several.
    while any(text.startswith(mark) for mark in begins):
        for mark in begins:
            text = text.removeprefix(mark)
    while any(text.endswith(mark) for mark in ends):
        for mark in ends:
            text = text.removesuffix(mark)
    return text


def _without_state(tokenizer: str) -> dict[str, Any]:
    """Return a tokenizer's JSON without its truncation and padding state, which changes whenever it encodes."""
    return {name: value for name, value in json.loads(tokenizer).items() if name not in ("truncation", "padding")}
