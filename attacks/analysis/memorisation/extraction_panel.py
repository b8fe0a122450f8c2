"""The panel of extraction: how many records a model completes from their first tokens, by length of that prompt.

Beside the training records of held-in users stand controls that must stay lower: the base model, held-out users, and
prompts taken from another user.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from typing import Any

from attacks.analysis import statistics
from attacks.analysis.curves import MIN_USERS
from attacks.analysis.memorisation.extraction import PREFIX_LENGTHS, recall, samples_needed
from attacks.reporting.record import read_scoring
from attacks.scoring.variants import CONTROL_PREFIX_TOKENS
from attacks.signals import CONTROL_PREFIX, HELD_IN, TRAINING, DocumentSignals
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import PrivacyStatement

NUM_SAMPLES = (1, 10, 100, 1000)
PROBABILITY = 0.5
HEADLINE_PREFIX = CONTROL_PREFIX_TOKENS

GROUPS = {
    "held-in": "held-in users, tuned model",
    "held-in, base": "held-in users, base model",
    "held-out": "held-out users, tuned model",
    "held-out, base": "held-out users, base model",
    "other prompt": "held-in users, tuned model, another user's prompt",
}


@dataclasses.dataclass
class Tally:
    """Pseudonym to number of records that came back, in one group of ``GROUPS`` at one prompt length.

    Attributes:
        records: records that are long enough to have a prompt and a suffix.
        greedy: records whose suffix greedy decoding gives back word for word.
        near: records of whose suffix the first nine tenths come back.
        sampled: number of samples -> records whose suffix is among so many samples with at least ``PROBABILITY``.
    """

    records: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    greedy: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    near: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sampled: dict[int, collections.Counter[str]] = dataclasses.field(
        default_factory=lambda: {count: collections.Counter() for count in NUM_SAMPLES}
    )

    def add(self, user: str, row: DocumentSignals, model: str, prefix: int) -> None:
        """Count one record as ``model`` gives it back after its first ``prefix`` tokens, if it is long enough."""
        recalled = recall(row, model, prefix)
        if recalled is None:
            return
        self.records[user] += 1
        self.greedy[user] += recalled.greedy
        self.near[user] += recalled.near
        needed = math.inf if recalled.log_prob is None else samples_needed(recalled.log_prob, PROBABILITY)
        for count, users in self.sampled.items():
            users[user] += needed <= count


def panel(run: pathlib.Path, statement: PrivacyStatement, seed: int) -> dict[str, Any] | None:  # noqa: ARG001
    """Return the panel of training records that the model gives back; None if too few users' records were scored."""
    tallies: dict[tuple[str, int], Tally] = collections.defaultdict(Tally)
    scoring = read_scoring(RunDirectory(run))
    for row in scoring.rows():
        _count(row, tallies)
    for key, tally in list(tallies.items()):
        if len(tally.records) < MIN_USERS:  # a row of few users would be about each of them
            del tallies[key]
    prefixes = [length for length in PREFIX_LENGTHS if tallies["held-in", length].records]
    if not prefixes:
        return None
    shown = [(group, length) for length in prefixes for group in GROUPS if tallies[group, length].records]
    headline = HEADLINE_PREFIX if HEADLINE_PREFIX in prefixes else prefixes[0]
    return {
        "title": "Extraction of training records",
        "summary": _summary(tallies, headline),
        "columns": [
            {"key": "prefix", "label": "prompt, tokens"},
            {"key": "group", "label": "records of"},
            {"key": "num_records", "label": "records"},
            {"key": "greedy", "label": "greedy, word for word"},
            {"key": "near", "label": "near (90 %)"},
            *({"key": f"n{count}", "label": f"within {count} samples"} for count in NUM_SAMPLES),
            {"key": "users", "label": "users with one, greedy"},
            {"key": "users_sampled", "label": f"users with one within {NUM_SAMPLES[-2]} samples"},
        ],
        "rows": [_row(group, length, tallies[group, length]) for group, length in shown],
        "notes": _notes(scoring.facts["options"]["sampling"], tallies, headline),
        "figure": _figure(tallies, headline),
    }


