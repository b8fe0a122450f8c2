"""A record as token ids, with the positions that are predicted: those whose loss is trained."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """One tokenised record.

    A classification record is its tokens followed by the number of its label, the one position that is predicted: so
    masks, units and microbatches need to know nothing of tasks.

    Attributes:
        tokens: [n] int64 token ids, n ≥ 1.
        is_target: [n] bool: whether the token at this position is predicted (from those before it). Never the first.
    """

    tokens: np.ndarray
    is_target: np.ndarray

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.is_target.shape
        assert not self.is_target[:1].any()

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_targets(self) -> int:
        """Number of predicted tokens."""
        return int(self.is_target.sum())

    @classmethod
    def of(cls, tokens: np.ndarray | Record) -> Record:
        """Return tokens as a record that predicts every token but the first; return a record unchanged."""
        if isinstance(tokens, Record):
            return tokens
        is_target = np.ones(len(tokens), dtype=bool)
        is_target[:1] = False
        return cls(tokens, is_target)

    def cut(self, max_length: int) -> Record:
        """Return the record of the first ``max_length`` tokens."""
        return Record(self.tokens[:max_length], self.is_target[:max_length])
