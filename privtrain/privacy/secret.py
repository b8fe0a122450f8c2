"""The run's secrets, and randomness as a pure function of them.

Public: that ChaCha20 and HMAC-SHA-256 are used, and how streams are keyed. Secret: the keys. Whoever knows a generation
key can redraw the sample of every step and subtract the noise, so keys live in ``secret/`` alone and print as ``***``.

Everything random that the guarantee rests on is drawn here: the same (key, purpose, context) gives the same bits on
every rank, machine and backend, which is what makes a run independent of its world size and a resumed step identical.
"""

from __future__ import annotations

import hashlib
import hmac
import pathlib
import re
import secrets
from collections.abc import Callable, Collection

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import special

from privtrain.errors import GuaranteeLost, PrivtrainError
from privtrain.files.private import read_private_file

KEY_BYTES = 32


class SecretKey:
    """A 256-bit key; its ``repr`` does not show it."""

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
        self._key = key

    @classmethod
    def generate(cls) -> SecretKey:
        """Return a fresh key from the operating system's entropy."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def insecure(cls, seed: int, purpose: str) -> SecretKey:
        """Return a key that anybody can recompute: tests only; the run is marked as not private."""
        return cls(hashlib.sha256(f"insecure:{seed}:{purpose}".encode()).digest())

    def reveal(self) -> bytes:
        """Return the raw bytes, for storage in ``secret/`` and for the broadcast to the other ranks."""
        return self._key

    def derive(self, purpose: str, *context: int | str) -> bytes:
        """Return HMAC-SHA-256 of the purpose and context: 32 bytes, different for every different argument list."""
        message = "\x1f".join([purpose, *(f"{type(item).__name__}:{item}" for item in context)])
        return hmac.digest(self._key, message.encode(), "sha256")

    def stream(self, purpose: str, *context: int | str) -> KeyStream:
        """Return the random stream of this purpose and context, always from its beginning."""
        return KeyStream(self.derive(purpose, *context))

    def __repr__(self) -> str:
        return "SecretKey(***)"

    def __reduce__(self) -> str:
        raise TypeError("a secret key is not pickled")


def pseudonym(key: SecretKey, unit_name: str) -> str:
    """Return HMAC-SHA-256 of a unit's name under the run's pseudonym key, 128 bits of it in hex."""
    return key.derive("pseudonym", unit_name).hex()[:32]


def which_pseudonym(user: str | None, given: str | None, make: Callable[[str], str]) -> str:
    """Return the pseudonym that a command is about.

    Args:
        user: a user id as in the data, if it was given.
        given: a pseudonym, if that was given.
        make: user id → pseudonym.

    Raises:
        PrivtrainError: unless exactly one of the two is given, and well formed.
    """
    if user is not None and given is None:
        return make(user)
    if given is None or user is not None:
        raise PrivtrainError("give the user id as in the data, or --pseudonym")
    if re.fullmatch(r"[0-9a-f]{32}", given) is None:
        raise PrivtrainError("--pseudonym: a pseudonym has 32 hexadecimal digits; for a user id leave the option out")
    return given


#: 64-bit words of a block of ChaCha20.
_WORDS_PER_BLOCK = 8
#: Words that are drawn at a time, and the zeros that are encrypted to get them: the result is the key stream itself.
_MOST_WORDS = 1 << 15
_ZEROS = memoryview(bytes(8 * _MOST_WORDS))


class KeyStream:
    """ChaCha20's key stream under a key used for nothing else, read as numbers one after another."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.seek(0)

    def seek(self, word: int) -> KeyStream:
        """Move to the 64-bit word of this number, counted from the stream's beginning, and return the stream."""
        block, rest = divmod(word, _WORDS_PER_BLOCK)
        # A zero nonce is right because every stream has its own derived key. The counter comes before it.
        nonce = block.to_bytes(4, "little") + bytes(12)
        self._encryptor = Cipher(algorithms.ChaCha20(self._key, nonce), mode=None).encryptor()
        self.uint64(rest)  # skip words of the block before the one asked for
        return self

    def uint64(self, count: int) -> np.ndarray:
        """Return the next ``count`` words of the stream: independent uniform 64-bit integers."""
        words = np.empty(count, dtype="<u8")
        for start in range(0, count, _MOST_WORDS):
            part = words[start : start + _MOST_WORDS].view(np.uint8).data
            self._encryptor.update_into(_ZEROS[: len(part)], part)
        return words

    def uniform(self, count: int) -> np.ndarray:
        """Return ``count`` uniforms on the 52-bit grid strictly inside (0, 1), symmetric about one half."""
        return ((self.uint64(count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def standard_normal(self, count: int) -> np.ndarray:
        """Return ``count`` float64 standard normals by inversion; the grid ends at 8.2 standard deviations."""
        return special.ndtri(self.uniform(count))

    def choose(self, population: int, count: int) -> list[int]:
        """Return ``count`` uniform distinct indices below ``population``, increasing; all if there are fewer."""
        if population <= count:
            return list(range(population))
        # Ranking 64-bit draws is uniform up to ties, whose chance is below population**2 / 2**65.
        return sorted(np.argsort(self.uint64(population), kind="stable")[:count].tolist())


#: Sizes that a key file may have: hexadecimal digits, with or without the end of the line.
_KEY_FILE_BYTES = (2 * KEY_BYTES, 2 * KEY_BYTES + 1)


def load_key_file(path: pathlib.Path, *, owners: Collection[int] | None = None) -> SecretKey:
    """Return the key in a private file, as :meth:`privtrain.run.directory.RunDirectory.create_key` writes it.

    Raises:
        GuaranteeLost: if it is gone or damaged.
        UnsafePath: as :func:`read_private_file`.
    """
    try:
        content = read_private_file(path, owners=owners)
        if len(content) not in _KEY_FILE_BYTES:
            raise ValueError("another size than a key's")
        return SecretKey(bytes.fromhex(content.decode("ascii").strip()))
    except (FileNotFoundError, ValueError):
        raise GuaranteeLost(
            f"{path} is missing or damaged; restore it, or start a new run with another run.name"
        ) from None
