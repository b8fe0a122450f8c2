"""Configuration: the tree (:mod:`schema`) and how it is read (:mod:`load`)."""

from privtrain.config.load import load_config, to_yaml, validate
from privtrain.config.schema import Config

__all__ = ["Config", "load_config", "to_yaml", "validate"]
