"""What stands in for the start-up self-test where a test is about what comes after it."""

from __future__ import annotations

from typing import Any

from privtrain.clipping.lines import LineClipper
from privtrain.errors import UnsupportedLayer


def pack_as_proven(trainer: Any, *_: Any) -> None:
    """Pack units into lines where a job of this model would, as if the self-test had proven them exact."""
    is_lines = isinstance(trainer.clipper, LineClipper) and trainer.objective.takes_lines
    if trainer.line_packer is None or not is_lines:
        return
    try:
        trainer.clipper.refuse_lines()
    except UnsupportedLayer:
        return
    trainer.packs_lines = True
