"""A look at real rows before anything is spent: does a single record teach the model anything, and if not, why."""

from __future__ import annotations

import itertools

from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.errors import ConfigError, Fault

_AT_ONCE = 64


def check_learnable(corpus: Corpus, encoder: Encoder) -> None:
    """Raise unless some record has a predicted token; the look ends at the first that has one.

    Noise alone would be trained on otherwise, and ε spent for it.

    Args:
        corpus: the kept records.
        encoder: as training encodes them, once it knows the model.

    Raises:
        ConfigError: with the reasons, each with its number of records, and what to change.
    """
    records = (record for texts in corpus.records.values() for record in texts)
    while batch := list(itertools.islice(records, _AT_ONCE)):
        encoded = encoder.encode(batch)
        if encoded.num_without_target < len(batch):
            encoder.complaints.clear()  # the records that are trained on are counted when they are encoded
            return
    raise ConfigError([Fault("data", f"no record predicts a token, so nothing would be learned{reasons_of(encoder)}")])


def reasons_of(encoder: Encoder) -> str:
    """Return why encoded records have no predicted token, without quoting any; empty if all have one."""
    found = [f"{count} × {reason}" for reason, count in encoder.complaints.most_common()]
    return f": {'; '.join(found)}" if found else ""
