"""Signatures of released directories by the OpenSSF Model Signing library (PyPI ``model-signing``), offline.

Keys and certificates only: no network service, no transparency log. The signature is ``model.sig``, a Sigstore bundle
over the SHA-256 of every released file, which ``model_signing verify`` reads too. The private key is read as the keys
of a run are (no link, nobody else's, closed to others) and never written, shown or sent anywhere.
"""

from __future__ import annotations

import base64
import dataclasses
import importlib.util
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, Self

from privtrain.config.publishing import ReleaseSection
from privtrain.errors import ConfigError, Fault, SigningFailed, UnsafePath
from privtrain.files import strict_json
from privtrain.files.private import read_private_file
from privtrain.run import bundle, exported
from privtrain.run.directory import RunDirectory

SIGNATURE = "model.sig"

PASSWORD_VARIABLE = "PRIVTRAIN_SIGNING_PASSWORD"
"""Environment variable that opens an encrypted private key."""

_OPTIONS = ("--private-key", "--certificate", "--chain")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


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

    @classmethod
    def of(cls, section: ReleaseSection) -> Self | None:
        """Return what a configuration says that a release is signed with; ``None`` if it is not."""
        if section.signing_key is None:
            return None
        return cls(section.signing_key, section.signing_certificate, tuple(section.signing_chain))


def password_from_environment() -> str | None:
    """Return the password of the private key, if one is set."""
    return os.environ.get(PASSWORD_VARIABLE)


def signing_faults(keys: Keys, password: str | None, names: tuple[str, str, str] = _OPTIONS) -> list[Fault]:
    """Return every reason why ``keys`` cannot sign; empty if they can. No message quotes key material.

    Args:
        keys: what is to sign.
        password: of the private key.
        names: option names of the key, its certificate and the certificate chain, for the faults.
    """
    assert keys.key is not None
    key_name, certificate_name, chain_name = names
    if importlib.util.find_spec("model_signing") is None:
        return [Fault(key_name, _NOT_INSTALLED)]
    from cryptography import exceptions

    faults: list[Fault] = []
    public_key = certificate = None
    try:
        public_key = _public_key(keys.key, password, is_certified=keys.certificate is not None)
    except FileNotFoundError:
        faults.append(Fault(key_name, f"{keys.key} is missing"))
    except (UnsafePath, OSError, ValueError, TypeError, exceptions.UnsupportedAlgorithm) as error:
        faults.append(Fault(key_name, f"{keys.key} cannot sign: {error}"))
    # The chain's certificates need only be readable; the signing one must fit the key.
    if keys.certificate is not None:
        certificate = _certificate(keys.certificate, certificate_name, faults)
    for path in keys.chain:
        _certificate(path, chain_name, faults)
    if public_key is not None and certificate is not None and certificate.public_key() != public_key:
        faults.append(Fault(certificate_name, f"{keys.certificate} is of another key than {keys.key}"))
    return faults


def _certificate(path: pathlib.Path, name: str, faults: list[Fault]) -> Any:
    """Return the certificate in a PEM file; ``None`` if there is none, with a fault of the option ``name`` added."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        faults.append(Fault(name, f"{path} is no certificate: {error}"))
        return None


def _public_key(path: pathlib.Path, password: str | None, *, is_certified: bool) -> Any:
    """Return the public key that belongs to a private key file.

    Args:
        path: PEM file of the private key.
        password: that may open it; not used if the file is not encrypted.
        is_certified: whether a certificate is signed with, too.

    Raises:
        UnsafePath: if the file is not this user's alone.
        ValueError: if model-signing could not sign with the key.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    encoded = None if password is None else password.encode("utf-8")
    content = read_private_file(path)
    if not _is_encrypted(content):
        encoded = None  # the password in the environment is for another key
    elif encoded is None:
        raise ValueError(f"it is encrypted; set {PASSWORD_VARIABLE}")
    elif is_certified:
        raise ValueError("it is encrypted, and the library signs with a certificate by open keys alone")
    key = serialization.load_pem_private_key(content, encoded)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _CURVES:
        raise ValueError(f"it is no elliptic-curve key over {', '.join(_CURVES)}")
    return key.public_key()


def _is_encrypted(content: bytes) -> bool:
    """Return whether a PEM key is encrypted, which both forms say in clear."""
    return b"ENCRYPTED" in content


_NOT_INSTALLED = "needs the package model-signing, which is not installed: pip install 'privtrain[signing]'"


def _library() -> Any:
    """Return the package ``model_signing``; raise ConfigError if it is not installed."""
    if importlib.util.find_spec("model_signing") is None:
        raise ConfigError([Fault("signature", _NOT_INSTALLED)])
    import model_signing

    return model_signing


def _check_files(keys: Keys) -> None:
    """Raise ConfigError, naming each option, unless all files to verify with are there."""
    named = [("--public-key", keys.key), *(("--certificate", path) for path in keys.chain)]
    faults = [Fault(name, f"{path} is no file") for name, path in named if path is not None and not path.is_file()]
    if faults:
        raise ConfigError(faults)


