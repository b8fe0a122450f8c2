"""The attack report: one self-contained page, the same facts as JSON and Markdown, and a summary for the terminal.

It reads public files only (``privacy.json``, ``metrics.jsonl``, ``report/attacks.json``), so it cannot leak what it
never sees. Of ``secret/`` it needs the key, with which it checks the seal of the results and seals the report.
"""

from __future__ import annotations

import datetime
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jinja2
import rich.table
import rich.text

from attacks import evidence, rundir
from attacks.alone import alone
from attacks.analysis import analyse
from attacks.errors import AttackInputError
from attacks.reporting import figures, panels, record
from attacks.scoring import target as targets
from attacks.signals import SIGNALS_PATH
from privtrain.errors import GuaranteeLost
from privtrain.files import reading
from privtrain.files.atomic import write_atomically
from privtrain.files.private import make_public_directory
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file, write_sealed

INDEX_PATH = pathlib.Path("report/index.html")
REPORT_PATH = pathlib.Path("report/report.json")
MARKDOWN_PATH = pathlib.Path("report/report.md")
SCHEMA_NAME = "privtrain/report/3"

NOT_RELEASED = "not released"

_DEPENDENCES = {
    "by_num_documents": "documents of each user that the attacker holds",
    "by_num_records": "records that training could use of the user",
    "by_share": "share of the user in the training text",
    "by_distinctness": "distinctness: KL of the user's tokens from the others', nats",
}

AXIS_LABELS = {
    "token_mean": "log-likelihood gain, nats per token",
    "sequence_sum": "log-likelihood gain, nats per document",
}


def write_report(run: pathlib.Path) -> pathlib.Path:
    """Write ``report/index.html``, whose path is returned, ``report/report.json`` and ``report/report.md``.

    Raises:
        AttackInputError: if the run is not finished or not analysed, or the analysis belongs to another plan.
        RunBusy: if another attack job is at work on the run.
        UnsafePath: if ``report/`` is a link, or others may write there.
    """
    # One attack job at a time: a job takes the lock of the signals (the secret scores that the analysis reads), so
    # nobody analyses anew while the report is being made of the results. The signals themselves are not opened.
    with alone(run / SIGNALS_PATH):
        return _write_report(run)


