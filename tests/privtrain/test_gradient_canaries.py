"""Units whose update is a random direction: clipped, sampled and written down as every unit; kept sums stay secret."""

from __future__ import annotations

import json
import stat
from typing import Any

import numpy as np
import pytest
import torch

from privtrain.backends import Placement
from privtrain.clipping import exact_sum
from privtrain.data.canaries import GRADIENT, Canary
from privtrain.data.directions import BLOCK, RAW_NORM, blocks, signs
from privtrain.data.units import UnitData
from privtrain.errors import ConfigError
from privtrain.job import noised_sums
from privtrain.job import train as job
from privtrain.job.train import train
from privtrain.ledger.log import verify_chain
from privtrain.privacy.layout import Layout
from privtrain.privacy.sampling import DrawnUnit
from privtrain.privacy.secret import SecretKey
from privtrain.run.directory import RunDirectory
from privtrain.training.gradient_canaries import GradientCanaries, check_placement
from tests import jobs
from tests.conftest import write_config
from tests.privtrain.interrupted import Killed
from tests.privtrain.models_for_tests import make_clipper, tiny_lora
from tests.privtrain.test_cooperative import LoneShards

pytestmark = pytest.mark.usefixtures("no_self_test")

KEY = SecretKey.insecure(3, "root")
CANARY = Canary("canary-1", GRADIENT, "", "x", 1, ("x",))


def canaries_of(owners):
    units = UnitData(owners, ((),) * len(owners), None, owners=owners)
    return GradientCanaries(KEY, [CANARY, Canary("canary-2", GRADIENT, "", "x", 1, ("x",))], units)


def added(tiny_llama, users, style="flat", clipping_norm=0.5):
    model, layout = tiny_lora(tiny_llama)
    clipper = make_clipper(model, layout, clipping_norm, style=style)
    clipper.reset()
    canaries_of(["canary-1", "canary-2"]).add(clipper, users)
    return exact_sum.as_float32(clipper.finish(), clipper.grid_exponent).double(), layout, clipper


@pytest.mark.parametrize("style", ["flat", "per_layer", "automatic"])
def test_canary_moves_the_sum_by_the_clipping_norm_at_most(tiny_llama, style):
    """Its raw update is ten times longer: only the clipper's own factor brings it down."""
    total, _, clipper = added(tiny_llama, ["canary-1"], style)
    assert 0.99 * 0.5 < float(total.norm()) <= 0.5 * (1 + 1e-5)
    assert clipper.diagnostics.num_units == clipper.diagnostics.num_clipped == 1
    assert clipper.diagnostics.unit_losses == {}


def test_without_clipping_a_canary_stands_out(tiny_llama, monkeypatch):
    """The mutant: every factor is 1."""
    from privtrain.clipping import styles

    monkeypatch.setattr(styles, "factors", lambda style, norms, norm: torch.ones_like(norms))
    total, _, _ = added(tiny_llama, ["canary-1"])
    assert float(total.norm()) == pytest.approx(RAW_NORM * 0.5, rel=1e-5)


def test_direction_is_the_keys_and_sums_add_over_ranks(tiny_llama):
    both, layout, _ = added(tiny_llama, ["canary-1", "canary-2"])
    one, other = (added(tiny_llama, [user])[0] for user in ("canary-1", "canary-2"))
    torch.testing.assert_close(both, one + other, rtol=0, atol=1e-9)
    drawn = [
        signs(KEY, "canary-1", slot.name, number, num)
        for slot in layout.slots
        for number, _, num in blocks(slot.num_coordinates)
    ]
    direction = torch.from_numpy(np.concatenate(drawn)).double() / layout.num_coordinates**0.5
    assert float(direction @ one) == pytest.approx(0.5, rel=1e-6)
    assert abs(float(direction @ other)) < 5 * 0.5 / layout.num_coordinates**0.5


def test_signs_are_fair_independent_and_cut_into_blocks():
    one, other = (signs(KEY, "u", "t", block, BLOCK).astype(float) for block in (0, 1))
    for values in (one, other, one * other, one * signs(KEY, "v", "t", 0, BLOCK)):
        assert abs(values.mean()) < 5 / BLOCK**0.5
    assert np.array_equal(signs(KEY, "u", "t", 0, 100), one[:100].astype(np.int8))
    assert blocks(BLOCK + 3) == [(0, 0, BLOCK), (1, BLOCK, 3)]


def test_canaries_are_taken_from_the_drawn_units_and_nobody_else():
    rows, users = canaries_of(["a", "canary-2", "b"]).apart([DrawnUnit(n, (0,)) for n in (2, 1, 0)])
    assert ([unit.unit for unit in rows], users) == ([2, 0], ["canary-2"])


def test_records_that_count_as_units_add_the_direction_each(tiny_llama):
    """The mutant that ignores k: the sum moves by as many clipping norms as the canary has records."""
    _, users = canaries_of(["canary-1"]).apart([DrawnUnit(0, (0,)), DrawnUnit(0, (1,))])
    (once, _, _), (twice, _, _) = added(tiny_llama, users[:1]), added(tiny_llama, users)
    torch.testing.assert_close(twice, 2 * once, rtol=0, atol=1e-9)
    assert canaries_of(["canary-1"]).apart([DrawnUnit(0, (0, 1))])[1] == ["canary-1"]


def test_sharded_sums_are_refused_by_key():
    parameter = torch.nn.Parameter(torch.zeros(4))
    noised_sums.check_whole(Layout({"w": parameter}))
    with pytest.raises(ConfigError, match=r"audit\.keep_noised_sums"):
        noised_sums.check_whole(Layout({"w": parameter}, {"w": (4, (8,))}))


