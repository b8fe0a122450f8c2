"""Checkpoints: whole or not at all, verified before use, and never held in memory in serialised form."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tracemalloc

import pytest
import torch
from torch import nn

from privtrain.backends import LocalBackend
from privtrain.errors import GuaranteeLost
from privtrain.job import checkpoint
from privtrain.privacy.layout import Layout


def trained(seed: int, width: int = 5):
    torch.manual_seed(seed)
    model = nn.Linear(width, width)
    layout = Layout.of(model)
    optimizer = torch.optim.AdamW(list(layout.parameters.values()), lr=0.1)
    model(torch.ones(2, width)).square().sum().backward()
    optimizer.step()
    return layout, optimizer


def save(directory, step=3, backend=None, of=None):
    layout, optimizer = of or trained(0)
    checkpoint.save(
        directory,
        step=step,
        generation=1,
        commitment="c0",
        layout=layout,
        optimizer=optimizer,
        clipping_norm=0.7,
        num_kept=2,
        backend=backend or LocalBackend(torch.device("cpu")),
    )
    return layout, optimizer


def test_what_was_saved_comes_back_bit_by_bit(tmp_path):
    layout, optimizer = save(tmp_path)
    other_layout, other_optimizer = trained(1)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert (found.step, found.generation, found.commitment) == (3, 1, "c0")
    norm = checkpoint.restore(found.state, other_layout, other_optimizer, LocalBackend(torch.device("cpu")))
    assert norm == 0.7
    for name, parameter in layout.parameters.items():
        other = other_layout.parameters[name]
        assert torch.equal(parameter, other)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[parameter][key], other_optimizer.state[other][key])
    assert (found.state.stat().st_mode & 0o777) == 0o600


def test_the_checksum_is_of_the_file(tmp_path):
    save(tmp_path)
    directory = tmp_path / "step-00000003"
    sha256 = json.loads((directory / "summary.json").read_text())["sha256"]
    assert hashlib.sha256((directory / "state.pt").read_bytes()).hexdigest() == sha256


def test_no_serialised_copy_is_made_in_memory(tmp_path):
    """12 bytes a parameter are there anyway: values and two moments."""
    layout, optimizer = trained(0, width=1000)
    num_bytes = 12 * sum(p.numel() for p in layout.parameters.values())
    tracemalloc.start()
    try:
        save(tmp_path, of=(layout, optimizer))
        assert checkpoint.load_newest(tmp_path) is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "step-00000003" / "state.pt").stat().st_size > num_bytes
    assert peak < 0.1 * num_bytes


@pytest.mark.parametrize(
    "summary",
    ["", "{", "[]", "null", "3", '"text"', "{}", '{"step": 4}', "no step", "no generation", "no sha256", "text step"],
)
def test_damaged_summary_falls_back_to_older_checkpoint(tmp_path, summary, capsys):
    save(tmp_path, step=3)
    save(tmp_path, step=4)
    path = tmp_path / "step-00000004" / "summary.json"
    if " " in summary and not summary.startswith("{"):
        kind, key = summary.split()
        content = json.loads(path.read_text())
        del content[key]
        summary = json.dumps(content | ({key: "4"} if kind == "text" else {}))
    path.write_text(summary)
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert "is damaged" in " ".join(capsys.readouterr().out.split())


def test_a_cut_state_is_passed_over(tmp_path):
    save(tmp_path)
    os.truncate(tmp_path / "step-00000003" / "state.pt", 100)
    assert checkpoint.load_newest(tmp_path) is None


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path):
    layout, optimizer = save(tmp_path)
    path = tmp_path / "step-00000003" / "state.pt"
    content = torch.load(path, weights_only=True)
    del content["clipping_norm"]
    torch.save(content, path)
    with pytest.raises(GuaranteeLost, match=r"step-00000003 .*another version.*clipping_norm"):
        checkpoint.restore(path, layout, optimizer, LocalBackend(torch.device("cpu")))


def test_a_full_disk_is_told_as_such(tmp_path, monkeypatch):
    """torch's own message is about positions in the file."""
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(checkpoint.os, "fdopen", lambda descriptor, _: _Closing(descriptor, full))
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path)


class _Closing(contextlib.AbstractContextManager):
    """A file on a full disk in place of the one that was opened."""

    def __init__(self, descriptor, full):
        os.close(descriptor)
        self._full = full

    def __enter__(self):
        return self._full

    def __exit__(self, *_):
        return None


class Alone(LocalBackend):
    """Tells whether files changed while rank 0 was not alone."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.is_alone = False

    @contextlib.contextmanager
    def main_alone(self):
        self.is_alone = True
        yield
        self.is_alone = False


def test_checkpoint_is_written_while_others_wait(tmp_path, monkeypatch):
    backend, original = Alone(), torch.save
    alone = []
    monkeypatch.setattr(torch, "save", lambda *a: (alone.append(backend.is_alone), original(*a)))
    monkeypatch.setattr(
        checkpoint,
        "replace_directory",
        lambda source, target, replace=checkpoint.replace_directory: (
            alone.append(backend.is_alone),
            replace(source, target),
        ),
    )
    save(tmp_path, backend=backend)
    assert alone == [True, True]