def _write_report(run: pathlib.Path) -> pathlib.Path:
    """Do what :func:`write_report` says; the caller holds the lock of the signals."""
    statement, attacks = _read(run)
    make_public_directory(run / "report")
    perplexity = rundir.held_out_perplexity(run)
    headline = attacks["results"][attacks["headline"]]
    shown = {
        "statement": statement,
        "attacks": attacks,
        "headline": headline,
        "perplexity": perplexity,
        "training_seconds": rundir.training_seconds(run),
        "axis_labels": AXIS_LABELS,
        "claim": _claim(statement, attacks),
        "panels": _shown_panels(attacks),
        "identity": _identity(run, statement, attacks),
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("attacks"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(scientific=panels.scientific, epsilon=format_epsilon, grouped=grouped)
    page = environment.get_template("report.html").render(
        **shown,
        roc_svg=figures.roc_figure(headline, _claim(statement, attacks)),
        histogram_svg=figures.histogram_figure(headline, AXIS_LABELS[attacks["headline"]]),
        dependence_svgs=_dependence_figures(attacks["user_inference"]),
        sensitive_svg=figures.sensitive_figure(attacks["sensitive"]["cells"]) if attacks["sensitive"] else "",
    )
    files = {MARKDOWN_PATH: environment.get_template("report.md").render(**shown).encode(), INDEX_PATH: page.encode()}
    facts = {
        "schema": SCHEMA_NAME,
        "privacy": reading.read_json(run / "privacy.json"),
        "held_out_perplexity": None if perplexity is None else {"before": perplexity[0], "after": perplexity[1]},
        "files": {path.name: hashlib.sha256(content).hexdigest() for path, content in files.items()},
        "attacks": attacks,
    }
    for path, content in files.items():
        write_atomically(run / path, content, mode=0o644)
    write_sealed(RunDirectory(run), run / REPORT_PATH, facts, mode=0o644)
    return run / INDEX_PATH


def read_results(run: pathlib.Path) -> Mapping[str, Any]:
    """Return the content of ``report/attacks.json``, once it is found to belong to the run as it is now.

    Raises:
        AttackInputError: if the run is not finished or not analysed, or the results are of another plan or target.
    """
    _, attacks = _read(run)
    return attacks


def _identity(run: pathlib.Path, statement: rundir.PrivacyStatement, attacks: Mapping[str, Any]) -> dict[str, str]:
    """Return heading to text of the page's table that identifies the run: names, digests, dates and software."""
    directory = RunDirectory(run)
    identity = {"Run": run.resolve().name}
    if directory.config.exists():
        model = (reading.read_yaml(directory.config, max_bytes=1 << 20) or {}).get("model") or {}
        identity["Base model"] = str(model.get("name_or_path") or model.get("package") or NOT_RELEASED)
    target = attacks["target"]
    if target.get("base"):
        identity["Base model, digest"] = targets.digest_of(target["base"])
    identity["Released model, digest"] = targets.digest_of(target["released"])
    identity["Scored documents, digest"] = targets.digest_of(attacks["scoring"]["documents"])
    for name, path in (("Statement of", directory.privacy), ("Analysed on", run / analyse.ATTACKS_PATH)):
        identity[name] = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).date().isoformat()
    software = {**(statement.model_extra or {}).get("software", {}), **attacks["software"]}
    identity["Software"] = ", ".join(f"{name} {version}" for name, version in software.items())
    return identity


def _shown_panels(attacks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the panels that are not None, with their cells as text, an id within the page, and their figure as SVG."""
    shown = []
    for name, panel in attacks["panels"].items():
        if panel is None:
            continue
        panels.check(name, panel)
        key = re.sub(r"[^a-z0-9]+", "-", name.lower())
        svg = figures.panel_figure(panel["figure"], f"panel-{key}") if panel.get("figure") else ""
        shown.append({**panel, **panels.table(panel), "name": name, "id": f"panel-{key}", "svg": svg})
    return shown


def _dependence_figures(curves: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return ``svg``, ``title`` and ``counts`` for each thing that users were grouped by, if it has two groups or more.

    Args:
        curves: key of ``_DEPENDENCES`` to the groups, each with its AUROC, interval and numbers of users.
    """
    figure_list = []
    for key, title in _DEPENDENCES.items():
        points = curves[key]
        if len(points) < 2:
            continue
        if key == "by_num_documents":
            labels = [str(point["num_documents"]) for point in points]
        else:
            labels = [f"{point['from']:.2g} to {point['to']:.2g}" for point in points]
        counts = "; ".join(f"{point['num_held_in']} + {point['num_held_out']}" for point in points)
        svg = figures.dependence_figure(points, labels, title, key.replace("_", "-"))
        figure_list.append({"svg": svg, "title": title, "counts": counts})
    return figure_list


def summary_table(run: pathlib.Path) -> rich.table.Table:
    """Return the run's main figures for the terminal, as a table of names and values.

    Raises:
        AttackInputError: if the run is not finished or not analysed.
    """
    statement, attacks = _read(run)
    perplexity = rundir.held_out_perplexity(run)
    headline = attacks["results"][attacks["headline"]]
    lower, upper = headline["bootstrap"]["interval"]
    title = None if statement.private else "NOT PRIVATE: " + "; ".join(statement.not_private_reasons)
    table = rich.table.Table(show_header=False, title=title, title_style="bold red", title_justify="left")
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    before, after = (NOT_RELEASED, NOT_RELEASED) if perplexity is None else (f"{value:.2f}" for value in perplexity)
    for name, value in (
        ("epsilon", format_epsilon(statement.epsilon)),
        ("delta", panels.scientific(statement.delta)),
        ("unit", f"{statement.unit}, {statement.neighboring_relation}"),
        ("steps", grouped(statement.steps_released)),
        ("held-out perplexity before", before),
        ("held-out perplexity after", after),
        ("user-inference AUROC", f"{headline['auroc']:.3f}  (95 % interval {lower:.3f} to {upper:.3f})"),
        ("cap that epsilon implies", _cap_text(attacks["cap"])),
        *((panel["title"].lower(), panel["summary"]) for panel in _shown_panels(attacks)),
        ("verdict", f"{attacks['verdict']}: {attacks['verdict_reason']}"),
    ):
        table.add_row(name, rich.text.Text(value))
    return table


def format_epsilon(epsilon: float | None) -> str:
    """Return epsilon to three decimals, rounded up: never below what was released.

    Args:
        epsilon: a certified upper bound, or None for infinity.
    """
    if epsilon is None:
        return "∞"
    # The product may round up past a whole number: 7.99 * 1000 = 7990.000000000001 is still 7.990.
    scaled = epsilon * 1000.0
    is_whole = math.isclose(scaled, round(scaled), rel_tol=1e-12)
    thousandths = round(scaled) if is_whole else math.ceil(scaled)
    return f"{thousandths / 1000.0:.3f}"


def grouped(count: int | None) -> str:
    """Return a count with thin spaces between thousands, such as ``"12 345"``."""
    return NOT_RELEASED if count is None else f"{count:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def _read(run: pathlib.Path) -> tuple[rundir.PrivacyStatement, Mapping[str, Any]]:
    """Return the privacy statement and the attack results, which must be the run's own and belong together.

    Raises:
        AttackInputError: if the run is not finished or not analysed, or the results are of another plan, split, target
            or scoring than the run has now.
    """
    statement = evidence.verified_statement(run)
    path = run / analyse.ATTACKS_PATH
    if not os.path.lexists(path):
        raise AttackInputError(
            f"{run} has no {analyse.ATTACKS_PATH}: expected an analysed run; run next: attacks analyse {run}"
        )
    directory, remedy = RunDirectory(run), f"run next: attacks analyse {run}"
    try:
        attacks = read_sealed_file(directory, path, schema=analyse.SCHEMA_NAME, remedy=remedy)
    except GuaranteeLost:
        raise AttackInputError(
            f"{path} cannot be believed without {directory.secret / 'root.key'}, which its seal is checked with; what "
            f"can be checked of a published report: attacks verify {run}"
        ) from None
    if attacks["plan_fingerprint"] != statement.plan_fingerprint:
        raise AttackInputError(f"{path} is of another plan than {run / 'privacy.json'}; {remedy}")
    if attacks["split_commitment"] != statement.split_commitment:
        raise AttackInputError(f"{path} was computed on other coins than the privacy statement commits to; {remedy}")
    evidence.check_target(directory, attacks["target"], path, remedy)
    # `privtrain ledger shred` deletes the signals and their record, and then the results stand alone.
    is_scored = record.record_path(run / SIGNALS_PATH).exists()
    if is_scored and record.read_scoring(directory).seal != attacks["scoring"]["seal"]:
        raise AttackInputError(f"{path} was computed from other signals than the run has now; {remedy}")
    return statement, attacks


def _claim(statement: rundir.PrivacyStatement, attacks: Mapping[str, Any]) -> str | None:
    """Return the guarantee as text, such as "ε = 2.000, δ = 1e-5"; None if it does not limit the attack."""
    if attacks["cap"]["reason"]:
        return None
    equals = "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"
    return f"ε{equals}{format_epsilon(statement.epsilon)}, δ{equals}{panels.scientific(statement.delta)}"


def _cap_text(cap: Mapping[str, Any]) -> str:
    """Return the largest AUROC that the guarantee allows, as a table cell; ``cap`` is that of ``attacks.json``."""
    if cap["reason"]:
        return f"none: {cap['reason']}"
    curve = "" if cap["curve"] is None else f"; {cap['curve']['auroc_of_sample']:.4f} by the whole privacy curve"
    return f"{cap['auroc']:.4f}  ({cap['auroc_of_sample']:.4f} for a sample of this size{curve})"
