"""Configuration: the tree (:mod:`schema`) and how it is read (:mod:`load`)."""

from privtrain.config.load import load_config, public_tree, to_yaml, validate
from privtrain.config.schema import Config

__all__ = ["Config", "load_config", "public_tree", "to_yaml", "validate"]
