"""Re-written documents that some attacks compare the original with; each costs forward passes under the target.

``lowercase``: the text in lower case. ``recall``: the document after a prefix that the model was not trained on.
``neighbours:N``: N copies in which some tokens gave way to others that the base model finds likely there (proposed from
the left context; Mattern et al. 2023 use a masked model, which would be a second model to load).
``control_prefix``: training records after the first tokens of another user's, as rows of their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from attacks.errors import AttackInputError
from attacks.scoring.documents import text_encoder, tokens_of
from attacks.scoring.scorer import Scorer
from privtrain.data.canaries import canaries_of
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder

KINDS = ("lowercase", "recall", "neighbours", "control_prefix")

RECALL, RECALL_PLAIN = "recall", "recall_plain"

CONTROL_PREFIX_TOKENS = 16
"""Tokens, the begin mark not counted, that control prefixes replace."""

_NUM_PROPOSALS = 10
_REPLACED_SHARE = 0.3
_PREFIX_SHARE = 0.25
_MOST_DONORS = 20
"""Users whose texts are joined into the prefix of ``recall``: enough to fill it."""

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Rewritten:
    """A sequence whose mean log-probability is wanted.

    Attributes:
        place: index of the document that it is a variant of.
        name: of the variant, such as ``"lowercase"`` or ``"neighbour_3"``.
        tokens: the whole sequence.
        first: index of the first predicted token that counts; those before it belong to a prefix.
    """

    place: int
    name: str
    tokens: Tokens
    first: int = 0


@dataclasses.dataclass(frozen=True)
class Variants:
    """What ``--variants`` asks for; see the module for what each variant is."""

    lowercase: bool = False
    recall: bool = False
    num_neighbours: int = 0
    control_prefix: bool = False

    @classmethod
    def parse(cls, text: str) -> Variants:
        """Read a comma-separated list such as ``"lowercase,neighbours:5"``.

        Raises:
            AttackInputError: if an item is unknown.
        """
        fields: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            kind, _, count = item.partition(":")
            if kind == "neighbours" and count.isdecimal() and int(count) > 0:
                fields["num_neighbours"] = int(count)
            elif kind in ("lowercase", "recall", "control_prefix") and not count:
                fields[kind] = True
            else:
                raise AttackInputError(
                    f"unknown variant {item!r}; expected lowercase, recall, control_prefix or neighbours:N"
                )
        return cls(**fields)


def recall_prefix(manifest: Mapping[str, Any], corpus: Corpus, encoder: Encoder, max_length: int) -> Tokens:
    """Return the prefix for the variant ``recall``: text of held-out users who are not attacked.

    So the model was not trained on it, and no scored user meets their own words in it.

    Args:
        manifest: the split of the attacked run.
        corpus: its data.
        encoder: texts to tokens, as training does.
        max_length: tokens of a training record at most; the prefix has a quarter of them.

    Raises:
        AttackInputError: if there is no such user.
    """
    canaries = {canary.user for canary in canaries_of(manifest)}
    donors = sorted(set(manifest["held_out"]) - set(manifest["attacker"]) - canaries)
    if not donors:
        raise AttackInputError("variant recall needs a held-out user without attacker documents; leave the variant out")
    size = max(2, int(_PREFIX_SHARE * max_length))  # tokens of the prefix
    shorter = text_encoder(encoder, size + 1)
    texts = [text for user in donors[:_MOST_DONORS] for text in corpus.records[user]]
    # A text that cannot be trained on is encoded without a token to predict: it is left out.
    readable = [text for text, record in zip(texts, shorter.encode(texts).records, strict=True) if record.num_targets]
    (tokens,) = tokens_of([" ".join(readable)], shorter)
    return tokens[:size]


def exchange_prefixes(users: Sequence[str], tokens: Sequence[Tokens]) -> list[Tokens | None]:
    """Replace the first tokens of each document by those of another user's document.

    Args:
        users: owner of each document.
        tokens: of each document.

    Returns:
        The new tokens of each document; None if it is too short, or nobody else has one that is long enough.
    """
    size = 1 + CONTROL_PREFIX_TOKENS  # with the begin mark
    exchanged: list[Tokens | None] = []
    for place, ids in enumerate(tokens):
        new_ids = None
        if len(ids) > size:
            # The next documents in turn, around the end of the list: the first that fits lends its tokens.
            for step in range(1, len(tokens)):
                lender = (place + step) % len(tokens)
                if users[lender] != users[place] and len(tokens[lender]) > size:
                    new_ids = np.concatenate([tokens[lender][:size], ids[size:]])
                    break
        exchanged.append(new_ids)
    return exchanged


def rewrite(
    variants: Variants,
    texts: Sequence[str],
    tokens: Sequence[Tokens],
    *,
    encoder: Encoder,
    max_length: int,
    prefix: Tokens | None,
) -> list[Rewritten]:
    """Return the variants that need no model: ``lowercase`` if asked for, ``recall`` if there is a prefix.

    Args:
        variants: what was asked for.
        texts: of the documents.
        tokens: of the documents.
        encoder: texts to tokens, as training does.
        max_length: tokens of a sequence at most.
        prefix: to put before each document.
    """
    rewritten = []
    if variants.lowercase:
        lowered = tokens_of([text.lower() for text in texts], text_encoder(encoder, max_length))
        rewritten += [Rewritten(place, "lowercase", ids) for place, ids in enumerate(lowered)]
    if prefix is not None:
        for place, ids in enumerate(tokens):
            # Without the document's first token, the begin mark: the prefix begins with one.
            joined = np.concatenate([prefix, ids[1:]])[:max_length]
            rewritten.append(Rewritten(place, RECALL, joined, first=len(prefix) - 1))
    return rewritten


def neighbours(
    names: Sequence[str], tokens: Sequence[Tokens], proposals: Sequence[npt.NDArray[np.int64]], count: int
) -> list[Rewritten]:
    """Return copies of each document with some tokens replaced; the same for the same names.

    Args:
        names: of the documents, seeds of the choice.
        tokens: of the documents.
        proposals: likely tokens at each predicted place, [tokens - 1, proposals].
        count: copies of each.
    """
    copies = []
    for place, (name, ids, likely) in enumerate(zip(names, tokens, proposals, strict=True)):
        seed = list(hashlib.sha256(name.encode()).digest())
        rng = np.random.default_rng(seed)
        # The first token is never predicted; the last may be the end mark: both stay.
        positions = np.arange(1, max(2, len(ids) - 1))
        num_replaced = max(1, round(_REPLACED_SHARE * len(positions)))
        for number in range(count):
            copy = ids.copy()
            for position in rng.choice(positions, num_replaced, replace=False):
                proposed = likely[position - 1]  # there is no row for the first token
                copy[position] = rng.choice(proposed[proposed != ids[position]])
            copies.append(Rewritten(place, f"neighbour_{number}", copy))
    return copies


def propose(base: Scorer, sequences: Sequence[Tokens]) -> list[npt.NDArray[np.int64]]:
    """Return, for each sequence, [tokens - 1, proposals] the tokens that the base model finds likeliest there."""
    return base.likeliest(sequences, _NUM_PROPOSALS)
