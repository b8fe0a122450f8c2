"""What a study's report holds. Whether a paper's claim reproduced is computed here from the numbers, never typed in."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from privtrain.studies.results import FEW_SEEDS, Estimate


class Verdict(enum.Enum):
    """What our numbers say of a paper's claim."""

    REPRODUCED = "reproduced"
    NOT_SHOWN = "not shown"
    CONTRADICTED = "contradicted"
    NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A paper's claim, compared with this study's result.

    Attributes:
        statement: the claim, in one sentence.
        citation: reference to the claim in the paper.
        paper: the paper's number, as text.
        ours: this study's number, as text.
        verdict: computed by one of the functions of this module.
        reason: why that verdict.
    """

    statement: str
    citation: str
    paper: str
    ours: str
    verdict: Verdict
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing with what it shows in words.

    Attributes:
        name: unique in the report; the ids inside the SVG begin with it.
        title: for those who cannot see it.
        svg: an ``<svg>`` element.
        caption: what to read off.
    """

    name: str
    title: str
    svg: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Findings:
    """Everything a study's module makes of its results.

    Attributes:
        claims: the paper's, judged.
        tables: the paper's numbers beside ours.
        figures: in the paper's style.
        notes: what a reader must know to read the numbers: data, model, departures from the paper.
        numbers: the same facts for machines.
    """

    claims: Sequence[Claim] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Statement:
    """A claim that waits for its verdict; see :class:`Claim`."""

    statement: str
    citation: str
    paper: str


def judge_direction(
    claim: Statement,
    difference: Estimate | None,
    *,
    digits: int = 3,
    factor: float = 1.0,
    unit: str = "",
) -> Claim:
    """Judge a claim that something is more than something else.

    Reproduced if the whole interval of the difference over seeds is positive, contradicted if all of it is negative;
    otherwise our seeds cannot tell the difference from none, and the claim is not shown.

    Args:
        claim: what the paper says.
        difference: first minus second, paired by seed; ``None`` if nothing was measured.
        digits: decimals to print.
        factor: the printed number is this times ours.
        unit: printed after it.
    """
    if difference is None or difference.interval is None:
        ours = "no cell is complete" if difference is None else difference.text(digits, factor)
        return _judged(claim, ours, Verdict.NOT_MEASURED, "too few of the cells that it needs are complete")
    low, high = difference.interval
    ours = f"difference {difference.text(digits, factor)}{unit}"
    few = f"; {difference.n} seeds are few, the interval rests on normality" if difference.n < FEW_SEEDS else ""
    if low > 0:
        return _judged(claim, ours, Verdict.REPRODUCED, f"the whole interval has the claimed sign{few}")
    if high < 0:
        return _judged(claim, ours, Verdict.CONTRADICTED, f"the whole interval has the opposite sign{few}")
    leaning = "with" if difference.mean > 0 else "against"
    reason = f"the interval holds zero; the mean leans {leaning} the claim{few}"
    return _judged(claim, ours, Verdict.NOT_SHOWN, reason)


def judge_fact(claim: Statement, holds: bool | None, *, ours: str, reason: str) -> Claim:
    """Judge a claim about computed numbers that have no noise, such as an accountant's."""
    verdict = {True: Verdict.REPRODUCED, False: Verdict.CONTRADICTED, None: Verdict.NOT_MEASURED}[holds]
    return _judged(claim, ours, verdict, reason)


def _judged(claim: Statement, ours: str, verdict: Verdict, reason: str) -> Claim:
    return Claim(claim.statement, claim.citation, claim.paper, ours, verdict, reason)


def summary(claims: Sequence[Claim]) -> list[str]:
    """Return the verdicts in plain sentences, one each."""
    words = {
        Verdict.REPRODUCED: "Reproduced",
        Verdict.NOT_SHOWN: "Not shown",
        Verdict.CONTRADICTED: "Contradicted",
        Verdict.NOT_MEASURED: "Not measured",
    }
    return [f"{words[claim.verdict]}: {claim.statement} — {claim.ours} ({claim.reason})." for claim in claims]
