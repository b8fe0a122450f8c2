"""Everything that can be wrong with a valid config, seen before any weight is loaded."""

from __future__ import annotations

import importlib.util
import os

from privtrain.config import Config
from privtrain.data.corpus import check_source
from privtrain.errors import ConfigError, Fault
from privtrain.model_files import check_model
from privtrain.signing import Keys, password_from_environment, signing_faults


def check_inputs(config: Config) -> None:
    """Look for the model, the data files and their columns, and the key that will sign; rank 0 alone needs that.

    Raises:
        ConfigError: with every fault.
    """
    faults = check_model(config.model) + check_source(config.data)
    if config.tracking.tensorboard and importlib.util.find_spec("tensorboard") is None:
        faults.append(Fault("tracking.tensorboard", "is not installed: pip install tensorboard"))
    keys = Keys.of(config.release)
    if keys is not None and os.environ.get("RANK", "0") == "0":
        names = ("release.signing_key", "release.signing_certificate", "release.signing_chain")
        faults += signing_faults(keys, password_from_environment(), names)
    if faults:
        raise ConfigError(faults)
