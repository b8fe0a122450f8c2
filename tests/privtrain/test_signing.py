"""Signatures of released directories by keys and by certificates, without any network."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import pathlib
import shutil

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st

from privtrain.commands.verify import Anchors, verify_directory
from privtrain.config import validate
from privtrain.config.publishing import ReleaseSection
from privtrain.errors import ConfigError, SigningFailed, VerificationFailed
from privtrain.inputs import check_inputs
from privtrain.job import released
from privtrain.job import train as job
from privtrain.job.publish import publish
from privtrain.job.train import train
from privtrain.run.directory import RunDirectory
from privtrain.run.signing import SIGNATURE, Keys, sign, signed_files
from tests.conftest import tiny_tree, write_config

pytestmark = pytest.mark.usefixtures("no_self_test")

pytest.importorskip("model_signing")


def write_key(
    place: pathlib.Path, name: str, password: bytes = b""
) -> tuple[ec.EllipticCurvePrivateKey, pathlib.Path, pathlib.Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = place / f"{name}.pem", place / f"{name}.pub"
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    private.chmod(0o600)
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
    (run / "wandb").mkdir()
    (run / "wandb" / "latest-run").symlink_to("offline-run")  # as W&B leaves it
    sign(run, Keys(key=private), signed_files(run))
    payload = json.loads((run / SIGNATURE).read_text())["dsseEnvelope"]["payload"]
    signed = base64.b64decode(payload).decode()
    assert "adapter_model.safetensors" in signed
    assert not any(name in signed for name in ("secret", "checkpoints", "wandb")), "names of what is private"
    verify_directory(run, Anchors(keys=Keys(key=public)))
    for name in ("secret", "checkpoints"):
        shutil.rmtree(run / name)
    verify_directory(run, Anchors(keys=Keys(key=public)))


def test_every_resealed_change_breaks_the_signature(released_run, tmp_path):
    """Whoever rewrites files and release.json alike still lacks the key."""
    from tests.privtrain.forgeries import reseal

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
    (tmp_path / "bad.pem").chmod(0o600)
    with pytest.raises(ConfigError, match="cannot sign"):
        sign(adapter, Keys(key=tmp_path / "bad.pem"), signed_files(adapter))
    with pytest.raises(ConfigError, match=r"none.pem is missing"):
        sign(adapter, Keys(key=tmp_path / "none.pem"), signed_files(adapter))
    assert not list(adapter.glob(".signing*"))


def test_encrypted_key_needs_its_password(adapter, tmp_path):
    _, private, public = write_key(tmp_path, "locked", b"sesame")
    for password, problem in ((None, "PRIVTRAIN_SIGNING_PASSWORD"), ("wrong", "cannot sign")):
        with pytest.raises(ConfigError, match=problem):
            sign(adapter, Keys(key=private), signed_files(adapter), password)
    sign(adapter, Keys(key=private), signed_files(adapter), "sesame")
    assert "the signature" in verify_directory(adapter, Anchors(keys=Keys(key=public))).checked


def signing_tree(tiny_llama, users_file, place: pathlib.Path, key: pathlib.Path) -> dict:
    tree = tiny_tree(tiny_llama, users_file, place / "runs")
    tree["release"] = {"signing_key": str(key)}
    return tree


def test_release_is_signed_by_the_key_of_the_configuration(tiny_llama, users_file, tmp_path, monkeypatch):
    """Run and adapter alike; of the key nothing is kept, shown or sent, not even its path."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, private, public = write_key(tmp_path, "ours")
    tree = signing_tree(tiny_llama, users_file, tmp_path, private)
    tree["tracking"] = {"wandb": True}
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    for place in (run, run / "adapter"):
        assert "the signature" in verify_directory(place, Anchors(keys=Keys(key=public))).checked
    body = b"".join(private.read_bytes().splitlines()[1:-1])
    for path in (path for path in run.rglob("*") if path.is_file()):
        content = path.read_bytes()
        assert body[:40] not in content.replace(b"\n", b""), path
        assert str(private).encode() not in content or path == run / "secret" / "config.yaml", path


