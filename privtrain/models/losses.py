"""What is learned of a record: the loss of each row, of that row alone, and how a model is scored on held-out records.

Everything between a record and its loss (units, microbatches, clipping, the self-test) sees tokens and a mask of the
predicted ones. Only this module knows that a classifier's one predicted "token" is its label.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from typing_extensions import override

from privtrain.data.lines import Line
from privtrain.data.records import Record
from privtrain.models.head_loss import FrozenHead, cross_entropy


class Objective(abc.ABC):
    """What is learned of a record: the task that losses and accuracy are of."""

    #: Whether :meth:`token_losses` exists.
    takes_lines = False

    def token_losses(self, model: torch.nn.Module, line: Line) -> torch.Tensor:
        """Return [1, tokens] fp32: each predicted token's loss, from its record alone; zero elsewhere.

        Within :func:`privtrain.clipping.attention.within_records`.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Return [rows] fp32: the sum of each row's losses at its predicted positions; zero for a row without any."""

    @abc.abstractmethod
    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """Return [] how many labels are the model's first choice; zero where accuracy has no meaning."""

    @abc.abstractmethod
    def plant(self, tokens: np.ndarray) -> Record:
        """Return a record of arbitrary tokens for the start-up self-test."""


@dataclasses.dataclass(frozen=True)
class CausalLM(Objective):
    """The next token, wherever the mask asks for it.

    Attributes:
        head: the model's, where lines need not form all logits at once.
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


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """The label of a sequence.

    Attributes:
        num_labels: number of labels.
        pad_id: what stands in the label's place when the model reads the row.
        separator_id: the token between two texts, for models that mark the second one (BERT); otherwise ``None``.
    """

    num_labels: int
    pad_id: int
    separator_id: int | None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, *, num_labels: int, pad_id: int, is_pair: bool) -> Classification:
        """Return the objective of a model: the second text is marked where the model has segments for it."""
        has_segments = is_pair and getattr(model.config, "type_vocab_size", 0) > 1
        return cls(num_labels, pad_id, tokenizer.sep_token_id if has_segments else None)

    @override
    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        logits, labels, has_label = self._read(model, input_ids, target_mask)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return torch.where(has_label, losses, 0.0)

    @override
    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        logits, labels, has_label = self._read(model, input_ids, target_mask)
        return ((logits.argmax(dim=1) == labels) & has_label).sum()

    @override
    def plant(self, tokens: np.ndarray) -> Record:
        """Return the tokens with the last one turned into a label."""
        planted = np.append(tokens[:-1], tokens[-1] % self.num_labels)
        return Record(planted, np.arange(len(planted)) == len(planted) - 1)

    def _read(
        self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits, labels, and which rows have one (padding rows have none)."""
        has_label = target_mask.any(dim=1)
        place = target_mask.int().argmax(dim=1, keepdim=True)
        labels = torch.where(has_label, input_ids.gather(1, place)[:, 0], 0)
        # The last place holds a label or padding. It is not read: the model may have no position for it.
        texts = input_ids[:, : max(1, input_ids.shape[1] - 1)]
        # A padding row attends to its first token: attention over nothing would be NaN.
        attended = torch.arange(texts.shape[1], device=input_ids.device) < place.clamp(min=1)
        ids = torch.where(attended, texts, self.pad_id)
        segments = None
        if self.separator_id is not None:
            is_separator = (ids == self.separator_id).long()
            segments = ((is_separator.cumsum(dim=1) - is_separator) > 0) & attended
        return label_logits(model, ids, attended, segments), labels, has_label


def token_log_probs(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return [rows, tokens - 1] fp32 log p(token | tokens before it); position t is the token ``input_ids[:, t + 1]``.

    No attention mask is needed: rows are padded on the right and a causal model does not look there, so a token's value
    does not depend on the padding or on the other rows.

    Args:
        model: a causal language model.
        input_ids: [rows, tokens].
    """
    # Prompt tuning puts its virtual tokens before the row's own.
    logits = model(input_ids=input_ids).logits[:, -input_ids.shape[1] : -1].float()
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return -losses.view(input_ids.shape[0], -1)


def row_losses(model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
    """Return [rows] fp32 sums of the negative log-likelihoods of predicted tokens, no term of another row."""
    log_probs = token_log_probs(model, input_ids)
    return -torch.where(target_mask[:, 1:], log_probs, 0.0).sum(dim=1)


def token_losses(model: torch.nn.Module, line: Line, head: FrozenHead | None = None) -> torch.Tensor:
    """Return [1, tokens] fp32 negative log-likelihoods of a line's predicted tokens, no term of another record."""
    # For all tokens, the last for nothing: a slice of the logits would copy them.
    targets = line.input_ids[0].roll(-1)
    if head is None:
        logits = model(input_ids=line.input_ids, position_ids=line.positions).logits[0]
        losses = cross_entropy(logits, targets)
    else:
        losses = head.losses(targets, input_ids=line.input_ids, position_ids=line.positions)
    return torch.where(line.target_mask, losses.roll(1)[None], 0.0)


def label_logits(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    segments: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return logits of each row's label under a sequence classifier: [rows, labels], fp32, no term of another row.

    Args:
        model: a sequence classification model.
        input_ids: [rows, tokens].
        attention_mask: [rows, tokens]; false on padding.
        segments: [rows, tokens]; true in the second text, for models that mark it.
    """
    options = {} if segments is None else {"token_type_ids": segments.long()}
    return model(input_ids=input_ids, attention_mask=attention_mask.long(), **options).logits.float()
