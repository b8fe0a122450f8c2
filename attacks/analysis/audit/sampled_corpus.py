"""The audit of a corpus that was sampled from a model: what somebody who holds the texts alone can tell of its users.

The corpus is what ``privtrain generate`` sampled from a released model. A coin decided for each user of the split, and
for each planted canary, whether training used their records; the audit guesses the coins.

The score asks how much likelier a user's records are under a model of word pairs that was counted in the corpus than
under one that was counted in everybody else's records of both sides (after Meeus et al. 2025, arXiv 2502.14921, who
train such a model on the corpus; the second one takes away how common a text is). The first knows the corpus, which the
run's ε covers, and the second no coin. So the one-run audit of :mod:`attacks.analysis.audit.evaluate` holds for it as
for any score.
"""

from __future__ import annotations

import collections
import itertools
import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from attacks import evidence
from attacks.analysis import verdict
from attacks.analysis.audit.evaluate import Finding, audit
from attacks.analysis.audit.guesses import Coins
from attacks.analysis.audit.panel import CANARIES, NATURAL, cap_of, claim_of
from attacks.errors import AttackInputError
from attacks.scoring.documents import read_manifest
from privtrain.config.data import DataSection
from privtrain.data.canaries import Canary, canaries_of, plant
from privtrain.data.corpus import Corpus
from privtrain.data.formats import written
from privtrain.files import reading
from privtrain.files.atomic import write_json
from privtrain.files.private import make_private_directory
from privtrain.run import bundle, generated
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import PrivacyStatement

ACCESS = "sampled corpus"
SCHEMA = "privtrain/corpus-audit/1"

#: Pseudo-counts of the smoothing: a pair falls back on its second word alone, and a single word on the uniform law.
_BACKOFF, _UNSEEN = 1.0, 1.0
_START = ""


class PairCounts:
    """Counts of the words of some texts, and of pairs of neighbouring words: a smoothed bigram model.

    Attributes:
        words: word to its count.
        pairs: (word before, word) to its count; before the first word of a text stands ``""``.
        firsts: word to the number of pairs that begin with it.
        num_words: in all.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.words: collections.Counter[str] = collections.Counter()
        self.pairs: collections.Counter[tuple[str, str]] = collections.Counter()
        self.firsts: collections.Counter[str] = collections.Counter()
        for text in texts:
            pairs = list(_pairs(text))
            self.pairs.update(pairs)
            self.words.update(word for _, word in pairs)
            self.firsts.update(first for first, _ in pairs)
        self.num_words = sum(self.words.values())

    def log_prob(self, pair: tuple[str, str], vocabulary: int, without: PairCounts | None = None) -> float:
        """Return the smoothed log-probability of the pair's second word after its first.

        Args:
            pair: (word before, word).
            vocabulary: number of distinct words, for the smoothing.
            without: counts that are subtracted first, for example those of the user who is scored.
        """
        first, word = pair
        num_word, num_words = self.words[word], self.num_words
        num_pair, num_first = self.pairs[pair], self.firsts[first]
        if without is not None:
            num_word -= without.words[word]
            num_words -= without.num_words
            num_pair -= without.pairs[pair]
            num_first -= without.firsts[first]
        prob_alone = (num_word + _UNSEEN / vocabulary) / (num_words + _UNSEEN)
        return math.log((num_pair + _BACKOFF * prob_alone) / (num_first + _BACKOFF))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield (word before, word) for every word of the text; ``""`` stands before the first."""
    before = _START
    for word in text.split():
        yield before, word
        before = word


