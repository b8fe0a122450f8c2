"""Every command in the guides: run on a tiny run, or parsed by its own parser and listed with a reason."""

from __future__ import annotations

import datetime
import importlib.util
import pathlib
import re
import shutil
import tomllib

import pytest
import yaml
from typer.testing import CliRunner

from privtrain.job.train import train
from privtrain.registry.store import Registry
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
    mentions,
    missing_files,
    parse,
)

COMMANDS = commands()
#: What the tour below runs, by program and subcommands.
RUN = {
    *(
        f"privtrain {name}"
        for name in (
            "preview",
            "plan",
            "train",
            "disclose",
            "export",
            "verify",
            "doctor",
            "schema",
            "invent-customers",
            "study",
        )
    ),
    "privtrain track sync",
    *(f"privtrain registry {name}" for name in ("budget set", "status", "runs", "init", "upgrade", "clock")),
    *(f"privtrain ledger {name}" for name in ("show", "verify", "top", "user", "stats", "export", "prove")),
    *(f"privtrain ledger {name}" for name in ("check-proof", "shred", "forget")),
    *(f"attacks {name}" for name in ("prepare", "audit-plan", "score", "analyse", "report", "verify", "shadows")),
    *(f"accountants {name}" for name in ("epsilon", "calibrate", "curve", "compare")),
}
#: What the tour does not run: why, and which test starts it instead. All of it is parsed, and its files looked for.
NOT_RUN = {
    "attacks audit-corpus": "needs a sampled corpus: tests/attacks/test_sampled_corpus.py",
    "attacks sample-canaries": "draws from a model: tests/attacks/test_canary_samples.py",
    "privtrain registry restored": "needs a database from a backup: tests/privtrain/test_registry_restored.py",
    "privtrain generate": "samples from a model: tests/privtrain/test_generate.py",
    "privtrain tune": "trains several models: tests/privtrain/test_tune.py",
    "privtrain init": "guesses from files: tests/privtrain/test_init.py",
    "privtrain from": "translates files of others: tests/privtrain/test_translate.py",
    "privtrain launch": "starts several processes, and ends with their exit code: tests/launch/test_launchers.py",
    "accelerate": "as a launcher of two ranks: tests/launch/test_launchers.py; the tour runs what it starts",
    "launch/torchrun.sh": "starts several processes: tests/launch/test_launchers.py",
    "srun": "needs a scheduler: tests/launch/test_slurm.py starts one",
    "sbatch": "needs a scheduler: tests/launch/test_slurm.py starts one",
    "privtrain ledger serve": "serves until it is stopped: tests/privtrain/test_registry_page.py",
    "privtrain registry refund": "of an unfinished run: tests/launch/test_budgets.py",
    "privtrain registry close": "of a lost run's reservation: tests/privtrain/test_registry.py",
    "privtrain push": "needs a hub: tests/privtrain/test_push.py plays one",
    "privtrain sign": "needs a key: tests/privtrain/test_signing.py",
    "make": "installs, downloads and takes minutes: .ci/run is `make lint` and `make test`; the targets are looked for",
    "wandb": "needs an account: tests/launch/test_cloud_files.py makes the trials by the agent's own code",
    "sky": "needs a cloud: tests/launch/test_cloud_files.py holds the file to the schemas and runs its last command",
    "dstack": "needs a cloud: tests/launch/test_cloud_files.py holds the file to the models and runs its last command",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: f"{c.guide}: {c.text[:60]}")
def test_a_command_of_a_guide_is_one_that_its_program_takes(command):
    assert command.name in RUN or command.name in NOT_RUN, "run it in the tour, or say above why not and what does"
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
        assert command.words[0] in APPS or command.name in NOT_RUN


def test_commands_not_run_here_are_run_where_the_list_says():
    assert not RUN & set(NOT_RUN)
    assert RUN | set(NOT_RUN) == {command.name for command in COMMANDS}
    for reason in NOT_RUN.values():
        for path in re.findall(r"[\w./]+\.py", reason):
            assert (REPOSITORY / path).is_file(), path


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


#: Launchers: the tour runs what they start, in this process.
_STARTERS = {"accelerate", "srun", "launch/torchrun.sh"}


def run(words: list[str]) -> str:
    done = CliRunner().invoke(APPS[words[0]], words[1:])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, (words, done.output)
    return done.output


