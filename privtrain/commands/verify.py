"""``privtrain verify DIRECTORY``: whether a run, an adapter, a model or an export is what was released.

From outside, without ``secret/``: the manifest against itself, every file against the manifest, the statement against
the plan that it carries, ε against the accountant, card, metrics and configuration against the statement. That shows
that the parts belong together. Who released them takes an anchor from elsewhere: the release digest, or a signature.
Where ``secret/`` is at hand, the ledger is verified too.

The manifest is ``release.json``: SHA-256 of every released file. The statement is ``privacy.json``: ε, δ and the plan.
The release digest is that of the manifest. A directory's *place* is its kind: run, adapter, model, export or corpus.
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
        directory: the directory that was checked.
        place: its kind: run, adapter, model, export or corpus.
        release_digest: digest of the manifest, which names the release.
        epsilon: ε of the statement; ``None`` where it is infinite.
        checked: what was compared, in words.
        not_checked: what could not be compared, and what it would take.
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
    """What the checker has from a source of their own, to compare with; None: that comparison is not made.

    Attributes:
        digest: the release digest that the release must have.
        keys: public key or root certificates that the signature must follow from.
        released: the run, or its released directory, that an export or corpus was made from.
        base_model: directory of the base model.
    """

    digest: str | None = None
    keys: Keys | None = None
    released: pathlib.Path | None = None
    base_model: pathlib.Path | None = None


#: Directories of a run that are no part of the release → what to say of them.
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

    # The parts against one another.
    manifest, place = bundle.read_manifest(directory)
    checked = ["release.json", "every file by SHA-256", "the statement against its plan, ε by the accountant"]
    faults, beside, description = _compare_files(directory, manifest, place)
    problems = [str(fault) for fault in faults]
    problems += _content_problems(directory, manifest, place)

    # Against what the checker has from elsewhere.
    not_checked: list[str] = []
    outcomes = [_check_digest(manifest, anchors), _check_signed(directory, anchors), _check_base(manifest, anchors)]
    if description is not None:  # an export or a corpus
        outcomes.append(_check_source(directory, manifest, description, anchors))
    for outcome in outcomes:
        problems += outcome.problems
        if outcome.checked:
            checked.append(outcome.checked)
        if outcome.not_checked:
            not_checked.append(outcome.not_checked)
    if place == "run":
        not_checked += [_NOT_RELEASED[name] for name in _NOT_RELEASED if (directory / name).exists()]
    if place in ("adapter", "model"):
        not_checked.append("config.yaml and metrics.jsonl, which are published beside this directory")

    # Against the ledger, if it is at hand; what is released must hold by itself first.
    run = RunDirectory(directory)
    if place == "run" and run.ledger.is_file() and not problems:
        checked.append(verify_run(directory))
    elif place == "run" and run.secret.exists() and not run.ledger.is_file():
        problems.append("secret/ledger.jsonl is missing")
    elif not problems:
        not_checked.append("that training was what the statement says: the ledger is in the run's secret/")
    if problems:
        raise VerificationFailed(list(dict.fromkeys(problems)), directory)
    return Verified(
        directory=str(directory),
        place=place,
        release_digest=manifest.digest,
        epsilon=_statement(directory)["epsilon"],
        checked=tuple(checked),
        not_checked=tuple(not_checked),
        beside=tuple(sorted(beside)),
    )


def _check_inputs(directory: pathlib.Path) -> None:
    """Raise ConfigError unless the directory holds something by whose name privtrain releases, if only in part."""
    if not directory.is_dir():
        raise ConfigError([Fault("DIRECTORY", f"{directory} is no directory")])
    names = (
        bundle.NAME,
        "privacy.json",
        exported.NAME,
        generated.NAME,
        "adapter_model.safetensors",
        "adapter",
        "model",
    )
    if not any((directory / name).exists() for name in names):
        raise ConfigError(
            [Fault("DIRECTORY", f"nothing in {directory} was released by privtrain; it has no release.json")]
        )


def _compare_files(
    directory: pathlib.Path, manifest: ReleaseManifest, place: str
) -> tuple[list[FileFault], list[str], dict[str, Any] | None]:
    """Compare every file with its digest in the manifest or, of an export or a corpus, in its own description.

    Returns:
        Files that differ, are missing or are too many; harmless files beside the release; and the content of
        ``export.json`` or ``corpus.json``, the description of an export or a corpus, else None.
    """
    if place == "run":
        faults, beside = bundle.run_faults(RunDirectory(directory), manifest)
        return faults, beside, None
    expected = manifest.within(place)  # path → SHA-256
    if place not in ("export", "corpus"):
        faults, beside = bundle.compare_files(directory, expected)
        return faults, beside, None
    module = generated if place == "corpus" else exported
    description = module.read_description(directory)
    own = (bundle.NAME, module.NAME)  # checked here and by their readers
    faults, beside = bundle.compare_files(directory, {**description["files"], **expected}, own=own)
    if description["release"] != manifest.digest:
        faults.append(FileFault(module.NAME, "speaks of another release than release.json"))
    if place == "corpus":
        return faults, beside, description
    weights = exported.weights_of(manifest.files)
    if description["released"] != weights or description["base_model"] != dict(manifest.base_model):
        faults.append(FileFault(exported.NAME, "names other released weights or another base model than release.json"))
    return faults, beside, description


def _content_problems(directory: pathlib.Path, manifest: ReleaseManifest, place: str) -> list[str]:
    """Return where statement, manifest, card, metrics and configuration contradict one another, in words.

    A file that is missing or cannot be read is passed over: the comparison by digest names it.
    """
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
    ledger_head = ledger.get("head") if isinstance(ledger, dict) else None
    for name, in_statement, in_manifest in (
        ("plan_fingerprint", statement.get("plan_fingerprint"), manifest.plan),
        ("ledger.head", ledger_head, manifest.ledger_head),
    ):
        if in_statement != in_manifest:
            problems.append(f"privacy.json: {name} is {in_statement}, release.json has {in_manifest}")
    faults = consistency.statement_faults(statement)
    if faults:  # nothing else can be compared with such a statement
        return [*problems, *(f"privacy.json: {fault}" for fault in faults)]
    # Each with the function that compares its text with the statement.
    if place == "run":
        files = [
            (f"{RunDirectory(directory).released.name}/README.md", consistency.card_faults),
            ("metrics.jsonl", consistency.metrics_faults),
            ("config.yaml", consistency.config_faults),
        ]
    else:
        files = [("README.md", consistency.card_faults)]
    for name, faults_of in files:
        try:
            text = bundle.text_of(directory / name)
        except (OSError, ValueError):
            continue  # compared by digest, and named there
        problems += [f"{name}: {fault}" for fault in faults_of(text, statement)]
    return problems


def _statement(directory: pathlib.Path) -> dict[str, Any]:
    """Return the content of ``privacy.json``; raise ValueError or OSError if it is no JSON object."""
    statement = strict_json.loads(bundle.text_of(directory / "privacy.json"))
    if not isinstance(statement, dict):
        raise ValueError("it holds no JSON object")
    return statement


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """What a comparison with one anchor found; nearly always only one of the three is filled.

    Attributes:
        problems: what does not hold.
        checked: what was compared and holds, in words.
        not_checked: what could not be compared, and what it would take.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    checked: str = ""
    not_checked: str = ""


