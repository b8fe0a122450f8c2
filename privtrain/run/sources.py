"""SHA-256 of the data files as they were when a run began, sealed: it covers columns that the trainer does not read.

The digest of the data covers what is trained on. Dates, languages and spans in other columns of the same files are read
after training, by the attack job, and mean something only if nobody chose them by then. So the SHA-256 of every file is
sealed under the run's key before the first step, and those columns are read from these very files alone.
"""

from __future__ import annotations

from typing import Any

from privtrain.config.data import DataSection, FilesSource
from privtrain.data.corpus import Corpus, digests_of, source_files
from privtrain.errors import DamagedFile
from privtrain.run.directory import RunDirectory
from privtrain.run.sealing import read_sealed_file, write_sealed

SCHEMA = "privtrain/sources/1"


def source_digests(data: DataSection, corpus: Corpus) -> tuple[str, ...] | None:
    """Return SHA-256 of the source's files in reading order; ``None`` where the rows are in no files."""
    if not isinstance(data.source, FilesSource):
        return None
    return corpus.source_digests or digests_of(source_files(data.source))


def write_sources(run: RunDirectory, digests: tuple[str, ...] | None) -> None:
    """Seal the digests of the files, for a run whose root key is there."""
    if digests is not None:
        write_sealed(run, run.sources, {"schema": SCHEMA, "files": list(digests)})


def read_sources(run: RunDirectory) -> tuple[str, ...]:
    """Return the digests of the files that the run began with.

    Raises:
        DamagedFile: if they are missing or not as they were sealed.
    """
    sources: Any = read_sealed_file(run, run.sources, schema=SCHEMA, remedy="restore it").get("files")
    if not isinstance(sources, list):
        raise DamagedFile(run.sources, "holds no digests", "restore it")
    return tuple(sources)
