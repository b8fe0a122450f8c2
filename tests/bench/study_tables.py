"""Write what studies found into the studies' guide: ``python -m tests.bench.study_tables STUDY_DIRECTORY...``.

Takes every number from the studies' ``report/report.json``; none is typed.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from privtrain import studies
from privtrain.files.atomic import write_atomically

README = pathlib.Path(studies.__file__).with_name("README.md")
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def section(facts: dict[str, Any]) -> str:
    """Return what one report says, as Markdown."""
    cells = facts["cells"]
    lines = [
        f"### {facts['study']}, scale {facts['scale']}",
        "",
        f"{cells['complete']} of {cells['planned']} cells complete ({cells['jobs']} jobs, {facts['num_jobs_open']} "
        f"still to be run, {len(facts['failed'])} failed); {len(facts['seeds'])} seeds.",
        "",
        "| claim of the paper | paper | here | verdict | power |",
        "|---|---|---|---|---|",
    ]
    for claim in facts["claims"]:
        texts = [claim["statement"], claim["paper"], claim["ours"], f"**{claim['verdict']}**: {claim['reason']}"]
        texts.append(claim["power"])
        lines.append("| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |")
    for table in facts["tables"]:
        lines += [
            "",
            f"{table['title']}:",
            "",
            "| " + " | ".join(table["columns"]) + " |",
            "|---" * len(table["columns"]) + "|",
        ]
        lines += ["| " + " | ".join(row) + " |" for row in table["rows"]]
        lines += ["", table["note"]] if table["note"] else []
    return "\n".join([*lines, ""])


def main() -> None:
    """Rewrite the text between the two markers."""
    reports = [pathlib.Path(argument) / "report" / "report.json" for argument in sys.argv[1:]]
    found = "\n".join(section(json.loads(path.read_text(encoding="utf-8"))) for path in reports)
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_atomically(README, f"{before}{BEGIN}\n{found}\n{END}{after}")


if __name__ == "__main__":
    main()
