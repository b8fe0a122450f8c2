"""``privtrain verify DIRECTORY``: whether a run, an adapter, a model or an export is what was released.

From outside, without ``secret/``: the manifest against itself, every file against the manifest, the statement against
the plan that it carries, ε against the accountant, card, metrics and configuration against the statement. That shows
that the parts belong together. Who released them takes an anchor from elsewhere: the release digest, or a signature.
Where ``secret/`` is at hand, the ledger is verified too.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable
from typing import Any

from privtrain.commands import export
from privtrain.errors import ConfigError, Fault, PrivtrainError, VerificationFailed
from privtrain.files import strict_json
from privtrain.ledger.view import verify_run
from privtrain.run import bundle, consistency, exported, generated
from privtrain.run.base_model import digests_in
from privtrain.run.bundle import FileFault, ReleaseManifest
from privtrain.run.directory import RunDirectory
from privtrain.run.signing import SIGNATURE, Keys, check_signature, signed_files


@dataclasses.dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        directory: what was checked.
        place: its kind, see :data:`privtrain.run.bundle.PLACES`.
        release_digest: names the release.
        epsilon: ε of the statement; ``None`` where it is infinite.
        checked: what was compared, in words.
        not_checked: what could not be, and what it would take.
        beside: harmless files that are not part of the release.
    """

    directory: str
    place: str
    release_digest: str
    epsilon: float | None
    checked: tuple[str, ...]
    not_checked: tuple[str, ...]
    beside: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Anchors:
    """What the checker has from elsewhere.

    Attributes:
        digest: the release digest that the release must have.
        keys: what a signature must be made with.
        released: the run, or its released directory, that an export was made from.
        base_model: directory of the base model.
    """

    digest: str | None = None
    keys: Keys | None = None
    released: pathlib.Path | None = None
    base_model: pathlib.Path | None = None


#: What may lie in a published run and is no part of the release.
_NOT_RELEASED = {
    "report": "report/: attacks verify RUN does",
    "wandb": "wandb/, which mirrors metrics.jsonl",
    "tensorboard": "tensorboard/, which mirrors metrics.jsonl",
}


def verify_directory(directory: pathlib.Path, anchors: Anchors | None = None) -> Verified:
    """Check a directory; see the module for what.

    Raises:
        ConfigError: if there is no such directory, or nothing that was released in it.
        VerificationFailed: naming every file and field that does not hold.
        LedgerCorrupt: if ``secret/`` is at hand and the ledger contradicts what is released.
    """
    anchors = anchors or Anchors()
    _check_inputs(directory)
    manifest, place = bundle.read_manifest(directory)
    checked = ["release.json", "every file by SHA-256", "the statement against its plan, ε by the accountant"]
    faults, beside, made = _files(directory, manifest, place)
    problems = [str(fault) for fault in faults]
    problems += _contents(directory, manifest, place)
    not_checked: list[str] = []
    for problem, done, left in (
        _check_digest(manifest, anchors),
        _check_signed(directory, anchors),
        _check_base(manifest, anchors),
        _check_source(directory, manifest, made, anchors) if made else ([], "", ""),
    ):
        problems += problem
        checked += [done] if done else []
        not_checked += [left] if left else []
    if place == "run":
        not_checked += [_NOT_RELEASED[name] for name in _NOT_RELEASED if (directory / name).exists()]
    if place in ("adapter", "model"):
        not_checked.append("config.yaml and metrics.jsonl, which are published beside this directory")
    run = RunDirectory(directory)
    if place == "run" and run.ledger.is_file() and not problems:
        checked.append(verify_run(directory))
    elif place == "run" and run.secret.exists() and not run.ledger.is_file():
        problems.append("secret/ledger.jsonl is missing")
    elif not problems:
        not_checked.append("that training was what the statement says: the ledger is in the run's secret/")
    if problems:
        raise VerificationFailed(list(dict.fromkeys(problems)), directory)
    epsilon = _statement(directory)["epsilon"]
    return Verified(
        str(directory), place, manifest.digest, epsilon, tuple(checked), tuple(not_checked), tuple(sorted(beside))
    )


def _check_inputs(directory: pathlib.Path) -> None:
    if not directory.is_dir():
        raise ConfigError([Fault("DIRECTORY", f"{directory} is no directory")])
    parts = (
        bundle.NAME,
        "privacy.json",
        exported.NAME,
        generated.NAME,
        "adapter_model.safetensors",
        "adapter",
        "model",
    )
    if not any((directory / name).exists() for name in parts):
        raise ConfigError(
            [Fault("DIRECTORY", f"nothing in {directory} was released by privtrain; it has no release.json")]
        )


def _files(
    directory: pathlib.Path, manifest: ReleaseManifest, place: str
) -> tuple[list[FileFault], list[str], dict[str, Any] | None]:
    """Return faults of files, harmless files beside the release, and what an export or a corpus says of its making."""
    if place == "run":
        return *bundle.run_faults(RunDirectory(directory), manifest), None
    expected = manifest.within(place)
    if place not in ("export", "corpus"):
        return *bundle.compare_files(directory, expected), None
    description = generated if place == "corpus" else exported
    made = description.read_description(directory)
    own = (bundle.NAME, description.NAME)
    faults, beside = bundle.compare_files(directory, {**made["files"], **expected}, own=own)
    if made["release"] != manifest.digest:
        faults.append(FileFault(description.NAME, "speaks of another release than release.json"))
    if place == "corpus":
        return faults, beside, made
    weights = exported.weights_of(manifest.files)
    if made["released"] != weights or made["base_model"] != dict(manifest.base_model):
        faults.append(FileFault(exported.NAME, "names other released weights or another base model than release.json"))
    return faults, beside, made


