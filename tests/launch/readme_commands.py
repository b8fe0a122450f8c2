"""Commands in the guides: found, taken apart, and parsed by the very parsers that will meet them, without running."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import shlex
from typing import Any

import typer

from accountants.cli import app as accountants_app
from attacks.cli import app as attacks_app
from privtrain.cli import app as privtrain_app

REPOSITORY = pathlib.Path(__file__).parents[2]
APPS = {"privtrain": privtrain_app, "attacks": attacks_app, "accountants": accountants_app}
#: Words that stand for something of the reader's, and what stands for them here.
PLACEHOLDERS = {"N": "10", "$RANK_OF_THIS_MACHINE": "1", "H": "0" * 64, "U": "user-000", "USER": "user-000"}
_FILE = re.compile(r"^(launch|docker|tests|privtrain|attacks|accountants)/[\w./-]+\.\w+$")
_ASSIGNMENT = re.compile(r"^[A-Z_][A-Z0-9_]*=")
#: Options of schedulers that take a value in the next word.
_SCHEDULER_VALUES = {"--nodes", "--ntasks-per-node", "--gpus-per-node", "--dependency"}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command of a guide.

    Attributes:
        guide: path of the guide.
        text: as it stands there, comments and line breaks removed.
        words: split as a shell would, without assignments before it, optional parts included.
    """

    guide: str
    text: str
    words: tuple[str, ...]

    @property
    def name(self) -> str:
        """Program and subcommands, as far as they are words of their own."""
        return " ".join(_walk(self.words)[0])


@functools.cache
def _program(name: str) -> Any:
    """The command line of one of this project's programs, as click has it."""
    return typer.main.get_command(APPS[name])


def _walk(words: tuple[str, ...]) -> tuple[list[str], Any]:
    """The words that name a command, and the command, if it is one of this project's."""
    found = [words[0]]
    at = _program(words[0]) if words[0] in APPS else None
    for word in words[1:]:
        if word not in getattr(at, "commands", {}):
            break
        at = at.commands[word]
        found.append(word)
    return found, at


def guides() -> list[pathlib.Path]:
    """Every guide of the project."""
    return sorted(path for path in REPOSITORY.rglob("README.md") if ".venv" not in path.parts)


def commands() -> list[Command]:
    """Every command of every guide: lines of shell blocks, programs' lines of plain blocks, whole mentions."""
    found = []
    for path in guides():
        text = path.read_text(encoding="utf-8")
        for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            if language not in ("", "bash", "sh"):
                continue
            for line in body.replace("\\\n", " ").splitlines():
                command = _command(path, line, is_shell=bool(language))
                if command is not None and (language or command.words[0] in APPS):
                    found.append(command)
        found += (command for command in mentions(path) if not _is_bare_name(command))
    return found


def _is_bare_name(command: Command) -> bool:
    """Whether this only speaks of a command that takes more words than are there."""
    names, at = _walk(command.words)
    return len(command.words) == len(names) and (
        hasattr(at, "commands") or any(p.required or p.param_type_name == "argument" for p in at.params)
    )


def mentions(path: pathlib.Path) -> list[Command]:
    """Commands within the sentences of a guide: this project's own, each with its subcommand at least."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = []
    for span in re.findall(rf"`((?:{'|'.join(APPS)}) [^`]+)`", text):
        # What stands for arguments of any kind or for several subcommands is a name alone.
        whole = re.split(r"…|\.\.\.|\||\[", re.sub(r"\s+", " ", span))[0]
        command = _command(path, whole, is_shell=True)
        if command is not None:
            found.append(command if whole == span else dataclasses.replace(command, words=tuple(command.name.split())))
    return found


def _command(path: pathlib.Path, line: str, *, is_shell: bool) -> Command | None:
    text = line.split(" #")[0].strip()
    if not is_shell:
        text = re.split(r"\s{2,}(?![-\s])", text)[0]  # then comes what it does
    if not text or text.startswith("#"):
        return None
    text = re.sub(r"\s+", " ", text)
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(re.sub(r"\[(-[^\]]*)\]", r"\1", text))]
    while words and _ASSIGNMENT.match(words[0]):
        words.pop(0)
    return Command(str(path.relative_to(REPOSITORY)), text, tuple(words)) if words else None


def parse(command: Command) -> None:
    """Parse one of this project's own commands to the last option, without running it.

    Raises:
        Exception: click's usage error, if it would be refused.
    """
    at = _program(command.words[0])
    arguments, parent = list(command.words[1:]), None
    while hasattr(at, "commands"):
        parent = at.make_context(at.name, arguments, parent=parent)
        # What follows a group's own options has a private name in some versions of click.
        rest = [*getattr(parent, "_protected_args", ()), *parent.args]
        _, at, arguments = at.resolve_command(parent, rest)
    at.make_context(at.name, arguments, parent=parent)


def inner(command: Command) -> Command | None:
    """What a launcher or scheduler starts, if it is one of this project's commands."""
    words = list(command.words)
    program = words.pop(0)
    if program == "privtrain" and words[:1] == ["launch"]:
        return dataclasses.replace(command, words=tuple(words[1:]))
    if program == "accelerate" and "-m" in words:
        return dataclasses.replace(command, words=tuple(words[words.index("-m") + 1 :]))
    if program == "launch/torchrun.sh":
        return dataclasses.replace(command, words=("privtrain", *words))
    if program == "srun":
        while words and words[0].startswith("--"):
            words = words[2:] if words[0] in _SCHEDULER_VALUES else words[1:]
        return dataclasses.replace(command, words=tuple(words))
    return None


def check_accelerate(command: Command) -> None:
    """Parse a launch as accelerate will, and see that its configuration is there."""
    from accelerate.commands.launch import launch_command_parser

    assert command.words[1] == "launch", command
    options = launch_command_parser().parse_args(list(command.words[2:]))
    assert (REPOSITORY / options.config_file).is_file(), command


def missing_files(command: Command) -> list[str]:
    """Files of this repository that the command names and that are not there."""
    named = [word for word in command.words if _FILE.match(word)]
    return [word for word in named if not (REPOSITORY / word).exists()]


def make_targets() -> set[str]:
    """Targets of the Makefile."""
    return set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.M))
