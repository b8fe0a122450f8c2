"""What was released, by digest: ``release.json``, the manifest that lies beside the released files.

The ledger (the hash-chained log of training) holds the same manifest in its last record, so that the files and the
proof of training belong together. Digests never run in a circle: the statement quotes the ledger's head before the
release record; the manifest holds the digest of the statement and of every file but its own; the release record holds
the manifest. Whoever has the release digest (of the manifest) from elsewhere, or a signature, can check a bundle
without the ledger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from privtrain.errors import PrivtrainError, VerificationFailed
from privtrain.files import strict_json
from privtrain.files.reading import MAX_BYTES
from privtrain.run.directory import RunDirectory

SCHEMA = "privtrain/release/1"
NAME = "release.json"

#: Kind of directory that holds a ``release.json`` → beginning of the manifest's paths that is cut off for it: what the
#: manifest calls ``adapter/config.json`` is ``config.json`` in a copy of ``adapter/`` alone.
PLACES = {"run": "", "adapter": "adapter/", "model": "model/", "export": "", "corpus": ""}

#: Directories of a run that are no part of the release. The private ones never leave; the others are written later or
#: mirror ``metrics.jsonl``.
NOT_RELEASED = ("secret", "checkpoints", "report", "wandb", "tensorboard")

#: Files that hubs, version control and people put beside a model, which no library executes or loads. They are named
#: in the report and do not fail it; anything else that is not in the manifest does.
HARMLESS = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "model.sig")
HARMLESS_DIRECTORIES = (".git", ".cache/huggingface")

_TOKENIZER_PREFIXES = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class ReleaseManifest:
    """What a release consists of.

    Attributes:
        statement: SHA-256 of the privacy statement's canonical JSON.
        plan: the plan's public fingerprint.
        ledger_head: head of the ledger before its release record; the statement quotes the same.
        base_model: file name → SHA-256 of the files that the base model was loaded from; empty if none was on disk.
        tokenizer: SHA-256 over the released tokenizer's files, see :func:`digest_of`.
        files: path from the run directory → SHA-256 of every released file but ``release.json`` itself.
    """

    statement: str
    plan: str
    ledger_head: str
    base_model: Mapping[str, str]
    tokenizer: str
    files: Mapping[str, str]

    @property
    def body(self) -> dict[str, Any]:
        """The manifest as a JSON object, as the ledger's release record holds it."""
        return {**dataclasses.asdict(self), "base_model": dict(self.base_model), "files": dict(self.files)}

    @property
    def digest(self) -> str:
        """The release digest: whoever has it from elsewhere can tell this release from any other."""
        return digest_of(self.body)

    @classmethod
    def parse(cls, body: Any) -> Self:
        """Return the manifest that a JSON object holds.

        Raises:
            ValueError: if it has other keys, or a path that leaves its directory, or a digest that is none.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(body, dict) or set(body) != names:
            raise ValueError(f"a release manifest holds {', '.join(sorted(names))} and nothing else")
        for name in ("statement", "plan", "ledger_head", "tokenizer"):
            _check_digest(name, body[name])
        for name in ("base_model", "files"):
            check_digests(name, body[name])
        return cls(**body)

    def within(self, place: str) -> dict[str, str]:
        """Return path → SHA-256 of the files that a directory of this kind must hold; ``place`` is a key of PLACES.

        Exports and corpora hold none of the released files but ``privacy.json``.
        """
        if place in ("export", "corpus"):
            return {path: digest for path, digest in self.files.items() if path == "privacy.json"}
        prefix = PLACES[place]
        return {path.removeprefix(prefix): digest for path, digest in self.files.items() if path.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class FileFault:
    """A file that is not what was released.

    Attributes:
        path: from the directory that was checked.
        problem: "differs", "is missing", "is not part of the release", or what kept it from being read.
    """

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{printable(self.path)} {self.problem}"


def printable(path: str) -> str:
    """Return a path as text that any terminal can show."""
    return path.encode("utf-8", "backslashreplace").decode() if path.isprintable() else ascii(path)


def canonical(value: Any) -> bytes:
    """Return the one JSON form of a value that digests are taken of: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def digest_of(value: Any) -> str:
    """Return SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(canonical(value)).hexdigest()


def sha256_of(path: pathlib.Path) -> str:
    """Return SHA-256 of a regular file.

    Raises:
        OSError: if it cannot be read or is a pipe, a device or a directory.
    """
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_of(path: pathlib.Path) -> str:
    """Return the text of a file that somebody published.

    Raises:
        OSError: as of :func:`sha256_of`, and if it is larger than any that is published.
        ValueError: if it is not UTF-8.
    """
    with _opened(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise OSError(f"has more than {MAX_BYTES} bytes")
    return content.decode("utf-8")


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[io.BufferedReader]:
    """Open a regular file, also behind a link, as the hub's cache has them; raise OSError of anything else.

    O_NONBLOCK: opening a pipe in its place would otherwise wait for ever.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError("is not a regular file")
    with open(descriptor, "rb") as file:
        yield file


