"""The random digits that noise is made of, for any run of a vector, and how a vector is cut into runs to draw them.

A *run* is a number of coordinates that follow one another. The vector is that of all trainable tensors, or of this
rank's parts of them, one after another (:mod:`.layout`).

Each tensor is cut into blocks of 2**16 coordinates. A block has a ChaCha20 stream under a key of its own, and
coordinate i of the tensor has word i mod 2**16 of it. Streams can be entered anywhere, so a run costs its own digits
and no more. On a CPU OpenSSL computes the stream, in as many threads as the rank has; elsewhere it is drawn where the
numbers are needed (:mod:`.chacha`). The digits are the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from privtrain.privacy import chacha
from privtrain.privacy.layout import Slot
from privtrain.privacy.secret import SecretKey
from privtrain.privacy.threads import CHUNK_ON_CPU, in_threads

#: Coordinates per independently keyed block.
BLOCK = 1 << 16
#: Coordinates drawn at a time on other devices than a CPU: a chunk takes some 500 kernels, which must be worth it.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Piece:
    """Coordinates [first, first + count) of a tensor, within one keyed block."""

    name: str
    first: int
    count: int

    @property
    def block(self) -> int:
        """Number of the block in its tensor."""
        return self.first // BLOCK

    @property
    def word(self) -> int:
        """Number of the 64-bit word, in the block's stream, that coordinate ``first`` has."""
        return self.first % BLOCK


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A run of the vector that is drawn at a time; it may reach over several tensors and blocks.

    Attributes:
        start: the coordinate of the vector at which it begins.
        pieces: the parts of tensors that it is made of, one after another.
    """

    start: int
    pieces: Sequence[Piece]

    @property
    def place(self) -> slice:
        """The chunk's coordinates in the vector."""
        return slice(self.start, self.start + sum(piece.count for piece in self.pieces))

    def coordinate(self, index: int) -> tuple[str, int]:
        """Return the name of the tensor, and the coordinate in it, of the chunk's coordinate number ``index``."""
        for piece in self.pieces:
            if index < piece.count:
                return piece.name, piece.first + index
            index -= piece.count
        raise IndexError(index)


def for_each_chunk(slots: Iterable[Slot], device: torch.device, draw: Callable[[Chunk], None]) -> None:
    """Call ``draw`` for chunks that together are the vector: on a CPU, in the threads of this rank.

    Args:
        slots: tensors, or parts of them, that follow one another in the vector.
        device: where the vector is.
        draw: called once for each chunk, in any order, from several threads.
    """
    in_threads(draw, list(chunks_of(slots, CHUNK_ON_CPU if device.type == "cpu" else _CHUNK)), device)


def chunks_of(slots: Iterable[Slot], most: int) -> Iterator[Chunk]:
    """Yield the chunks of a vector, of ``most`` coordinates each; the last may be shorter.

    A chunk is cut into pieces where a tensor or a keyed block ends.
    """
    start, pieces, room = 0, list[Piece](), most  # room: coordinates that the present chunk still takes
    for slot in slots:
        done = 0
        while done < slot.num_coordinates:
            first = slot.first + done
            count = min(slot.num_coordinates - done, BLOCK - first % BLOCK, room)
            pieces.append(Piece(slot.name, first, count))
            done, room = done + count, room - count
            if not room:
                yield Chunk(start, pieces)
                start, pieces, room = start + most, [], most
    if pieces:
        yield Chunk(start, pieces)


def digits(key: SecretKey, purpose: str, chunk: Chunk, device: torch.device) -> torch.Tensor:
    """Return 64 uniform binary digits for each coordinate of a chunk: [n] int64, the same on every device.

    Args:
        key: the secret of a step's noise.
        purpose: what the digits are for; digits of different purposes are independent.
        chunk: the coordinates.
        device: where the digits are wanted.
    """
    if device.type == "cpu":
        return _from_openssl(key, purpose, chunk)
    chacha.check_chacha(device)
    return _from_tensors(key, purpose, chunk, device)


def _from_openssl(key: SecretKey, purpose: str, chunk: Chunk) -> torch.Tensor:
    """Return the digits from the CPU's stream cipher, [n] int64."""
    words = [
        key.stream(purpose, piece.name, piece.block).seek(piece.word).uint64(piece.count) for piece in chunk.pieces
    ]
    joined = words[0] if len(words) == 1 else np.concatenate(words)  # no copy of a single piece
    return torch.from_numpy(joined.view(np.int64))


def _from_tensors(key: SecretKey, purpose: str, chunk: Chunk, device: torch.device) -> torch.Tensor:
    """Return the same digits, computed on the device: all ChaCha20 blocks that a chunk touches at once.

    Not to be taken for the keyed blocks of 2**16 coordinates: a ChaCha20 block is 8 words of one such block's stream.
    """
    per_block = chacha.BLOCK_WORDS
    # The ChaCha20 blocks that each piece needs, by their numbers in its stream, and the key of that stream.
    numbers: list[np.ndarray] = []
    keys: list[bytes] = []
    for piece in chunk.pieces:
        last_word = piece.word + piece.count - 1
        numbers.append(np.arange(piece.word // per_block, last_word // per_block + 1))
        keys.append(key.derive(purpose, piece.name, piece.block))
    num_blocks = [len(of_piece) for of_piece in numbers]
    piece_of_block = np.repeat(np.arange(len(num_blocks)), num_blocks)

    # All blocks at once; both index vectors in one transfer.
    indices = torch.from_numpy(np.stack([piece_of_block, np.concatenate(numbers)])).to(device)
    piece_on_device, counters = indices[0], indices[1].int()
    key_of_piece = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.int32).view(len(keys), -1).to(device)
    stream = chacha.blocks(key_of_piece[piece_on_device], counters).reshape(-1)

    # A piece may begin and end within a ChaCha20 block: words before and behind it are left out.
    words: list[torch.Tensor] = []
    for piece, part in zip(chunk.pieces, stream.split([per_block * num for num in num_blocks]), strict=True):
        skipped = piece.word % per_block
        words.append(part[skipped : skipped + piece.count])
    return words[0] if len(words) == 1 else torch.cat(words)
