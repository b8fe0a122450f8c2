"""A SLURM cluster on this machine: munge, a controller and two node daemons, all in one directory."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return "" if os.geteuid() == 0 else "node daemons need root"


@contextlib.contextmanager
def cluster(directory: pathlib.Path) -> Iterator[dict[str, str]]:
    """Start it, and give the environment in which SLURM's commands find it."""
    directory.chmod(0o755)
    for name in ("munge", "state", "spool/n1", "spool/n2"):
        (directory / name).mkdir(parents=True)
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    config = directory / "slurm.conf"
    config.write_text(_config(directory), encoding="utf-8")
    munge = directory / "munge"
    flags = [f"--key-file={key}", f"--socket={munge}/socket", f"--pid-file={munge}/pid", f"--log-file={munge}/log"]
    daemons = [subprocess.Popen(["munged", "--foreground", "--force", f"--seed-file={munge}/seed", *flags])]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    try:
        _wait(lambda: (munge / "socket").exists(), "munge")
        commands = [["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
        for command in commands:
            log = open(directory / f"{command[0]}-{command[-1]}.out", "wb")  # noqa: SIM115 - the daemon's
            daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        _wait(lambda: _run(environment, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", "two idle nodes")
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()


def state(environment: dict[str, str], job: str) -> dict[str, str]:
    """What the controller says of a job."""
    text = _run(environment, "scontrol", "show", "job", job)
    return dict(item.split("=", 1) for item in text.split() if "=" in item)


def wait_for(environment: dict[str, str], job: str, wanted: str, timeout_seconds: float) -> dict[str, str]:
    """The job, once it is in the wanted state."""
    _wait(lambda: state(environment, job).get("JobState") == wanted, f"job {job} to be {wanted}", timeout_seconds)
    return state(environment, job)


def _run(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _wait(holds, what: str, timeout_seconds: float = 60) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_seconds:g} s for {what}")
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _config(directory: pathlib.Path) -> str:
    host = socket.gethostname().split(".")[0]
    ports = [_free_port() for _ in range(3)]
    nodes = "\n".join(
        f"NodeName=n{n} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[n]} CPUs=1 State=UNKNOWN" for n in (1, 2)
    )
    return f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool/%n
StateSaveLocation={directory}/state
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
MpiDefault=none
SwitchType=switch/none
JobRequeue=1
KillWait=60
ReturnToService=2
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
