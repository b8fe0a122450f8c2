"""What scoring asks of a language model. Anything that can answer can be attacked: a network, or a table of numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSignals:
    """One sequence under one model; entry t speaks of the token after ``tokens[: t + 1]``.

    Attributes:
        logp: log-probability of the token, in nats.
        correct: whether it is the most likely one.
        mean: mean of log p over the vocabulary, under p.
        variance: its variance, under p.
        sampled_logp: log-probability of the token under the sampling scheme, -inf if it cannot be drawn; None if the
            scorer has no scheme.
    """

    logp: npt.NDArray[np.float32]
    correct: npt.NDArray[np.bool_]
    mean: npt.NDArray[np.float32]
    variance: npt.NDArray[np.float32]
    sampled_logp: npt.NDArray[np.float32] | None = None


class Scorer(Protocol):
    """A language model as the attacker may query it."""

    def score(self, sequences: Sequence[npt.NDArray[np.int64]]) -> list[TokenSignals]:
        """Return the signals of each sequence: n - 1 entries for n tokens, of which the first is context only.

        Args:
            sequences: token ids, each of at least two tokens.
        """
        ...

    def likeliest(self, sequences: Sequence[npt.NDArray[np.int64]], count: int) -> list[npt.NDArray[np.int64]]:
        """Return, for each sequence of n tokens, [n - 1, count] the likeliest tokens after each prefix, best first."""
        ...
