"""Help and shell completion of the three programs: right, and without loading anything that takes seconds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAMS = {
    "privtrain": ("plan", "train", "doctor", "ledger", "registry"),
    "attacks": ("score", "analyse", "report"),
    "accountants": ("epsilon", "calibrate", "compare"),
}
HEAVY = {"torch", "transformers", "scipy", "pyarrow", "wandb", "duckdb", "datasets", "dp_accounting", "matplotlib"}
_CALL = """
import sys
sys.argv = {argv!r}
from {program}.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
print("loaded:", *sorted(set(sys.modules) & {heavy!r}), file=sys.stderr)
"""


def call(program: str, *arguments: str, **environment: str) -> str:
    """What it prints, having loaded nothing heavy; as the installed script would be called."""
    code = _CALL.format(argv=[program, *arguments], program=program, heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].strip() == "loaded:", done.stderr
    return done.stdout


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_nothing_heavy(program):
    shown = call(program, "--help")
    assert all(name in shown for name in (*PROGRAMS[program], "--install-completion"))


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_finds_commands_and_loads_nothing_heavy(program, shell):
    """By the protocol of each shell's script: bash and zsh hand over the words so far."""
    first = PROGRAMS[program][0]
    words = {"bash": "COMP_WORDS", "zsh": "_TYPER_COMPLETE_ARGS", "fish": "_TYPER_COMPLETE_ARGS"}[shell]
    environment = {
        f"_{program.upper()}_COMPLETE": f"complete_{shell}",
        words: f"{program} {first[:2]}",
        "COMP_CWORD": "1",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    assert first in call(program, **environment)


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_completion_script_can_be_shown(program):
    shown = call(program, "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_{program.upper()}_COMPLETE" in shown


def test_options_are_completed_too():
    environment = {"COMP_WORDS": "privtrain plan --acc", "COMP_CWORD": "2"}
    assert "--accelerate" in call("privtrain", _PRIVTRAIN_COMPLETE="complete_bash", **environment)
