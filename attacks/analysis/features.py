"""One pass over the signals: every attack's number per document, and what is known of documents and users beside it.

Token arrays are read once and dropped, so memory grows with documents only by a few numbers each.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import scipy.sparse

from attacks.analysis import user_inference
from attacks.analysis.arrays import BoolArray, FloatArray, IntArray
from attacks.analysis.protocol import DocumentAttack, UnderOtherModels
from attacks.errors import AttackInputError
from attacks.reporting.record import Scoring
from attacks.signals import FRESH, HELD_IN, TRAINING, DocumentSignals


@dataclasses.dataclass(frozen=True, eq=False)
class DocumentTable:
    """The documents of one kind, sorted by side, user and document.

    Attributes:
        owner: [documents] index of the document's owner in ``Scored.users``.
        keys: (user, document) names of each document.
        num_tokens: [documents].
        mean_logp: [documents] mean log-probability per token under the attacked model.
        scores: name of an attack or statistic to [documents] scores.
        missing: name of an attack that could not run to the field of the signals that it lacks.
    """

    owner: IntArray
    keys: list[tuple[str, str]]
    num_tokens: IntArray
    mean_logp: FloatArray
    scores: Mapping[str, FloatArray]
    missing: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """Users and documents as arrays, with every attack's score of every document: what the analysis works on.

    Attributes:
        users: pseudonyms, sorted by side ("held_in" first) and name.
        is_held_in: [users].
        num_records: [users] records that training could use.
        num_bytes: [users] bytes of text in them.
        documents: kind (``"fresh"`` or ``"training"``) to its documents.
        tokens: [users, vocabulary] counts of tokens in the user's fresh documents; None without token ids.
        traits: name to [users] what can be seen of the user's fresh documents without any model, such as their length.
        languages: [users] the commonest language of the user's fresh documents.
    """

    users: list[str]
    is_held_in: BoolArray
    num_records: IntArray
    num_bytes: IntArray
    documents: Mapping[str, DocumentTable]
    tokens: scipy.sparse.csr_matrix | None
    traits: Mapping[str, FloatArray]
    languages: list[str]


def _ignore(row: DocumentSignals) -> None:
    """Watch nothing."""


def collect(
    rows: Iterable[DocumentSignals],
    attacks: Iterable[DocumentAttack],
    watch: Callable[[DocumentSignals], None] = _ignore,
) -> Scored:
    """Score every document by every attack that its signals suffice for.

    Args:
        rows: the signals; only fresh and training documents are read, since canaries have panels of their own.
        attacks: those that score one document at a time.
        watch: called with every row that is read.

    Raises:
        AttackInputError: if an attack gives a document no finite score.
    """
    attacks = list(attacks)
    kept: dict[str, list[_Summary]] = collections.defaultdict(list)  # by kind
    counts: dict[tuple[str, str], collections.Counter[int]] = {}  # (side, user) to counts of token ids
    num_records: dict[tuple[str, str], int] = {}  # (side, user) to records that training could use
    num_bytes: dict[tuple[str, str], int] = {}  # (side, user) to bytes of text in them
    missing: dict[str, dict[str, str]] = collections.defaultdict(dict)  # kind to attack to the field that it lacks
    for row in rows:
        if row.kind not in (FRESH, TRAINING):
            continue
        watch(row)
        user = (row.side, row.user)
        num_records[user], num_bytes[user] = row.user_num_records, row.user_num_bytes
        scores = user_inference.document_log_ratios(row)
        for attack in attacks:
            # An attack that lacked a signal of one document stays out for all documents of the kind.
            lacking = missing[row.kind].get(attack.name) or attack.missing(row)
            if lacking is None:
                scores[attack.name] = attack.score(row)
            else:
                missing[row.kind][attack.name] = lacking
        _check_finite(row, scores)
        kept[row.kind].append(_Summary.of(row, scores))
        if row.kind == FRESH and row.token_ids is not None:
            counts.setdefault(user, collections.Counter()).update(row.token_ids.tolist())
    order = sorted(num_records)
    place = {user: index for index, user in enumerate(order)}
    tables = {kind: _table(kept[kind], place, missing[kind]) for kind in (FRESH, TRAINING)}
    traits, languages = _traits(kept[FRESH], place)
    return Scored(
        users=[user for _, user in order],
        is_held_in=np.array([side == HELD_IN for side, _ in order], dtype=np.bool_),
        num_records=np.array([num_records[user] for user in order], dtype=np.int64),
        num_bytes=np.array([num_bytes[user] for user in order], dtype=np.int64),
        documents=tables,
        tokens=_matrix(counts, order) if counts else None,
        traits=traits,
        languages=languages,
    )


def _check_finite(row: DocumentSignals, scores: Mapping[str, float]) -> None:
    """Raise if an attack made no number of a document."""
    wrong = [name for name, score in scores.items() if not math.isfinite(score)]
    if wrong:
        raise AttackInputError(
            f"document {row.document!r} of user {row.user!r} ({row.kind}) has no finite score by {', '.join(wrong)}: "
            "its log-probabilities are no model's; score the run again"
        )


def under_other_models(table: DocumentTable, scored: Scored, references: Iterable[Scoring]) -> UnderOtherModels | None:
    """Return the same documents under shadow models; None without documents or shadows.

    Args:
        table: documents of one kind.
        scored: the users.
        references: signals of the same documents under each shadow.

    Raises:
        KeyError: if a shadow lacks a document.
    """
    columns, inside = [], []  # one entry a shadow: the documents' means, and whether it trained on their owners
    for reference in references:
        means, sides = {}, {}
        for row in reference.rows():
            means[row.user, row.document] = float(row.target_logp.mean(dtype=np.float64))
            sides[row.user] = row.side == HELD_IN
        columns.append([means[key] for key in table.keys])
        inside.append([sides[scored.users[owner]] for owner in table.owner])
    if not columns or not table.keys:
        return None
    return UnderOtherModels(table.mean_logp, np.array(columns).T, np.array(inside).T)


@dataclasses.dataclass(frozen=True)
class _Summary:
    """What is kept of a document once its tokens are dropped: its scores, and what is known without a model."""

    user: tuple[str, str]  # side, pseudonym
    document: str
    num_tokens: int
    mean_logp: float
    scores: Mapping[str, float]
    num_bytes: int
    zlib_bytes: int
    date: float | None
    language: str | None

    @classmethod
    def of(cls, row: DocumentSignals, scores: Mapping[str, float]) -> _Summary:
        """Summarise a document, whose scores by the attacks are known."""
        return cls(
            user=(row.side, row.user),
            document=row.document,
            num_tokens=row.num_tokens,
            mean_logp=float(row.target_logp.mean(dtype=np.float64)),
            scores=scores,
            num_bytes=row.num_bytes,
            zlib_bytes=row.zlib_bytes,
            date=row.date,
            language=row.language,
        )


def _table(kept: list[_Summary], place: Mapping[tuple[str, str], int], missing: Mapping[str, str]) -> DocumentTable:
    """Return documents of one kind as arrays, sorted by side, user and document.

    Args:
        kept: the documents, in any order.
        place: (side, user) to the user's index in ``Scored.users``.
        missing: attacks that lack a signal of some document, which get no column, to that signal.
    """
    rows = sorted(kept, key=lambda item: (item.user, item.document))
    names = [name for name in (rows[0].scores if rows else ()) if name not in missing]
    return DocumentTable(
        owner=np.array([place[item.user] for item in rows], dtype=np.int64),
        keys=[(item.user[1], item.document) for item in rows],
        num_tokens=np.array([item.num_tokens for item in rows], dtype=np.int64),
        mean_logp=np.array([item.mean_logp for item in rows]),
        scores={name: np.array([item.scores[name] for item in rows]) for name in names},
        missing=missing,
    )


def _matrix(
    counts: Mapping[tuple[str, str], collections.Counter[int]], order: list[tuple[str, str]]
) -> scipy.sparse.csr_matrix:
    """Return token counts, [users in order, tokens that occur in ascending order of their ids]."""
    tokens = sorted(set().union(*counts.values()))
    column_of = {token: column for column, token in enumerate(tokens)}
    cells: list[tuple[int, int, int]] = []  # row, column, count
    for row, user in enumerate(order):
        for token, count in sorted(counts.get(user, {}).items()):
            cells.append((row, column_of[token], count))
    rows, columns, values = np.array(cells, dtype=np.int64).T
    return scipy.sparse.csr_matrix((values.astype(np.float64), (rows, columns)), shape=(len(order), len(tokens)))


def _traits(kept: list[_Summary], place: Mapping[tuple[str, str], int]) -> tuple[Mapping[str, FloatArray], list[str]]:
    """Return what each user's fresh documents look like without any model.

    Args:
        kept: fresh documents.
        place: (side, user) to the user's index.

    Returns:
        Trait to [users] means over documents, and the commonest language of each user. A user without documents has
        sizes of 0, a date of NaN and the language ``"unknown"``.
    """
    documents_of: list[list[_Summary]] = [[] for _ in place]  # by the user's index
    for item in kept:
        documents_of[place[item.user]].append(item)
    columns: dict[str, list[float]] = collections.defaultdict(list)
    languages = []
    has_dates = any(item.date is not None for item in kept)
    for items in documents_of:
        columns["num_documents"].append(len(items))
        columns["mean_tokens"].append(_mean([item.num_tokens for item in items], of_none=0.0))
        columns["mean_bytes"].append(_mean([item.num_bytes for item in items], of_none=0.0))
        ratios = [item.zlib_bytes / max(item.num_bytes, 1) for item in items]
        columns["compression"].append(_mean(ratios, of_none=0.0))
        if has_dates:
            dates = [item.date for item in items if item.date is not None]
            columns["date"].append(_mean(dates, of_none=math.nan))
        votes = collections.Counter(item.language or "unknown" for item in items)
        # Of equally common ones the last in the alphabet, so that the order of documents does not count.
        languages.append(max(votes, key=lambda name: (votes[name], name), default="unknown"))
    return {name: np.array(values) for name, values in columns.items()}, languages


def _mean(values: Sequence[float], *, of_none: float) -> float:
    """Return the mean of the values, or ``of_none`` where there are none."""
    return float(np.mean(values)) if values else of_none
