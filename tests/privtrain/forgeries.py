"""A finished run, rewritten by somebody who may rewrite all of it."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable

from privtrain.privacy.plan import PrivacyPlan
from privtrain.run import bundle
from privtrain.run.bundle import digest_of, read_manifest, render
from privtrain.run.release import card_section


def released_files(directory: pathlib.Path) -> list[str]:
    return list(bundle.files_under(directory, bundle.NOT_RELEASED))


def reseal(directory: pathlib.Path) -> None:
    """Make ``release.json`` fit whatever lies in a run directory, as somebody would who may rewrite all of it."""
    old, _ = read_manifest(directory)
    statement = json.loads((directory / "privacy.json").read_text())
    (directory / "adapter" / "privacy.json").write_bytes((directory / "privacy.json").read_bytes())
    files = {name: bundle.sha256_of(directory / name) for name in old.files}
    values = {**old.body, "statement": digest_of(statement), "plan": statement["plan_fingerprint"], "files": files}
    manifest = bundle.ReleaseManifest.parse({**values, "tokenizer": bundle.tokenizer_digest(files)})
    (directory / "release.json").write_text(render(manifest, "run"))
    (directory / "adapter" / "release.json").write_text(render(manifest, "adapter"))


def forge(directory: pathlib.Path, edit: Callable[[dict], None], *, fingerprint: bool = False, card: bool = False):
    statement = json.loads((directory / "privacy.json").read_text())
    edit(statement)
    if fingerprint:
        statement["plan_fingerprint"] = PrivacyPlan.from_body(statement["plan"]).fingerprint()
    (directory / "privacy.json").write_text(json.dumps(statement, indent=2, ensure_ascii=False) + "\n")
    if card:
        text = (directory / "adapter" / "README.md").read_text()
        section = card_section(PrivacyPlan.from_body(statement["plan"]), statement)
        (directory / "adapter" / "README.md").write_text(text[: text.index("## Privacy statement")] + section)
    reseal(directory)
