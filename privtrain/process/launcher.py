"""``privtrain launch COMMAND``: run a launcher so that a cluster sees how the job ended.

torchrun and ``accelerate launch`` turn every exit code of a rank into 1, give ranks 30 seconds after SIGTERM, and die
of SIGUSR1. A scheduler needs to know 75 (queue again) from 2 (a mistake in the config), and a step may take longer.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import subprocess
import tempfile
import threading
from collections.abc import Sequence

from privtrain.errors import EXIT_PREEMPTED, EXIT_REFUSED_RELEASE, EXIT_WRONG_INPUT, PrivtrainError
from privtrain.process.exit import LAUNCH_DIRECTORY, was_asked_to_stop

#: What ranks get to finish their step and save; the cluster's own patience usually ends first.
_SHUTDOWN_TIMEOUT_SECONDS = 300
#: Schedulers often signal every process of a job. torch's launcher kills its ranks when it gets a second signal, so a
#: signal that this process gets is passed on only if no rank has had one after this time.
_PASS_ON_AFTER_SECONDS = 2.0


def launch(command: Sequence[str]) -> int:
    """Run ``command``, pass SIGTERM, SIGUSR1 and SIGINT on to it, and return the exit code of the job inside.

    Args:
        command: the words of a launcher's command line, such as ``["accelerate", "launch", …]``.

    Returns:
        0, or the code of the first rank that failed (2, 3, 4, 75), or the launcher's own. 75 whenever this process was
        asked to stop and the job neither finished nor was refused: the same command then resumes it.

    Raises:
        PrivtrainError: if there is no such command, or no such accelerate config.
    """
    _check_config_file(command)
    with tempfile.TemporaryDirectory(prefix="privtrain-launch-") as directory:
        environment = {
            "PET_SHUTDOWN_TIMEOUT": str(_SHUTDOWN_TIMEOUT_SECONDS),
            "PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
            **os.environ,
            LAUNCH_DIRECTORY: directory,
        }
        try:
            process = subprocess.Popen(command, env=environment)
        except FileNotFoundError:
            raise PrivtrainError(f"no such command: {command[0]}; give one such as accelerate launch ...") from None
        received: list[int] = []

        def pass_on() -> None:
            """Signal the launcher, unless it has ended or the scheduler signalled the ranks itself."""
            if process.poll() is None and (received[0] == signal.SIGINT or not was_asked_to_stop(directory)):
                process.send_signal(received[0])

        def note(number: int, _: object) -> None:
            """Note a signal; pass the first one on later, if no rank has had one by then.

            Not at once: a scheduler often signals every process of a job, so the launcher may have had the signal
            already, and torch's kills its ranks at a second one.
            """
            received.append(number)
            if len(received) == 1:
                timer = threading.Timer(_PASS_ON_AFTER_SECONDS, pass_on)
                timer.daemon = True
                timer.start()

        numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            code = process.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return _exit_code(code, pathlib.Path(directory), received)


def _check_config_file(command: Sequence[str]) -> None:
    """Raise if the file after ``--config_file`` is missing, where accelerate would only show a traceback."""
    for word, next_word in itertools.pairwise([*command, ""]):
        name, _, joined = word.partition("=")
        path = joined or next_word  # --config_file=PATH, or --config_file PATH
        if name in ("--config_file", "--config-file") and not os.path.isfile(path):
            raise PrivtrainError(f"{name}: no such file: {path}; give its whole path, or start in the checkout")


def _exit_code(launcher_code: int, directory: pathlib.Path, received: list[int]) -> int:
    """Return the exit code of the job.

    Args:
        launcher_code: of the launcher; negative if a signal ended it.
        directory: where the first rank that failed recorded its code.
        received: signals that this process got. After one of them, except an interrupt by hand, the code is that of a
            pre-empted job, unless the job's own says that another start would fail as well.
    """
    if launcher_code == 0:
        return 0
    recorded = directory / "exit-code"
    code = int(recorded.read_text(encoding="ascii")) if recorded.exists() else launcher_code
    is_final = code in (EXIT_WRONG_INPUT, EXIT_REFUSED_RELEASE)
    if received and received[0] != signal.SIGINT and not is_final:
        return EXIT_PREEMPTED
    return code if code > 0 else 128 - code  # as a shell says that signal -code ended it
