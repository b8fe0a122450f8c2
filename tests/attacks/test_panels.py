"""Panels: any table with words, a figure and a verdict, shown the same way everywhere."""

from __future__ import annotations

import io
import json

import pytest
import rich.console

from attacks.analysis import analyse, registry
from attacks.reporting import panels, report
from attacks.reporting.policy import Policy

PANEL = {
    "title": "Exposure of canaries",
    "summary": "The most exposed of 12 canaries has rank 1 of 1000.",
    "columns": ["tier", {"key": "exposure", "label": "exposure, bits"}, "extracted"],
    "rows": [
        {"tier": "1 | repeated once", "exposure": 1.25, "extracted": False},
        {"tier": "4", "exposure": None, "extracted": True},
        {"tier": "<b>16</b>", "exposure": 9.97e-7},
    ],
    "notes": ["Ties rank the references first."],
    "figure": {
        "kind": "bar",
        "x_label": "repetitions",
        "y_label": "bits",
        "caption": "Exposure by tier.",
        "series": [
            {"label": "planted", "x": ["1", "4"], "y": [1.0, None]},
            {"label": "not", "x": ["1", "4"], "y": [0.5, 0.7]},
        ],
    },
    "verdict": "falsified",
    "verdict_reason": "the canaries were found",
}


@pytest.fixture
def run(make_run, monkeypatch):
    monkeypatch.setitem(registry.PANELS, "exposure", lambda run, statement, seed: PANEL)
    line = {"kind": "line", "series": [{"label": "a", "x": [1, 2], "y": [0.5, 0.6]}]}
    monkeypatch.setitem(
        registry.PANELS, "lines only", lambda *_: PANEL | {"title": "Lines", "rows": [], "figure": line}
    )
    monkeypatch.setitem(registry.PANELS, "nothing", lambda *_: None)
    made = make_run(20)
    analyse.analyse_run(made)
    report.write_report(made)
    return made


def test_a_panel_is_in_page_markdown_and_summary(run):
    page, markdown = (run / report.INDEX_PATH).read_text(), (run / report.MARKDOWN_PATH).read_text()
    for fact in (
        "Exposure of canaries",
        "rank 1 of 1000",
        "exposure, bits",
        "1.25",
        "9.97e-7",
        "Ties rank",
        "were found",
    ):
        assert fact in page, fact
        assert fact in markdown, fact
    assert "&lt;b&gt;16&lt;/b&gt;" in page
    assert "Exposure by tier." in page
    assert "| 1 \\| repeated once | 1.25 | no |" in markdown
    assert "| 4 | – | yes |" in markdown  # noqa: RUF001
    assert "Lines" in page
    console = rich.console.Console(file=io.StringIO(), width=200)
    console.print(report.summary_table(run))
    assert "The most exposed of 12 canaries" in console.file.getvalue()


def test_the_policy_heeds_a_panels_verdict(run):
    facts = json.loads((run / analyse.ATTACKS_PATH).read_text())
    assert "exposure: verdict falsified" in Policy().violations(facts)
    assert Policy(fail_on_verdicts=[]).violations(facts) == []


@pytest.mark.parametrize(
    ("change", "said"), [({"rows": [{"tier": [1]}]}, "flat rows"), ({"columns": None}, "lacks columns")]
)
def test_a_panel_that_cannot_be_shown_is_refused(change, said):
    panel = {key: value for key, value in (PANEL | change).items() if value is not None}
    with pytest.raises(ValueError, match=said):
        panels.check("exposure", panel)
