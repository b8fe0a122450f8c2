"""A job in this process that something happens to after one of its steps."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import pytest

from privtrain.job.train import train
from privtrain.training.trainer import Trainer


class Killed(BaseException):
    """The process is gone: nothing of it is caught."""


@contextlib.contextmanager
def after_step(number: int, act: Callable[[], object]) -> Iterator[None]:
    """Every trainer calls ``act`` once it has taken this step."""
    take = Trainer.train_step

    def step(self: Trainer, now: int) -> None:
        take(self, now)
        if now == number:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", step)
        yield


def die() -> None:
    raise Killed


def train_until_killed(config: pathlib.Path, last: int) -> None:
    with after_step(last, die), pytest.raises(Killed):
        train(config)
