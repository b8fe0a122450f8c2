"""``privtrain push``: put what was released, an export or a corpus onto a Hugging Face hub, as it was verified.

The token is the hub client's own (``HF_TOKEN``, or ``hf auth login``): it is no option, and is neither shown nor kept.
"""

from __future__ import annotations

import glob
import pathlib
import re
from typing import Any

from privtrain.commands.verify import verify_directory
from privtrain.errors import ConfigError, Fault, PrivtrainError
from privtrain.files import reading
from privtrain.process.console import say
from privtrain.run import bundle, exported, generated
from privtrain.run.directory import RunDirectory
from privtrain.run.signing import SIGNATURE

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")

#: Files that a hub makes in a new repository.
_OF_THE_HUB = (".gitattributes",)


def push(directory: pathlib.Path, repository: str, *, is_public: bool = False, is_consented: bool = False) -> str:
    """Verify a directory and upload the files that were verified, and no other; return a line that says where they are.

    Args:
        directory: a run (its adapter or model is uploaded), an adapter or model, an export, or a corpus.
        repository: ``NAMESPACE/NAME`` on the hub; made if it is not there.
        is_public: make a new repository public.
        is_consented: upload also a release whose statement says that it is not private (``--not-private``).

    Raises:
        ConfigError: if it cannot be uploaded; nothing was sent then.
        VerificationFailed: if the directory is not what was released.
        PrivtrainError: if the hub does not take it.
    """
    if not _REPOSITORY.fullmatch(repository):
        problem = f"given {repository!r}; must be NAMESPACE/NAME of letters, digits, ., _ and -"
        raise ConfigError([Fault("REPOSITORY", problem)])
    verified = verify_directory(directory)
    # verified.place is the kind of directory; of a run only the released part is uploaded.
    place = directory if verified.place != "run" else RunDirectory(directory).released
    reasons = reading.read_json(place / "privacy.json")["not_private_reasons"]
    if reasons and not is_consented:
        problem = f"is not private ({'; '.join(reasons)}); to upload it all the same, give --not-private"
        raise ConfigError([Fault("DIRECTORY", problem)])
    names = _names(place)
    kind = "dataset" if verified.place == "corpus" else "model"
    url = _upload(place, repository, kind, names, is_public=is_public)
    return (
        f"uploaded {len(names)} files to {url}; release digest {verified.release_digest}. Others check it with: "
        f"privtrain verify COPY --digest {verified.release_digest}"
    )


def _names(place: pathlib.Path) -> list[str]:
    """Return the files of a verified directory that belong to the release, relative to it.

    These are the files that ``release.json`` lists, ``release.json`` itself, the signature and, of an export or a
    corpus, the files that its own description lists, with the description.
    """
    manifest, kind = bundle.read_manifest(place)
    names = {*manifest.within(kind), bundle.NAME}
    if kind in ("export", "corpus"):
        description = generated if kind == "corpus" else exported  # modules that read corpus.json and export.json
        names |= {*description.read_description(place)["files"], description.NAME}
    if (place / SIGNATURE).exists():
        names.add(SIGNATURE)
    return sorted(names)


def _upload(place: pathlib.Path, repository: str, kind: str, names: list[str], *, is_public: bool) -> str:
    """Upload the named files, and return the address of the repository.

    Args:
        place: directory that holds the files.
        repository: ``NAMESPACE/NAME``.
        kind: ``model`` or ``dataset``.
        names: files, relative to ``place``.
        is_public: make a new repository public.

    Raises:
        ConfigError: if there is no token, or the repository holds files that are not ours.
        PrivtrainError: if the hub refused, with the reason in words.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    if huggingface_hub.get_token() is None:
        raise ConfigError([Fault("HF_TOKEN", "no token of the hub on this machine; set it, or run: hf auth login")])
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, repo_type=kind, private=not is_public, exist_ok=True)
        existing = set(api.list_repo_files(repository, repo_type=kind))
        foreign = sorted(existing - set(names) - set(_OF_THE_HUB))
        if foreign:
            problem = (
                f"{repository} holds files that are no part of this ({', '.join(foreign[:3])}); with them it would "
                "not verify. Remove them there, or choose another repository"
            )
            raise ConfigError([Fault("REPOSITORY", problem)])
        say(f"uploading {len(names)} files to {repository}")
        done: Any = api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=str(place),
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload with privtrain",
        )
    except (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, httpx.HTTPError, OSError) as error:
        response = getattr(error, "response", None)  # errors of the connection have none
        status: Any = getattr(response, "status_code", None)
        reasons = {401: "the token is not valid", 403: "the token may not write there", 404: "no such namespace"}
        if status in reasons:
            reason = reasons[status]
        elif isinstance(error, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE is set"
        else:  # the error itself is not shown: its text may quote the request
            reason = type(error).__name__ + ("" if status is None else f", status {status}")
        raise PrivtrainError(f"the hub did not take {repository}: {reason}; mend it and push again") from None
    return str(getattr(done, "repo_url", "") or f"{repository} ({kind})")
