"""Settings for the whole suite: eight fake devices, strict dtypes, no rank promotion."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

# Shape annotations are executed under pytest only.
install_import_hook(("empg_jax.algorithms", "empg_jax.models", "empg_jax.learner"), "beartype.beartype")

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
