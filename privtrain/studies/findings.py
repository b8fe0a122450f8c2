"""What a study's report holds. Whether a paper's claim reproduced is computed here from the numbers, never typed in."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any

from privtrain.studies import power
from privtrain.studies.results import CONFIDENCE, FEW_SEEDS, Estimate


class Verdict(enum.Enum):
    """What our numbers say of a paper's claim."""

    REPRODUCED = "reproduced"
    UNDECIDED = "undecided"
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
        power: what the existing seeds can show, and what would show the paper's difference; empty where nothing is
            random, or too little was measured.
        numbers: the difference and its power, for machines.
    """

    statement: str
    citation: str
    paper: str
    ours: str
    verdict: Verdict
    reason: str
    power: str = ""
    numbers: Mapping[str, Any] | None = None


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
    """A claim that waits for its verdict; see :class:`Claim`.

    Attributes:
        statement: the claim, in one sentence.
        citation: reference to the claim in the paper.
        paper: the paper's number, as text.
        expected: the paper's difference in the study's own unit, where it states one: what power is planned for.
    """

    statement: str
    citation: str
    paper: str
    expected: float | None = None


def judge_direction(
    claim: Statement,
    difference: Estimate | None,
    *,
    least: float = 0.0,
    users_variance: float | None = None,
    digits: int = 3,
    factor: float = 1.0,
    unit: str = "",
) -> Claim:
    """Judge a claim that a first thing is more than a second.

    Reproduced if the whole 95 % interval of the difference over seeds is positive. Contradicted if all of it lies below
    the least difference that counts. Otherwise our seeds cannot tell: the claim is undecided, with what would decide
    it.

    Args:
        claim: what the paper says.
        difference: first minus second, paired by seed; ``None`` if nothing was measured.
        least: the least difference that counts, fixed before any run; 0 if any does. With it also a true difference of
            zero can be decided.
        users_variance: see :func:`privtrain.studies.power.plan`.
        digits: decimals to print.
        factor: numbers are printed as this multiple, e.g. 100 for per cent.
        unit: printed after the number.
    """
    if difference is None or difference.interval is None:
        ours = "no cell is complete" if difference is None else difference.text(digits, factor)
        return _judged(claim, ours, Verdict.NOT_MEASURED, "too few of the cells that it needs are complete")
    low, high = difference.interval
    if low > 0:
        verdict, reason = Verdict.REPRODUCED, "the whole interval has the claimed sign"
    elif high < 0:
        verdict, reason = Verdict.CONTRADICTED, "the whole interval has the opposite sign"
    elif high < least:
        count = f"{factor * least:.{digits}f}"
        verdict, reason = Verdict.CONTRADICTED, f"the whole interval is below {count}, the least that counts"
    else:
        leaning = "with" if difference.mean > 0 else "against"
        verdict, reason = Verdict.UNDECIDED, f"the interval holds zero; the mean leans {leaning} the claim"
    if difference.n < FEW_SEEDS:
        reason += f"; {difference.n} seeds are few, the interval rests on normality"
    planned = power.plan(difference.values, papers=claim.expected, least=least, users_variance=users_variance)
    ours = f"difference {difference.text(digits, factor)}{unit}"
    return _with_power(_judged(claim, ours, verdict, reason), difference, planned, digits, factor)


def judge_best(claim: Statement, leads: Mapping[str, Estimate], *, digits: int = 3) -> Claim:
    """Judge a claim that one of several is the best.

    Reproduced if its lead over each rival is positive, by the whole 95 % interval. All these must hold, so no
    correction for their number is due. Contradicted if some rival is better, by an interval at a level that is
    corrected for the number of rivals (Bonferroni), since any of them would do. The rival of least lead is shown.

    Args:
        claim: what the paper says.
        leads: rival → its value minus that of the claimed best (less is better), paired by seed; empty if not measured.
        digits: decimals to print.
    """
    if not leads or any(lead.interval is None for lead in leads.values()):
        return _judged(claim, "no cell is complete", Verdict.NOT_MEASURED, "fewer than two seeds of all are complete")
    rival, least = min(leads.items(), key=lambda item: item[1].mean)
    judged = judge_direction(claim, least, digits=digits)
    ours = f"{judged.ours}, against {rival}, the best other"
    corrected = 1 - (1 - CONFIDENCE) / len(leads)
    intervals = [lead.interval for lead in leads.values()]
    wide_intervals = [lead.interval_at(corrected) for lead in leads.values()]
    if any(ends is not None and ends[1] < 0 for ends in wide_intervals):
        reason = f"another is better, at {100 * corrected:.0f} % for each of {len(leads)}"
        verdict = Verdict.CONTRADICTED
    elif all(ends is not None and ends[0] > 0 for ends in intervals):
        verdict, reason = Verdict.REPRODUCED, f"better than each of {len(leads)} others, by the whole interval"
    else:
        verdict, reason = Verdict.UNDECIDED, "neither better than every other nor worse than one"
    if least.n < FEW_SEEDS:
        reason += f"; {least.n} seeds are few, the interval rests on normality"
    return dataclasses.replace(judged, ours=ours, verdict=verdict, reason=reason)


def judge_no_effect(claim: Statement, difference: Estimate | None, *, margin: float) -> Claim:
    """Judge a claim that something changes nothing.

    Reproduced if the whole 95 % interval is within ± ``margin`` of zero, contradicted if it is wholly outside, else
    undecided.

    Args:
        claim: what the paper says.
        difference: what changed, paired by seed; ``None`` if nothing was measured.
        margin: a change within it counts as none.
    """
    if difference is None or difference.interval is None:
        return _not_measured(claim)
    low, high = difference.interval
    if low >= -margin and high <= margin:
        verdict, reason = Verdict.REPRODUCED, f"the whole interval is within {margin} of zero"
    elif low > margin or high < -margin:
        verdict, reason = Verdict.CONTRADICTED, f"the whole interval is farther than {margin} from zero"
    else:
        verdict, reason = Verdict.UNDECIDED, f"the interval reaches beyond {margin} from zero"
    judged = _judged(claim, f"difference {difference.text()}", verdict, reason)
    return _with_power(judged, difference, power.plan(difference.values, margin=margin))


def judge_at_least(claim: Statement, share: Estimate | None, bar: float) -> Claim:
    """Judge a target for a share: its mean is at least ``bar``, and it is above zero by the whole interval.

    Contradicted if the whole interval lies below the bar, else undecided.
    """
    if share is None or share.interval is None:
        return _not_measured(claim)
    low, high = share.interval
    if high < bar:
        verdict, reason = Verdict.CONTRADICTED, f"the whole interval is below {bar:.0%}"
    elif share.mean >= bar and low > 0:
        below = "" if low >= bar else f", and reaches below {bar:.0%}"
        verdict, reason = Verdict.REPRODUCED, f"the mean is at least {bar:.0%}; the interval is above zero{below}"
    else:
        verdict, reason = Verdict.UNDECIDED, f"the interval reaches {bar:.0%}, the mean does not, or it holds zero"
    judged = _judged(claim, f"{share.text(1, 100)} %", verdict, reason)
    return dataclasses.replace(judged, numbers=_numbers(share))


def judge_not_worse(claim: Statement, difference: Estimate | None) -> Claim:
    """Judge a claim that something is not worse than something else by more than the interval.

    Args:
        claim: what is claimed.
        difference: first minus second, where less is better, paired by seed; ``None`` if nothing was measured.
    """
    if difference is None or difference.interval is None:
        return _not_measured(claim)
    low, high = difference.interval
    if low > 0:
        verdict, reason = Verdict.CONTRADICTED, "worse by the whole interval"
    elif high < 0:
        verdict, reason = Verdict.REPRODUCED, "better by the whole interval"
    else:
        verdict, reason = Verdict.REPRODUCED, "the interval holds zero"
    judged = _judged(claim, f"difference {difference.text()}", verdict, reason)
    return dataclasses.replace(judged, numbers=_numbers(difference))


def judge_fact(claim: Statement, holds: bool | None, *, ours: str, reason: str) -> Claim:
    """Judge a claim about computed numbers that have no noise, such as an accountant's.

    Args:
        claim: what the paper says.
        holds: whether the numbers agree; ``None`` if they are not known.
        ours: the numbers, as text.
        reason: how they were computed.
    """
    verdict = {True: Verdict.REPRODUCED, False: Verdict.CONTRADICTED, None: Verdict.NOT_MEASURED}[holds]
    return _judged(claim, ours, verdict, reason)


def _judged(claim: Statement, ours: str, verdict: Verdict, reason: str) -> Claim:
    return Claim(claim.statement, claim.citation, claim.paper, ours, verdict, reason)


def _not_measured(claim: Statement) -> Claim:
    return _judged(claim, "no cell is complete", Verdict.NOT_MEASURED, "fewer than two seeds are complete")


def _numbers(difference: Estimate) -> dict[str, Any]:
    return {"difference": difference.to_json(), "same_split": difference.same_split}


def _with_power(
    claim: Claim, difference: Estimate, planned: power.Plan | None, digits: int = 3, factor: float = 1.0
) -> Claim:
    """Return the claim with what its seeds can show; ``digits`` and ``factor`` as for :func:`judge_direction`."""
    assert planned is not None, "an interval has at least two seeds"
    numbers = {**_numbers(difference), "power": planned.to_json()}
    return dataclasses.replace(claim, power=planned.text(digits, factor), numbers=numbers)


def summary(claims: Sequence[Claim]) -> list[str]:
    """Return a sentence for each claim, with its verdict; for an undecided one also what would decide it."""
    sentences = []
    for claim in claims:
        needs = f" {claim.power}." if claim.verdict is Verdict.UNDECIDED and claim.power else ""
        verdict = claim.verdict.value.capitalize()
        sentences.append(f"{verdict}: {claim.statement} — {claim.ours} ({claim.reason}).{needs}")
    return sentences
