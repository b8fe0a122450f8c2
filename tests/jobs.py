"""Start real jobs with ``accelerate launch`` and kill them."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

REPOSITORY = pathlib.Path(__file__).parent.parent
CPU_CONFIG = REPOSITORY / "launch" / "accelerate" / "cpu.yaml"

_ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(REPOSITORY),
    "ACCELERATE_USE_CPU": "true",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


def command(module: str, *arguments: str | pathlib.Path) -> list[str]:
    """``accelerate launch`` of a module with the shipped CPU config: two gloo ranks."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU_CONFIG)]
    return [*launcher, "-m", module, *map(str, arguments)]


def run_script(script: pathlib.Path, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a script on two ranks to its end."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU_CONFIG), str(script)]
    return subprocess.run(
        launcher, cwd=REPOSITORY, env=_ENVIRONMENT, capture_output=True, text=True, timeout=timeout_seconds, check=False
    )


def run(module: str, *arguments: str | pathlib.Path, timeout_seconds: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a job to its end."""
    return subprocess.run(
        command(module, *arguments),
        cwd=REPOSITORY,
        env=_ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


def start(module: str, *arguments: str | pathlib.Path) -> subprocess.Popen[bytes]:
    """Start a job and return at once."""
    return subprocess.Popen(
        command(module, *arguments),
        cwd=REPOSITORY,
        env=_ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def worker_pids(launcher: subprocess.Popen[bytes]) -> list[int]:
    """The ranks of a job, in order of their rank."""
    found = {}
    for entry in pathlib.Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int(entry.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = dict(
                item.split("=", 1) for item in entry.joinpath("environ").read_text().split("\0") if "=" in item
            )
        except (OSError, ValueError, UnicodeDecodeError):
            continue
        if parent == launcher.pid and "RANK" in variables:
            found[int(variables["RANK"])] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def wait_for_ledger(
    launcher: subprocess.Popen[bytes], ledger: pathlib.Path, num_bytes: int, timeout_seconds: float
) -> bool:
    """Whether the ledger grew to ``num_bytes`` before the job ended."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and launcher.poll() is None:
        if ledger.exists() and ledger.stat().st_size >= num_bytes:
            return True
        time.sleep(0.002)
    return False


def wait_for_checkpoint(
    launcher: subprocess.Popen[bytes], run: pathlib.Path, step: int, timeout_seconds: float
) -> bool:
    """Whether a checkpoint of ``step`` appeared before the job ended."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline and launcher.poll() is None:
        if (run / "checkpoints" / f"step-{step:08d}").exists():
            return True
        time.sleep(0.001)
    return False


def kill_rank(launcher: subprocess.Popen[bytes], rank: int) -> None:
    """SIGKILL one rank; the launcher then ends the others and itself."""
    pids = worker_pids(launcher)
    if rank < len(pids):
        os.kill(pids[rank], signal.SIGKILL)
    try:
        launcher.wait(timeout=90)
    except subprocess.TimeoutExpired:
        launcher.kill()
        raise