def _contents(directory: pathlib.Path, manifest: ReleaseManifest, place: str) -> list[str]:
    """Return what the files say, against each other; a file that is missing is named elsewhere."""
    try:
        statement = _statement(directory)
    except (OSError, ValueError) as error:
        return [f"privacy.json cannot be read: {error}"]
    problems = []
    if bundle.tokenizer_digest(manifest.files) != manifest.tokenizer:
        problems.append("release.json: tokenizer is not the digest of the tokenizer's files")
    if bundle.digest_of(statement) != manifest.statement:
        problems.append("privacy.json: its content is not what release.json holds")
    ledger = statement.get("ledger")
    for name, mine, theirs in (
        ("plan_fingerprint", statement.get("plan_fingerprint"), manifest.plan),
        ("ledger.head", ledger.get("head") if isinstance(ledger, dict) else None, manifest.ledger_head),
    ):
        if mine != theirs:
            problems.append(f"privacy.json: {name} is {mine}, release.json has {theirs}")
    faults = consistency.statement_faults(statement)
    if faults:
        return [*problems, *(f"privacy.json: {fault}" for fault in faults)]
    cards = {"run": f"{RunDirectory(directory).released.name}/README.md"}
    files = [(cards.get(place, "README.md"), consistency.card_faults)]
    if place == "run":
        files += [("metrics.jsonl", consistency.metrics_faults), ("config.yaml", consistency.config_faults)]
    for name, faults_of in files:
        try:
            text = bundle.text_of(directory / name)
        except (OSError, ValueError):
            continue  # compared by digest, and named there
        problems += [f"{name}: {fault}" for fault in faults_of(text, statement)]
    return problems


def _statement(directory: pathlib.Path) -> dict[str, Any]:
    statement = strict_json.loads(bundle.text_of(directory / "privacy.json"))
    if not isinstance(statement, dict):
        raise ValueError("it holds no JSON object")
    return statement


#: Of one check: problems; what was compared, in words; what could not be, and what it would take. Empty: nothing.
_Outcome = tuple[list[str], str, str]


def _check_digest(manifest: ReleaseManifest, anchors: Anchors) -> _Outcome:
    """Compare the release digest with the one that the checker has."""
    if anchors.digest is None:
        return [], "", "that this is the release you mean: give --digest, or --public-key where it is signed"
    if anchors.digest != manifest.digest:
        return [f"release.json: the release digest is {manifest.digest}, not {anchors.digest}"], "", ""
    return [], "the release digest given", ""


def _check_signed(directory: pathlib.Path, anchors: Anchors) -> _Outcome:
    """Check the signature, if the checker has the keys."""
    if anchors.keys is None:
        is_signed = (directory / SIGNATURE).exists()
        return [], "", f"the signature {SIGNATURE}: give --public-key or --certificate" if is_signed else ""
    problems = check_signature(directory, anchors.keys, signed_files(directory))
    return problems, "" if problems else "the signature", ""


def _check_base(manifest: ReleaseManifest, anchors: Anchors) -> _Outcome:
    """Compare the files of the base model, if the checker has it, with their digests."""
    if not manifest.base_model:
        return [], "", "the base model: it was not on disk when the run was released"
    if anchors.base_model is None:
        return [], "", "the base model: give --base-model DIRECTORY"
    if not anchors.base_model.is_dir():
        raise ConfigError([Fault("--base-model", f"{anchors.base_model} is no directory")])
    ggufs = [name for name in manifest.base_model if name.endswith(".gguf")]
    try:
        digests = digests_in(anchors.base_model, ggufs[0] if list(manifest.base_model) == ggufs else None)
    except OSError as error:
        return [f"the base model cannot be read: {error}"], "", ""
    names = sorted({*digests, *manifest.base_model})
    wrong = [name for name in names if digests.get(name) != manifest.base_model.get(name)]
    return [f"{anchors.base_model / name} is not the base model's file" for name in wrong], "the base model", ""


def _check_source(
    directory: pathlib.Path, manifest: ReleaseManifest, made: dict[str, Any], anchors: Anchors
) -> _Outcome:
    """Check an export or a corpus, described by ``made``, against the release that it was made from."""
    is_corpus = made["schema"] == generated.SCHEMA
    if anchors.released is None:
        if is_corpus:
            return [], "", "that texts and model are of one release: give --released RUN"
        return [], "", "that these weights follow from the released ones: give --released RUN (and --base-model)"
    source = verify_directory(anchors.released)
    if source.release_digest != manifest.digest:
        return [f"{anchors.released} is another release than the one that this was made from"], "", ""
    if is_corpus:
        left = "that the texts were sampled from it: privtrain generate draws them again, on the same machine"
        return [], "the release that the texts were sampled from", left
    try:
        problems = export.reproduction_faults(directory, made, anchors.released, anchors.base_model)
    except PrivtrainError as error:
        return [], "", f"that these weights follow from the released ones: {error}"
    return problems, "" if problems else "the weights, made again from the released ones", ""


def describe(verified: Verified) -> str:
    """Return lines for people."""
    lines = [f"{verified.directory} is what was released ({verified.place}); release digest {verified.release_digest}"]
    lines += _listed("compared", verified.checked)
    lines += _listed("not compared", verified.not_checked)
    lines += _listed("not part of the release, and harmless", [bundle.printable(path) for path in verified.beside])
    return "\n".join(lines)


def _listed(title: str, items: Iterable[str]) -> list[str]:
    items = list(items)
    return [f"{title}:", *(f"  {item}" for item in items)] if items else []


def print_verified(directory: pathlib.Path, anchors: Anchors, *, as_json: bool) -> None:
    """Check a directory and print what was compared."""
    verified = verify_directory(directory, anchors)
    print(json.dumps(dataclasses.asdict(verified), indent=2) if as_json else describe(verified))
