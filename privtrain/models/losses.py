"""What is learned of a record: the loss of each row, of that row alone, and how a model is scored on held-out records.

Everything between a record and its loss (units, microbatches, clipping, the self-test) sees tokens and a mask of the
predicted ones. Only this module knows that a classifier's one predicted "token" is its label.

``input_ids`` is [rows, tokens] int64, a record in each row, padded on the right. ``target_mask`` is [rows, tokens]
bool: whether the token at this position is predicted, from those before it. A line (:mod:`privtrain.data.lines`) is one
long row that holds several records.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from typing_extensions import override

from privtrain.data.lines import Line
from privtrain.data.records import Record
from privtrain.models.head_loss import FrozenHead, cross_entropy


class Objective(abc.ABC):
    """The task that is learned: how the loss of a record, and accuracy, are computed."""

    #: Whether records may be packed into lines; then :meth:`token_losses` is there.
    takes_lines = False

    def token_losses(self, model: torch.nn.Module, line: Line) -> torch.Tensor:
        """Return [1, tokens] fp32: each predicted token's loss, from its record alone; zero elsewhere.

        Call it within :func:`privtrain.clipping.attention.within_records`, which keeps attention inside each record.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Return [rows] fp32: the sum of each row's losses at its predicted positions; zero for a row without any."""

    @abc.abstractmethod
    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Return a scalar: for how many rows the label is the model's first choice; zero for a language model."""

    @abc.abstractmethod
    def plant(self, tokens: np.ndarray) -> Record:
        """Return a valid record of this task made of arbitrary tokens, for the start-up self-test."""


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """Predicting the next token, wherever the mask asks for it.

    Attributes:
        head: the model's decoder and head, if lines can be computed without forming all logits at once; else ``None``.
    """

    head: FrozenHead | None = None

    takes_lines = True

    @override
    def token_losses(self, model: torch.nn.Module, line: Line) -> torch.Tensor:
        return token_losses(model, line, self.head)

    @override
    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        return row_losses(model, input_ids, target_mask)

    @override
    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=input_ids.device)

    @override
    def plant(self, tokens: np.ndarray) -> Record:
        return Record.of(tokens)


class _LabelledRows(NamedTuple):
    """What a classifier says of some rows, and what it should say.

    Attributes:
        logits: [rows, labels].
        labels: [rows] numbers of the labels; 0 for a padding row.
        has_label: [rows] false for a padding row.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    has_label: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Predicting the label of a sequence. A record is the text's tokens, then the label's number as a last "token".

    Attributes:
        num_labels: number of labels.
        pad_id: token id of padding, which the model reads in the label's place.
        separator_id: token between two texts, for models that mark the second one (BERT); otherwise ``None``.
    """

    num_labels: int
    pad_id: int
    separator_id: int | None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, num_labels: int, pad_id: int, is_pair: bool) -> Classification:
        """Return the objective of a model; ``is_pair``: records have two texts, and BERT's kind marks the second."""
        has_segments = is_pair and getattr(model.config, "type_vocab_size", 0) > 1
        return cls(num_labels, pad_id, tokenizer.sep_token_id if has_segments else None)

    @override
    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        rows = self._read(model, input_ids, target_mask)
        losses = torch.nn.functional.cross_entropy(rows.logits, rows.labels, reduction="none")
        return torch.where(rows.has_label, losses, 0.0)

    @override
    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        rows = self._read(model, input_ids, target_mask)
        return ((rows.logits.argmax(dim=1) == rows.labels) & rows.has_label).sum()

    @override
    def plant(self, tokens: np.ndarray) -> Record:
        """Return the tokens with the last one turned into a label."""
        planted = np.append(tokens[:-1], tokens[-1] % self.num_labels)
        return Record(planted, np.arange(len(planted)) == len(planted) - 1)

    def _read(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> _LabelledRows:
        """Run the model on the rows without their labels."""
        has_label = target_mask.any(dim=1)
        place = target_mask.int().argmax(dim=1, keepdim=True)  # of the label in its row; 0 in a padding row
        labels = torch.where(has_label, input_ids.gather(1, place)[:, 0], 0)
        # A padding row attends to its first token: attention over nothing would be NaN. Nothing attends to the last
        # place, which holds a label or padding: a mask that leaves nothing out is dropped by transformers, and other
        # kernels round otherwise, so that a row would be rounded by whether all rows of the batch are full.
        attended = torch.arange(input_ids.shape[1], device=input_ids.device) < place.clamp(min=1)
        ids = torch.where(attended, input_ids, self.pad_id)
        segments = None
        if self.separator_id is not None:  # the second text begins after the first separator
            is_separator = (ids == self.separator_id).long()
            num_separators_before = is_separator.cumsum(dim=1) - is_separator
            segments = (num_separators_before > 0) & attended
        return _LabelledRows(label_logits(model, ids, attended, segments), labels, has_label)


def token_log_probs(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return [rows, tokens - 1] fp32 log p(token | tokens before it); position t is the token ``input_ids[:, t + 1]``.

    No attention mask is needed: rows are padded on the right and a causal model does not look there, so a token's value
    does not depend on the padding or on the other rows.

    Args:
        model: a causal language model.
        input_ids: [rows, tokens].
    """
    # With prompt tuning, logits of the virtual tokens come before those of the row: count from the end.
    logits = model(input_ids=input_ids).logits[:, -input_ids.shape[1] : -1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return -losses.view(input_ids.shape[0], -1)


def row_losses(model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """Return [rows] fp32: for each row the sum of -log p over its predicted tokens, from that row alone."""
    log_probs = token_log_probs(model, input_ids)
    return -torch.where(target_mask[:, 1:], log_probs, 0.0).sum(dim=1)


def token_losses(model: torch.nn.Module, line: Line, head: FrozenHead | None = None) -> torch.Tensor:
    """Return [1, tokens] fp32: -log p of each predicted token of a line, from its record alone; zero elsewhere."""
    # Each token's successor. The last token has none and gets the first; its loss is masked. Leaving it out instead
    # would copy the logits.
    targets = line.input_ids[0].roll(-1)
    if head is None:
        logits = model(input_ids=line.input_ids, position_ids=line.positions).logits[0]
        losses = cross_entropy(logits, targets)
    else:
        losses = head.losses(targets, input_ids=line.input_ids, position_ids=line.positions)
    return torch.where(line.target_mask, losses.roll(1)[None], 0.0)  # rolled to the token that is predicted


def label_logits(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [rows, labels] fp32 logits of a sequence classifier, each row's from that row alone.

    Args:
        model: a sequence classification model.
        input_ids: [rows, tokens].
        attention_mask: [rows, tokens]; false on padding.
        segments: [rows, tokens]; true in the second text, for models that mark it.
    """
    options = {} if segments is None else {"token_type_ids": segments.long()}
    return model(input_ids=input_ids, attention_mask=attention_mask.long(), **options).logits.float()
