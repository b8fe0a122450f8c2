"""What training cost, as the run released it: operations, time and memory (the third axis of Das et al. 2025)."""

from __future__ import annotations

import pathlib
from typing import Any

from attacks.rundir import released_values
from privtrain.run.statement import PrivacyStatement

# (metric, label, how the values of all steps become one, factor to the label's unit)
_METRICS = (
    ("perf/step_seconds", "seconds of all steps", sum, 1.0),
    ("perf/flops_per_token", "operations of a token, in millions", max, 1e-6),
    ("perf/peak_memory_bytes", "peak memory of rank 0, MiB", max, 2.0**-20),
)


def panel(run: pathlib.Path, statement: PrivacyStatement, seed: int) -> dict[str, Any] | None:  # noqa: ARG001
    """Return the report panel of time, memory and operations, from ``metrics.jsonl``; None if none was released."""
    rows = []
    for name, label, combine, factor in _METRICS:
        values = released_values(run, name)
        if values:
            rows.append({"what": label, "value": factor * combine(values)})
    if not rows:
        return None
    return {
        "title": "Cost of training",
        "summary": "; ".join(f"{row['what']}: {row['value']:.4g}" for row in rows) + ".",
        "columns": [{"key": "what", "label": "measured by the training job"}, {"key": "value", "label": "value"}],
        "rows": rows,
        "notes": [
            "Operations are counted on a planted microbatch, clipping included, if performance.count_flops is on. Time "
            "and memory are not covered by ε."
        ],
    }