@pytest.fixture
def tour(tree, tmp_path, monkeypatch, no_self_test):
    """A tiny run that anybody's data could have given, a registry, and a place to write to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(tmp_path / "registry.db"))
    # Computed for a quarter of a minute, of no use to a dry run: tests/privtrain/test_study_findings.py looks at it.
    monkeypatch.setattr("privtrain.studies.noise.Setting.noise", lambda setting, name: 0.8)
    recommended = {"overrides": {}, "rate_now": 0.02, "rate_without_noise": 0.03}
    monkeypatch.setattr("privtrain.studies.more_per_epsilon.recommended", lambda *given, **named: recommended)
    del tree["privacy"]["insecure_seed"]
    tree["privacy"] |= {"noise_multiplier": 4.0, "target_delta": 1e-6}
    tree["data"]["held_out_fraction"] = 0.5  # the split is random: both sides need two users to attack
    tree["registry"] = {"retry_seconds": 1, "dataset": "customers"}
    Registry(str(tmp_path / "registry.db")).set_budget("customers", epsilon=500, delta=1e-5)
    recipe = write_config(tree, tmp_path / "my.yaml")
    train(recipe)
    return recipe, tmp_path / "runs" / "tiny"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_commands_of_the_guides_run(tour, tmp_path):
    """In the guides' order, on one tiny run; each program and subcommand that RUN claims is seen to run."""
    recipe, finished = tour
    registry = Registry(str(tmp_path / "registry.db"))
    (tmp_path / "policy.yaml").write_text("fail_on_verdicts: [falsified]\n", encoding="utf-8")
    stands_for = {
        **dict.fromkeys(("launch/recipes/demo.yaml", "my.yaml", "run.yaml", "RECIPE", "CONFIG"), str(recipe)),
        **dict.fromkeys(("runs/demo", "runs/my-run", "RUN", "DIRECTORY"), str(finished)),
        "YYYY-MM-DD": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "0" * 64: yaml.safe_load((finished / "privacy.json").read_text())["ledger"]["head"],
        "privacy.target_epsilon=4": "privacy.num_steps=4",  # the tiny run gives the noise itself
    }
    done = set()
    for number, found in enumerate(COMMANDS):
        command = (inner(found) or found) if found.words[0] in _STARTERS else found
        # A shadow is a run of its own: tests/attacks/test_scoring_jobs.py scores one. A corpus needs a model that
        # samples: tests/privtrain/test_generate.py verifies one. The tiny run gives the noise that optimizing chooses:
        # tests/privtrain/test_optimize.py.
        if command.name in NOT_RUN or {"--documents-of", "corpus", "--optimize"} & set(command.words):
            continue
        if (command.name, command.words) in done and command.name != "attacks analyse":
            continue  # each scoring is analysed
        done.add((command.name, command.words))
        file = str(tmp_path / ("policy.yaml" if command.name == "attacks report" else f"file-{number}"))
        places = {
            **stands_for,
            "FILE": file,
            **dict.fromkeys(("my-model", "OUTPUT"), str(tmp_path / f"model-{number}")),
        }
        words = [places.get(word, word) for word in command.words]
        if command.name in ("privtrain train", "attacks prepare"):
            words.append(f"run.name=again-{number}")
            registry.set_budget("customers", epsilon=500, delta=1e-5)
        if command.name == "privtrain study" and "--dry-run" not in words:
            words.append("--dry-run")  # tests/privtrain/test_studies.py runs a study
        if command.name == "privtrain ledger shred":
            copy = tmp_path / f"copy-{number}"
            shutil.copytree(finished, copy)
            words = [str(copy) if word == str(finished) else word for word in words]
        if command.name == "attacks verify":
            run(["attacks", "report", str(finished)])
        run(words)
    assert {name for name, _ in done} == RUN


def test_a_command_within_a_sentence_is_one_that_is_there():
    """Bare names; those with arguments are among COMMANDS."""
    for path in guides():
        for command in mentions(path):
            assert len(command.words) > 1, f"{path}: no such subcommand: {command.text}"


def test_other_programs_within_sentences_are_there():
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for path in guides():
        text = path.read_text(encoding="utf-8")
        for module in re.findall(r"python -m ([\w.]+)", text):
            assert importlib.util.find_spec(module) is not None, (path, module)
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert target in make_targets(), (path, target)
        for extra in re.findall(r"pip install 'privtrain\[(\w+)\]'", text):
            assert extra in extras["optional-dependencies"], (path, extra)


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
