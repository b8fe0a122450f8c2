"""A look at rows before anything is spent: which are dropped and why, and whether the rest teach the model anything.

What is found is for the owner of the data: it goes to the console, and nowhere else. A start that is refused because of
it releases nothing.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Iterator

import numpy as np

from privtrain.config.data import DataSection
from privtrain.data import chat
from privtrain.data.corpus import Corpus
from privtrain.data.encode import Encoder
from privtrain.data.records import Record
from privtrain.errors import ConfigError, Fault

#: Records that are encoded for a look, evenly spaced over the data.
NUM_LOOKED_AT = 512
_AT_ONCE = 64
#: Ids that are compared with others; of data on disk each comparison is a search.
_NUM_IDS_LOOKED_AT = 100_000

#: What becomes of a missing id when a table is written as text.
_NO_IDS = ("nan", "NaN", "None", "null", "NULL", "NA", "N/A", "<NA>", "NaT", "undefined")

#: A number that a spreadsheet rounded, also with a decimal comma.
_ROUNDED_NUMBER = re.compile(r"[0-9][.,][0-9]+[Ee][+][0-9]+")

#: Shares of records above which truncation, or of tokens above which unknown words, are worth a warning.
_MUCH_TRUNCATION = 0.2
_MUCH_UNKNOWN = 0.01
#: Models embed a few ids more than their tokenizer has; one that has far fewer is probably another model's.
_FEW_TOKENS = 0.8


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen in the records that were looked at. Private: it describes the data.

    Attributes:
        lengths: [records] tokens of each, cut at ``data.max_length``.
        num_predicted: [records] predicted tokens of each.
        num_truncated: how many records were cut.
        complaints: why records predict nothing → number of such records.
        labels: number of a label (its place in ``data.labels``) → records with it; empty except for classification.
        faults: what a start of training is refused for.
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
        corpus: the kept records, and counts of the rows that were dropped.
        encoder: encodes records as training will. Its complaints are cleared, before and after.
        data: the section of the configuration that corpus and encoder were made from.
    """
    encoder.complaints.clear()
    encoded = encoder.encode(sample_of(corpus, NUM_LOOKED_AT))
    lengths = np.asarray([len(record) for record in encoded.records])
    num_predicted = np.asarray([record.num_targets for record in encoded.records])
    labels: collections.Counter[int] = collections.Counter()
    if data.is_classification:
        labels.update(int(record.tokens[-1]) for record in encoded.records if record.num_targets)
    faults = [] if num_predicted.any() else [*_nothing_learned(corpus, encoder)]
    if not faults:
        faults = [*_dropped(corpus, encoder, num_predicted, data)]
    complaints = dict(encoder.complaints.most_common())
    encoder.complaints.clear()  # so that training counts the complaints of its own records alone
    warnings = [*_warnings(encoded.records, encoder, data, encoded.num_truncated, labels), *_doubtful_users(corpus)]
    return Look(lengths, num_predicted, encoded.num_truncated, complaints, dict(labels), tuple(faults), tuple(warnings))


def check_rows(corpus: Corpus, encoder: Encoder, data: DataSection) -> tuple[str, ...]:
    """Return the warnings of :func:`look_at`, whose arguments these are.

    Raises:
        ConfigError: with the faults of :func:`look_at`. Training would otherwise spend ε on noise alone.
    """
    look = look_at(corpus, encoder, data)
    if look.faults:
        raise ConfigError(look.faults)
    return look.warnings


def sample_of(corpus: Corpus, size: int) -> list[str]:
    """Return at most ``size`` records, evenly spaced over the data; always the same. No other record is read."""
    step = max(1, math.ceil(corpus.num_records / size))
    sample: list[str] = []
    num_before = 0  # records of the users before this one
    wanted = 0  # number of the next record to take, in all users' records
    for texts in corpus.records.values():
        while wanted < num_before + len(texts):
            sample.append(texts[wanted - num_before])
            wanted += step
        num_before += len(texts)
    return sample


def _dropped(corpus: Corpus, encoder: Encoder, num_predicted: np.ndarray, data: DataSection) -> Iterator[Fault]:
    """Yield a fault if more rows are dropped or predict nothing than ``data.max_unusable_fraction`` allows.

    ``num_predicted`` holds the predicted tokens of the records looked at: they stand for all kept rows.
    """
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
    """Yield a fault if no record of the whole data predicts a token; stop reading where one does."""
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
    """Yield what does not stop training but spoils its result: truncation, unknown tokens, unused labels."""
    if num_truncated > _MUCH_TRUNCATION * len(records):
        yield f"{num_truncated / len(records):.0%} of records are cut at data.max_length={data.max_length} tokens"
    num_tokens, num_ids = len(encoder.tokenizer), encoder.num_ids
    if num_ids is not None and num_tokens < _FEW_TOKENS * num_ids:
        yield f"the tokenizer has {num_tokens:,} tokens and the model embeds {num_ids:,}: is it this model's tokenizer?"
    if data.format == "chat" and chat.writes_date(encoder.tokenizer):
        day = f"{chat.TODAY.day} {chat.TODAY:%B %Y}"
        yield f"the chat template writes today's date; here it is always {day}, so that records never change"
    unknown = encoder.tokenizer.unk_token_id
    if unknown is not None and unknown not in encoder.marks:
        num_unknown = sum(int((record.tokens == unknown).sum()) for record in records)
        share = num_unknown / max(1, sum(map(len, records)))
        if share > _MUCH_UNKNOWN:
            yield f"{share:.0%} of tokens are unknown to the tokenizer; is it the one for this language?"
    for number, name in enumerate(data.labels or ()):
        if labels[number] == 0:
            yield f"no record among {len(records)} has the label {name!r} of data.labels"


def _doubtful_users(corpus: Corpus) -> Iterator[str]:
    """Yield warnings of ids that may stand for many people, since tables write no id so, or for one person twice."""
    users = list(itertools.islice(corpus.records, _NUM_IDS_LOOKED_AT))
    num_in_lower_case = sum(user != user.lower() and user.lower() in corpus.records for user in users)
    if num_in_lower_case:
        yield (
            f"{num_in_lower_case} ids are other ids but for capital letters; if both are of one person, as of mail "
            "addresses, write them in lower case: they count as two users"
        )
    num_rounded = sum(_ROUNDED_NUMBER.fullmatch(user) is not None for user in users)
    if num_rounded:
        yield (
            f"{num_rounded} ids are numbers such as 1.23457E+15, as spreadsheets round long ones: several people may "
            "have become one user; export the column as text"
        )
    for name in _NO_IDS:
        if name in corpus.records:
            yield (
                f"{len(corpus.records[name])} records are of a user called {name!r}: if that stands for a missing id, "
                "leave the cell empty; together they count as one person"
            )


def reasons_of(encoder: Encoder) -> str:
    """Return the encoder's complaints as the end of a sentence, e.g. ": 3 × cut before ..."; empty without any."""
    reasons = [f"{count} × {reason}" for reason, count in encoder.complaints.most_common()]
    return f": {'; '.join(reasons)}" if reasons else ""
