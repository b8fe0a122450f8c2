"""What a base in parts cannot do is refused by name, before any weight is made."""

from __future__ import annotations

import pytest
import torch

from privtrain.config import validate
from privtrain.errors import ConfigError
from privtrain.models.weights import BaseSource
from privtrain.training import network


def source_of(tree) -> BaseSource:
    config = validate(tree)
    return BaseSource(config.model, torch.float32, method=config.training.method, lora=config.lora)


@pytest.mark.parametrize(
    "lora", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"use_dora": True, "modules_to_save": ["lm_head"]}]
)
def test_adapters_that_read_base_weights_are_refused_by_name(tree, lora):
    tree["lora"] |= lora
    with pytest.raises(ConfigError, match=r"sharded over ranks \(ZeRO-3, FSDP2\)") as refused:
        source_of(tree).empty()
    assert {fault.path for fault in refused.value.faults} == {f"lora.{key}" for key in lora}
    assert source_of(tree).whole() is not None, "a whole base may have them"


def test_keys_of_an_unused_method_are_not_refused(tree):
    tree["lora"] |= {"use_dora": True, "modules_to_save": ["lm_head"]}
    tree["training"]["method"] = "full"
    with torch.device("meta"):
        assert source_of(tree).empty() is not None


def test_a_job_hands_its_adapter_settings_to_the_backend(tree):
    """Else there would be nothing to refuse."""
    tree["lora"] |= {"use_dora": True}

    class Backend:
        device = torch.device("cpu")

        def load_base(self, source):
            source.empty()

    with pytest.raises(ConfigError, match=r"lora\.use_dora"):
        network._trainable_model(validate(tree), "fp32", Backend(), 0)
