"""Two ranks under ZeRO 2 of which one forgets its noise: ``python -m tests.attacks.broken_job CONFIG`` on each rank."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

from tests import jobs


def launch(config: pathlib.Path, timeout_seconds: float = 400) -> subprocess.CompletedProcess[str]:
    """Runs the broken job to its end."""
    settings = jobs.REPOSITORY / "launch" / "accelerate" / "zero2.yaml"
    return subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(settings)),
            *("--num_processes", "2", "-m", "tests.attacks.broken_job", str(config)),
        ],
        cwd=jobs.REPOSITORY,
        env={
            **os.environ,
            "PYTHONPATH": str(jobs.REPOSITORY),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
        check=False,
    )


if __name__ == "__main__":
    from tests.attacks.mutants import noise_on_rank_zero, train_broken

    train_broken(pathlib.Path(sys.argv[1]), noise_on_rank_zero)
