"""SkyPilot, dstack and W&B sweeps: the shipped files are what these tools take, and start the command that resumes.

skypilot and dstack pin other versions of click and pydantic than this project's environment can hold, so they are no
test dependency. Day to day the keys are compared with those that the tools' own models know, copied here with their
source; the long form installs both into an environment of their own and asks the models themselves.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml
from typer.testing import CliRunner
from wandb.sdk.launch.sweeps import utils as sweeps

from privtrain.cli import app
from privtrain.registry import views
from privtrain.registry.store import Registry
from tests.conftest import write_config
from tests.jobs import REPOSITORY
from tests.launch.readme_commands import Command, check_accelerate, inner, parse

LAUNCH = REPOSITORY / "launch"
SKYPILOT, DSTACK = "skypilot==0.14.1", "dstack==0.22.5"

#: sky/utils/schemas.py of skypilot 0.14.1: properties of get_task_schema, get_resources_schema and get_volume_schema.
SKY_TASK = {"name", "workdir", "num_nodes", "resources", "file_mounts", "setup", "run", "envs", "secrets", "volumes"}
SKY_RESOURCES = {"infra", "accelerators", "cpus", "memory", "disk_size", "use_spot", "job_recovery", "image_id"}
SKY_RECOVERY = {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"}
SKY_VOLUME = {"name", "type", "infra", "labels", "size", "use_existing", "config"}
#: dstack/_internal/core/models/configurations.py of dstack 0.22.5: fields of TaskConfiguration and of a volume.
DSTACK_TASK = {"type", "name", "nodes", "python", "image", "repos", "env", "commands", "resources", "spot_policy"}
DSTACK_TASK |= {"retry", "volumes", "max_duration", "fleets"}
DSTACK_RETRY = {"on_events", "duration"}
DSTACK_VOLUME = {"type", "name", "backend", "region", "size", "volume_id", "availability_zone", "tags"}

_MODELS = """
import pathlib, sys, yaml, jsonschema
from sky.utils import schemas
from dstack._internal.core.models.configurations import parse_apply_configuration
launch = pathlib.Path(sys.argv[1])
read = lambda name: yaml.safe_load((launch / name).read_text())
task = read("skypilot/train.yaml")
jsonschema.validate(task, schemas.get_task_schema())
jsonschema.validate(task["resources"], schemas.get_resources_schema())
jsonschema.validate(read("skypilot/runs.volume.yaml"), schemas.get_volume_schema())
for name in ("dstack/train.dstack.yml", "dstack/runs.dstack.yml"):
    parse_apply_configuration(read(name))