def key_of_another_kind(place: pathlib.Path) -> pathlib.Path:
    from cryptography.hazmat.primitives.asymmetric import ed25519

    path = place / "ed25519.pem"
    path.write_bytes(
        ed25519.Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("missing", "is missing"),
        ("link", "is a link"),
        ("open", "can be read by other users"),
        ("directory", "is no regular file"),
        ("other", "no elliptic-curve key"),
        ("public", "cannot sign"),
        ("encrypted", "PRIVTRAIN_SIGNING_PASSWORD"),
    ],
)
def test_key_that_cannot_sign_is_refused_before_training(kind, problem, tiny_llama, users_file, tmp_path):
    _, private, public = write_key(tmp_path, "ours", b"sesame" if kind == "encrypted" else b"")
    key = {
        "missing": tmp_path / "none.pem",
        "link": tmp_path / "link.pem",
        "directory": tmp_path,
        "other": key_of_another_kind(tmp_path),
        "public": public,
    }.get(kind, private)
    (tmp_path / "link.pem").symlink_to(private)
    public.chmod(0o600)
    if kind == "open":
        private.chmod(0o640)
    tree = signing_tree(tiny_llama, users_file, tmp_path, key)
    tree["data"]["user_column"] = "nobody"
    with pytest.raises(ConfigError, match=rf"(?s)user_column.*release.signing_key.*{problem}") as caught:
        train(write_config(tree, tmp_path / "c.yaml"))
    assert not (tmp_path / "runs" / "tiny").exists()
    assert "-----" not in str(caught.value)


def test_certificates_without_a_key_or_of_another_key_are_faults(tiny_llama, users_file, tmp_path):
    tree = signing_tree(tiny_llama, users_file, tmp_path, tmp_path / "unused.pem")
    tree["release"] = {"signing_certificate": "leaf.crt"}
    with pytest.raises(ConfigError, match=r"need release.signing_key"):
        validate(tree)
    _, private, _ = write_key(tmp_path, "ours")
    other_key, _, _ = write_key(tmp_path, "other")
    tree["release"] = {
        "signing_key": str(private),
        "signing_certificate": str(certificate(other_key, "other", None, tmp_path / "other.crt")),
        "signing_chain": [str(private)],
    }
    with pytest.raises(ConfigError, match=r"(?s)signing_chain.*is no certificate.*of another key than"):
        check_inputs(validate(tree))


def test_unsigned_release_is_signed_by_the_same_command(tiny_llama, users_file, tmp_path, monkeypatch):
    _, private, public = write_key(tmp_path, "ours")
    config = write_config(signing_tree(tiny_llama, users_file, tmp_path, private), tmp_path / "c.yaml")

    def lost(directory, *rest):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(released, "sign", lost)
        with pytest.raises(SigningFailed, match=r"stays so, but is not signed.*No space.*privtrain sign DIRECTORY"):
            train(config)
    run = tmp_path / "runs" / "tiny"
    verify_directory(run)
    assert SigningFailed.exit_code != 0
    assert not (run / SIGNATURE).exists()
    before = (run / "release.json").read_bytes()
    train(config)
    assert (run / "release.json").read_bytes() == before
    assert "the signature" in verify_directory(run, Anchors(keys=Keys(key=public))).checked


def test_what_is_signed_is_what_was_released(tiny_llama, users_file, tmp_path, monkeypatch):
    """Weights that changed behind the release are never signed."""
    _, private, _ = write_key(tmp_path, "ours")
    config = write_config(signing_tree(tiny_llama, users_file, tmp_path, private), tmp_path / "c.yaml")

    def publish_and_alter(run, *rest, **named):
        manifest = publish(run, *rest, **named)
        with open(run.adapter / "adapter_model.safetensors", "ab") as file:
            file.write(b"x")
        return manifest

    monkeypatch.setattr(job, "publish", publish_and_alter)
    with pytest.raises(SigningFailed, match=r"adapter_model.safetensors differs"):
        train(config)
    assert not list((tmp_path / "runs" / "tiny").rglob(SIGNATURE))


# Mutants: the code is broken on purpose, and a check sees it.


def check_weights_are_signed(released_run: pathlib.Path, place: pathlib.Path) -> None:
    """Raise unless weights that changed, with every digest made again, break the signature."""
    test_every_resealed_change_breaks_the_signature(released_run, place)


ALL_SIGNED_FILES = signed_files


def only_cards(directory: pathlib.Path) -> list[str]:
    return [name for name in ALL_SIGNED_FILES(directory) if name.endswith(".md")]


def hash_only_cards(self, model_path, *, files_to_hash=None):
    del files_to_hash
    return self._config.hash(model_path, files_to_hash=[path for path in self._paths if path.suffix == ".md"])


