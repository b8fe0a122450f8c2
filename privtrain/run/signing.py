"""Signatures of released directories by the OpenSSF Model Signing library (PyPI ``model-signing``), offline.

Keys and certificates only: no network service, no transparency log. The signature is ``model.sig``, a Sigstore bundle
over the SHA-256 of every released file, which ``model_signing verify`` reads too.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

from privtrain.errors import ConfigError, Fault
from privtrain.run.bundle import files_under

SIGNATURE = "model.sig"


@dataclasses.dataclass(frozen=True)
class Keys:
    """What signs, or what a signature must be made with: an elliptic-curve key, or certificates.

    Attributes:
        key: PEM file of the private key to sign with, or of the public key to verify with.
        certificate: PEM file of the signing certificate, to sign with.
        chain: PEM files of the certificates above it; to verify, of the roots that are trusted.
    """

    key: pathlib.Path | None = None
    certificate: pathlib.Path | None = None
    chain: tuple[pathlib.Path, ...] = ()


def _library() -> Any:
    if importlib.util.find_spec("model_signing") is None:
        problem = "needs the package model-signing, which is not installed: pip install 'privtrain[signing]'"
        raise ConfigError([Fault("signature", problem)])
    import model_signing

    return model_signing


def _check_files(keys: Keys) -> None:
    named = [("key", keys.key), ("certificate", keys.certificate), *(("chain", path) for path in keys.chain)]
    faults = [Fault(name, f"{path} is no file") for name, path in named if path is not None and not path.is_file()]
    if faults:
        raise ConfigError(faults)


def sign(directory: pathlib.Path, keys: Keys, files: Sequence[str], password: str | None = None) -> pathlib.Path:
    """Sign the released files of a directory.

    Args:
        directory: where they are and the signature goes.
        keys: a private key, with certificates or without.
        files: paths of what is signed; everything else there is left out.
        password: of the private key.

    Returns:
        The signature's path.

    Raises:
        ConfigError: if the library or a key is not there or does not fit.
    """
    library = _library()
    _check_files(keys)
    assert keys.key is not None
    config = library.signing.Config()
    signature = directory / SIGNATURE
    try:
        if keys.certificate is None:
            config.use_elliptic_key_signer(private_key=keys.key, password=password)
        else:
            config.use_certificate_signer(
                private_key=keys.key, signing_certificate=keys.certificate, certificate_chain=keys.chain
            )
        with tempfile.TemporaryDirectory(dir=directory, prefix=".signing-") as place:
            written = pathlib.Path(place) / SIGNATURE
            config.set_hashing_config(_hashing(library, directory, files)).sign(directory, written)
            written.replace(signature)
    except (ValueError, TypeError) as error:
        raise ConfigError([Fault("--private-key", f"{keys.key} cannot sign: {error}")]) from None
    return signature


def check_signature(directory: pathlib.Path, keys: Keys, files: Sequence[str]) -> list[str]:
    """What is wrong with the signature of a directory; nothing if it is made with ``keys`` and over ``files``."""
    signature = directory / SIGNATURE
    if not signature.is_file():
        return [f"{SIGNATURE} is missing: the directory is not signed"]
    library = _library()
    _check_files(keys)
    config = library.verifying.Config().set_hashing_config(_hashing(library, directory, files))
    if keys.key is not None:
        config.use_elliptic_key_verifier(public_key=keys.key)
    else:
        config.use_certificate_verifier(certificate_chain=keys.chain)
    try:
        config.verify(directory, signature)
    except Exception as error:  # noqa: BLE001 - the library has no base of its own, and any doubt is a failure
        return [f"{SIGNATURE} does not hold: {str(error).strip() or type(error).__name__}"]
    return []


def _hashing(library: Any, directory: pathlib.Path, files: Sequence[str]) -> Any:
    """SHA-256 over exactly ``files``; the library walks the directory and is told what to leave out."""
    left_out = sorted(set(files_under(directory)) - set(files))
    config = library.hashing.Config().use_file_serialization(hashing_algorithm="sha256", allow_symlinks=True)
    return config.set_ignored_paths(paths=[directory / path for path in left_out], ignore_git_paths=False)
