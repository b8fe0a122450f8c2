"""A study's report: one self-contained page, the same facts as Markdown and JSON.

The page and the Markdown hold what :class:`privtrain.studies.findings.Findings` says; figures also lie beside them as
SVG files.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

import privtrain
from privtrain.files.atomic import write_atomically, write_json
from privtrain.studies.findings import Findings, Verdict, summary
from privtrain.studies.recipe import Recipe
from privtrain.studies.results import FEW_SEEDS, Results

_ONE_BY_ONE = (
    "Each claim is judged by itself at 95 %; among many, one in twenty that are false would be judged reproduced or "
    "contradicted by chance."
)

SCHEMA = "privtrain/study/1"


@dataclasses.dataclass(frozen=True)
class Run:
    """A study as far as it got.

    Attributes:
        recipe: what was planned.
        module: names the paper and reads the results: ``TITLE``, ``PAPER``, ``find(results) -> Findings``.
        scale: ``"small"`` or ``"paper"``.
        root: directory of the study.
        results: of complete cells.
        failed: job name and its record, for each that failed.
        num_open: jobs still to be run.
        seconds: all jobs' time, added up.
        num_jobs: jobs in all.
    """

    recipe: Recipe
    module: Any
    scale: str
    root: pathlib.Path
    results: Results
    failed: Sequence[tuple[str, Mapping[str, Any]]]
    num_open: int
    seconds: float
    num_jobs: int


def write_report(run: Run) -> pathlib.Path:
    """Write ``report/index.html``, ``report/report.md``, ``report/report.json`` and the figures.

    Returns:
        The path of the page.
    """
    findings: Findings = run.module.find(run.results)
    directory = run.root / "report"
    directory.mkdir(parents=True, exist_ok=True)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("privtrain.studies"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    shown = {
        "title": run.module.TITLE,
        "paper": run.module.PAPER,
        "run": run,
        "findings": findings,
        "sentences": summary(findings.claims),
        "counts": {v.value: sum(claim.verdict is v for claim in findings.claims) for v in Verdict},
        "seeds": len(run.recipe.seeds),
        "few_seeds": FEW_SEEDS,
        "num_planned": len(run.results.planned),
        "num_complete": len(run.results.cells),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "version": privtrain.__version__,
    }
    for figure in findings.figures:
        write_atomically(directory / f"{figure.name}.svg", _standalone(figure.svg))
    write_atomically(directory / "report.md", environment.get_template("report.md").render(**shown))
    write_json(directory / "report.json", _facts(run, findings))
    page = directory / "index.html"
    write_atomically(page, environment.get_template("report.html").render(**shown))
    return page


def _facts(run: Run, findings: Findings) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "study": run.recipe.study,
        "scale": run.scale,
        "paper": run.module.PAPER,
        "seeds": run.recipe.seeds,
        "cells": {"planned": len(run.results.planned), "complete": len(run.results.cells), "jobs": run.num_jobs},
        "failed": [{"job": name, **record} for name, record in run.failed],
        "num_jobs_open": run.num_open,
        "seconds": round(run.seconds, 1),
        "claims": [{**dataclasses.asdict(claim), "verdict": claim.verdict.value} for claim in findings.claims],
        "tables": [dataclasses.asdict(table) for table in findings.tables],
        "numbers": dict(findings.numbers),
        "notes": [*findings.notes, _ONE_BY_ONE],
        "software": {"privtrain": privtrain.__version__},
    }


def _standalone(svg: str) -> str:
    """Return a stand-alone SVG file: with its namespaces declared, and white under its ink."""
    declared = svg if "xmlns=" in svg[:400] else svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return re.sub(r"(<svg [^>]*)>", r'\1 style="background:#fff">', declared, count=1)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
