"""The report in Weights & Biases: its public files as an artifact, its results as a table. Offline by default."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from attacks.analysis.analyse import ATTACKS_PATH
from attacks.reporting.report import INDEX_PATH, MARKDOWN_PATH, REPORT_PATH
from privtrain.files import reading
from privtrain.tracking.wandb_settings import careful_settings

PUBLISHED = (ATTACKS_PATH, INDEX_PATH, REPORT_PATH, MARKDOWN_PATH)
"""What is uploaded: these and nothing that happens to lie beside them."""

TABLE_COLUMNS = (
    "statistic",
    "unit",
    "documents",
    "auroc",
    "lower",
    "upper",
    "p_value",
    "p_holm",
    "num_held_in",
    "num_held_out",
    "verdict",
)


def table_rows(attacks: Mapping[str, Any]) -> list[list[Any]]:
    """Return one row per statistic, in the order of ``TABLE_COLUMNS``."""
    return [
        [
            name,
            result["unit"],
            result["documents"],
            result["auroc"],
            *result["bootstrap"]["interval"],
            result.get("p_value"),
            result.get("p_holm"),
            result["num_held_in"],
            result["num_held_out"],
            result["verdict"],
        ]
        for name, result in attacks["results"].items()
    ]


def log_report(run: pathlib.Path, attacks: Mapping[str, Any], *, project: str) -> None:
    """Log a written report to Weights & Biases: headline, table of statistics and public files; nothing of ``secret/``.

    Args:
        run: with the report's files.
        attacks: content of its ``attacks.json``.
        project: of Weights & Biases.
    """
    settings = careful_settings()
    import wandb

    name = run.resolve().name
    logged = wandb.init(
        project=project, name=f"{name}-attacks", group=name, job_type="attacks", dir=str(run), settings=settings
    )
    try:
        headline = attacks["results"][attacks["headline"]]
        lower, upper = headline["bootstrap"]["interval"]
        logged.summary.update(
            {
                "attacks/auroc": headline["auroc"],
                "attacks/auroc_lower": lower,
                "attacks/auroc_upper": upper,
                "attacks/auroc_cap": attacks["cap"]["auroc_used"],
                "attacks/verdict": attacks["verdict"],
                "plan_fingerprint": attacks["plan_fingerprint"],
            }
        )
        rows: Any = table_rows(attacks)
        logged.log({"attacks/results": wandb.Table(columns=list(TABLE_COLUMNS), data=rows)})
        artifact = wandb.Artifact(f"{name}-attack-report", type="attack-report")
        for path in PUBLISHED:
            # Copied from what was read here, not from whatever the path holds when the upload begins.
            with artifact.new_file(path.name, mode="wb") as file:
                file.write(reading.read_bytes(run / path))
        logged.log_artifact(artifact)
    finally:
        logged.finish()
