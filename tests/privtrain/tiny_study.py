"""A study for tests: what its module computes and concludes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from privtrain.studies.figures import AxisLabels, Level, Series, curves_figure, places_figure, roc_figure
from privtrain.studies.findings import Figure, Findings, Statement, Table, judge_direction
from privtrain.studies.results import Results

TITLE = "A tiny study"
PAPER = "Nobody 2026"


def settle(values: Mapping[str, str], tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"privacy.noise_multiplier": settings["noise"]} if values["method"] == "quiet-too" else {}


def find(results: Results) -> Findings:
    methods = results.values_of("method")
    estimates = {m: results.estimate("eval/held_out_loss", method=m) for m in methods}
    known = {m: e for m, e in estimates.items() if e is not None}
    difference = results.difference("eval/held_out_loss", {"method": "loud"}, {"method": "quiet"})
    labels = AxisLabels("ε", "held-out loss, nats", x_scale="log")
    curves = [Series(m, [1.0, 8.0], [e, e.mean / 2]) for m, e in known.items()]
    places = [Series("loss", list(range(len(known))), list(known.values()))]
    return Findings(
        claims=[judge_direction(Statement("More noise costs | more", "Table 1", "0.5 nats"), difference)],
        tables=[Table("Loss", ["method", "loss"], [[m, e.text()] for m, e in known.items()], note="In nats.")],
        figures=[
            Figure(
                "curves", "loss against ε", curves_figure("curves", curves, labels, [Level("base", 1.0)]), "Curves."
            ),
            Figure("places", "loss by method", places_figure("places", list(known), places, labels), "Places."),
            Figure("roc", "ROC", roc_figure("roc", [("x", [0, 0.5, 1], [0, 0.7, 1])], 20), "ROC."),
        ],
        notes=["Nothing is real."],
        numbers={m: e.to_json() for m, e in known.items()},
    )
