"""Everything that can be wrong with a valid config, seen before any weight is loaded."""

from __future__ import annotations

import importlib.util

from privtrain.config import Config
from privtrain.data.corpus import check_source
from privtrain.errors import ConfigError, Fault
from privtrain.models.files import check_model


def check_inputs(config: Config) -> None:
    """Look for the model, the data files and their columns.

    Raises:
        ConfigError: with every fault.
    """
    faults = check_model(config.model) + check_source(config.data)
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        faults.append(Fault("tracking.tensorboard", "is not installed: pip install tensorboard"))
    if faults:
        raise ConfigError(faults)
