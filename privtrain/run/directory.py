"""The run directory: where each file lives, who may read it, and how it is written without being lost.

Public files lie at the top; ``secret/`` and ``checkpoints/`` are 0700 and never leave the machine. The whole directory
is 0700 until the release: ``metrics.jsonl`` grows with every step, and when it does tells how long each took, and so
who may have been in it. What is checked, and how keys are opened, is in :mod:`privtrain.files.private`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import stat
from collections.abc import Iterator

from privtrain.errors import GuaranteeLost, PrivtrainError, UnsafePath
from privtrain.files.atomic import temporary_of, write_atomically
from privtrain.files.private import (
    check_directory_around,
    check_empty,
    check_private_directory,
    check_private_tree,
    locked_file,
    make_private_directory,
)
from privtrain.privacy.secret import SecretKey, load_key_file

#: Of the sealed list of the noised sums that are kept.
NOISED_SUMS_SCHEMA = "privtrain/noised-sums/1"


class RunDirectory:
    """Paths of one run, and the few operations on them.

    Files directly in the directory are public once the run is released. Those in ``secret/`` are never published, for
    example ``manifest`` (the split: who is trained on), ``ledger`` (the log of training), ``used`` (what training used)
    and keys. ``staged`` holds a release while it is being made.
    """

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.config = root / "config.yaml"
        self.resolved_config = root / "secret" / "config.yaml"
        self.privacy = root / "privacy.json"
        self.metrics = root / "metrics.jsonl"
        self.release = root / "release.json"
        self.staged = root / ".release"
        self.adapter = root / "adapter"
        self.model = root / "model"
        self.report = root / "report"
        self.checkpoints = root / "checkpoints"
        self.secret = root / "secret"
        self.identity = self.secret / "identity.json"
        self.reservation = self.secret / "reservation.json"
        self.manifest = self.secret / "manifest.json"
        self.prepared = self.secret / "prepared.json"
        self.used = self.secret / "used.json"
        self.sources = self.secret / "sources.json"
        self.ledger = self.secret / "ledger.jsonl"
        self.data_counts = self.secret / "data_counts.json"
        self.evaluation_before = self.secret / "evaluation_before.json"
        self.base_losses = self.secret / "base_losses.json"
        self.private_metrics = self.secret / "private_metrics.jsonl"
        self.noised_sums = self.secret / "noised_sums"
        self.noised_sums_index = self.noised_sums / "index.json"

    def noised_sum(self, step: int) -> pathlib.Path:
        """Return the path of a step's noised gradient sum; runs with ``audit.keep_noised_sums`` keep them."""
        return self.noised_sums / f"step-{step:06d}.npy"

    def exists(self) -> bool:
        """Return whether a run was begun here."""
        return self.identity.exists()

    def is_complete(self) -> bool:
        """Return whether training finished and everything was released: ``release.json`` is put in place last."""
        return self.release.exists() and self.privacy.exists() and self.released.exists()

    def holds(self, path: pathlib.Path) -> bool:
        """Return whether a path is inside the run directory."""
        return self.root.resolve() in path.resolve().parents

    @property
    def released(self) -> pathlib.Path:
        """What is published: the whole model where all weights were trained, otherwise the adapter."""
        return self.model if self.model.exists() else self.adapter

    def create(self) -> None:
        """Make the directories with their permissions.

        Raises:
            PrivtrainError: if the directory holds files of something else.
        """
        # These alone are left by a job that was killed before the run had an identity: go on with them.
        begun = {self.secret.name, self.checkpoints.name, self.config.name, temporary_of(self.config).name}
        if self.root.exists() and any(p.name not in begun for p in self.root.iterdir()):
            raise PrivtrainError(
                f"{self.root} exists and is not a run of privtrain; choose another run.name or run.output_dir"
            )
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_directory_around(self.root)  # whoever may write here may rename secret/
        self.hide()
        for private in (self.secret, self.checkpoints):
            make_private_directory(private)

    def hide(self) -> None:
        """Close the directory to other users, until :meth:`show`.

        Raises:
            UnsafePath: if it cannot be closed.
        """
        with contextlib.suppress(PermissionError):
            self.root.chmod(stat.S_IRWXU)
        mode = stat.S_IMODE(self.root.stat().st_mode)
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UnsafePath(
                f"{self.root} stays open to other users (mode {mode:04o}), who could see how long each step takes: it "
                "is another user's, or its file system keeps no modes; choose another run.output_dir"
            )

    def show(self) -> None:
        """Let other users read what is released, as far as the umask let them read the released directory in it."""
        others = self.released.stat().st_mode & 0o055  # to read and enter, for group and others
        self.root.chmod(stat.S_IRWXU | others)

    def check_new(self) -> None:
        """Raise if the private directories hold anything before the run begins: a planted key would be known to others.

        Raises:
            UnsafePath: if there is anything that neither ``attacks prepare`` nor a start that failed leaves there.
        """
        files = [self.secret / "lock", self.secret / "reservation_claims.json", self.identity]
        if self.prepared.exists():
            files += [self.prepared, self.sources, self.secret / "spans.json"]
            files += [self.secret / "root.key", self.secret / "root.insecure"]
        files += [temporary_of(file) for file in files]  # of a start that was killed while it wrote them
        check_empty(self.secret, {file.name for file in files})
        check_empty(self.checkpoints, ())

    def check_private(self) -> None:
        """Raise unless ``secret/`` and ``checkpoints/`` are this user's, closed to others, and no links.

        Nor may others be able to rename them. Call this before every use of them.

        Raises:
            UnsafePath: saying which, and what to do.
        """
        if self.root.exists():
            check_directory_around(self.root)
        for private in (self.secret, self.checkpoints):
            if os.path.lexists(private):
                check_private_directory(private)

    def check_permissions(self) -> list[pathlib.Path]:
        """Check the private directories as :meth:`check_private` does, and everything below them.

        Returns:
            Files and directories below whose own permissions let others in; they are closed now. Nobody could reach
            them, since the directory above them was closed.

        Raises:
            UnsafePath: saying what is not as it must be.
        """
        self.check_private()
        tightened: list[pathlib.Path] = []
        for private in (self.secret, self.checkpoints):
            if os.path.lexists(private):
                tightened += check_private_tree(private)
        return tightened

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's lock while the block runs; raise RunBusy if another job on the same directory has it."""
        make_private_directory(self.secret)
        self.check_private()
        busy = f"another job is running in {self.root}; wait for it or choose another run.name"
        with locked_file(self.secret / "lock", busy=busy) as lock:
            os.fchmod(lock, 0o600)
            yield

    def create_key(self, name: str, insecure_seed: int | None = None) -> SecretKey:
        """Make a key in ``secret/NAME.key`` and return it; a key that is there is replaced, so it must be unused.

        Args:
            name: of the key.
            insecure_seed: makes a key that can be guessed, for tests and examples; ``secret/NAME.insecure`` marks it.
        """
        key, marker = SecretKey.generate(), self.secret / f"{name}.insecure"
        # At no moment may a key that can be guessed lie there unmarked. So the marker is written before the key; where
        # the new key is a secure one, the marker of an old key goes only after the new key has replaced it.
        if insecure_seed is not None:
            key = SecretKey.insecure(insecure_seed, name)
            write_atomically(marker, "made from privacy.insecure_seed\n", mode=0o600)
        write_atomically(self.secret / f"{name}.key", key.reveal().hex() + "\n", mode=0o600)
        if insecure_seed is None:
            marker.unlink(missing_ok=True)
        return key

    def keep_key(self, name: str, insecure_seed: int | None = None, *, was_used: bool = False) -> SecretKey:
        """Return the key in ``secret/NAME.key``; make it if it is not there, unless it was used before.

        Args:
            name: of the key.
            insecure_seed: as for :meth:`create_key`.
            was_used: whether something was drawn from the key already; then another one must never take its place.

        Raises:
            GuaranteeLost: if the key is gone but ``was_used``, or if it was made from a seed, so that it can be
                guessed, and ``insecure_seed`` is None.
        """
        file = self.secret / f"{name}.key"
        if not was_used and not os.path.lexists(file):
            return self.create_key(name, insecure_seed)
        if insecure_seed is None and (self.secret / f"{name}.insecure").exists():
            raise GuaranteeLost(
                f"{file} was made from privacy.insecure_seed, so it can be guessed, and this "
                "configuration sets no such seed; set another run.name"
            )
        return self.load_key(name)

    def load_key(self, name: str) -> SecretKey:
        """Return the key stored in ``secret/NAME.key``.

        Raises:
            GuaranteeLost: if it is gone, since another one must never stand in for a key that was used.
            UnsafePath: if others could have read or planted it.
        """
        self.check_private()
        return load_key_file(self.secret / f"{name}.key")
