"""The SLURM files on a real scheduler: two nodes train, are pre-empted, queue themselves again; the attack follows."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from privtrain.ledger.view import verify_run
from tests.conftest import save_tiny_llama, write_config, write_users
from tests.launch import slurm_cluster

REPOSITORY = pathlib.Path(__file__).parents[2]
SLURM = REPOSITORY / "launch" / "slurm"

ACCELERATE = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"
JOB_ENVIRONMENT = {
    "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(REPOSITORY),
    "MAIN_ADDRESS": "127.0.0.1",  # the nodes' names stand for this machine and do not resolve
    "ACCELERATE_USE_CPU": "true",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment in which SLURM's commands find it."""
    with slurm_cluster.cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def submit(environment: dict[str, str], directory: pathlib.Path, *arguments: object) -> str:
    command = ["sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={directory}/%x.log", *map(str, arguments)]
    done = subprocess.run(command, env={**environment, **JOB_ENVIRONMENT}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def config(tree, tmp_path):
    tree["model"]["name_or_path"] = str(save_tiny_llama(tmp_path / "model", num_layers=1))
    tree["data"]["source"]["paths"] = [str(write_users(tmp_path / "users.jsonl"))]
    tree["privacy"] |= {"num_steps": 150, "noise_multiplier": 4.0}
    tree["performance"]["checkpoint_interval_steps"] = 20
    return write_config(tree, tmp_path / "tiny.yaml")


def test_two_nodes_train_are_preempted_requeued_and_attacked(config, tmp_path, cluster):
    run = tmp_path / "runs" / "tiny"
    job = submit(cluster, tmp_path, "--nodes=2", SLURM / "train.sbatch", ACCELERATE, config)
    attack = submit(cluster, tmp_path, f"--dependency=afterok:{job}", SLURM / "attack.sbatch", run, ACCELERATE)
    log = tmp_path / "privtrain.log"

    deadline = time.monotonic() + 240
    while not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.exists() else "nothing was started"
        time.sleep(0.2)
    subprocess.run(["scancel", "--signal=TERM", job], env=cluster, check=True)
    slurm_cluster.wait_for(cluster, job, "PENDING", 120)
    assert "queued again" in log.read_text()
    assert not (run / "privacy.json").exists()
    assert slurm_cluster.state(cluster, attack)["JobState"] == "PENDING"

    # SLURM holds a requeued job back for two minutes; its nodes refuse one of the second in which it was stopped.
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+5"], env=cluster, check=True)
    ended = slurm_cluster.wait_for(cluster, job, "COMPLETED", 300)
    assert ended["Restarts"] == "1"
    assert ended["NumNodes"] == "2"
    slurm_cluster.wait_for(cluster, attack, "COMPLETED", 300)

    statement = json.loads((run / "privacy.json").read_text())
    assert statement["steps_released"] == 150, "no step was charged twice"
    assert "matches privacy.json" in verify_run(run)
    assert "ddp, 2 processes" in log.read_text()
    assert (run / "report" / "index.html").exists()


def test_a_mistake_ends_the_job_and_is_not_queued_again(config, tmp_path, cluster):
    job = submit(cluster, tmp_path, SLURM / "train.sbatch", ACCELERATE, config, "privacy.nonsense=1")
    ended = slurm_cluster.wait_for(cluster, job, "FAILED", 120)
    assert ended["ExitCode"] == "2:0"
    assert "privacy.nonsense" in (tmp_path / "privtrain.log").read_text()
