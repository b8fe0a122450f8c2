"""Invariant 5: everything random is a pure function of a 256-bit secret that never shows itself."""

from __future__ import annotations

import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

from privtrain.errors import GuaranteeLost
from privtrain.privacy.secret import SecretKey, pseudonym
from privtrain.run.directory import RunDirectory


def test_a_key_never_prints_or_pickles_itself():
    key = SecretKey.generate()
    assert key.reveal().hex() not in repr(key) + str(key) + f"{key!r}"
    with pytest.raises(TypeError):
        pickle.dumps(key)


def test_fresh_keys_come_from_the_operating_system_and_differ():
    assert len({SecretKey.generate().reveal() for _ in range(50)}) == 50


def test_streams_differ_by_purpose_and_context():
    key = SecretKey.insecure(0, "x")
    contexts = [("a",), ("a", 1), ("a", "1"), ("a", 1, 1), ("a", 11), ("b", 1)]
    assert len({key.derive(*context) for context in contexts}) == len(contexts)


def test_uniforms_and_normals_have_their_law():
    stream = SecretKey.insecure(0, "law").stream("test")
    uniforms = stream.uniform(200_000)
    assert 0 < uniforms.min() < uniforms.max() < 1
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-3
    assert stats.kstest(stream.standard_normal(200_000), "norm").pvalue > 1e-3


@hypothesis.given(population=st.integers(0, 200), count=st.integers(0, 50), seed=st.integers(0, 5))
def test_choose_gives_distinct_indices(population, count, seed):
    chosen = SecretKey.insecure(seed, "c").stream("test").choose(population, count)
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(population, count)
    assert all(0 <= index < population for index in chosen)


def test_choose_is_uniform():
    counts = np.zeros(6)
    for step in range(3000):
        counts[SecretKey.insecure(0, "u").stream("test", step).choose(6, 2)] += 1
    assert stats.chisquare(counts).pvalue > 1e-3


def test_keys_are_stored_for_the_owner_alone(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    key = run.create_key("root")
    assert run.load_key("root").reveal() == key.reveal()
    assert (run.secret / "root.key").stat().st_mode & 0o777 == 0o600
    assert run.secret.stat().st_mode & 0o777 == 0o700


def test_pseudonyms_need_the_key():
    a, b = SecretKey.generate(), SecretKey.generate()
    assert pseudonym(a, "alice") == pseudonym(a, "alice") != pseudonym(b, "alice")
    assert "alice" not in pseudonym(a, "alice")


def test_a_lost_key_is_never_replaced_by_another(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    with pytest.raises(GuaranteeLost, match="missing or damaged"):
        run.load_key("generation-0000")
    (run.secret / "root.key").touch(mode=0o600)
    (run.secret / "root.key").write_text("short")
    with pytest.raises(GuaranteeLost, match="missing or damaged"):
        run.load_key("root")
