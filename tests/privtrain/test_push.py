"""privtrain push: the verified files and no other, to a hub that is played by a fake; the token is nowhere."""

from __future__ import annotations

import json
import re
import shutil

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import HfHubHTTPError
from safetensors import safe_open
from typer.testing import CliRunner

from privtrain.cli import app
from privtrain.commands.export import export_run
from privtrain.commands.generate import GenerateOptions, generate
from privtrain.commands.push import push
from privtrain.commands.verify import verify_directory
from privtrain.errors import ConfigError, PrivtrainError, VerificationFailed
from privtrain.job.train import train
from tests.conftest import write_config

TOKEN = "hf_secret_word_of_a_test"


class Hub:
    """Keeps what is uploaded, by the client's own signatures."""

    def __init__(self):
        self.calls, self.files, self.error = [], [], None

    def client(self):
        return self

    def create_repo(self, repository, *, repo_type, private, exist_ok):
        if self.error:
            raise self.error
        self.calls.append((repository, repo_type, private, exist_ok))

    def list_repo_files(self, repository, *, repo_type):
        return [".gitattributes", *self.files]

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        import fnmatch
        import pathlib

        places = [path for path in pathlib.Path(folder_path).rglob("*") if path.is_file()]
        names = [path.relative_to(folder_path).as_posix() for path in places]
        self.files = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        self.folder = pathlib.Path(folder_path)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", found.client)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    return found


@pytest.fixture
def finished(released_run, tmp_path):
    return shutil.copytree(released_run, tmp_path / "runs" / "tiny")


def downloaded(hub, tmp_path):
    """What somebody has who takes everything from the hub."""
    copy = tmp_path / "downloaded"
    shutil.rmtree(copy, ignore_errors=True)
    for name in hub.files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub.folder / name, copy / name)
    return copy


@pytest.mark.parametrize("what", ["run", "adapter", "merged", "corpus"])
def test_upload_verifies_where_it_is_taken_from_the_hub(hub, finished, tmp_path, what):
    directory = {"run": finished, "adapter": finished / "adapter"}.get(what, tmp_path / what)
    if what == "merged":
        export_run(finished, directory, merge=True, dtype="fp32")
    if what == "corpus":
        generate(finished, directory, GenerateOptions(num_texts=3))
    (directory / "LICENSE").write_text("harmless, and no part of the release")
    done = CliRunner().invoke(app, ["push", str(directory), "me/tiny"])
    assert done.exit_code == 0, (done.output, done.exception)
    assert hub.calls == [("me/tiny", "dataset" if what == "corpus" else "model", True, True)]
    assert "LICENSE" not in hub.files
    found = verify_directory(downloaded(hub, tmp_path))
    assert f"--digest {found.release_digest}" in done.output
    assert not [name for name in hub.files if "secret" in name or "checkpoint" in name]
    assert TOKEN not in done.output


def test_nothing_is_sent_of_what_does_not_verify(hub, finished):
    with open(finished / "adapter" / "README.md", "a") as file:
        file.write("ε is 0.1")
    with pytest.raises(VerificationFailed):
        push(finished, "me/tiny")
    assert hub.calls == []


def test_what_is_not_private_needs_consent(hub, tree, tmp_path, no_self_test):
    tree["privacy"]["num_steps"] = 1
    train(write_config(tree, tmp_path / "c.yaml"))
    run = tmp_path / "runs" / "tiny"
    with pytest.raises(ConfigError, match=r"is not private \(.*insecure_seed.*--not-private"):
        push(run, "me/tiny")
    assert hub.calls == []
    push(run, "me/tiny", is_consented=True, is_public=True)
    assert hub.calls == [("me/tiny", "model", False, True)]


@pytest.mark.parametrize("name", ["tiny", "me/", "me/a b", "me/x/y", "../x", ""])
def test_repository_that_is_no_name_is_refused(hub, finished, name):
    with pytest.raises(ConfigError, match=r"REPOSITORY: given .*NAMESPACE/NAME"):
        push(finished, name)


def test_files_of_others_in_the_repository_are_not_mixed_in(hub, finished):
    hub.files = ["adapter_model.bin"]
    with pytest.raises(ConfigError, match=r"holds files that are no part of this \(adapter_model.bin\)"):
        push(finished, "me/tiny")


def test_missing_token_and_refusals_are_named_and_tell_no_token(hub, finished, monkeypatch):
    import httpx

    for status, words in ((403, "may not write there"), (500, "status 500")):
        response = httpx.Response(status, request=httpx.Request("POST", f"https://hub/{TOKEN}"))
        hub.error = HfHubHTTPError(f"denied for {TOKEN}", response=response)
        with pytest.raises(PrivtrainError, match=words) as caught:
            push(finished, "me/tiny")
        assert TOKEN not in str(caught.value)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ConfigError, match="HF_TOKEN: no token of the hub"):
        push(finished, "me/tiny")


def test_card_has_the_metadata_that_hub_pages_read(tree, tmp_path, no_self_test):
    """Checked by the hub's own reader: task, results on public rows, no path of this machine."""
    rows = [{"text": f"a public text number {number}"} for number in range(4)]
    (tmp_path / "public.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree["data"]["evaluation"] = {"kind": "files", "paths": [str(tmp_path / "public.jsonl")]}
    tree["privacy"]["num_steps"] = 1
    train(write_config(tree, tmp_path / "c.yaml"))
    card = (tmp_path / "runs" / "tiny" / "adapter" / "README.md").read_text("utf-8")
    data = huggingface_hub.ModelCard(card, ignore_metadata_errors=False).data
    assert data.pipeline_tag == "text-generation"
    assert data.library_name == "peft"
    metrics = {result.metric_type: result.metric_value for result in data.eval_results or ()}
    last = [json.loads(line) for line in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()][-1]
    assert metrics == {name: pytest.approx(last[f"eval/{name}"], abs=1e-6) for name in ("loss", "perplexity")}
    front = re.match(r"---\n(.*?)\n---\n", card, re.S)
    assert front is not None
    assert str(tmp_path) not in front[1]
    assert yaml.safe_load(front[1])["model-index"][0]["name"] == "tiny"
    verify_directory(tmp_path / "runs" / "tiny")


def test_adapter_is_in_the_form_that_vllm_reads(finished):
    """Field by field, after vllm/lora/peft_helper.py and lora_model.py: names, types, shapes, and nothing unknown."""
    adapter = finished / "adapter"
    settings = json.loads((adapter / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert isinstance(settings["r"], int)
    assert isinstance(settings["lora_alpha"], int)
    assert isinstance(settings["target_modules"], list)
    assert settings["bias"] == "none"
    assert settings.get("modules_to_save") is None
    assert settings["use_dora"] is False
    assert settings["use_rslora"] is False
    assert not settings.get("rank_pattern")
    assert not settings.get("alpha_pattern")
    name = re.compile(r"base_model\.model\.(model\.layers\.\d+\.\w+\.(\w+))\.lora_(A|B)\.weight")
    with safe_open(str(adapter / "adapter_model.safetensors"), "pt") as file:
        found = {key: file.get_slice(key).get_shape() for key in list(file.keys())}
    seen = set()
    for key, shape in found.items():
        match = name.fullmatch(key)
        assert match is not None, key
        assert match[2] in settings["target_modules"]
        assert shape[0 if match[3] == "A" else 1] == settings["r"], key
        seen.add((match[1], match[3]))
    assert {part for part, _ in seen} == {part for part, side in seen if side == "B"}
    assert not (adapter / "new_embeddings.safetensors").exists()
    assert json.loads((adapter / "tokenizer_config.json").read_text())
