"""Dropout is drawn from all of a step's secret: where it is on, a unit more moves the masks of the others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from privtrain.clipping import random_state
from privtrain.clipping.random_state import RandomState, seed_from
from privtrain.errors import GuaranteeLost
from privtrain.privacy.secret import SecretKey
from privtrain.training.trainer import Trainer

KEY = SecretKey.insecure(0, "dropout")


class Words:
    """A stream of a secret that begins with one word, and goes on as a key says."""

    def __init__(self, first: int, rest: SecretKey = KEY) -> None:
        self._first, self._rest = first, rest

    def uint64(self, count: int) -> np.ndarray:
        words = self._rest.stream("rest").uint64(count)
        words[0] = self._first
        return words


def mask_after(seed) -> torch.Tensor:
    seed()
    return torch.nn.functional.dropout(torch.ones(200), 0.5)


def mask_of_step(stream) -> torch.Tensor:
    trainer = SimpleNamespace(
        _key=SimpleNamespace(stream=lambda *_: stream), backend=SimpleNamespace(rank=0), plan=None
    )
    return mask_after(lambda: Trainer._seed_dropout(trainer, 0))  # pyright: ignore[reportArgumentType]


def test_secrets_that_share_32_bits_drop_otherwise():
    other = SecretKey.insecure(1, "dropout")
    assert torch.equal(mask_of_step(Words(10)), mask_of_step(Words(10)))
    assert not torch.equal(mask_of_step(Words(10)), mask_of_step(Words(10, other)))


def test_torch_seeds_a_cpu_by_32_bits():
    """Why :func:`seed_from` is needed; if this fails, it may go."""
    assert torch.equal(mask_after(lambda: torch.manual_seed(5)), mask_after(lambda: torch.manual_seed(5 + (1 << 40))))


def test_every_word_of_the_state_is_the_secrets():
    seed_from(KEY.stream("words"))
    words = torch.get_rng_state().numpy().view(np.uint64)[3 : 3 + 624]
    assert np.array_equal(words, KEY.stream("words").uint64(625)[1:] >> np.uint64(32))


def test_numbers_are_those_of_the_twister():
    """numpy's Mersenne twister, given the same words, draws the same numbers."""
    seed_from(KEY.stream("words"))
    drawn = [int(torch.empty(1, dtype=torch.int64).random_(0, 1 << 32)) for _ in range(1000)]
    twister = np.random.RandomState()
    words = (KEY.stream("words").uint64(625)[1:] >> np.uint64(32)).astype(np.uint32)
    twister.set_state(("MT19937", words, 624, 0, 0.0))
    # torch takes two words for a number below 2**32, of which the second is the lower half.
    assert drawn == [int(twister.randint(0, 1 << 32, size=2, dtype=np.uint32)[1]) for _ in range(1000)]


def test_a_pass_is_repeated_from_such_a_state():
    seed_from(KEY.stream("words"))
    before = RandomState.of(torch.device("cpu"))
    first = torch.rand(5)
    with before.replayed():
        assert torch.equal(torch.rand(5), first)
    assert not torch.equal(torch.rand(5), first)


@pytest.mark.parametrize("state", [torch.zeros(16, dtype=torch.uint8), torch.zeros(5056, dtype=torch.uint8)])
def test_a_state_of_another_form_is_refused(monkeypatch, state):
    monkeypatch.setattr(random_state.torch, "get_rng_state", lambda: state)
    with pytest.raises(GuaranteeLost, match="cannot be seeded"):
        seed_from(KEY.stream("words"))