def test_directions_are_refused_on_sharded_gradients():
    """The whole sum is on the rank, the clipper is cooperative all the same."""
    layout = Layout({"w": torch.nn.Parameter(torch.zeros(4))})
    noised_sums.check_whole(layout)
    shards: Any = LoneShards(layout)
    sharded = Placement(layout, layout, 0, 1, shards=shards)
    with pytest.raises(ConfigError, match=r"canaries\.num_gradient_users.*launch with ddp"):
        check_placement(3, sharded)
    check_placement(0, sharded)
    check_placement(3, Placement(layout, layout, 0, 1))


def test_a_job_asks_before_its_first_step(tree, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "check_placement", lambda num, placement: seen.append((num, placement.shards)))
    monkeypatch.setattr(job, "_self_test", lambda *_: seen.append("self-test") or 1 / 0)
    tree["canaries"], tree["audit"] = {"num_gradient_users": 3}, {"keep_noised_sums": True}
    with pytest.raises(ZeroDivisionError):
        train(write_config(tree, tmp_path / "c.yaml"))
    assert seen == [(3, None), "self-test"]


def test_directions_without_sums_are_refused(tree, tmp_path):
    tree["canaries"] = {"num_gradient_users": 3}
    with pytest.raises(ConfigError, match="keep_noised_sums: true"):
        train(write_config(tree, tmp_path / "c.yaml"))


@pytest.fixture
def kept_run(tree, tmp_path):
    tree["canaries"] = {"num_gradient_users": 12}
    tree["audit"] = {"keep_noised_sums": True}
    train(write_config(tree, tmp_path / "c.yaml"))
    return RunDirectory(tmp_path / "runs" / "tiny")


def test_noised_sums_are_kept_for_the_owner_alone(kept_run):
    assert stat.S_IMODE(kept_run.noised_sums.stat().st_mode) == 0o700
    files = sorted(kept_run.noised_sums.iterdir())
    assert [path.name for path in files] == ["index.json", *(f"step-{n:06d}.npy" for n in range(4))]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    published = [path for path in kept_run.root.rglob("*") if path.is_file() and kept_run.secret not in path.parents]
    assert not [path for path in published if path.suffix == ".npy" or "noised_sums" in path.parts]
    used = json.loads(kept_run.used.read_text())["canaries"]
    assert len(used) == 12
    assert sum(facts["num_drawn"] for facts in used.values()) > 0, "sampled and written to the ledger like any user"


def test_nothing_is_kept_unless_asked(tree, tmp_path):
    train(write_config(tree, tmp_path / "c.yaml"))
    assert not (tmp_path / "runs" / "tiny" / "secret" / "noised_sums").exists()


def killed_before_writing(config, run, last: int, monkeypatch) -> bytes:
    """Train until a step's sum is handed over and not yet written; return the file that it would have been."""
    keep = noised_sums.NoisedSums.keep

    def kept(self, step, vector, clipping_norm):
        keep(self, step, vector, clipping_norm)
        assert (0, step) in verify_chain(run.ledger).commits, "nothing leaves the job before the commit is on disk"
        if step == last:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(noised_sums.NoisedSums, "keep", kept)
        with pytest.raises(Killed):
            train(config)
    content = run.noised_sum(last).read_bytes()
    run.noised_sum(last).unlink()
    return content


@pytest.fixture
def keeping(tree, tmp_path):
    tree["audit"] = {"keep_noised_sums": True}
    return write_config(tree, tmp_path / "c.yaml"), RunDirectory(tmp_path / "runs" / "tiny")


@pytest.mark.parametrize("last", [2, 3])
def test_replay_mends_crash_between_commit_and_file(keeping, monkeypatch, last):
    config, run = keeping
    content = killed_before_writing(config, run, last, monkeypatch)
    train(config)
    assert run.noised_sum(last).read_bytes() == content
    assert [step for step, _ in sealed_steps(run)] == [0, 1, 2, 3]


def test_sums_of_steps_that_were_given_up_are_not_sealed(keeping, monkeypatch):
    """A new environment: step 2 begins again from the checkpoint at 2, and none is left for step 3."""
    config, run = keeping
    killed_before_writing(config, run, 3, monkeypatch)
    assert run.noised_sum(2).exists()
    monkeypatch.setattr(job, "environment_digest", lambda *_, **__: bytes(32))
    train(config)
    assert verify_chain(run.ledger).generation == 1
    assert [step for step, _ in sealed_steps(run)] == [0, 1]
    assert not run.noised_sum(2).exists()


def sealed_steps(run):
    return json.loads((run.noised_sums / "index.json").read_text())["steps"]


@pytest.mark.dist
def test_two_ranks_keep_the_same_sums_as_one(tree, tmp_path):
    """Canaries are dealt to ranks; the exact sum and its noise do not know how."""
    tree["canaries"], tree["audit"] = {"num_gradient_users": 12}, {"keep_noised_sums": True}
    runs = []
    for name in ("one", "two"):
        tree["run"]["name"] = name
        config = write_config(tree, tmp_path / f"{name}.yaml")
        if name == "one":
            train(config)
        else:
            done = jobs.run("privtrain", "train", config)
            assert done.returncode == 0, done.output[-3000:]
        runs.append(RunDirectory(tmp_path / "runs" / name))
    first, second = ([np.load(run.noised_sum(step)) for step in range(4)] for run in runs)
    for one, two in zip(first, second, strict=True):
        assert one.any()
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-4 * np.abs(one).max())
