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
from privtrain.studies import software
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
        module: the study's Python module, with ``TITLE``, ``PAPER`` and ``find(results) -> Findings``.
        scale: ``"small"`` or ``"paper"``.
        root: directory of the study.
        results: of complete cells.
        failed: (job name, its ``failed.json``) of each job that failed.
        num_open: jobs still to be run.
        seconds: all jobs' time, added up.
        num_jobs: jobs in all.
        software: what complete jobs ran with, each version once; see :mod:`privtrain.studies.software`.
        command: the command line that continues the study and writes this report.
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
    software: Sequence[Mapping[str, Any]]
    command: str


def write_report(run: Run) -> pathlib.Path:
    """Write the report as HTML (whose path is returned), Markdown and JSON, and the figures."""
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
    verdicts = [claim.verdict for claim in findings.claims]
    shown = {
        "title": run.module.TITLE,
        "paper": run.module.PAPER,
        "run": run,
        "findings": findings,
        "sentences": summary(findings.claims),
        "counts": {verdict.value: verdicts.count(verdict) for verdict in Verdict},
        "seeds": len(run.recipe.seeds),
        "few_seeds": FEW_SEEDS,
        "num_planned": len(run.results.planned),
        "num_complete": len(run.results.cells),
        "powered": [claim for claim in findings.claims if claim.power],
        "design": _design(run, findings),
        "pairing": _pairing(findings),
        "software": [software.words(dict(facts)) for facts in run.software],
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
    """Return the content of ``report.json``."""
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
        "design": _design(run, findings),
        "pairing": _pairing(findings),
        "command": run.command,
        "software": {"report": software.software(), "jobs": list(run.software)},
    }


def _design(run: Run, findings: Findings) -> list[str]:
    """Return in sentences what was compared with what, and how."""
    recipe = run.recipe
    axes = "; ".join(f"{axis}: {', '.join(values)}" for axis, values in recipe.axes.items())
    seeds = ", ".join(map(str, recipe.seeds))
    if recipe.seed_key is None:
        paired = f"Every job draws its own secrets, {len(recipe.seeds)} for each cell"
    else:
        paired = (
            f"Seeds {seeds} go into {recipe.seed_key}: arms of one seed share split, sample, noise and planted secrets "
            "as far as their settings let them, and are compared with each other, seed by seed"
        )
    num_random = sum(claim.numbers is not None for claim in findings.claims)
    return [
        f"{len(run.results.planned)} cells in {run.num_jobs} jobs. Axes: {axes}.",
        f"{paired}.",
        f"Commands of a job: {' ; '.join(recipe.commands)}.",
        f"{num_random} of {len(findings.claims)} claims rest on an interval over seeds; the others compare computed "
        "numbers, or were not measured.",
    ]


def _pairing(findings: Findings) -> list[str]:
    """Return in sentences for which claims the two runs of a pair have the same held-in and held-out users.

    Each run commits to its split before training. Nothing is said where ``same_split`` is ``None``: not known, or no
    pair.
    """
    known = [(claim.statement, claim.numbers["same_split"]) for claim in findings.claims if claim.numbers]
    same = [statement for statement, is_same in known if is_same]
    other = [statement for statement, is_same in known if is_same is False]
    sentences = []
    if same:
        sentences.append(f"{len(same)} differences are of runs that committed to the same split of users at each seed.")
    if other:
        listed = "; ".join(other)
        sentences.append(
            f"In {len(other)} the arms' users, records or planted secrets differ by their settings: {listed}."
        )
    return sentences


def _standalone(svg: str) -> str:
    """Return an ``<svg>`` element as a file of its own: with its namespace declared, and on a white background."""
    declared = svg if "xmlns=" in svg[:400] else svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return re.sub(r"(<svg [^>]*)>", r'\1 style="background:#fff">', declared, count=1)


def _markdown_cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
