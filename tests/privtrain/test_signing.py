"""Signatures of released directories by keys and by certificates, without any network."""

from __future__ import annotations

import datetime
import pathlib
import shutil

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privtrain.commands.verify import Anchors, signed_files, verify_directory
from privtrain.errors import ConfigError, VerificationFailed
from privtrain.run.signing import SIGNATURE, Keys, sign

pytest.importorskip("model_signing")


def write_key(place: pathlib.Path, name: str) -> tuple[ec.EllipticCurvePrivateKey, pathlib.Path, pathlib.Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = place / f"{name}.pem", place / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return key, private, public


@pytest.fixture
def adapter(released_run, tmp_path):
    return shutil.copytree(released_run / "adapter", tmp_path / "adapter")


def test_signed_directory_verifies_with_its_key_alone(adapter, tmp_path):
    _, private, public = write_key(tmp_path, "ours")
    _, _, other = write_key(tmp_path, "other")
    with pytest.raises(VerificationFailed, match=r"model.sig is missing: the directory is not signed"):
        verify_directory(adapter, Anchors(keys=Keys(key=public)))
    assert sign(adapter, Keys(key=private), signed_files(adapter)) == adapter / SIGNATURE
    assert any("--public-key" in item for item in verify_directory(adapter).not_checked)
    moved = shutil.move(adapter, tmp_path / "moved")
    assert "the signature" in verify_directory(pathlib.Path(moved), Anchors(keys=Keys(key=public))).checked
    with pytest.raises(VerificationFailed, match=r"model.sig does not hold"):
        verify_directory(pathlib.Path(moved), Anchors(keys=Keys(key=other)))


def test_whole_run_is_signed_without_what_is_private(released_run, tmp_path):
    run = shutil.copytree(released_run, tmp_path / "run")
    _, private, public = write_key(tmp_path, "ours")
    sign(run, Keys(key=private), signed_files(run))
    verify_directory(run, Anchors(keys=Keys(key=public)))
    for name in ("secret", "checkpoints"):
        shutil.rmtree(run / name)
    verify_directory(run, Anchors(keys=Keys(key=public)))


def test_every_resealed_change_breaks_the_signature(released_run, tmp_path):
    """Whoever rewrites files and release.json alike still lacks the key."""
    from tests.privtrain.test_verify import reseal

    run = shutil.copytree(released_run, tmp_path / "run", ignore=shutil.ignore_patterns("secret", "checkpoints"))
    _, private, public = write_key(tmp_path, "ours")
    sign(run, Keys(key=private), signed_files(run))
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    reseal(run)
    verify_directory(run)
    with pytest.raises(VerificationFailed, match=r"model.sig does not hold"):
        verify_directory(run, Anchors(keys=Keys(key=public)))


def certificate(
    key: ec.EllipticCurvePrivateKey,
    name: str,
    issuer: tuple[str, ec.EllipticCurvePrivateKey] | None,
    path: pathlib.Path,
) -> pathlib.Path:
    by_name, by_key = issuer or (name, key)
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, by_name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by_key.public_key()), critical=False)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=issuer is None,
                crl_sign=issuer is None,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False)
        .sign(by_key, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return path


def test_certificate_of_a_trusted_root_signs(adapter, tmp_path):
    root_key, _, _ = write_key(tmp_path, "root")
    leaf_key, leaf_private, _ = write_key(tmp_path, "leaf")
    root = certificate(root_key, "root", None, tmp_path / "root.crt")
    leaf = certificate(leaf_key, "leaf", ("root", root_key), tmp_path / "leaf.crt")
    sign(adapter, Keys(leaf_private, leaf, (root,)), signed_files(adapter))
    assert "the signature" in verify_directory(adapter, Anchors(keys=Keys(chain=(root,)))).checked
    stranger_key, _, _ = write_key(tmp_path, "stranger")
    stranger = certificate(stranger_key, "stranger", None, tmp_path / "stranger.crt")
    with pytest.raises(VerificationFailed, match=r"model.sig does not hold"):
        verify_directory(adapter, Anchors(keys=Keys(chain=(stranger,))))


def test_key_that_is_none_is_a_wrong_input(adapter, tmp_path):
    (tmp_path / "bad.pem").write_text("no key")
    with pytest.raises(ConfigError, match="cannot sign"):
        sign(adapter, Keys(key=tmp_path / "bad.pem"), signed_files(adapter))
    with pytest.raises(ConfigError, match="is no file"):
        sign(adapter, Keys(key=tmp_path / "none.pem"), signed_files(adapter))
    assert not list(adapter.glob(".signing*"))
