"""Which of a user's records may be trained on: at most k, chosen by the user's own records and public things alone.

Selection comes after the split set some records aside for the attack job, and before training. Whatever is selected of
one user changes nothing for others, so adding or removing a user still adds or removes that user's records and nothing
more: it costs no ε. That is why each strategy here is allowed:

* ``random``: by a secret coin of the user's own.
* ``longest``, ``shortest``: by the length of the user's own records.
* ``highest_perplexity``, ``lowest_perplexity``: by the loss of the user's own records under the model before training,
  which is public. Each record is scored by itself, in a tensor of its own, so that not even rounding depends on others.
  A model that was trained on these data would not do: then the choice would depend on everybody.
* ``random_chunk``: the user's texts end to end, cut into pieces of ``data.max_length`` tokens; then as ``random``.

What is *not* allowed, and not offered: anything that compares users, such as the k records that are rarest in the data
set, or a threshold taken over all of it.

Strategies are those of Chua et al. 2024 (arXiv 2406.14322), section 5.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from privtrain.data.corpus import Corpus
from privtrain.data.packed import UserIndices
from privtrain.data.split import Split
from privtrain.errors import GuaranteeLost
from privtrain.privacy.secret import SecretKey

#: (user, index of a record) → mean loss per predicted token under the public model, in nats.
Losses = Mapping[tuple[str, int], float]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rule that selects each user's training records: how many, and which.

    Attributes:
        strategy: one of those of the module, as in ``privacy.selection``.
        max_records: k, the most records of a user; ``None`` for all.
        key: the run's root key, which ``random`` draws from.
    """

    strategy: str
    max_records: int | None
    key: SecretKey

    @property
    def needs_losses(self) -> bool:
        """Whether records are ranked by their loss."""
        return self.strategy.endswith("_perplexity")

    def to_score(self, split: Split) -> list[tuple[str, int]]:
        """Return the (user, index) of records whose loss must be known: all those of users who have more than k."""
        if not self.needs_losses or self.max_records is None:
            return []
        return [
            (user, index)
            for user, indices in split.training.items()
            if len(indices) > self.max_records
            for index in indices
        ]

    def applied(self, corpus: Corpus, split: Split, losses: Losses) -> Split:
        """Return the split with at most k training records of each user.

        ``random_chunk`` leaves the split as it is: pieces are selected later, when texts are cut into pieces.
        """
        if self.max_records is None or self.strategy == "random_chunk":
            return split
        chosen = (
            (user, self.of_user(user, indices, corpus.records[user], losses))
            for user, indices in split.training.items()
        )
        return dataclasses.replace(split, training=UserIndices(chosen))

    def of_user(self, user: str, indices: Sequence[int], texts: Sequence[str], losses: Losses) -> tuple[int, ...]:
        """Return at most k of ``indices``, in increasing order. Of two records that rank alike the earlier is taken.

        Args:
            user: the user's id.
            indices: records that training may use, increasing.
            texts: all of the user's records.
            losses: loss of each of these records, where the strategy needs them (:meth:`to_score`).
        """
        assert self.max_records is not None
        if len(indices) <= self.max_records:
            return tuple(indices)
        if self.strategy == "random":
            chosen = self.key.stream("selection", user).choose(len(indices), self.max_records)
            return tuple(indices[place] for place in chosen)
        rank: Callable[[int], float] = {
            "longest": lambda index: -len(texts[index]),
            "shortest": lambda index: len(texts[index]),
            "highest_perplexity": lambda index: -losses[user, index],
            "lowest_perplexity": lambda index: losses[user, index],
        }[self.strategy]
        ranked = sorted(indices, key=rank)  # of equal ranks the earlier record first: sorting is stable
        return tuple(sorted(ranked[: self.max_records]))


def check_contributions(owners: Sequence[str], max_records: int | None) -> None:
    """Raise unless every user owns at most ``max_records`` training units; the user-level guarantee depends on it.

    Raises:
        GuaranteeLost: if a user owns more. The message names nobody.
    """
    if max_records is None:
        return
    # Equal ids have equal hashes, so nobody is counted too low; ids that clash by chance only lead to a closer look.
    hashes = np.fromiter(map(hash, owners), dtype=np.int64, count=len(owners))
    hashes.sort()
    if not len(hashes) or _longest_run(hashes) <= max_records:
        return
    most = max(collections.Counter(owners).values())
    if most > max_records:
        raise GuaranteeLost(
            f"a user has {most} records in the training set, privacy.records_per_user allows {max_records}; nothing "
            "was trained. Report this: selection bounds them"
        )


def _longest_run(ordered: np.ndarray) -> int:
    """Return how often the most frequent value stands in a sorted array, which is not empty."""
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))  # the first value starts a run, too
    return int(np.diff(starts, append=len(ordered)).max())
