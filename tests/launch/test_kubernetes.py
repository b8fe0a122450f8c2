"""The Kubernetes files against the published models of their kinds, unknown keys refused."""

from __future__ import annotations

import pathlib
import shlex
from typing import Any

import yaml
from kubeflow_trainer_api.models import io_k8s_api_batch_v1_job, trainer_v1alpha1_train_job

from tests.launch.readme_commands import Command, check_accelerate, inner, parse

KUBERNETES = pathlib.Path(__file__).parents[2] / "launch" / "kubernetes"


def content(name: str) -> dict[str, Any]:
    return yaml.safe_load((KUBERNETES / name).read_text(encoding="utf-8"))


def unknown_keys(given: Any, accepted: Any, place: str = "") -> list[str]:
    """Keys that a model dropped."""
    if isinstance(given, dict):
        return [
            found
            for key, value in given.items()
            for found in (
                unknown_keys(value, accepted[key], f"{place}.{key}")
                if isinstance(accepted, dict) and key in accepted
                else [f"{place}.{key}"]
            )
        ]
    if isinstance(given, list):
        pairs = zip(given, accepted, strict=True)
        return [found for i, (a, b) in enumerate(pairs) for found in unknown_keys(a, b, f"{place}[{i}]")]
    return []


def test_the_train_job_is_one_of_kubeflow_trainer():
    given = content("trainjob.yaml")
    job = trainer_v1alpha1_train_job.TrainerV1alpha1TrainJob.from_dict(given)
    assert job is not None
    assert unknown_keys(given, job.to_dict()) == []
    trainer = given["spec"]["trainer"]
    assert trainer["command"][:2] == ["privtrain", "launch"], "the cluster must see exit code 75"
    recipe = trainer["args"][1]
    assert (KUBERNETES.parents[1] / recipe).exists()
    name = pathlib.Path(recipe).stem
    assert f"/runs/{name}" in (KUBERNETES / "attack-job.yaml").read_text(encoding="utf-8")


def test_the_attack_is_a_job():
    given = content("attack-job.yaml")
    job = io_k8s_api_batch_v1_job.IoK8sApiBatchV1Job.from_dict(given)
    assert job is not None
    assert unknown_keys(given, job.to_dict()) == []
    assert given["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"]


def test_what_the_containers_start_is_what_the_programs_take():
    trainer = content("trainjob.yaml")["spec"]["trainer"]
    words = [*trainer["command"], *trainer["args"]]
    assert words[:4] == ["privtrain", "launch", "torchrun", "-m"]
    parse(Command("trainjob.yaml", "", tuple(words[4:])))
    (container,) = content("attack-job.yaml")["spec"]["template"]["spec"]["containers"]
    first, *lines = container["args"][0].strip().splitlines()
    assert first == "set -e"
    commands = [Command("attack-job.yaml", line, tuple(shlex.split(line))) for line in lines]
    check_accelerate(commands[0])
    started = [inner(command) or command for command in commands]
    assert [command.name for command in started] == ["attacks score", "attacks analyse", "attacks report"]
    for command in started:
        parse(command)


def test_a_mistyped_key_is_found():
    given = content("trainjob.yaml")
    given["spec"]["trainer"]["numNode"] = given["spec"]["trainer"].pop("numNodes")
    job = trainer_v1alpha1_train_job.TrainerV1alpha1TrainJob.from_dict(given)
    assert unknown_keys(given, job.to_dict()) == [".spec.trainer.numNode"]
