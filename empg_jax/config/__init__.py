"""The configuration: one strict object from a YAML file and dotted overrides."""

from empg_jax.config.load import Config as Config
from empg_jax.config.load import check_resumable as check_resumable
from empg_jax.config.load import describe as describe
from empg_jax.config.load import load_config as load_config
