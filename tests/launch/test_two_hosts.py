"""Two machines: trained through the shipped launch files, one lost without a word, resumed to the same bits."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import pytest

from privtrain.ledger.log import verify
from tests import hosts, jobs
from tests.cluster import Job
from tests.conftest import save_tiny_llama, write_users
from tests.launch.faults import adapter_of, job_config

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]

REASON = hosts.why_not()
NUM_STEPS = 60
TIMEOUT_SECONDS = 6
#: After the watch has spoken: the ranks end, and torch's launcher its own business with a store that is gone.
LAUNCHER_SECONDS = 60
#: Launch file → backend of the forked ranks that give the undisturbed result.
LAUNCH_FILES = {"cpu.yaml": "ddp", "zero3.yaml": "zero3"}
DIRECTORY = jobs.REPOSITORY / "launch" / "accelerate"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("hosts")
    save_tiny_llama(directory / "model", num_layers=1)
    write_users(directory / "users.jsonl")
    return directory


def config_of(place: pathlib.Path, name: str) -> pathlib.Path:
    path = job_config(place, name, heartbeat_timeout_seconds=TIMEOUT_SECONDS, checkpoint_interval_steps=10)
    path.write_text(path.read_text().replace("num_steps: 6", f"num_steps: {NUM_STEPS}"))
    return path


def undisturbed(place: pathlib.Path, backend: str) -> bytes:
    name = f"one-host-{backend}"
    job = Job(config_of(place, name), place / name, backend=backend)
    assert job.wait() == [0, 0], job.output()
    return adapter_of(place / "runs" / name)


def launch(
    both: tuple[hosts.Host, hosts.Host], place: pathlib.Path, config: pathlib.Path, launch_file: str
) -> list[subprocess.Popen]:
    """The documented command on each host. Only the first one has the run directory."""
    started = []
    for rank, host in enumerate(both):
        command = [
            *(sys.executable, "-m", "privtrain", "launch", sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(DIRECTORY / launch_file)),
            *("--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)),
            *("--main_process_ip", both[0].address, "--main_process_port", "29611"),
            *("-m", "privtrain", "train", str(config)),
            *([f"run.output_dir={place / 'elsewhere'}"] if rank else []),
        ]
        environment = {
            "PYTHONPATH": str(jobs.REPOSITORY),
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        started.append(host.start(command, place / f"{config.stem}-{rank}.log", jobs.REPOSITORY, **environment))
    return started


def wait_for_commits(ledger: pathlib.Path, num_commits: int, timeout_seconds: float = 150) -> bool:
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        if ledger.exists() and ledger.read_bytes().count(b'"kind":"commit"') >= num_commits:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.parametrize("launch_file", ["cpu.yaml", pytest.param("zero3.yaml", marks=pytest.mark.campaign)])
@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.campaign)])
def test_dark_host_ends_the_job_and_the_same_command_goes_on(place, launch_file, lost):
    name = f"lost-{lost}-{LAUNCH_FILES[launch_file]}"
    config = config_of(place, name)
    run = place / "runs" / name
    ledger = run / "secret" / "ledger.jsonl"
    with hosts.two_hosts() as both:
        started = launch(both, place, config, launch_file)
        assert wait_for_commits(ledger, 3), (place / f"{config.stem}-0.log").read_text()
        both[lost].pull_cable()
        both[lost].kill_processes()
        went_dark = time.monotonic()
        survivor = 1 - lost
        code = started[survivor].wait(TIMEOUT_SECONDS + LAUNCHER_SECONDS)
        output = (place / f"{config.stem}-{survivor}.log").read_text()
        assert code == 4, output
        assert ("no sign of life from rank 1" if lost else "rank 0's machine") in output
        print(f"the launcher left {time.monotonic() - went_dark:.1f} s after the host went dark")
        both[lost].plug_cable()
        assert verify_unfinished(ledger)
        again = launch(both, place, config, launch_file)
        codes = [process.wait(150) for process in again]
        assert codes == [0, 0], (place / f"{config.stem}-0.log").read_text()
    assert adapter_of(run) == undisturbed(place, LAUNCH_FILES[launch_file])
    state = verify(ledger)
    assert len(state.commits) == state.num_charged == NUM_STEPS
    assert not (place / "elsewhere").exists(), "only the host of rank 0 needs the run directory"


def verify_unfinished(ledger: pathlib.Path) -> bool:
    """The host was lost in the middle, not after the end."""
    return ledger.read_bytes().count(b'"kind":"commit"') < NUM_STEPS
