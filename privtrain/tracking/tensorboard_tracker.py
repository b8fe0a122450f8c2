"""The mirror in TensorBoard: event files under ``RUN/tensorboard``."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence

from privtrain.run.directory import RunDirectory
from privtrain.tracking.mirrors import Row
from privtrain.tracking.trackers import QuietTracker


class TensorBoardTracker(QuietTracker):
    """Mirrors rows as scalars; needs the package ``tensorboard``.

    All rows bear the moment at which the file was opened, so that they do not tell when a step was done. So does the
    file's own time stamp once it is closed; the file's name and head tell that moment in any case. A file whose job was
    killed gets its time stamp when the next job closes its own.
    """

    def __init__(self, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._directory = run.root / "tensorboard"
        self._opened_at = time.time()
        self._writer = SummaryWriter(str(self._directory))

    def log_rows(self, rows: Sequence[Row]) -> None:
        """Mirror rows."""
        for step, values in rows:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step, walltime=self._opened_at)
        self._writer.flush()

    def close(self) -> None:
        """Flush and end."""
        self._writer.close()
        for file in self._directory.iterdir():
            # events.out.tfevents.TIME.HOST.PID.N: the machine's name has no place in a published directory.
            renamed = file.rename(file.with_name(file.name.replace(f".{socket.gethostname()}.", ".privtrain.")))
            _, _, _, opened_at, *_ = renamed.name.split(".")
            os.utime(renamed, (int(opened_at), int(opened_at)))