def sign(directory: pathlib.Path, keys: Keys, files: Sequence[str], password: str | None = None) -> pathlib.Path:
    """Sign the released files of a directory; return the signature's path.

    Args:
        directory: where they are and the signature goes.
        keys: a private key, with certificates or without.
        files: paths of what is signed; everything else there is left out.
        password: of the private key.

    Raises:
        ConfigError: if the library or a key is not there or does not fit.
        SigningFailed: if the library signed other files or other content; no signature is left then.
    """
    faults = signing_faults(keys, password)
    if faults:
        raise ConfigError(faults)
    library = _library()
    assert keys.key is not None
    config = library.signing.Config()
    signature = directory / SIGNATURE
    try:
        if keys.certificate is None:
            # The library hands the password on to cryptography, which takes bytes.
            encoded = None  # also where the password is for another key
            if password is not None and _is_encrypted(read_private_file(keys.key)):
                encoded = password.encode("utf-8")
            config.use_elliptic_key_signer(private_key=keys.key, password=encoded)
        else:
            config.use_certificate_signer(
                private_key=keys.key, signing_certificate=keys.certificate, certificate_chain=keys.chain
            )
        with tempfile.TemporaryDirectory(dir=directory, prefix=".signing-") as place:
            written = pathlib.Path(place) / SIGNATURE
            config.set_hashing_config(_Exactly(library, directory, files)).sign(directory, written)
            problems = _content_faults(directory, written, files)
            if problems:
                raise SigningFailed(f"{directory} was not signed as it is: {'; '.join(problems)}")
            written.replace(signature)
    except (ValueError, TypeError) as error:
        raise ConfigError([Fault("--private-key", f"{keys.key} cannot sign: {error}")]) from None
    return signature


def check_signature(directory: pathlib.Path, keys: Keys, files: Sequence[str]) -> list[str]:
    """Return faults of a directory's signature; empty if it was made with ``keys`` over exactly ``files`` as they are.

    Args:
        directory: with ``model.sig``.
        keys: a public key, or roots of certificates that are trusted.
        files: paths that the signature must be over.
    """
    signature = directory / SIGNATURE
    if not signature.is_file():
        return [f"{SIGNATURE} is missing: the directory is not signed"]
    library = _library()
    _check_files(keys)
    config = library.verifying.Config().set_hashing_config(_Exactly(library, directory, files))
    if keys.key is not None:
        config.use_elliptic_key_verifier(public_key=keys.key)
    else:
        config.use_certificate_verifier(certificate_chain=keys.chain)
    try:
        config.verify(directory, signature)
    except Exception as error:  # noqa: BLE001 - the library has no base of its own, and any doubt is a failure
        return [f"{SIGNATURE} does not hold: {str(error).strip() or type(error).__name__}"]
    return _content_faults(directory, signature, files)


def _content_faults(directory: pathlib.Path, signature: pathlib.Path, files: Sequence[str]) -> list[str]:
    """Return where the list of files and digests in a signature differs from the files here.

    The list is read from the signature itself, so that no setting of the library decides what was compared.
    """
    try:
        envelope = strict_json.loads(signature.read_bytes())["dsseEnvelope"]
        resources = strict_json.loads(base64.b64decode(envelope["payload"]))["predicate"]["resources"]
        signed = {item["name"]: (item["algorithm"], item["digest"]) for item in resources}
        expected = {file: ("sha256", bundle.sha256_of(directory / file)) for file in files}
    except (OSError, ValueError, LookupError, TypeError) as error:
        return [f"{SIGNATURE} is no signature of files that are here ({type(error).__name__})"]
    wrong = sorted(name for name in {*signed, *expected} if signed.get(name) != expected.get(name))
    return [f"{SIGNATURE} is not over {bundle.printable(name)} as it is here" for name in wrong]


class _Exactly:
    """A hashing configuration for the library model-signing: SHA-256 over exactly the given files.

    By itself the library walks the directory, and writes the names of files to be left out (keys, caches) into the
    signature, which is published.
    """

    def __init__(self, library: Any, directory: pathlib.Path, files: Sequence[str]) -> None:
        config = library.hashing.Config().use_file_serialization(hashing_algorithm="sha256")
        config.set_allow_symlinks(True)  # hubs keep files behind links
        self._config = config.set_ignored_paths(paths=[], ignore_git_paths=False)
        self._paths = [directory / file for file in files]

    def hash(self, model_path: pathlib.Path, *, files_to_hash: Any = None) -> Any:
        """Return the library's manifest of our files; a signature's own list of files is not followed."""
        del files_to_hash
        return self._config.hash(model_path, files_to_hash=self._paths)

    def add_ignored_paths(self, **_: Any) -> None:
        """Do nothing: the library asks to leave out the signature and its keys, which are not among our files."""


def signed_files(directory: pathlib.Path) -> list[str]:
    """Return the paths that a signature of a released directory must be over: ``release.json`` and all it names."""
    manifest, place = bundle.read_manifest(directory)
    names = {bundle.NAME, *manifest.within(place)}
    if place == "export":
        names |= {exported.NAME, *exported.read_description(directory)["files"]}
    if place == "run":
        names.add(f"{RunDirectory(directory).released.name}/{bundle.NAME}")
    return sorted(names)
