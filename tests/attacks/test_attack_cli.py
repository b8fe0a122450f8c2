from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from attacks import cli
from attacks.scoring import score


def call(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Runs the command in this process: exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["attacks", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_help_loads_nothing_heavy():
    code = (
        "import sys\n"
        "from attacks import cli\n"
        "sys.argv = ['attacks', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "print(sorted({'torch', 'numpy', 'scipy', 'pyarrow', 'matplotlib', 'jinja2'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in ("score", "analyse", "report"))


def test_the_module_runs_as_the_command():
    done = subprocess.run([sys.executable, "-m", "attacks", "--help"], capture_output=True, text=True, check=True)
    assert "analyse" in done.stdout


def test_analyse_then_report(monkeypatch, capsys, make_run):
    run = make_run(30)
    code, out, err = call(monkeypatch, capsys, "analyse", run, "--seed", "3")
    assert (code, err) == (0, "")
    assert "run next: attacks report" in out
    assert json.loads((run / "report/attacks.json").read_text())["seed"] == 3
    code, out, err = call(monkeypatch, capsys, "report", run)
    assert (code, err) == (0, "")
    assert "user-inference AUROC" in out
    assert out.splitlines()[-1] == f"report: {run / 'report/index.html'}"


def test_score_hands_over_to_the_scoring_stage(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr(score, "score_run", lambda run, options, documents_of: calls.append((run, options)))
    arguments = ("--batch-tokens", "512", "--variants", "lowercase")
    assert call(monkeypatch, capsys, "score", tmp_path, *arguments)[0] == 0
    assert calls == [(pathlib.Path(tmp_path), score.ScoreOptions(batch_tokens=512, variants="lowercase"))]


@pytest.mark.parametrize("command", ["analyse", "report"])
def test_own_mistakes_are_one_line_and_exit_code_2(monkeypatch, capsys, make_run, tmp_path, command):
    unfinished = make_run(0, name="unfinished", steps_released=10)
    unscored = make_run(0, name="unscored")
    empty = tmp_path / "empty"
    empty.mkdir()
    next_of_unscored = "attacks score" if command == "analyse" else "attacks analyse"
    for run, given, next_command in (
        (tmp_path / "nowhere", "no run at", "ls "),
        (empty, "has no privacy.json", "privtrain train"),
        (unfinished, "released 10 of 60 steps", "privtrain train"),
        (unscored, "has no ", next_of_unscored),
    ):
        code, out, err = call(monkeypatch, capsys, command, run)
        assert code == 2
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("attacks: ")
        assert str(run) in err
        assert "expected" in err or "with: " in err
        assert given in err
        assert next_command in err