def files_under(directory: pathlib.Path, skipped: Iterable[str] = ()) -> Iterator[str]:
    """Yield the paths, relative to ``directory``, of all files below it; a link to a directory counts as a file.

    Args:
        directory: where.
        skipped: names of directories directly in it that are left out.
    """
    for root, directories, files in os.walk(directory):
        parent = pathlib.Path(root)
        # os.walk goes on into what is left in this list.
        if parent == directory:
            directories[:] = [name for name in directories if name not in skipped]
        links = [name for name in directories if (parent / name).is_symlink()]
        directories[:] = sorted(set(directories) - set(links))
        for name in sorted([*files, *links]):
            yield (parent / name).relative_to(directory).as_posix()


def is_harmless(path: str) -> bool:
    """Return whether a file may lie beside a release without being part of it."""
    return path in HARMLESS or any(path.startswith(f"{directory}/") for directory in HARMLESS_DIRECTORIES)


def compare_files(
    directory: pathlib.Path, expected: Mapping[str, str], skipped: Iterable[str] = (), own: Iterable[str] = (NAME,)
) -> tuple[list[FileFault], list[str]]:
    """Compare every file of a directory with what it must be.

    Args:
        directory: where.
        expected: path relative to it → SHA-256.
        skipped: names of directories directly in it that are no part of the release.
        own: further paths that may be there and are checked elsewhere.

    Returns:
        (faults, paths of harmless files that are not part of the release).
    """
    faults, beside = [], []
    present = set(files_under(directory, skipped))
    for path, digest in expected.items():
        try:
            if sha256_of(directory / path) != digest:
                faults.append(FileFault(path, "differs from what was released"))
        except FileNotFoundError:
            faults.append(FileFault(path, "is missing"))
        except OSError as error:
            faults.append(FileFault(path, f"cannot be read: {error.strerror or error}"))
    for path in sorted(present - set(expected) - set(own)):
        # A harmless file may lie at the top and, in a run, in the released directory.
        top, _, below = path.partition("/")
        is_in_release = top in ("adapter", "model") and any(known.startswith(f"{top}/") for known in expected)
        if is_harmless(path) or (is_in_release and is_harmless(below)):
            beside.append(path)
        else:
            faults.append(FileFault(path, "is not part of the release"))
    return faults, beside


def render(manifest: ReleaseManifest, place: str) -> str:
    """Return the text of ``release.json`` for a directory of kind ``place``, a key of :data:`PLACES`."""
    content = {"schema": SCHEMA, "place": place, "release_digest": manifest.digest, **manifest.body}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_manifest(directory: pathlib.Path) -> tuple[ReleaseManifest, str]:
    """Return (manifest, kind of directory) as ``release.json`` in this directory says.

    Raises:
        VerificationFailed: if there is no such file, or it differs in a byte from what :func:`render` writes.
    """
    path = directory / NAME
    try:
        text = text_of(path)
        content = strict_json.loads(text)
        if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA:
            raise ValueError(f"it is not of schema {SCHEMA!r}")
        place = content.pop("place", None)
        if place not in PLACES:
            raise ValueError(f"place is {place!r}; must be one of {', '.join(PLACES)}")
        digest = content.pop("release_digest", None)
        manifest = ReleaseManifest.parse(content)
        if manifest.digest != digest:
            raise ValueError("release_digest is not the digest of the rest")
        if render(manifest, place) != text:
            raise ValueError("it is not in the form in which it is written")
    except FileNotFoundError:
        raise VerificationFailed([f"{NAME} is missing"], directory) from None
    except (OSError, ValueError) as error:
        raise VerificationFailed(
            [f"{NAME} cannot be used: {getattr(error, 'strerror', None) or error}"], directory
        ) from None
    return manifest, place


