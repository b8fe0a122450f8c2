"""Language models of known distributions: categorical and Markov laws, and mixtures of them over documents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from attacks.scoring.scorer import TokenSignals

FloatArray = npt.NDArray[np.float64]


class ExactModel:
    """A model that gives the law of the next token; token 0 begins every sequence and is context only."""

    num_tokens: int

    def next_law(self, context: Sequence[int]) -> FloatArray:
        """p(next | context), [num_tokens]."""
        raise NotImplementedError

    def score(self, sequences: Sequence[npt.NDArray[np.int64]]) -> list[TokenSignals]:
        found = []
        for tokens in sequences:
            laws = np.array([self.next_law(tokens[:place].tolist()) for place in range(1, len(tokens))])
            with np.errstate(divide="ignore"):
                logs = np.log(laws)
            finite = np.where(laws > 0, logs, 0.0)
            mean = (laws * finite).sum(axis=1)
            variance = (laws * (finite - mean[:, None]) ** 2).sum(axis=1)
            logp = logs[np.arange(len(tokens) - 1), tokens[1:]]
            found.append(TokenSignals(logp, laws.argmax(axis=1) == tokens[1:], mean, variance))
        return found

    def likeliest(self, sequences, count):
        return [
            np.array([np.argsort(-self.next_law(t[:p].tolist()))[:count] for p in range(1, len(t))]) for t in sequences
        ]

    def probability(self, document: Sequence[int]) -> float:
        """p(document), without its first token."""
        return float(np.prod([self.next_law(document[:place])[document[place]] for place in range(1, len(document))]))

    def documents(self, length: int) -> list[tuple[int, ...]]:
        """Every document of this length."""
        return [(0, *rest) for rest in itertools.product(range(self.num_tokens), repeat=length)]

    def draw(self, rng: np.random.Generator, length: int) -> npt.NDArray[np.int64]:
        """A random document."""
        found = [0]
        for _ in range(length):
            found.append(int(rng.choice(self.num_tokens, p=self.next_law(found))))
        return np.array(found)


class Categorical(ExactModel):
    """Tokens drawn independently."""

    def __init__(self, law: Sequence[float]) -> None:
        self.law = np.asarray(law, dtype=np.float64)
        self.num_tokens = len(self.law)

    def next_law(self, context):
        return self.law


class Markov(ExactModel):
    """The next token depends on the last one."""

    def __init__(self, transitions: Sequence[Sequence[float]]) -> None:
        self.transitions = np.asarray(transitions, dtype=np.float64)
        self.num_tokens = len(self.transitions)

    def next_law(self, context):
        return self.transitions[context[-1]]


class Mixture(ExactModel):
    """Whole documents drawn from one of several models: what a perfect learner of many users is."""

    def __init__(self, weights: Sequence[float], models: Sequence[ExactModel]) -> None:
        self.weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
        self.models = list(models)
        self.num_tokens = models[0].num_tokens

    def next_law(self, context):
        posterior = self.weights * [model.probability(context) for model in self.models]
        laws = np.array([model.next_law(context) for model in self.models])
        return posterior @ laws / posterior.sum()
