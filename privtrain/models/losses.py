"""What is learned of a record: the loss of each row, of that row alone, and how a model is scored on held-out records.

Everything between a record and its loss (units, microbatches, clipping, the self-test) sees tokens and a mask of the
predicted ones. Only this module knows that a classifier's one predicted "token" is its label.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch

from privtrain.data.records import Record
from privtrain.models.load import label_logits, row_losses


class Objective(Protocol):
    """A task."""

    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """[rows] fp32: the sum of each row's losses at its predicted positions; zero for a row without any."""
        ...

    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """[] how many labels are the model's first choice; zero where accuracy has no meaning."""
        ...

    def plant(self, tokens: np.ndarray) -> Record:
        """A record of arbitrary tokens for the start-up self-test."""
        ...


class CausalLM:
    """The next token, wherever the mask asks for it."""

    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """See :class:`Objective`."""
        return row_losses(model, input_ids, target_mask)

    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """See :class:`Objective`."""
        return torch.zeros((), device=input_ids.device)

    def plant(self, tokens: np.ndarray) -> Record:
        """See :class:`Objective`."""
        return Record.of(tokens)


@dataclasses.dataclass(frozen=True)
class Classification:
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
        """The objective of a model: the second text is marked where the model has segments for it.

        Args:
            model: a sequence classifier, with or without an adapter.
            tokenizer: the model's.
            num_labels: number of labels.
            pad_id: the padding token.
            is_pair: whether records hold two texts.
        """
        has_segments = is_pair and getattr(model.config, "type_vocab_size", 0) > 1
        return cls(num_labels, pad_id, tokenizer.sep_token_id if has_segments else None)

    def losses(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """See :class:`Objective`."""
        logits, labels, has_label = self._read(model, input_ids, target_mask)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return torch.where(has_label, losses, 0.0)

    def num_correct(self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor) -> torch.Tensor:
        """See :class:`Objective`."""
        logits, labels, has_label = self._read(model, input_ids, target_mask)
        return ((logits.argmax(dim=1) == labels) & has_label).sum()

    def plant(self, tokens: np.ndarray) -> Record:
        """See :class:`Objective`."""
        planted = np.append(tokens[:-1], tokens[-1] % self.num_labels)
        return Record(planted, np.arange(len(planted)) == len(planted) - 1)

    def _read(
        self, model: torch.nn.Module, input_ids: torch.Tensor, target_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits, labels, and which rows have one (padding rows have none)."""
        has_label = target_mask.any(dim=1)
        place = target_mask.int().argmax(dim=1, keepdim=True)
        labels = torch.where(has_label, input_ids.gather(1, place)[:, 0], 0)
        # A padding row attends to its first token: attention over nothing would be NaN.
        attended = torch.arange(input_ids.shape[1], device=input_ids.device) < place.clamp(min=1)
        ids = torch.where(attended, input_ids, self.pad_id)
        segments = None
        if self.separator_id is not None:
            is_separator = (ids == self.separator_id).long()
            segments = ((is_separator.cumsum(dim=1) - is_separator) > 0) & attended
        return label_logits(model, ids, attended, segments), labels, has_label
