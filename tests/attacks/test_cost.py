"""The panel of what training cost."""

from __future__ import annotations

import json

from attacks.analysis import cost
from attacks.reporting import panels
from attacks.rundir import read_statement


def test_the_cost_panel_adds_up_what_the_run_released(make_run):
    run = make_run()
    statement = read_statement(run)
    rows = [
        {"train/step": 0, "eval/held_out_perplexity": 9.0},
        {"train/step": 1, "perf/step_seconds": 1.5},
        {"train/step": 2, "perf/step_seconds": 2.0},
        {"train/step": 2, "perf/peak_memory_bytes": 2**30, "perf/flops_per_token": 6e6},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    panel = cost.panel(run, statement, 0)
    assert panel is not None
    panels.check("cost", panel)
    assert [row["value"] for row in panel["rows"]] == [3.5, 6.0, 1024.0]
    (run / "metrics.jsonl").write_text(json.dumps(rows[0]))
    assert cost.panel(run, statement, 0) is None
