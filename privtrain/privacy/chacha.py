"""ChaCha20 in a tensor's integer arithmetic: the key stream of :mod:`.secret`, on whichever device the numbers go.

RFC 8439, section 2.3, many 64-byte blocks at a time: the four columns of the state are the rows of four tensors, so a
round is a few dozen elementwise kernels over all blocks. 32-bit additions wrap around, and a shift to the right of a
negative number is cleared of its sign: the same integers on every device, which :func:`check_chacha` compares with
OpenSSL's once for each device of a process.
"""

from __future__ import annotations

import functools

import torch

from privtrain.errors import GuaranteeLost
from privtrain.privacy.secret import KEY_BYTES, KeyStream

#: 64-bit words of a block.
BLOCK_WORDS = 8
_CONSTANTS = (0x61707865, 0x3320646E, 0x79622D32, 0x6B206574)
_NUM_DOUBLE_ROUNDS = 10


def blocks(keys: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """Return one block of key stream for each key and counter, with a nonce of zeros.

    Args:
        keys: [n, 8] int32, the little-endian words of each block's key.
        counters: [n] int32.

    Returns:
        [n, 8] int64: the stream's 64-bit words, as :meth:`~privtrain.privacy.secret.KeyStream.uint64` reads them.
    """
    num_blocks = len(counters)
    words = keys.T.contiguous()
    nonce = torch.zeros(3, num_blocks, dtype=torch.int32, device=counters.device)
    constants = torch.tensor(_CONSTANTS, dtype=torch.int32, device=counters.device)
    # The state is 4 by 4 words of 32 bits: constants, two rows of key, and counter with nonce; each row is [4, n].
    first = [constants[:, None].expand(4, num_blocks), words[:4], words[4:], torch.cat([counters[None], nonce])]
    rows = [row.clone() for row in first]
    for _ in range(_NUM_DOUBLE_ROUNDS):
        _round(rows)  # of columns
        _turn(rows, 1)
        _round(rows)  # of diagonals
        _turn(rows, -1)
    stream = torch.cat([row.add_(start) for row, start in zip(rows, first, strict=True)]).long()
    # Two words of 32 bits make one of 64.
    low, high = stream[0::2] & 0xFFFFFFFF, stream[1::2] << 32
    return (low | high).T


def _round(rows: list[torch.Tensor]) -> None:
    """Apply the quarter round to every column, in place."""
    a, b, c, d = rows
    # The RFC's lines, such as `a += b; d ^= a; d <<<= 16`.
    for one, other, third, bits in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
        one.add_(other)
        third.bitwise_xor_(one)
        # Turn `third` to the left by `bits`; the mask clears what the shift to the right made of its sign.
        left = third << bits
        third.bitwise_right_shift_(32 - bits).bitwise_and_((1 << bits) - 1).bitwise_or_(left)


def _turn(rows: list[torch.Tensor], sign: int) -> None:
    """Turn the state's rows 1 to 3 in place: diagonals become columns (``sign`` 1), or go back (-1)."""
    for number in (1, 2, 3):
        rows[number] = rows[number].roll(-sign * number, 0)


@functools.cache
def check_chacha(device: torch.device) -> None:
    """Compare :func:`blocks` with OpenSSL's stream, once for each device of a process.

    Raises:
        GuaranteeLost: if the device computes another stream.
    """
    key = bytes(range(KEY_BYTES))
    keys = torch.frombuffer(bytearray(key), dtype=torch.int32).expand(32, BLOCK_WORDS)
    computed = blocks(keys.to(device), torch.arange(32, dtype=torch.int32, device=device))
    expected = torch.from_numpy(KeyStream(key).uint64(32 * BLOCK_WORDS).astype("<i8"))
    if not torch.equal(computed.reshape(-1).cpu(), expected):
        raise GuaranteeLost(f"integer arithmetic on {device} is not that of ChaCha20; noise cannot be drawn there")
