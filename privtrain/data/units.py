"""From a split to privacy units: tokenised records, each owned by exactly one unit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from privtrain.data.corpus import Corpus
from privtrain.data.split import Split

_TOKENIZER_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class UnitData:
    """The training units, in a fixed order that every rank shares.

    Attributes:
        names: unit identifiers: user ids, or ``user#record`` where the unit is the example. Private.
        records: per unit, its token id arrays.
        num_truncated: records cut at ``max_length``. Private.
    """

    names: tuple[str, ...]
    records: tuple[tuple[np.ndarray, ...], ...]
    num_truncated: int

    def __len__(self) -> int:
        return len(self.names)

    def sha256(self) -> str:
        """Digest of every unit's name and tokens."""
        digest = hashlib.sha256()
        for name, records in zip(self.names, self.records, strict=True):
            for part in (name.encode("utf-8", errors="surrogatepass"), *(tokens.tobytes() for tokens in records)):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


def build_units(
    corpus: Corpus, split: Split, tokenizer: PreTrainedTokenizerBase, *, unit: str, max_length: int
) -> UnitData:
    """Tokenise the training records of ``split`` and group them by privacy unit.

    Args:
        corpus: the kept records.
        split: which of them are trained on.
        tokenizer: turns text into ids; begin- and end-of-text tokens are added here.
        unit: ``"user"`` groups a user's records; ``"example"`` makes each record a unit.
        max_length: tokens kept of a record, marks included.
    """
    owners = [(user, index) for user, indices in split.training.items() for index in indices]
    tokens, num_truncated = tokenize([corpus.records[u][i] for u, i in owners], tokenizer, max_length)
    names: list[str] = []
    grouped: list[list[np.ndarray]] = []
    for (user, index), ids in zip(owners, tokens, strict=True):
        if unit == "example":
            names.append(f"{user}#{index}")
            grouped.append([ids])
        elif names and names[-1] == user:
            grouped[-1].append(ids)
        else:
            names.append(user)
            grouped.append([ids])
    return UnitData(tuple(names), tuple(map(tuple, grouped)), num_truncated)


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[np.ndarray], int]:
    """Token ids of each text between the begin and end marks, cut at ``max_length``; and how many were cut.

    The first token is context only, so that every token of the text has a prediction.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    end = tokenizer.eos_token_id
    assert isinstance(begin, int)
    assert isinstance(end, int)
    result, num_truncated = [], 0
    for start in range(0, len(texts), _TOKENIZER_BATCH):
        encoded = tokenizer(list(texts[start : start + _TOKENIZER_BATCH]), add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:  # pyright: ignore[reportGeneralTypeIssues]
            full = [begin, *ids, end]
            num_truncated += len(full) > max_length
            result.append(np.asarray(full[:max_length], dtype=np.int64))
    return result, num_truncated
