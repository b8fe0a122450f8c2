"""What a newcomer meets first: README, CONTRIBUTING, SECURITY, CITATION, templates, changelog, tiers of tests."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
import yaml

import privtrain
from tests.launch.readme_commands import REPOSITORY, make_targets

_PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", ".github/pull_request_template.md"]
_FAST_TESTS = re.search(r"^FAST_TESTS := ((?:.*\\\n)*.*)$", (REPOSITORY / "Makefile").read_text("utf-8"), re.M)


def fast_tests() -> list[str]:
    assert _FAST_TESTS
    return _FAST_TESTS[1].replace("\\\n", " ").split()


def imports_torch(code: str, *arguments: str) -> bool:
    """Whether a fresh interpreter has torch after running the code."""
    program = f"{code}\nimport sys; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return {"True": True, "False": False}[done.stdout.split()[-1]]


def test_readme_is_at_most_150_lines():
    assert len((REPOSITORY / "README.md").read_text("utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", _PAGES)
def test_page_links_and_commands_exist(page):
    text = (REPOSITORY / page).read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", text):
        assert (REPOSITORY / page).parent.joinpath(target).exists(), target
    for target in re.findall(r"make ([a-z-]+)`", text):
        assert target in make_targets(), target
    for path in re.findall(r"`((?:tests|privtrain|attacks|accountants|launch)/[\w./]+\.\w+)`", text):
        assert path == "tests/privtrain/test_X.py" or (REPOSITORY / path).exists(), path


def test_citation_has_what_cff_1_2_requires():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    assert all("name" in author or "family-names" in author for author in citation["authors"])
    assert citation["version"] == privtrain.__version__
    assert citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_form_has_what_github_requires(form):
    tree = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text("utf-8"))
    assert {"name", "description", "body"} <= set(tree)
    ids = [part["id"] for part in tree["body"]]
    assert len(set(ids)) == len(ids)
    assert all(part["type"] in {"textarea", "input"} and part["attributes"]["label"] for part in tree["body"])


def test_no_test_has_a_name_beyond_60_characters():
    names = [
        name
        for path in (REPOSITORY / "tests").rglob("*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    ]
    assert len(names) > 1500
    assert [name for name in names if len(name) > 60] == []


def test_changelog_entry_is_one_line():
    for line in (REPOSITORY / "CHANGELOG.md").read_text("utf-8").partition("\n## ")[2].splitlines()[1:]:
        assert not line or line.startswith(("- ", "### ", "## ")), line


@pytest.mark.parametrize(
    "module", ["accountants", "accountants.cli", "attacks.analysis.statistics.roc", "attacks.analysis.audit.one_run"]
)
def test_module_without_a_model_does_not_import_torch(module):
    assert not imports_torch(f"import {module}")


def test_wrong_configuration_is_told_before_torch_is_imported():
    mistake = "['privtrain', 'train', 'launch/recipes/demo.yaml', 'privacy.nonsense=1']"
    run = "from privtrain.cli import main\ntry: main()\nexcept SystemExit as ended: assert ended.code == 2"
    code = f"import sys; sys.argv = {mistake}; {run}"
    assert not imports_torch(code)


def test_fast_tests_collected_do_not_import_torch():
    assert "tests/accountants" in fast_tests()
    code = (
        "import pytest, sys; assert pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', *sys.argv[1:]]) == 0"
    )
    assert not imports_torch(code, *fast_tests())


def test_import_of_torch_in_a_test_is_found(tmp_path: pathlib.Path):
    test = tmp_path / "test_mutant.py"
    test.write_text("import torch\n\ndef test_nothing(): pass\n", encoding="utf-8")
    code = "import pytest, sys; pytest.main(['--collect-only', '-q', '-p', 'no:cacheprovider', sys.argv[1]])"
    assert imports_torch(code, str(test))