def released_digests(run: pathlib.Path) -> dict[str, str]:
    """Return path → SHA-256 of every released file, as a run's ``release.json`` says; the files are not looked at.

    Raises:
        VerificationFailed: if there is no readable ``release.json``, or it is not a run's.
    """
    manifest, place = read_manifest(run)
    if place != "run":
        raise VerificationFailed([f"{NAME} is for a directory of kind {place!r}, not for a run"], run)
    return dict(manifest.files)


def check_released(run: pathlib.Path) -> ReleaseManifest:
    """Compare the released files of a finished run with ``release.json``, and that with the ledger's last record.

    Cheap beside loading a model, and needs no ledger package: the chain itself is for ``privtrain ledger verify``.

    Returns:
        The manifest, whose ``digest`` names this release.

    Raises:
        PrivtrainError: if it is not a finished run.
        VerificationFailed: naming every file that differs, is missing or is not part of the release.
    """
    directory = RunDirectory(run)
    if not directory.is_complete():
        raise PrivtrainError(f"{run} holds no finished run (no {NAME}); finish it with privtrain train")
    released_digests(run)  # raises if it is not the release.json of a run
    manifest, _ = read_manifest(run)
    faults, _ = run_faults(directory, manifest)
    problems = [str(fault) for fault in faults]
    if directory.ledger.exists() and last_record(directory.ledger).get("manifest") != manifest.body:
        problems.append(f"{NAME} is not what the last record of {directory.ledger} holds")
    if problems:
        raise VerificationFailed(problems, run)
    return manifest


def run_faults(run: RunDirectory, manifest: ReleaseManifest) -> tuple[list[FileFault], list[str]]:
    """Compare all released files of a run directory with the manifest; see :func:`compare_files`.

    ``adapter/`` or ``model/`` must hold a ``release.json`` of its own, so that it can be published alone.
    """
    copy = run.released.relative_to(run.root) / NAME
    expected = {**manifest.within("run"), copy.as_posix(): text_sha256(render(manifest, run.released.name))}
    return compare_files(run.root, expected, skipped=NOT_RELEASED)


def text_sha256(text: str) -> str:
    """Return SHA-256 of a text file's bytes."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def last_record(log: pathlib.Path) -> dict[str, Any]:
    """Return the record in the last line of a log, unchecked; empty if there is none, or a crash cut the line short."""
    lines = log.read_bytes().splitlines(keepends=True)
    if not lines or not lines[-1].endswith(b"\n"):
        return {}
    try:
        record = strict_json.loads(lines[-1])
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def tokenizer_digest(files: Mapping[str, str]) -> str:
    """Return a digest over the tokenizer's files among released files.

    ``files`` maps paths such as ``"adapter/tokenizer.json"`` to SHA-256; what counts is the part after the first slash.
    """
    digests = {}
    for path, digest in files.items():
        _, _, name = path.partition("/")
        if name.startswith(_TOKENIZER_PREFIXES):
            digests[name] = digest
    return digest_of(digests)


def check_digests(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` maps paths that stay below their directory to SHA-256 digests."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object of file names and digests")
    for path, digest in value.items():
        if not _is_safe(path):
            raise ValueError(f"{name} holds the path {path!r}, which leaves the directory")
        _check_digest(f"{name}: {path}", digest)


def _check_digest(name: str, value: Any) -> None:
    """Raise ``ValueError``, naming ``name``, unless ``value`` is a SHA-256 in hexadecimal."""
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError(f"{name} is no SHA-256 in hexadecimal")


def _is_safe(path: str) -> bool:
    """Return whether a relative path stays below its directory and is in normal form, which gives a file one name.

    ``"adapter/config.json"`` is; ``"/etc/passwd"``, ``"../x"``, ``"a//b"`` and names with a backslash are not.
    """
    pure = pathlib.PurePosixPath(path)
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    leaves = pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path
    return not leaves and path == pure.as_posix()