def _count(row: DocumentSignals, tallies: dict[tuple[str, int], Tally]) -> None:
    """Add a document to the tallies of its groups, at every prompt length."""
    if row.kind == CONTROL_PREFIX and row.side == HELD_IN:
        tallies["other prompt", HEADLINE_PREFIX].add(row.user, row, "target", HEADLINE_PREFIX)
    if row.kind != TRAINING:
        return
    side = "held-in" if row.side == HELD_IN else "held-out"
    for length in PREFIX_LENGTHS:
        tallies[side, length].add(row.user, row, "target", length)
        tallies[f"{side}, base", length].add(row.user, row, "base", length)


def _row(group: str, length: int, tally: Tally) -> dict[str, Any]:
    """Return the table's row of one group (a key of ``GROUPS``) at one prompt length in tokens."""
    return {
        "prefix": length,
        "group": GROUPS[group],
        "num_records": tally.records.total(),
        "greedy": tally.greedy.total(),
        "near": tally.near.total(),
        **{f"n{count}": users.total() for count, users in tally.sampled.items()},
        "users": _users(tally, tally.greedy),
        "users_sampled": _users(tally, tally.sampled[NUM_SAMPLES[-2]]),
    }


def _users(tally: Tally, hits: collections.Counter[str]) -> str:
    """Return how many users had a record that came back, with a confidence interval of their share.

    Users are independent of each other; records of one user are not, so the interval counts users.
    """
    num_hit = sum(count > 0 for count in hits.values())
    interval = statistics.clopper_pearson(num_hit, len(tally.records))
    return f"{num_hit} of {len(tally.records)} ({interval.lower:.1%} to {interval.upper:.1%})"


def _summary(tallies: dict[tuple[str, int], Tally], length: int) -> str:
    """Return what greedy decoding gives back after ``length`` tokens, beside the controls."""

    def share_of(group: str) -> str:
        tally = tallies[group, length]
        return f"{tally.greedy.total()} of {tally.records.total()}"

    return (
        f"Given the first {length} tokens, greedy decoding gives back the rest of {share_of('held-in')} scored "
        f"training records of held-in users verbatim ({share_of('held-in, base')} by the base model), and of "
        f"{share_of('held-out')} records of held-out users, which nobody trained on."
    )


def _notes(scheme: str, tallies: dict[tuple[str, int], Tally], headline: int) -> list[str]:
    """Return the sentences below the table; ``scheme`` names how text is sampled, ``headline`` is a prompt length."""
    notes = [
        "“Within n samples” means at least once with probability one half, from the probability of the whole suffix "
        f"under {scheme}; the suffix is the next 50 tokens, or what is left of the record, at least 8.",
        "Near: the first nine tenths of the suffix come back, so the edit distance is at most a tenth. One forward "
        "pass does not see outputs that stray and come back, so the true number of near matches is at least this one.",
    ]
    if not tallies["other prompt", headline].records:
        notes.append("No prompts of other users were scored: attacks score --variants control_prefix.")
    return notes


def _figure(tallies: dict[tuple[str, int], Tally], length: int) -> dict[str, Any]:
    """Return the line chart of records that come back against samples drawn, a line a group, at one prompt length."""
    series = []
    for group, label in GROUPS.items():
        tally = tallies[group, length]
        if tally.records:
            shares = [users.total() / tally.records.total() for users in tally.sampled.values()]
            series.append({"label": label, "x": [math.log10(count) for count in NUM_SAMPLES], "y": shares})
    return {
        "kind": "line",
        "x_label": "samples drawn, log10",
        "y_label": "share of records",
        "caption": f"Records that come back at least once with probability one half, after {length} tokens.",
        "series": series,
    }