def scores_of(texts: Sequence[str], records: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return each user's score: the mean gain in log-probability of the words of their records, in nats.

    The gain of a word is its log-probability by the corpus less that by everybody else's records.

    Args:
        texts: of the corpus.
        records: user → texts of the records that training could use, of both sides alike.
    """
    corpus = PairCounts(texts)
    pool = PairCounts(itertools.chain.from_iterable(records.values()))
    vocabulary = len(set(corpus.words) | set(pool.words)) + 1
    scores = {}
    for user, own in records.items():
        mine = PairCounts(own)
        gains = []
        for pair, count in mine.pairs.items():
            gain = corpus.log_prob(pair, vocabulary) - pool.log_prob(pair, vocabulary, without=mine)
            gains.append(count * gain)
        scores[user] = sum(gains) / max(mine.num_words, 1)
    return scores


def audit_corpus(run: pathlib.Path, corpus: pathlib.Path, *, seed: int = 0) -> tuple[list[Finding], pathlib.Path]:
    """Audit the users and canaries of a finished run by a corpus alone, and write the result into ``secret/corpora``.

    Args:
        run: a finished run with its ``secret/``.
        corpus: what ``privtrain generate`` sampled from it.
        seed: of ties and of the dropping that makes coins fair; not to be chosen after the result.

    Returns:
        A finding for each source of coins, and the file that holds them.

    Raises:
        AttackInputError: if the run is not what was released, or the corpus is of another run or was altered.
    """
    statement, directory = evidence.verified_statement(run), RunDirectory(run)
    described = _checked(directory, corpus)
    manifest = read_manifest(directory)
    config = evidence.read_config(directory)
    rows = [row for _, row in reading.read_json_lines(corpus / generated.TEXTS, remedy="sample it again")]
    texts = [_written_of_row(row, config.data) for row in rows]
    natural = evidence.read_corpus(config)
    if natural.manifest_sha256 != manifest["data_sha256"]:
        raise AttackInputError("data.source holds other rows than the run was trained on; restore them")
    canaries = [canary for canary in canaries_of(manifest) if canary.is_text]
    records = _usable_texts(plant(natural, canaries), manifest, config.data)
    sources = _coins(scores_of(texts, records), records, manifest, canaries, config.data.held_out_fraction, statement)
    findings = [
        audit(
            coins,
            claim_of(statement, cap_of(statement, coins), coins.unit),
            statement.delta,
            seed=seed,
            num_sources=len(sources),
        )
        for coins in sources
    ]
    return findings, _write(directory, described["relation"], findings)


def _usable_texts(corpus: Corpus, manifest: Mapping[str, Any], data: DataSection) -> dict[str, list[str]]:
    """Return, for each user of either side, the texts of the records that training could use.

    Args:
        corpus: the run's data with its canaries.
        manifest: of the split.
        data: the format of the records.
    """
    texts: dict[str, list[str]] = {}
    for user in sorted([*manifest["held_in"], *manifest["held_out"]]):
        if user not in corpus.records:
            continue
        kept_back = set(manifest["attacker"].get(user, ()))  # for the attacker, so training could not use them
        usable = [record for index, record in enumerate(corpus.records[user]) if index not in kept_back]
        texts[user] = [written(record, data) for record in usable]
    return texts


def _checked(run: RunDirectory, corpus: pathlib.Path) -> dict[str, Any]:
    """Return the description of a corpus; raise unless it is of this run's release and unaltered."""
    described = generated.read_description(corpus)
    released, _ = bundle.read_manifest(run.root)
    if described["release"] != released.digest:
        raise AttackInputError(f"{corpus} was sampled from another release than {run.root} holds; name its own run")
    if bundle.sha256_of(corpus / generated.TEXTS) != described["files"].get(generated.TEXTS):
        raise AttackInputError(f"{corpus / generated.TEXTS} was altered since it was sampled; sample it again")
    return described


def _written_of_row(row: Mapping[str, Any], data: DataSection) -> str:
    """Return the text that the model wrote in a row of the corpus: a chat's last message, a pair's completion."""
    match data.format:
        case "chat":
            return str(row[data.messages_column][-1]["content"])
        case "prompt_completion":
            return str(row[data.completion_column])
        case _:
            return str(row[data.text_column])


def _coins(
    scores: Mapping[str, float],
    records: Mapping[str, Sequence[str]],
    manifest: Mapping[str, Any],
    canaries: Sequence[Canary],
    prob_out: float,
    statement: PrivacyStatement,
) -> list[Coins]:
    """Return the sources of coins: the users of the split, if some are held out, and the planted canaries, if any.

    Args:
        scores: user to score.
        records: user to the texts that training could use.
        manifest: of the split; ``held_in`` lists the users whose coin put them into training.
        canaries: planted ones.
        prob_out: chance that a user of the split was held out.
        statement: the run's privacy statement.

    Raises:
        AttackInputError: if there is no source at all.
    """
    held_in, planted = set(manifest["held_in"]), {canary.user for canary in canaries}
    sources = []
    for name, users, chance in (
        (NATURAL, [user for user in scores if user not in planted], 1.0 - prob_out),
        (CANARIES, [user for user in scores if user in planted], 0.5),
    ):
        if not users or chance == 1.0:  # nobody was held out, so there was no coin
            continue
        most_records = max(len(records[user]) for user in users)
        is_example = name == CANARIES and statement.unit == "example" and most_records == 1
        sources.append(
            Coins(
                np.array([scores[user] for user in users]),
                np.array([user in held_in for user in users], dtype=np.bool_),
                prob_in=chance,
                unit="example" if is_example else verdict.ATTACKED_UNIT,
                name=name,
                most_records=most_records,
                score="gain of word pairs",
                access=ACCESS,
            )
        )
    if not sources:
        raise AttackInputError(
            "nobody had a coin: data.held_out_fraction is 0 and no canary was planted; train with either"
        )
    return sources


def _write(run: RunDirectory, corpus_digest: str, findings: Sequence[Finding]) -> pathlib.Path:
    """Write the findings to ``secret/corpora/<first 16 digits of corpus_digest>.audit.json`` and return that path.

    ``corpus_digest`` is what the corpus's description calls ``relation``: the digest of the rest of its content.
    """
    make_private_directory(run.secret / "corpora")
    path = run.secret / "corpora" / f"{corpus_digest[:16]}.audit.json"
    body = [
        {
            "coins": finding.name,
            "unit": finding.unit,
            "num_coins": finding.num_coins,
            "epsilon_at_least": finding.epsilon,
            "ceiling": finding.epsilon_ceiling,
            "delta": finding.delta,
            "num_guesses": finding.counts.num_guesses,
            "num_correct": finding.counts.num_correct,
            "curve_p_value": finding.curve_p_value,
            "claimed_epsilon": _finite(finding.claim.pair.epsilon if finding.claim.pair else None),
            "verdict": str(finding.verdict),
            "reason": finding.verdict_reason,
        }
        for finding in findings
    ]
    write_json(path, {"schema": SCHEMA, "corpus": corpus_digest, "findings": body}, mode=0o600)
    return path


def _finite(value: float | None) -> float | None:
    """Return the value, or None for one that JSON lacks."""
    return value if value is not None and math.isfinite(value) else None
