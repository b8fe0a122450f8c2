"""A look at rows before anything is spent: which are dropped and why, and whether the rest teach the model anything.

What is found is for the owner of the data: it goes to the console, and nowhere else. A start that is refused because of
it releases nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np

from privtrain.config.data import DataSection
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.records import Record
from privtrain.errors import ConfigError, Fault

#: Records that are encoded for a look, evenly spaced over the data.
NUM_LOOKED_AT = 512
_AT_ONCE = 64

#: Shares of records above which truncation, or of tokens above which unknown words, are worth a warning.
_MUCH_TRUNCATION = 0.2
_MUCH_UNKNOWN = 0.01
#: Models embed a few ids more than their tokenizer has; one that has far fewer is probably another model's.
_FEW_TOKENS = 0.8


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen. Private: it describes the data.

    Attributes:
        lengths: tokens of each record that was looked at, cut at ``data.max_length``.
        num_predicted: predicted tokens of each.
        num_truncated: how many were cut.
        complaints: why records predict nothing, with their number among those looked at.
        labels: how many records have each label, by its number; empty but for classification.
        faults: what a start is refused for.
        warnings: what is worth a second thought.
    """

    lengths: np.ndarray
    num_predicted: np.ndarray
    num_truncated: int
    complaints: dict[str, int]
    labels: dict[int, int]
    faults: tuple[Fault, ...]
    warnings: tuple[str, ...]


def look_at(corpus: Corpus, encoder: Encoder, data: DataSection) -> Look:
    """Encode some records and say what is wrong with them, and with the rows that were dropped.

    Args:
        corpus: the kept records, and the counts of the others.
        encoder: as training encodes them, for the model that is trained. Its complaints are cleared.
        data: the section that it was made of.
    """
    encoder.complaints.clear()
    encoded = encoder.encode(sample_of(corpus, NUM_LOOKED_AT))
    lengths = np.asarray([len(record) for record in encoded.records])
    num_predicted = np.asarray([record.num_targets for record in encoded.records])
    labels: collections.Counter[int] = collections.Counter()
    if data.is_classification:
        labels.update(int(record.tokens[-1]) for record in encoded.records if record.num_targets)
    faults = [] if num_predicted.any() else [*_nothing_learned(corpus, encoder)]
    faults = faults or [*_dropped(corpus, encoder, num_predicted, data)]
    complaints = dict(encoder.complaints.most_common())
    encoder.complaints.clear()  # the records that are trained on are counted when they are encoded
    warnings = [*_warnings(encoded.records, encoder, data, encoded.num_truncated, labels)]
    return Look(lengths, num_predicted, encoded.num_truncated, complaints, dict(labels), tuple(faults), tuple(warnings))


def check_rows(corpus: Corpus, encoder: Encoder, data: DataSection) -> tuple[str, ...]:
    """Return the warnings of :func:`look_at`.

    Raises:
        ConfigError: with its faults. Noise alone would be trained on otherwise, and ε spent for it.
    """
    look = look_at(corpus, encoder, data)
    if look.faults:
        raise ConfigError(look.faults)
    return look.warnings


def sample_of(corpus: Corpus, size: int) -> list[str]:
    """Return records evenly spaced over the data; always the same. No other record is read."""
    step = max(1, -(-corpus.num_records // size))
    sample, position, wanted = [], 0, 0
    for texts in corpus.records.values():
        while wanted < position + len(texts):
            sample.append(texts[wanted - position])
            wanted += step
        position += len(texts)
    return sample


def _dropped(corpus: Corpus, encoder: Encoder, num_predicted: np.ndarray, data: DataSection) -> Iterator[Fault]:
    """Yield a fault if more rows are dropped or predict nothing than ``data.max_unusable_fraction`` allows."""
    counts = corpus.counts
    useless_share = float((num_predicted == 0).mean())
    num_kept = counts.num_rows - counts.num_without_user - counts.num_empty
    share = (counts.num_without_user + counts.num_empty + useless_share * num_kept) / max(counts.num_rows, 1)
    if share <= data.max_unusable_fraction:
        return
    reasons = counts.why_dropped()
    if useless_share:
        reasons.append(f"{useless_share:.0%} of the others predict no token{reasons_of(encoder)}")
    yield Fault(
        "data",
        f"{share:.0%} of {counts.num_rows} rows would teach the model nothing ({'; '.join(reasons)}); mend them, or "
        f"raise data.max_unusable_fraction from {data.max_unusable_fraction:g}. To see them: privtrain preview CONFIG",
    )


def _nothing_learned(corpus: Corpus, encoder: Encoder) -> Iterator[Fault]:
    """Yield a fault unless any record at all predicts a token; the look ends at the first that does."""
    records = itertools.chain.from_iterable(corpus.records.values())
    encoder.complaints.clear()
    while batch := list(itertools.islice(records, _AT_ONCE)):
        if encoder.encode(batch).num_without_target < len(batch):
            return
    yield Fault("data", f"no record predicts a token, so nothing would be learned{reasons_of(encoder)}")


def _warnings(
    records: list[Record],
    encoder: Encoder,
    data: DataSection,
    num_truncated: int,
    labels: collections.Counter[int],
) -> Iterator[str]:
    """Yield what training would survive and its results would not: truncation, unknown tokens, unused labels."""
    if num_truncated > _MUCH_TRUNCATION * len(records):
        yield f"{num_truncated / len(records):.0%} of records are cut at data.max_length={data.max_length} tokens"
    num_tokens, num_ids = len(encoder.tokenizer), encoder.num_ids
    if num_ids is not None and num_tokens < _FEW_TOKENS * num_ids:
        yield f"the tokenizer has {num_tokens:,} tokens and the model embeds {num_ids:,}: is it this model's tokenizer?"
    unknown = encoder.tokenizer.unk_token_id
    if unknown is not None and unknown not in encoder.marks:
        num_unknown = sum(int((record.tokens == unknown).sum()) for record in records)
        share = num_unknown / max(1, sum(map(len, records)))
        if share > _MUCH_UNKNOWN:
            yield f"{share:.0%} of tokens are unknown to the tokenizer; is it the one for this language?"
    for number, name in enumerate(data.labels or ()):
        if labels[number] == 0:
            yield f"no record among {len(records)} has the label {name!r} of data.labels"


def reasons_of(encoder: Encoder) -> str:
    """Return why encoded records have no predicted token, without quoting any; empty if all have one."""
    reasons = [f"{count} × {reason}" for reason, count in encoder.complaints.most_common()]
    return f": {'; '.join(reasons)}" if reasons else ""
