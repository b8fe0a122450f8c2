"""The digits of noise are one stream, on any device, in any cut, in any number of threads."""

from __future__ import annotations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from privtrain.errors import GuaranteeLost
from privtrain.privacy import chacha, digits
from privtrain.privacy.digits import BLOCK, chunks_of
from privtrain.privacy.layout import Slot
from privtrain.privacy.noise import StepNoise, noised
from privtrain.privacy.secret import KeyStream, SecretKey

CPU = torch.device("cpu")
KEY = SecretKey.insecure(2, "digits")


def slots_of(parts: list[tuple[int, int]]) -> list[Slot]:
    """Parts (first coordinate, number) of tensors that follow one another in a vector."""
    slots, start = [], 0
    for number, (first, count) in enumerate(parts):
        slots.append(Slot(f"t{number}", (count,), start, first, (first + count,)))
        start += count
    return slots


def whole_streams(slots: list[Slot]) -> torch.Tensor:
    """Digits by the definition: the streams of whole blocks from their beginning, and the part of them."""
    found = [np.zeros(0, dtype=np.uint64)]
    for slot in slots:
        last = slot.first + slot.num_coordinates
        blocks = [KEY.stream("noise", slot.name, block).uint64(BLOCK) for block in range(last // BLOCK + 1)]
        found.append(np.concatenate(blocks)[slot.first : last])
    return torch.from_numpy(np.concatenate(found).view(np.int64))


PARTS = st.lists(
    st.tuples(st.sampled_from([0, 3, 8, BLOCK - 5, BLOCK, 2 * BLOCK + 1]), st.sampled_from([0, 1, 7, 64, 1000])),
    min_size=1,
    max_size=4,
)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(parts=PARTS, most=st.sampled_from([1, 5, 1000, 1 << 22]))
def test_any_cut_of_a_vector_has_the_digits_of_whole_streams(parts, most):
    """By OpenSSL and by a tensor's integers, which other devices draw with."""
    slots = slots_of(parts)
    hypothesis.assume(sum(count for _, count in parts) <= 200 * most)
    chunks = list(chunks_of(slots, most))
    places = [i for chunk in chunks for i in range(chunk.place.start, chunk.place.stop)]
    assert places == list(range(sum(count for _, count in parts)))
    for draw in (
        lambda chunk: digits.digits(KEY, "noise", chunk, CPU),
        lambda chunk: digits._from_tensors(KEY, "noise", chunk, CPU),
    ):
        found = torch.cat([torch.zeros(0, dtype=torch.int64), *map(draw, chunks)])
        assert torch.equal(found, whole_streams(slots))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(parts=PARTS)
def test_each_number_of_a_chunk_knows_its_coordinate(parts):
    slots = slots_of(parts)
    expected = [(slot.name, slot.first + i) for slot in slots for i in range(slot.num_coordinates)]
    found = [
        chunk.coordinate(i) for chunk in chunks_of(slots, 1000) for i in range(chunk.place.stop - chunk.place.start)
    ]
    assert found == expected


def test_a_stream_entered_anywhere_goes_on_as_from_its_beginning():
    whole = KeyStream(bytes(range(32))).uint64(70_000)
    for word in (0, 1, 7, 8, 9, 4095, 65_535):
        assert np.array_equal(KeyStream(bytes(range(32))).seek(word).uint64(50), whole[word : word + 50])


def test_blocks_are_those_of_rfc_8439():
    """Section 2.3.2 has a nonce of its own; the zero key and counter 0 and 1 are in appendix A.1, vectors 1 and 2."""
    found = chacha.blocks(torch.zeros(2, 8, dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32))
    begins = [bytes(row.numpy().astype("<i8").tobytes()[:8]).hex() for row in found]
    assert begins == ["76b8e0ada0f13d90", "9f07e7be5551387a"]


def test_a_device_that_computes_another_stream_is_refused(monkeypatch):
    """The mutant: a right shift that carries the sign into the rotated bits."""
    honest = chacha._round

    def signed(rows):
        honest(rows)
        rows[1].bitwise_or_(rows[1] >> 25)

    monkeypatch.setattr(chacha, "_round", signed)
    chacha.check_chacha.cache_clear()
    with pytest.raises(GuaranteeLost, match="not that of ChaCha20"):
        chacha.check_chacha(CPU)
    monkeypatch.undo()
    chacha.check_chacha(CPU)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_threads_draw_the_noise_of_one(num_threads):
    total = torch.arange(5 * BLOCK + 11) * 1_234_567
    kind = {"exponent": -40, "stddev": 0.7, "noise": StepNoise(KEY), "name": "w", "first": 9}
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = noised(total, **kind)
        torch.set_num_threads(num_threads)
        assert torch.equal(noised(total, **kind), alone)
    finally:
        torch.set_num_threads(before)


def test_an_error_in_a_thread_stops_the_noise(monkeypatch):
    """The mutant would be a pool whose results nobody asks for."""
    drawn = digits.digits
    monkeypatch.setattr(
        "privtrain.privacy.noise.digits",
        lambda key, purpose, chunk, device: 1 / 0 if chunk.start else drawn(key, purpose, chunk, device),
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            noised(torch.zeros(2 * BLOCK, dtype=torch.int64), exponent=-40, stddev=1.0, noise=StepNoise(KEY), name="w")
    finally:
        torch.set_num_threads(before)