SIGNING_MUTANTS = {
    "the card alone is signed": {
        "tests.privtrain.test_signing.signed_files": only_cards,
        "privtrain.commands.verify.signed_files": only_cards,
    },
    "any signature holds": {"privtrain.commands.verify.check_signature": lambda *_: []},
    "the library hashes a part and nobody looks": {
        "privtrain.run.signing._Exactly.hash": hash_only_cards,
        "privtrain.run.signing._content_faults": lambda *_: [],
    },
}


@pytest.mark.parametrize("mutant", SIGNING_MUTANTS)
def test_mutant_of_signing_is_seen(released_run, tmp_path, monkeypatch, mutant):
    (tmp_path / "whole").mkdir()
    check_weights_are_signed(released_run, tmp_path / "whole")
    for name, broken in SIGNING_MUTANTS[mutant].items():
        monkeypatch.setattr(name, broken)
    with pytest.raises(pytest.fail.Exception):
        check_weights_are_signed(released_run, tmp_path)


@pytest.mark.parametrize("kind", ["fewer", "more", "other content"])
def test_signature_over_other_files_does_not_hold(released_run, adapter, tmp_path, kind):
    """By the right key, but over a part, over more, or over another directory."""
    _, private, public = write_key(tmp_path, "ours")
    files, source = signed_files(adapter), adapter
    if kind == "fewer":
        files = only_cards(adapter)
    elif kind == "more":
        (adapter / "LICENSE").write_text("mine")
        files = [*files, "LICENSE"]
    else:
        source = shutil.copytree(adapter, tmp_path / "other")
        (source / "README.md").write_text("another card")
    sign(source, Keys(key=private), files)
    if source != adapter:
        shutil.copy(source / SIGNATURE, adapter / SIGNATURE)
    with pytest.raises(VerificationFailed, match=rf"{SIGNATURE} (does not hold|is not over)"):
        verify_directory(adapter, Anchors(keys=Keys(key=public)))


def test_signature_over_a_part_is_never_kept(adapter, tmp_path, monkeypatch):
    _, private, _ = write_key(tmp_path, "ours")
    monkeypatch.setattr("privtrain.run.signing._Exactly.hash", hash_only_cards)
    with pytest.raises(SigningFailed, match=r"is not over adapter_model.safetensors as it is here"):
        sign(adapter, Keys(key=private), signed_files(adapter))
    assert not (adapter / SIGNATURE).exists()
    assert not list(adapter.glob(".signing*"))


def test_release_is_not_called_signed_without_a_signature(released_run, tmp_path, monkeypatch, capsys):
    run = RunDirectory(shutil.copytree(released_run, tmp_path / "run"))
    _, private, _ = write_key(tmp_path, "ours")
    section = ReleaseSection(signing_key=private)
    with monkeypatch.context() as patched:
        patched.setattr(released, "sign", lambda directory, *_: directory / SIGNATURE)
        assert isinstance(released.sign_release(run, section), SigningFailed)
    assert "signed" not in capsys.readouterr().out
    assert released.sign_release(run, section) is None
    assert "signed" in capsys.readouterr().out


def test_signature_of_another_release_does_not_hold(released_run, adapter, tmp_path):
    """Of the run for its adapter, or of an adapter with another card for this one."""
    run = shutil.copytree(released_run, tmp_path / "run")
    _, private, public = write_key(tmp_path, "ours")
    sign(run, Keys(key=private), signed_files(run))
    shutil.copy(run / SIGNATURE, adapter / SIGNATURE)
    with pytest.raises(VerificationFailed, match=r"model.sig does not hold"):
        verify_directory(adapter, Anchors(keys=Keys(key=public)))


@settings(max_examples=40)
@given(place=st.floats(0, 1), bits=st.integers(1, 255))
def test_signature_with_any_other_byte_is_one_line(adapter, tmp_path, place, bits):
    """Refused, or read the same way (JSON has room for spaces): never a traceback."""
    if not (tmp_path / "ours.pem").exists():
        write_key(tmp_path, "ours")
        sign(adapter, Keys(key=tmp_path / "ours.pem"), signed_files(adapter))
        (tmp_path / "whole.sig").write_bytes((adapter / SIGNATURE).read_bytes())
    content = bytearray((tmp_path / "whole.sig").read_bytes())
    content[int(place * (len(content) - 1))] ^= bits
    (adapter / SIGNATURE).write_bytes(content)
    with contextlib.suppress(VerificationFailed):
        verify_directory(adapter, Anchors(keys=Keys(key=tmp_path / "ours.pub")))
