"""Recall of the automatic PII labeller, measured on texts with known spans."""

from __future__ import annotations

import collections
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NotRequired, TypedDict

from attacks.reporting.record import read_scoring
from attacks.scoring import pii
from attacks.scoring.pii import Span
from privtrain.data.invented_customers import CustomerRecord, customer_records
from privtrain.run.directory import RunDirectory
from privtrain.run.statement import PrivacyStatement

NUM_MESSAGES = 200
_MESSAGES_PER_CUSTOMER = 2.0
ALL = "all"


class Recall(TypedDict):
    """How much of one kind of span (such as a telephone number) a labeller found.

    Only the row of all kinds has ``precision``: the share of the characters found that lie in a span.
    """

    kind: str
    num_spans: int
    num_characters: int
    recall: float  # share of the characters
    found_whole: float  # share of the spans
    precision: NotRequired[float | None]


class LabellerFacts(TypedDict):
    """What the record of a scoring says of its labeller."""

    name: str
    rows: list[Recall]


def invented_messages(count: int = NUM_MESSAGES) -> list[CustomerRecord]:
    """Return the first messages of invented customers, the same every time."""
    return list(itertools.islice(customer_records(count, seed=0, mean_records=_MESSAGES_PER_CUSTOMER), count))


def measure(find: Callable[[str], Sequence[Span]], records: Iterable[CustomerRecord]) -> list[Recall]:
    """Return the recall of a labeller, for each kind of span and over all.

    Args:
        find: text to (start, end) spans of personal data.
        records: texts with the spans that they truly hold.

    Returns:
        A row a kind: how many spans and characters there are, the share of the characters that was found, and the
        share of the spans that was found whole. The last row, ``all``, also has the share of the characters found that
        are sensitive.
    """
    totals: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    num_found = 0
    for record in records:
        labelled = {place for start, end in find(record.text) for place in range(start, end)}
        num_found += len(labelled)
        for span in record.spans:
            places = set(range(span.start, span.end))
            for kind in (span.label, ALL):
                totals[kind].update(
                    num_spans=1,
                    num_characters=len(places),
                    num_found=len(places & labelled),
                    num_whole=places <= labelled,
                )
    in_order = sorted(totals.items(), key=lambda item: (item[0] == ALL, item[0]))  # by name, "all" last
    rows: list[Recall] = [
        {
            "kind": kind,
            "num_spans": total["num_spans"],
            "num_characters": total["num_characters"],
            "recall": total["num_found"] / total["num_characters"],
            "found_whole": total["num_whole"] / total["num_spans"],
        }
        for kind, total in in_order
    ]
    if rows:
        rows[-1]["precision"] = totals[ALL]["num_found"] / num_found if num_found else None
    return rows


def measure_presidio() -> LabellerFacts:
    """Return Presidio's recall on invented customers, as :func:`panel` reads it; takes some seconds."""
    return {"name": pii.version(), "rows": measure(pii.find_personal_data, invented_messages())}


def sentence(facts: LabellerFacts) -> str:
    """Return the recall as a line of text; the kinds of spans that are missed most come first."""
    *kinds, total = facts["rows"]
    listed = ", ".join(f"{row['kind']} {row['recall']:.0%}" for row in sorted(kinds, key=lambda row: row["recall"]))
    return f"found {total['recall']:.0%} of the sensitive characters of {NUM_MESSAGES} invented messages ({listed})"


def panel(run: pathlib.Path, statement: PrivacyStatement, seed: int) -> dict[str, Any] | None:  # noqa: ARG001
    """Return the report panel on the automatic labeller; None if the run was scored without one."""
    facts = read_scoring(RunDirectory(run)).facts.get("labeller")
    if facts is None:
        return None
    return {
        "title": "Recall of the labeller of sensitive tokens",
        "summary": f"{facts['name']} {sentence(facts)}. Sensitive tokens that it missed count as other tokens.",
        "columns": [
            "kind",
            {"key": "num_spans", "label": "spans"},
            {"key": "num_characters", "label": "characters"},
            {"key": "recall", "label": "characters found"},
            {"key": "found_whole", "label": "spans found whole"},
            {"key": "precision", "label": "of the characters found, sensitive"},
        ],
        "rows": facts["rows"],
        "notes": ["Measured on invented customers, not on this run's data, whose language and forms may suit it less."],
    }