def _check_digest(manifest: ReleaseManifest, anchors: Anchors) -> _Outcome:
    """Compare the release digest with the one that the checker has."""
    if anchors.digest is None:
        left = "that this is the release you mean: give --digest, or --public-key where it is signed"
        return _Outcome(not_checked=left)
    if anchors.digest != manifest.digest:
        return _Outcome([f"release.json: the release digest is {manifest.digest}, not {anchors.digest}"])
    return _Outcome(checked="the release digest given")


def _check_signed(directory: pathlib.Path, anchors: Anchors) -> _Outcome:
    """Check the signature, if the checker has the keys."""
    if anchors.keys is None:
        is_signed = (directory / SIGNATURE).exists()
        left = f"the signature {SIGNATURE}: give --public-key or --certificate"
        return _Outcome(not_checked=left if is_signed else "")
    problems = check_signature(directory, anchors.keys, signed_files(directory))
    return _Outcome(problems, checked="" if problems else "the signature")


def _check_base(manifest: ReleaseManifest, anchors: Anchors) -> _Outcome:
    """Compare the files of the base model, if the checker has it, with their digests in the manifest."""
    if not manifest.base_model:
        return _Outcome(not_checked="the base model: it was not on disk when the run was released")
    if anchors.base_model is None:
        return _Outcome(not_checked="the base model: give --base-model DIRECTORY")
    if not anchors.base_model.is_dir():
        raise ConfigError([Fault("--base-model", f"{anchors.base_model} is no directory")])
    # A GGUF base is one file of a directory that may hold others; of any other base all files count.
    base_names = list(manifest.base_model)
    is_gguf = all(name.endswith(".gguf") for name in base_names)
    gguf_file = base_names[0] if is_gguf else None
    try:
        digests = digests_in(anchors.base_model, gguf_file)
    except OSError as error:
        return _Outcome([f"the base model cannot be read: {error}"])
    names = sorted({*digests, *manifest.base_model})
    wrong = [name for name in names if digests.get(name) != manifest.base_model.get(name)]
    problems = [f"{anchors.base_model / name} is not the base model's file" for name in wrong]
    return _Outcome(problems, checked="the base model")


def _check_source(
    directory: pathlib.Path, manifest: ReleaseManifest, description: dict[str, Any], anchors: Anchors
) -> _Outcome:
    """Check an export or a corpus against the release that it was made from, if the checker has that.

    Args:
        directory: the export or corpus.
        manifest: its ``release.json``.
        description: content of its ``export.json`` or ``corpus.json``.
        anchors: what the checker has.
    """
    is_corpus = description["schema"] == generated.SCHEMA
    if anchors.released is None:
        if is_corpus:
            return _Outcome(not_checked="that texts and model are of one release: give --released RUN")
        left = "that these weights follow from the released ones: give --released RUN (and --base-model)"
        return _Outcome(not_checked=left)
    source = verify_directory(anchors.released)
    if source.release_digest != manifest.digest:
        return _Outcome([f"{anchors.released} is another release than the one that this was made from"])
    if is_corpus:
        left = "that the texts were sampled from it: privtrain generate draws them again, on the same machine"
        return _Outcome(checked="the release that the texts were sampled from", not_checked=left)
    try:
        problems = export.reproduction_faults(directory, description, anchors.released, anchors.base_model)
    except PrivtrainError as error:
        return _Outcome(not_checked=f"that these weights follow from the released ones: {error}")
    return _Outcome(problems, checked="" if problems else "the weights, made again from the released ones")


def describe(verified: Verified) -> str:
    """Return what a verification found as lines for people."""
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
