"""Every command in the guides: run on a tiny run where it is quick, parsed by its own parser where it is not."""

from __future__ import annotations

import pathlib
import re
import shutil

import pytest
import typer
import yaml
from typer.testing import CliRunner

from privtrain.registry.store import Registry
from privtrain.training.job import train
from tests.conftest import write_config
from tests.launch.readme_commands import (
    APPS,
    REPOSITORY,
    Command,
    check_accelerate,
    commands,
    guides,
    inner,
    make_targets,
    missing_files,
    parse,
)

COMMANDS = commands()
#: What the tour below runs, by program and subcommands.
RUN = {
    "privtrain plan",
    "privtrain train",
    "privtrain export",
    "privtrain registry budget set",
    "privtrain registry status",
    "privtrain registry runs",
    *(f"privtrain ledger {name}" for name in ("show", "verify", "top", "user", "stats", "export", "prove")),
    *(f"privtrain ledger {name}" for name in ("check-proof", "shred", "forget")),
    *(f"attacks {name}" for name in ("score", "analyse", "report", "shadows")),
    *(f"accountants {name}" for name in ("epsilon", "calibrate", "curve", "compare")),
}
#: What is parsed, and its files looked for, but not run here; and which test does run it.
PARSED = {
    "privtrain": "launch and its like are in inner()",
    "privtrain launch": "tests/launch/test_launchers.py",
    "privtrain doctor": "tests/launch/test_launchers.py",
    "privtrain study": "tests/privtrain/test_studies.py",
    "privtrain ledger serve": "tests/privtrain/test_registry_page.py",
    "attacks prepare": "tests/attacks/test_prepare.py",
    "attacks audit-plan": "tests/attacks/test_audit_plan.py",
    "accelerate": "tests/launch/test_jobs.py",
    "launch/torchrun.sh": "tests/launch/test_launchers.py",
    "srun": "tests/launch/test_slurm.py",
    "sbatch": "tests/launch/test_slurm.py",
    "make": "the Makefile's targets",
    "wandb": "tests/launch/test_cloud_files.py",
    "sky": "tests/launch/test_cloud_files.py",
    "dstack": "tests/launch/test_cloud_files.py",
    "docker": "tests/launch/test_docker.py",
    "export": "the shell's",
}


#: Programs that start nothing of ours whose arguments could be parsed.
_ALONE = {"make", "sbatch", "wandb", "sky", "dstack", "docker", "export"}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.guide}: {c.text[:60]}")
def test_a_command_of_a_guide_is_one_that_its_program_takes(command):
    assert command.name in RUN or command.name in PARSED, "claim it above: as run, or as parsed and by what it is run"
    assert missing_files(command) == []
    if command.words[0] in APPS:
        parse(command)
    if command.words[0] == "accelerate":
        check_accelerate(command)
    if command.words[0] == "make":
        assert set(command.words[1:]) <= make_targets()
    started = inner(command)
    if started is not None:
        test_a_command_of_a_guide_is_one_that_its_program_takes(started)
    else:
        assert command.words[0] in APPS or command.name in _ALONE


def test_every_guide_is_read():
    """A guide without a shell block has no commands; these have."""
    assert {command.guide for command in COMMANDS} >= {
        "README.md",
        "launch/README.md",
        "accountants/README.md",
        "attacks/README.md",
        "privtrain/ledger/README.md",
        "privtrain/registry/README.md",
    }
    assert len(guides()) >= 8


@pytest.mark.parametrize(
    "words",
    [
        ("privtrain", "plan"),
        ("privtrain", "plam", "x.yaml"),
        ("privtrain", "ledger", "top", "RUN", "--most", "3"),
        ("accountants", "epsilon", "-s", "one"),
        ("attacks", "score", "RUN", "more"),
    ],
)
def test_a_command_that_is_wrong_is_found(words):
    with pytest.raises(Exception, match=r"(?i)missing|no such|valid number|unexpected"):
        parse(Command("test", " ".join(words), words))


def run(words: list[str]) -> str:
    done = CliRunner().invoke(typer.main.get_command(APPS[words[0]]), words[1:])  # pyright: ignore[reportArgumentType]
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, (words, done.output)
    return done.output


@pytest.fixture
def tour(tree, tmp_path, monkeypatch):
    """A tiny run that anybody's data could have given, a registry, and a place to write to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(tmp_path / "registry.db"))
    del tree["privacy"]["insecure_seed"]
    tree["privacy"] |= {"noise_multiplier": 4.0, "target_delta": 1e-6}
    tree["registry"] = {"retry_seconds": 1, "dataset": "customers"}
    Registry(str(tmp_path / "registry.db")).set_budget("customers", epsilon=500, delta=1e-5)
    recipe = write_config(tree, tmp_path / "my.yaml")
    train(recipe)
    return recipe, tmp_path / "runs" / "tiny"


@pytest.mark.campaign
@pytest.mark.timeout(900)
def test_the_commands_of_the_guides_run(tour, tmp_path):
    """In the guides' order, on one tiny run; each program and subcommand that RUN claims is seen to run."""
    recipe, finished = tour
    head = yaml.safe_load((finished / "privacy.json").read_text())["ledger"]["head"]
    fresh = iter(range(1000))
    seen = set()

    def here(command: Command, word: str) -> str:
        if word in ("launch/recipes/demo.yaml", "my.yaml"):
            return str(recipe)
        if word in ("runs/demo", "runs/my-run", "RUN"):
            return str(finished)
        return {
            "0" * 64: head,
            "my-model": str(tmp_path / f"model-{next(fresh)}"),
            "FILE": str(tmp_path / f"file-{next(fresh)}"),
            "privacy.target_epsilon=4": "privacy.num_steps=4",  # the tiny run gives the noise itself
        }.get(word, word)

    for found in COMMANDS:
        command = (inner(found) or found) if found.words[0] == "accelerate" else found
        if command.name not in RUN or (command.name == "accountants compare" and "accountants compare" in seen):
            continue
        words = [here(command, word) for word in command.words]
        if command.name == "privtrain train":
            words.append(f"run.name=again-{next(fresh)}")
            Registry(str(tmp_path / "registry.db")).set_budget("customers", epsilon=500, delta=1e-5)
        if command.name == "privtrain ledger shred":
            copy = tmp_path / f"copy-{next(fresh)}"
            shutil.copytree(finished, copy)
            words = [str(copy) if word == str(finished) else word for word in words]
        run(words)
        seen.add(command.name)
    assert seen == RUN


def test_the_python_of_the_accountants_guide_runs():
    text = (REPOSITORY / "accountants" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S)
    assert blocks
    for block in blocks:
        names: dict[str, object] = {}
        exec(compile(block, "accountants/README.md", "exec"), names)
        assert names["answer"]


def test_yaml_of_the_guides_is_yaml():
    for path in guides():
        for block in re.findall(r"^```yaml\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S):
            assert isinstance(yaml.safe_load(block), dict), path


def test_the_guides_links_lead_somewhere():
    for path in guides():
        for target in re.findall(r"\]\(([\w./-]+?)(?:#[\w-]+)?\)", path.read_text(encoding="utf-8")):
            assert pathlib.Path(path.parent, target).exists(), (path, target)