"""


def content(name: str):
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


def test_the_skypilot_task_has_only_keys_that_skypilot_knows():
    task = content("skypilot/train.yaml")
    assert set(task) <= SKY_TASK
    assert set(task["resources"]) <= SKY_RESOURCES
    assert set(task["resources"]["job_recovery"]) <= SKY_RECOVERY
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 4], "saved; the machine failed"
    volume = content("skypilot/runs.volume.yaml")
    assert set(volume) <= SKY_VOLUME
    assert list(task["volumes"].values()) == [volume["name"]]


def test_the_dstack_task_has_only_keys_that_dstack_knows():
    task = content("dstack/train.dstack.yml")
    assert task["type"] == "task"
    assert set(task) <= DSTACK_TASK
    assert set(task["retry"]) <= DSTACK_RETRY
    assert {"interruption", "error"} <= set(task["retry"]["on_events"])
    volume = content("dstack/runs.dstack.yml")
    assert set(volume) <= DSTACK_VOLUME
    assert volume["name"] == task["volumes"][0]["name"].replace("${{ dstack.node_rank }}", "0")


def last_command(script: str, environment: dict[str, str], tmp_path: pathlib.Path) -> list[str]:
    """The words that the last command of a script is started with, as the tool's variables make them."""
    stub = tmp_path / "privtrain"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" privtrain "$@"\n')
    stub.chmod(0o755)
    lines = [line for line in script.splitlines() if not line.startswith(("source ", "make "))]
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", "\n".join(lines)],
        env={"PATH": path, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("tool", ["skypilot", "dstack"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_machine_starts_its_ranks_and_shares_the_volume(tool, rank, tmp_path):
    """Variables as the tools set them on two machines of eight GPUs."""
    if tool == "skypilot":
        task = content("skypilot/train.yaml")
        given = {"NUM_NODES": "2", "NODE_RANK": rank, "NUM_GPUS_PER_NODE": "8", "NODE_IPS": "10.0.0.1\n10.0.0.2"}
        variables = {**task["envs"], **{f"SKYPILOT_{name}": value for name, value in given.items()}}
        script, mounted = task["run"], next(iter(task["volumes"]))
    else:
        task = content("dstack/train.dstack.yml")
        given = {"NODES_NUM": "2", "NODE_RANK": rank, "GPUS_PER_NODE": "8", "MASTER_NODE_IP": "10.0.0.1"}
        recipe = "launch/recipes/llama-3.1-70b-lora.yaml"
        variables = {"RECIPE": recipe, "LAUNCH_FILE": "launch/accelerate/zero3.yaml"}
        variables |= {f"DSTACK_{name}": value for name, value in given.items()}
        script, mounted = "\n".join(task["commands"]), task["volumes"][0]["path"]
    words = last_command(script, variables, tmp_path)
    assert words[:2] == ["privtrain", "launch"], "the tool must see exit code 75"
    started = inner(Command(tool, "", tuple(words)))
    assert started is not None
    check_accelerate(started)
    flags = dict(itertools.pairwise(words))
    assert (flags["--num_machines"], flags["--machine_rank"], flags["--num_processes"]) == ("2", rank, "16")
    assert flags["--main_process_ip"] == "10.0.0.1"
    training = inner(started)
    assert training is not None
    parse(training)
    assert training.words[-1] == f"run.output_dir={mounted}"
    assert (REPOSITORY / training.words[2]).is_file()


@pytest.mark.campaign
@pytest.mark.timeout(1800)
def test_skypilot_and_dstack_themselves_take_the_files(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "-q", "--prefer-binary", SKYPILOT, DSTACK], check=True)
    environment = {**os.environ, "HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    subprocess.run([python, "-c", _MODELS, str(LAUNCH)], env=environment, check=True)


def trials() -> list[list[str]]:
    """The command line of each trial, made by the code of W&B's agent."""
    sweep = content("wandb/sweep.yaml")
    varied = sweep["parameters"]["training.learning_rate"]["values"]
    found = []
    for value in varied:
        chosen = {name: {"value": item.get("value", value)} for name, item in sweep["parameters"].items()}
        arguments = sweeps.create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        command = sweeps.create_sweep_command(list(sweep["command"]))
        found.append([word for part in command for word in (arguments if part == "${args_no_hyphens}" else [part])])
    return found


def test_every_trial_of_a_sweep_is_charged(tree, tmp_path, monkeypatch):
    """By the command that the agent starts: its script hands the words on to the program; the recipe is a tiny one."""
    del tree["privacy"]["insecure_seed"]
    tree["privacy"] |= {"noise_multiplier": 4.0, "target_delta": 1e-6}
    tree["registry"] = {"retry_seconds": 1}
    recipe = write_config(tree, tmp_path / "my.yaml")
    database = tmp_path / "registry.db"
    registry = Registry(str(database))
    registry.set_budget("customers", epsilon=50, delta=1e-5)
    program = tmp_path / "privtrain"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    for number, words in enumerate(trials()):
        words = [str(recipe) if word.startswith("launch/recipes/") else word for word in words]
        monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(database))
        trial = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": f"t{number}"}
        handed_on = subprocess.run(
            words, cwd=REPOSITORY, env=os.environ | trial, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        done = CliRunner().invoke(app, handed_on)
        assert done.exit_code == 0, (handed_on, done.output, done.exception)
    charged = {view.name: (view.state, view.num_charged) for view in views.runs(registry.database)}
    assert charged == {f"sweep-s1-t{number}": ("closed", 4) for number in range(2)}
    released = [json.loads((tmp_path / "runs" / f"sweep-s1-t{n}" / "privacy.json").read_text()) for n in range(2)]
    assert all(statement["mechanism"]["noised_metrics"]["release"] == ["loss"] for statement in released)


def test_a_trial_without_a_registry_does_not_start(tmp_path):
    environment = {"PATH": os.environ["PATH"], "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "t0"}
    done = subprocess.run(
        [str(LAUNCH / "wandb" / "trial.sh"), "x.yaml"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "every trial of a sweep spends budget" in done.stderr
