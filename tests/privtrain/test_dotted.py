"""Dotted keys have one meaning on the command line, in Python, in studies and in translations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privtrain import api
from privtrain.config.dotted import assigned, place_of
from privtrain.config.load import apply_overrides, layered
from privtrain.errors import ConfigError

NAMES = st.sampled_from(["a", "b", "c"])
KEYS = st.lists(NAMES, min_size=1, max_size=4).map(".".join)


@given(st.dictionaries(KEYS, st.integers(), max_size=5), KEYS)
def test_keys_mean_the_same_in_python_and_on_the_command_line(values, other):
    """Both walk as deep as the key is long, fault by fault, and neither changes the tree that it is given."""

    def outcome(function, given):
        tree = {"a": {"b": None, "c": 1}, "b": {}}
        try:
            found = function(tree, given)
        except ConfigError as error:
            found = [(fault.path, fault.problem) for fault in error.faults]
        assert tree == {"a": {"b": None, "c": 1}, "b": {}}
        return found

    by_line = outcome(apply_overrides, [f"{key}={value}" for key, value in values.items()])
    assert outcome(assigned, values) == by_line


def test_settings_in_python_reach_every_level(tree):
    settings = {
        "data.source.paths": ["x.jsonl"],
        "privacy.noised_metrics.release": ["loss"],
        "data.evaluation.kind": "files",
        "data.evaluation.paths": ["public.jsonl"],
    }
    config = api._config(tree, settings)
    again = api._config(config, {"privacy.noised_metrics.noise": 5.0})
    assert [str(path) for path in config.data.source.paths] == ["x.jsonl"]
    assert config.data.evaluation.kind == "files"
    assert config.privacy.noised_metrics.release == ["loss"]
    assert again.privacy.noised_metrics.noise == 5.0
    assert again.privacy.noised_metrics.release == ["loss"]


@pytest.mark.parametrize("key", ["", ".", "a.", ".a", "a..b"])
def test_empty_names_are_refused_by_key(key):
    with pytest.raises(ConfigError, match=r"section\.key"):
        assigned({}, {key: 1})
    with pytest.raises(ValueError, match="not a section"):
        place_of({"a": 1}, "a.b")


def test_every_wrong_setting_is_named_at_once(tree):
    with pytest.raises(ConfigError) as caught:
        api._config(tree, {"privacy.num_steps.x": 1, "model..y": 2})
    assert [fault.path for fault in caught.value.faults] == ["privacy.num_steps.x", "model..y"]


def test_later_layers_of_overrides_replace_earlier_ones():
    """What a trial says takes the place of what was said for all; twice in one layer stays twice, and is refused."""
    assert layered(["a.b=1", "a.c=2"], ["a.b=3"], ["a.d=4"]) == ["a.c=2", "a.b=3", "a.d=4"]
    with pytest.raises(ConfigError, match=r"a\.b: given twice"):
        apply_overrides({}, layered(["a.b=0"], ["a.b=1", "a.b=2"]))
