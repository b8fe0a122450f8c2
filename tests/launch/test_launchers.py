"""Every way to start a job, with what a cluster sees of its end: accelerate, torchrun and srun."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from privtrain.process.slurm import adopt_slurm_tasks, first_host
from tests import jobs
from tests.cluster import Ranks, free_port
from tests.conftest import save_tiny_llama, write_users
from tests.launch.faults import job_config

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(jobs.REPOSITORY),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}
LAUNCH = [sys.executable, "-m", "privtrain", "launch"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("launchers")
    save_tiny_llama(directory / "model", num_layers=1)
    write_users(directory / "users.jsonl")
    return directory


def start(command: list[str], log: pathlib.Path, **extra: str) -> subprocess.Popen[bytes]:
    with open(log, "wb") as output:
        return subprocess.Popen(
            command, cwd=jobs.REPOSITORY, env=ENVIRONMENT | extra, stdout=output, stderr=subprocess.STDOUT
        )


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.campaign)])
def test_launcher_asked_to_stop_ends_with_75_and_a_checkpoint(place, number):
    config = job_config(place, f"stopped-{number.name}")
    run = place / "runs" / f"stopped-{number.name}"
    command = [*LAUNCH, *jobs.command("privtrain", "train", config, "privacy.num_steps=2000")]
    log = place / f"{number.name}.log"
    job = start(command, log)
    ledger = run / "secret" / "ledger.jsonl"
    end = time.monotonic() + 200
    while not (ledger.exists() and ledger.read_bytes().count(b'"commit"') >= 3) and time.monotonic() < end:
        time.sleep(0.05)
    job.send_signal(number)
    assert job.wait(90) == 75, log.read_text()
    assert "saved after step" in log.read_text()
    assert list((run / "checkpoints").glob("step-*"))


@pytest.mark.dist
@pytest.mark.slow
def test_torchrun_passes_on_that_it_was_the_users_mistake(place):
    config = job_config(place, "mistaken")
    log = place / "torchrun.log"
    script = str(jobs.REPOSITORY / "launch" / "torchrun.sh")
    arguments = ["train", str(config), "data.user_column=owner"]
    job = start(["bash", script, *arguments], log, NPROC_PER_NODE="2", MASTER_PORT=str(free_port()))
    assert job.wait(120) == 2, log.read_text()
    assert "owner" in log.read_text()


def as_task_of_srun(shared: dict[str, str], rank: int) -> None:
    """Take from a forked rank what a launcher tells it, and give it what srun tells a task."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ.update(shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)})


@pytest.mark.dist
def test_srun_alone_makes_ranks_of_tasks_and_passes_75_through(place):
    """srun starts the tasks; here they get its variables without a scheduler."""
    config = job_config(place, "srun")
    shared = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
    }
    tasks = Ranks(
        ["privtrain", "doctor", config, "--json"], place / "srun", before=functools.partial(as_task_of_srun, shared)
    )
    assert tasks.wait(120) == [0, 0], tasks.output()
    text = tasks.output(0)
    report = json.loads(text[text.index('{\n  "ok"') :])
    found = {finding["name"]: finding for finding in report["findings"]}
    assert report["ok"] is True
    assert found["world"]["values"]["world_size"] == 2
    assert found["network"]["values"]["bytes_per_second"] > 0
    assert found["self-test"]["values"]["num_coordinates"] > 0
    assert '"ok"' not in tasks.output(1), "only rank 0 reports"
    assert not (place / "runs" / "srun").exists(), "the doctor leaves nothing behind"


def test_doctor_names_every_fault_with_its_fix(place, monkeypatch, capsys):
    from privtrain.commands.doctor import examine

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(place / "no-netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr("privtrain.commands.doctor.write_atomically", _no_room)
    assert examine(None, [], as_json=True) == 2
    report = json.loads(capsys.readouterr().out)
    faults = {finding["name"]: finding["fix"] for finding in report["findings"] if finding["status"] == "fault"}
    assert set(faults) == {"disk", "W&B"}
    assert "run.output_dir" in faults["disk"]
    assert "wandb login" in faults["W&B"]


def test_doctor_looks_at_the_registry_without_making_one(tmp_path, monkeypatch, capsys):
    from privtrain.commands.doctor import examine
    from privtrain.registry.store import Registry

    database = tmp_path / "registry.db"
    monkeypatch.setenv("PRIVTRAIN_REGISTRY", str(database))

    def found() -> dict[str, str]:
        examine(None, [], as_json=True)
        findings = json.loads(capsys.readouterr().out)["findings"]
        return next(finding for finding in findings if finding["name"] == "registry")

    assert (found()["status"], database.exists()) == ("fault", False)
    assert "registry init" in found()["what"]
    registry = Registry(str(database))
    assert "budget set" in found()["fix"]
    registry.set_budget("customers", epsilon=8, delta=1e-6)
    assert found()["status"] == "ok"
    assert "customers: 0.000 of 8 spent" in found()["what"]
    (tmp_path / "registry.db.key").unlink()
    assert "key" in found()["what"]
    monkeypatch.delenv("PRIVTRAIN_REGISTRY")
    assert found()["what"].startswith("none")


def _no_room(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_doctor_reports_a_failed_self_test_as_a_fault(place, monkeypatch, capsys):
    """A mutant: the clipper lets everything through."""
    from privtrain.clipping import PerUnitClipper
    from privtrain.commands.doctor import examine

    finish = PerUnitClipper.finish
    monkeypatch.setattr(PerUnitClipper, "finish", lambda self: finish(self) * 3)
    assert examine(job_config(place, "mutant"), [], as_json=False) == 2
    output = capsys.readouterr().out
    assert "fault" in output
    assert "above clipping_norm" in output
    assert "not ready" in output


def test_tasks_of_srun_become_ranks():
    environment = {
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
        "SLURM_STEP_NODELIST": "gpu[007-008]",
        "SLURM_JOB_ID": "41234",
    }
    adopt_slurm_tasks(environment)
    expected = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "gpu007"}
    assert {name: environment[name] for name in expected} == expected
    assert 1024 < int(environment["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16"},  # the batch script itself
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "RANK": "12"},  # a rank of torchrun inside a task
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_what_is_not_a_rank_of_srun_stays_as_it_is(environment):
    before = dict(environment)
    adopt_slurm_tasks(environment)
    assert environment == before


def test_a_task_that_sees_one_gpu_uses_that_one():
    environment = {"SLURM_PROCID": "3", "SLURM_LOCALID": "3", "SLURM_STEP_NUM_TASKS": "4", "CUDA_VISIBLE_DEVICES": "3"}
    adopt_slurm_tasks(environment)
    assert environment["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[007-012,20],cpu3", "gpu007"),
        ("n1", "n1"),
        ("a,b[1-2]", "a"),
        ("rack[2,4]-ib", "rack2-ib"),
        ("10.0.0.1", "10.0.0.1"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
