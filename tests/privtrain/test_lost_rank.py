"""A rank that is lost while weights are gathered ends the job by its name, exit code 4: no route or model is blamed."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist

from privtrain.backends.watch import Watch
from privtrain.clipping import fallback
from privtrain.errors import EXIT_MACHINE_FAILED, RankLost
from privtrain.job.stop import StopRequest
from privtrain.job.supervise import _root_cause
from privtrain.privacy.layout import Layout
from tests.privtrain.models_for_tests import clipped_sum, invented_users
from tests.privtrain.test_fallback import GONE, Small
from tests.privtrain.test_sharded import sharded

USERS = invented_users(2, most_records=1, seed=4)
NCCL = dist.DistBackendError("NCCL communicator was aborted on rank 0")
SILENT = dist.DistNetworkError("The client socket has timed out after 60000ms")


class Wrapping(Small):
    """Catches what its layer raises, and raises its own."""

    def between(self, x):
        try:
            return self.layer(x)
        except RuntimeError as error:
            raise ValueError("the layer fails") from error


class Gathering:
    """Gathers each module's weights before its forward and its backward pass; gather number ``fails_at`` fails."""

    def __init__(self, model: torch.nn.Module, error: Exception, fails_at: int | None) -> None:
        self.num_gathers, self._error, self._fails_at = 0, error, fails_at
        for module in model.children():
            module.register_forward_pre_hook(lambda *_: self._gather())
            module.register_full_backward_pre_hook(lambda *_: self._gather())

    def _gather(self) -> None:
        self.num_gathers += 1
        if self._fails_at is not None and self.num_gathers > self._fails_at:
            raise self._error


def step(route: str, error: Exception, fails_at: int | None, kind: type[Small] = Small) -> int:
    """A whole step from a fresh start; the number of gathers."""
    model = kind()
    gathering = Gathering(model, error, fails_at)
    clipped_sum(sharded(model, Layout.of(model), model.losses, route=route), USERS, 2)
    return gathering.num_gathers


def shown(error: Exception) -> Exception:
    """What the job shows where rank 1 was found to be silent."""
    watch = Watch.__new__(Watch)
    watch._is_alone, watch._interval, watch.timeout_seconds, watch._rank = False, 0.1, 1.0, 0
    watch._roster, watch._decided = ["host a", "host b"], threading.Event()
    watch._prefix, watch._put = "", lambda key, value: None
    watch._conclude({"kind": "lost", "ranks": [1], "code": EXIT_MACHINE_FAILED})
    return _root_cause(error, watch, StopRequest())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize(
    ("route", "error"),
    [("auto", NCCL), ("batched", GONE), ("two_pass", SILENT)],
    ids=["nccl", "gloo", "silent"],
)
def test_any_gather_that_fails_names_the_lost_rank(route, error):
    for fails_at in range(step(route, error, None)):
        with pytest.raises(RuntimeError) as caught:
            step(route, error, fails_at)
        found = shown(caught.value)
        assert isinstance(found, RankLost), f"gather {fails_at}: {caught.value!r}"
        assert found.exit_code == EXIT_MACHINE_FAILED
        assert "rank 1 (host b)" in str(found)


def test_a_gather_that_fails_inside_a_models_own_words_too():
    with pytest.raises(ValueError, match="the layer fails") as caught:
        step("auto", GONE, 1, Wrapping)
    assert isinstance(shown(caught.value), RankLost)


def test_mutant_a_lost_rank_is_taken_for_a_bad_route(monkeypatch):
    monkeypatch.setattr(fallback, "is_elsewhere", lambda _: False)
    with pytest.raises(Exception, match="one_unit") as caught:
        step("batched", GONE, 2)
    assert not isinstance(shown_without_announcing(caught.value), RankLost)


def shown_without_announcing(error: Exception) -> Exception:
    watch = Watch.__new__(Watch)
    watch._is_alone = True
    return _root_cause(error, watch, StopRequest())
